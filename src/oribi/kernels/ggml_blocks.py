"""Weights in the blocks of ggml's quantised types, as GGUF files hold them: dequantised bit for bit as the gguf package does.

A row of a matrix [N, K] is whole blocks, each with its own scales, so that rows can change places without their codes being touched.
A block holds S parts of L values, S L = 32 or, of the types called _K, 256:

    w[s, l] = scale[s] q[s, l] - minimum[s]

d and m are float16. Scales of parts are d, or d times an integer; minima are none, -m, or m times an integer. All products are exact
in float32, the difference is rounded once, and then once more to the output's dtype.

Source: ggml's block_* structs, https://github.com/ggml-org/ggml; the gguf package's `quants`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from oribi.kernels.dispatch import jit, launch, tl, use_triton

# values that the reference decodes at a time: its temporaries stay in a core's cache
_AT_ONCE = 1 << 17
# values of a program of 4 warps
_VALUES = 2048


@dataclass(frozen=True)
class BlockType:
    """How a type's blocks lie.

    Args:
        nbytes: of a block.
        parts, length: S and L.
        bits: of a value's code.
        quants: the byte where the low 4 bits of the codes begin, or the whole codes of 8 bits.
        high: the byte where further bits begin; 0 where there are none.
        zero: subtracted from the codes.
        minimum: whether m follows d.
    """

    nbytes: int
    parts: int
    length: int
    bits: int
    quants: int
    high: int = 0
    zero: int = 0
    minimum: bool = False

    @property
    def values(self) -> int:
        """Of a block."""
        return self.parts * self.length

    @property
    def apart(self) -> int:
        """Values from that in the low half of a byte to that in the high half; of codes of 8 bits, all values."""
        return 32 if self.bits == 8 else {2: 16, 8: 32, 16: 64}[self.parts]

    @property
    def word(self) -> int:
        """Bytes that a kernel loads at a time: blocks of other sizes begin at any even address."""
        return 2 if self.nbytes % 4 else 4

    @property
    def fields(self) -> tuple[int, ...]:
        """What `block_values` asks for."""
        return (
            self.parts, self.length, self.bits, self.quants, self.high, self.zero, self.minimum, self.word, self.apart,
        )  # fmt: skip


BLOCK_TYPES = {
    "Q4_0": BlockType(18, 2, 16, 4, 2, zero=8),
    "Q4_1": BlockType(20, 2, 16, 4, 4, minimum=True),
    "Q5_0": BlockType(22, 2, 16, 5, 6, high=2, zero=16),
    "Q5_1": BlockType(24, 2, 16, 5, 8, high=4, minimum=True),
    "Q8_0": BlockType(34, 2, 16, 8, 2),
    "Q4_K": BlockType(144, 8, 32, 4, 16, minimum=True),
    "Q5_K": BlockType(176, 8, 32, 5, 48, high=16, minimum=True),
    "Q6_K": BlockType(210, 16, 16, 6, 0, high=128, zero=32),
}


@dataclass
class BlockCodes:
    """A matrix in blocks of a ggml type.

    Args:
        shape: (N, K), K a multiple of a block's values.
        kind: a name in `BLOCK_TYPES`.
        codes: [N, K / values * nbytes] uint8, as in the file.
    """

    shape: tuple[int, int]
    kind: str
    codes: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], kind: str) -> "BlockCodes":
        """A matrix without values, on the meta device."""
        size = shape[1] // BLOCK_TYPES[kind].values * BLOCK_TYPES[kind].nbytes
        return cls(shape, kind, torch.empty(shape[0], size, dtype=torch.uint8, device="meta"))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def moved(self, device: torch.device, codes: torch.Tensor) -> "BlockCodes":
        """This matrix with other memory for its codes, which are all that it holds."""
        return replace(self, codes=codes)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        return iter((self.codes,))

    def write(self, out: torch.Tensor) -> None:
        """Writes the values into out [N, K], whose rows may be strided, rounded once to its dtype."""
        write_blocks(self.codes[None], self.kind, out[None])


def write_blocks(
    codes: torch.Tensor, kind: str, out: torch.Tensor, experts: torch.Tensor | None = None
) -> None:
    """Writes the values of matrices of one type, rounded once to the dtype of `out`.

    Args:
        codes: [E, N, bytes of a row] uint8. kind: a name in `BLOCK_TYPES`.
        out: [L, N, K]; rows and matrices may be strided.
        experts: [L] int64, the matrices that are wanted, each any number of times; None takes all in their order.
    """
    if use_triton(codes):
        _launch(codes, kind, out, experts)
        return
    rows = max(1, _AT_ONCE // out.shape[2])
    for place, expert in enumerate(range(len(codes)) if experts is None else experts.tolist()):
        for some, part in zip(codes[expert].split(rows), out[place].split(rows)):
            decode_blocks(some, kind, part)


def _launch(codes: torch.Tensor, kind: str, out: torch.Tensor, experts: torch.Tensor | None) -> None:
    of = BLOCK_TYPES[kind]
    row_blocks = out.shape[2] // of.values
    blocks, count = out.shape[1] * row_blocks, _VALUES // of.values
    codes = codes if codes.data_ptr() % of.word == 0 else codes.clone()
    launch(
        _kernel, len(out) * -(-blocks // count), out, codes, out if experts is None else experts, out.stride(0), out.stride(1),
        row_blocks, blocks, of.nbytes, *of.fields, count, experts is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def decode_blocks(codes: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Writes the values of rows of blocks, on any device.

    Args:
        codes: [N, bytes of a row] uint8. kind: a name in `BLOCK_TYPES`.
        out: [N, K]; rows may be strided.
    """
    of = BLOCK_TYPES[kind]
    blocks = codes.view(len(codes), -1, of.nbytes)
    scale, minimum = _scales(blocks, of)
    values = _codes(blocks, of).float().mul_(scale[..., None])
    if minimum is not None:
        values.sub_(minimum[..., None])
    out.copy_(values.view(out.shape))


def _scales(blocks: torch.Tensor, of: BlockType) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales of the parts, float32 [N, B, S] or [N, B, 1], and minima likewise."""

    def half(first: int) -> torch.Tensor:
        return blocks[..., first : first + 2].contiguous().view(torch.float16).float()

    if of.parts == 2:  # one scale for both halves
        return half(0), -half(2) if of.minimum else None
    if not of.minimum:
        return half(208) * blocks[..., 192:208].contiguous().view(torch.int8), None
    low, middle, high = (
        blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    )  # 4 of 6 bits, 4 of 6 bits, the rest
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=-1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=-1)
    return half(0) * scales, half(2) * minima


def _codes(blocks: torch.Tensor, of: BlockType) -> torch.Tensor:
    """Integers [N, B, S, L], int8 or uint8."""
    packed = blocks[..., of.quants : of.quants + (of.values if of.bits == 8 else of.values // 2)]
    if of.bits == 8:
        return packed.contiguous().view(torch.int8).unflatten(-1, (of.parts, of.length))
    # the low half of a byte is a value of this part, and the high half one of the next, of one so many values further on
    packed = packed.unflatten(-1, (-1, 1, of.apart))
    codes = torch.cat([packed & 15, packed >> 4], dim=-2).flatten(-3)
    if of.bits == 5:
        codes |= _fifth_bits(blocks, of).flatten(-2) << 4
    elif of.bits == 6:
        pairs = blocks[..., of.high : of.high + 64].unflatten(-1, (2, 1, 32))
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
        codes |= (((pairs >> shifts) & 3) << 4).flatten(-3)
    codes = codes.unflatten(-1, (of.parts, of.length))
    return codes.view(torch.int8) - of.zero if of.zero else codes


def _fifth_bits(blocks: torch.Tensor, of: BlockType) -> torch.Tensor:
    """The highest bits of codes of 5, 0 or 1: [N, B, S, 32] of _K types, whose bytes hold one of each part, else [N, B, 4, 8]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    if of.parts == 8:
        return (blocks[..., None, of.high : of.high + 32] >> shifts[:, None]) & 1
    return (blocks[..., of.high : of.high + 4, None] >> shifts) & 1


@jit
def _words(codes, start, byte, inside, WORD: tl.constexpr):
    """Words from a byte of blocks on, as int32. A pointer to words, not to bytes, is what Triton can load 16 bytes of."""
    if WORD == 4:
        words = tl.load(codes.to(tl.pointer_type(tl.int32)) + (start + byte // 4), mask=inside, other=0)
    else:
        words = tl.load(codes.to(tl.pointer_type(tl.uint16)) + (start + byte // 2), mask=inside, other=0).to(
            tl.int32
        )
    return words


@jit
def _half(codes, start, number, inside, WORD: tl.constexpr):
    at = start * (WORD // 2) + number
    return tl.load(codes.to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0.0).to(tl.float32)


@jit
def block_values(
    codes, start, group, inside, PARTS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr, QUANTS: tl.constexpr,
    HIGH: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, WORD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Values of groups of blocks in float32: [A, B, 1 or 2, APART / LENGTH, LENGTH / WORD, WORD / 2, 2].

    A group's codes lie in APART bytes, which are loaded once: of 4 bits and more, the high halves are the codes of so many values
    further on.

    Args:
        codes: pointer to the first block. start: [A, B or 1, 1, 1, 1, 1, 1], the word with which each block begins.
        group: [1, B, 1, 1, 1, 1, 1] in a block. inside: of `start`'s shape: which blocks exist; others are zeros.
        PARTS and all further: as in `BlockType`.
    """
    half = tl.arange(0, 1 if BITS == 8 else 2)[None, None, :, None, None, None, None]
    run = tl.arange(0, APART // LENGTH)[None, None, None, :, None, None, None]
    word = tl.arange(0, LENGTH // WORD)[None, None, None, None, :, None, None]
    pair = tl.arange(0, WORD // 2)[None, None, None, None, None, :, None]
    odd = tl.arange(0, 2)[None, None, None, None, None, None, :]
    part = (group * half.shape[2] + half) * (APART // LENGTH) + run
    # codes from 0, one in each byte of a word; of 4 bits, with others above them
    q = _words(codes, start + group * (APART // WORD) + run * (LENGTH // WORD) + word, QUANTS, inside, WORD)
    if BITS == 8:
        q = q ^ -0x7F7F7F80  # 0x80808080
    else:
        q = q >> (half * 4)
    if BITS == 6:
        high = _words(codes, start + group * (32 // WORD) + run % 2 * (16 // WORD) + word, HIGH, inside, WORD)
        q = (q & 0x0F0F0F0F) | (((high >> (half * 4 + run // 2 * 2)) & 0x03030303) << 4)
    elif BITS == 5 and PARTS == 8:
        high = _words(codes, start + word, HIGH, inside, WORD) >> part
        q = (q & 0x0F0F0F0F) | ((high & 0x01010101) << 4)
    q = q >> (pair * 16)
    if BITS == 5 and PARTS == 2:
        high = _words(codes, start * (WORD // 2) + part, HIGH, inside, 2) >> (word * WORD + 2 * pair)
        q = (q & 0x0F0F) | ((high & 1) << 4) | ((high & 2) << 11)
    # 2^23 + q and 2^23 + 256 q have q among their last bits: GPUs shift and convert integers at half the speed of an addition
    CODE: tl.constexpr = (1 << BITS) - 1
    OFFSET: tl.constexpr = 128 if BITS == 8 else ZERO
    bits = (q & tl.where(odd == 0, CODE, CODE << 8)) | 0x4B000000
    value = bits.to(tl.float32, bitcast=True) - tl.where(
        odd == 0, 8388608.0 + OFFSET, 8388608.0 + 256 * OFFSET
    )
    unit = tl.where(odd == 0, 1.0, 0.00390625)
    if PARTS == 2:
        value *= _half(codes, start, 0, inside, WORD) * unit
        if MINIMUM:
            value += _half(codes, start, 1, inside, WORD)
    elif PARTS == 16:
        at = codes.to(tl.pointer_type(tl.int8)) + (start * WORD + 192 + part)
        scale = tl.load(at, mask=inside, other=0).to(tl.float32)
        value *= _half(codes, start, 104, inside, WORD) * scale * unit
    else:
        shift = part % 4 * 8
        low, middle = _words(codes, start, 4, inside, 4) >> shift, _words(codes, start, 8, inside, 4) >> shift
        high = _words(codes, start, 12, inside, 4) >> shift
        scale = tl.where(part < 4, low & 63, (high & 15) | ((low >> 2) & 48)).to(tl.float32)
        minimum = tl.where(part < 4, middle & 63, ((high >> 4) & 15) | ((middle >> 2) & 48)).to(tl.float32)
        scale = _half(codes, start, 0, inside, WORD) * scale
        value = value * (scale * unit) - _half(codes, start, 1, inside, WORD) * minimum
    return value


@jit
def _kernel(
    out_ptr, codes, experts, expert_stride, row_stride, row_blocks, blocks,
    BYTES: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr, QUANTS: tl.constexpr,
    HIGH: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, WORD: tl.constexpr, APART: tl.constexpr,
    BLOCKS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(blocks, BLOCKS)
    matrix = (tl.program_id(0) // programs).to(tl.int64)
    source = matrix
    if CHOSEN:
        source = tl.load(experts + matrix)
    block = (tl.program_id(0) % programs).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    start = (source * blocks + block) * (BYTES // WORD)
    GROUPS: tl.constexpr = PARTS * LENGTH // (APART if BITS == 8 else 2 * APART)
    value = block_values(
        codes, start[:, None, None, None, None, None, None], tl.arange(0, GROUPS)[None, :, None, None, None, None, None],
        (block < blocks)[:, None, None, None, None, None, None], PARTS, LENGTH, BITS, QUANTS, HIGH, ZERO, MINIMUM, WORD, APART,
    )  # fmt: skip
    row = block // row_blocks
    at = matrix * expert_stride + row * row_stride + (block - row * row_blocks) * (PARTS * LENGTH)
    at = at[:, None] + tl.arange(0, PARTS * LENGTH)[None, :]
    value = tl.reshape(value, [BLOCKS, PARTS * LENGTH]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, value, mask=(block < blocks)[:, None])
