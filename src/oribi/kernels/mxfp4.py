"""MXFP4 weights as a checkpoint stores them: 4-bit floating-point numbers in blocks of 32 that share a power of two.

    w[i] = e2m1[code[i]] 2^(scale[i // 32] - 127)        e2m1 = 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign

A stack is [E, N, K]: E experts, N rows and K columns of each. Two codes share a byte, the earlier in the low half. Every product is
exact in bfloat16 and float32.

Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from oribi.formats.codecs import fp4_pairs
from oribi.kernels.dispatch import jit, launch, tl, use_triton

# values that share a scale
MX_BLOCK = 32
# 4-byte words (8 codes) of a program, as in `nf4`
_WORDS = 512
# rows that the reference decodes at a time: bounds its temporaries
_ROWS = 4096


@dataclass
class MXFP4Stack:
    """MXFP4 codes and scales of a stack.

    Args:
        shape: (E, N, K). parts: matrices that lie one below the other in each expert.
        codes: [E, N, K / 2] uint8. scales: [E, N, K / 32] uint8.
    """

    shape: tuple[int, int, int]
    parts: int
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int], parts: int) -> "MXFP4Stack":
        """A stack without values, on the meta device."""
        *stack, columns = shape
        new = {"dtype": torch.uint8, "device": "meta"}
        return cls(
            shape,
            parts,
            torch.empty(*stack, columns // 2, **new),
            torch.empty(*stack, columns // MX_BLOCK, **new),
        )

    def moved(self, device: torch.device, codes: torch.Tensor) -> "MXFP4Stack":
        """This stack with scales on a device, and with other memory for the codes."""
        return replace(self, codes=codes, scales=self.scales.to(device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        return iter((self.codes, self.scales))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def write(self, out: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        """Writes the weights of some experts [L] int64, or of all, into out [L, N, K]; rows and experts may be strided."""
        if use_triton(self.codes):
            self._launch(out, experts)
            return
        for place, expert in enumerate(range(self.shape[0]) if experts is None else experts.tolist()):
            for first in range(0, self.shape[1], _ROWS):
                rows = slice(first, first + _ROWS)
                out[place, rows] = self._decode(expert, rows)

    def matrix(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """One of the matrices [N / parts, K], counted through all experts."""
        expert, part = divmod(place, self.parts)
        size = self.shape[1] // self.parts
        return self._decode(expert, slice(part * size, (part + 1) * size)).to(dtype)

    def _decode(self, expert: int, rows: slice) -> torch.Tensor:
        return decode_mxfp4(self.codes[expert, rows], self.scales[expert, rows])

    def _launch(self, out: torch.Tensor, experts: torch.Tensor | None) -> None:
        _, rows, columns = self.shape
        words = rows * columns // 8
        launch(
            _kernel, len(out) * -(-words // _WORDS), out, self.codes.view(torch.int32), self.scales,
            out if experts is None else experts, out.stride(0), out.stride(1), words, columns // 8,
            MX_BLOCK // 8, _WORDS, experts is not None, num_warps=4,
        )  # fmt: skip


def from_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., K / 2] and scales [..., K / 32] of rows in ggml's blocks, which have a scale first and 16 values between a byte's halves.

    Args:
        blocks: [..., K / 32 * 17] uint8.

    Source: ggml's block_mxfp4, https://github.com/ggml-org/ggml.
    """
    blocks = blocks.unflatten(-1, (-1, 1 + MX_BLOCK // 2))
    halves = blocks[..., 1:]
    values = torch.cat([halves & 15, halves >> 4], dim=-1)
    return (values[..., ::2] | values[..., 1::2] << 4).flatten(-2), blocks[..., 0]


def decode_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., K] of codes [..., K / 2] and scales [..., K / 32], uint8 each, on any device."""
    values = fp4_pairs(codes).view(*scales.shape, MX_BLOCK)
    bits = torch.where(scales == 0, 0x400000, scales.int() << 23)  # 2^-127 is no normal number
    return (values * bits.view(torch.float32)[..., None]).flatten(-2)


@jit
def _kernel(
    out_ptr, codes, scales, experts, expert_stride, row_stride, words, row_words,
    BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(words, WORDS)
    expert = tl.program_id(0) // programs
    word = tl.program_id(0) % programs * WORDS + tl.arange(0, WORDS)
    inside = word < words
    source = expert.to(tl.int64)
    if CHOSEN:
        source = tl.load(experts + expert)
    code = tl.load(codes + source * words + word, mask=inside, other=0)
    scale = tl.load(scales + source * (words // BLOCK_WORDS) + word // BLOCK_WORDS, mask=inside, other=1)
    scale = scale.to(tl.int32)
    power = tl.where(scale == 0, 0x400000, scale << 23).to(tl.float32, bitcast=True)
    column = tl.arange(0, 8)
    nibble = (code[:, None] >> (column * 4)[None, :]) & 15
    size = nibble & 7
    # from 2 on, a code's upper bits are an exponent and its lowest one is the mantissa
    normal = ((((size >> 1) + 126) << 23) | ((size & 1) << 22)).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    value = tl.where(nibble >= 8, -value, value) * power[:, None]
    row = (word // row_words).to(tl.int64) * row_stride + expert.to(tl.int64) * expert_stride
    at = (row + word % row_words * 8)[:, None] + column[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
