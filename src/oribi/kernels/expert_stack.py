"""The weights of all experts of a layer, packed: what codes of any kind have in common, and those of NF4.

NF4: one stack of matrices, each quantised alone as bitsandbytes does. MXFP4 is in `kernels/mxfp4.py`.

A stack is [E, N, K]: E experts, N rows and K columns of each. An expert holds C matrices of N / C rows one below the other (gate,
then up), and M = E C matrices lie one behind the other. Each is what `kernels/nf4.py` makes of it: codes, scales of blocks of
64 values, and, per matrix, an offset and scales of 256 scales, so that a matrix has the bits of its own tensor in a checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from oribi.kernels.dispatch import jit, launch, tl, use_triton
from oribi.kernels.nf4 import BLOCK, decode
from oribi.kernels.packed_weight import Codes

# 4-byte words (8 codes) of a program, as in `nf4`
_WORDS = 512


class StackCodes(Codes, Protocol):
    """Codes of a stack's frozen weights.

    Args:
        shape: (E, N, K). parts: matrices that lie one below the other in each expert, whose places are counted through all experts.
    """

    shape: tuple[int, int, int]
    parts: int

    def write(self, out: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        """Writes the dense weights of some experts [L] int64, or of all in their order, into out [L, N, K].

        Rows and experts of `out` may be strided. An expert may be wanted any number of times.
        """

    def matrix(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """One of the matrices [N / parts, K], dense."""


@dataclass
class PackedStack:
    """NF4 codes and scales of a stack.

    Args:
        shape: (E, N, K). parts: C, matrices of an expert.
        codes: [M, N K / (2 C)] uint8.
        absmax: [M, blocks] uint8, or float32 where scales are not quantised in turn.
        absmax2: [M, ceil(blocks / 256)] float32. offset: [M] float32. code2: [256] float32; None without double quantisation.
        code: [16] float32, NF4's values.
    """

    shape: tuple[int, int, int]
    parts: int
    codes: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None
    offset: torch.Tensor | None
    code2: torch.Tensor | None
    code: torch.Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], parts: int, double_quant: bool, device: torch.device
    ) -> "PackedStack":
        """A stack whose matrices `put` fills.

        Args:
            shape, parts: as of the stack; K is a multiple of 64.
            double_quant: whether scales are quantised to 8 bits.
        """
        experts, rows, columns = shape
        count = experts * parts
        size = rows // parts * columns
        blocks = size // BLOCK

        def new(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

        return cls(
            shape,
            parts,
            new(count, size // 2, dtype=torch.uint8),
            new(count, blocks, dtype=torch.uint8 if double_quant else torch.float32),
            new(count, -(-blocks // 256)) if double_quant else None,
            new(count) if double_quant else None,
            new(256) if double_quant else None,
            new(16),
        )

    @property
    def nested(self) -> bool:
        """Whether scales are quantised in turn."""
        return self.absmax2 is not None

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        kept = (self.codes, self.absmax, self.absmax2, self.offset, self.code2, self.code)
        return (tensor for tensor in kept if tensor is not None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def moved(self, device: torch.device, codes: torch.Tensor) -> "PackedStack":
        """This stack with scales on a device, and with other memory for the codes."""
        kept = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device) for name, value in kept.items()} | {"codes": codes})

    def put(self, matrix: int, codes: torch.Tensor, state: object) -> None:
        """Stores a packed matrix.

        Args:
            matrix: its place. codes, state: as `nf4.quantize` gives them.
        """
        self.codes[matrix] = codes.view(-1)
        self.absmax[matrix] = state.absmax
        self.code.copy_(state.code)
        if self.nested:
            self.absmax2[matrix] = state.state2.absmax
            self.offset[matrix] = state.offset
            self.code2.copy_(state.state2.code)

    def write(self, out: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        """As of `StackCodes`, with bitsandbytes' bits."""
        if use_triton(self.codes):
            _launch(self, out, experts)
            return
        matrices = slice(None)
        if experts is not None:
            parts = torch.arange(self.parts, device=experts.device)
            matrices = (experts[:, None] * self.parts + parts).view(-1)
        out.copy_(self._dense(matrices, out.dtype).view(out.shape))

    def matrix(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `StackCodes`."""
        return self._dense(slice(place, place + 1), dtype).view(-1, self.shape[2])

    def _dense(self, matrices: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values of some matrices, block by block."""
        scales, codes = _scales(self, matrices).contiguous(), self.codes[matrices].contiguous()
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1), scales.view(-1), BLOCK, "nf4", (scales.numel(), BLOCK), dtype
        )


def dequantize_stack(
    stack: StackCodes,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weights of some experts or of all.

    Args:
        stack: of E experts.
        dtype: bfloat16, float16 or float32.
        out: [L, N, K] in dtype for the result; rows and experts may be strided.
        experts: [L] int64, whose weights are wanted, each any number of times; None takes all in their order.

    Returns:
        [L, N, K].
    """
    if out is None:
        count = stack.shape[0] if experts is None else len(experts)
        out = torch.empty(count, *stack.shape[1:], dtype=dtype, device=next(stack.tensors()).device)
    if len(out):
        stack.write(out, experts)
    return out


def _scales(stack: PackedStack, matrices: slice | torch.Tensor) -> torch.Tensor:
    """float32 scales [m, blocks] of some matrices, each product and sum rounded by itself."""
    absmax = stack.absmax[matrices]
    if not stack.nested:
        return absmax
    scale2 = stack.absmax2[matrices].repeat_interleave(256, dim=1)[:, : absmax.shape[1]]
    return stack.code2[absmax.int()] * scale2 + stack.offset[matrices][:, None]


def _launch(stack: PackedStack, out: torch.Tensor, experts: torch.Tensor | None) -> None:
    _, rows, columns = stack.shape
    rows //= stack.parts
    words = rows * columns // 8
    unread = stack.absmax
    launch(
        _kernel, len(out) * stack.parts * -(-words // _WORDS), out, stack.code, stack.codes, stack.absmax,
        unread if stack.absmax2 is None else stack.absmax2, unread if stack.code2 is None else stack.code2,
        unread if stack.offset is None else stack.offset, out if experts is None else experts,
        out.stride(0), out.stride(1), words, rows, columns // 8, stack.absmax.shape[1],
        1 if stack.absmax2 is None else stack.absmax2.shape[1], stack.parts, BLOCK // 8, _WORDS, stack.nested,
        experts is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@jit
def _kernel(
    out_ptr, lut, codes, absmax, absmax2, code2, offset, experts, expert_stride, row_stride,
    words, rows, row_words, blocks, blocks2,
    PARTS: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr, NESTED: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(words, WORDS)
    place = tl.program_id(0) // programs
    word = tl.program_id(0) % programs * WORDS + tl.arange(0, WORDS)
    inside = word < words
    expert, part = place // PARTS, place % PARTS
    source = expert.to(tl.int64)
    if CHOSEN:
        source = tl.load(experts + expert)
    matrix = source * PARTS + part
    values = decode(
        word, inside, lut, codes + matrix * words * 4, absmax + matrix * blocks, absmax2 + matrix * blocks2, code2,
        offset + matrix, BLOCK_WORDS, NESTED,
    )  # fmt: skip
    row = (part * rows + word // row_words).to(tl.int64) * row_stride + expert.to(tl.int64) * expert_stride
    at = (row + word % row_words * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
