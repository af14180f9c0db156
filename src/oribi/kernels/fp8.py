"""Products of frozen weights in fp8, approximate: x, dy and W are rounded to e4m3; LoRA and biases stay as they are.

    y = s_x s_w e4m3(x / s_x) e4m3(W / s_w)^T + xa (sB)^T      dx = s_dy s_w e4m3(dy / s_dy) e4m3(W / s_w) + dyb A

T tokens, K in features, N out features of a group of linear layers that shares its input; xa, sB, dyb and A as in `lora`.
e4m3 has three bits of mantissa, and 448 is its largest value. s_x and s_dy [T, 1] are a row's largest magnitude / 448,
s_w the largest of the whole group's blocks / 448: as e4m3 is a floating-point format, a finer scale would not round less.
With one scale the copy of W for dx is exactly the transpose of that for y, so dx is the gradient of the y computed.

Matrix units want both operands' rows to run along the sum: W [N, K] for y and W^T [K, N] for dx, made when asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch

from oribi.kernels import nf4
from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton
from oribi.kernels.lora import GroupWeight, Projection, group_shape, lora_layout
from oribi.kernels.lora_expand import expand
from oribi.kernels.lora_pack import pack_factors
from oribi.kernels.packed_weight import dense_weight, weight_shape

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# rows and weights without anything above it count as zeros: the inverse of their scale would overflow
SMALLEST = 2.0**-100
# Hopper's units then add to about 14 bits instead of float32's 24; operands have 4
FAST_ACCUMULATION = True
# of the matrix units: sizes are multiples of it
MULTIPLE = 16
# rows and 4-byte words (8 codes) of a program of 8 warps that decodes weights
_ROWS, _WORDS = 128, 16


def quantize_rows(x: torch.Tensor, codes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in e4m3, each by its own scale.

    Args:
        x: [T, K] in 16 or 32 bit, rows may be strided.
        codes: contiguous [T, K] for the result; in another dtype than e4m3 it takes the quotients, not yet rounded to e4m3.

    Returns:
        codes [T, K], contiguous, and scales [T, 1] float32; 1 for a row of zeros.
    """
    tokens, k = x.shape
    if codes is None:
        codes = torch.empty(tokens, k, dtype=E4M3, device=x.device)
    if not use_triton(x):
        scales = _scale(x.abs().amax(1, keepdim=True).float())
        codes.copy_(x.float() * scales.reciprocal())
        return codes, scales
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = next_power_of_2(k)
    if tokens:
        launch(
            _rows_kernel, tokens, codes, scales, x, k, x.stride(0), LARGEST, SMALLEST, block,
            num_warps=min(max(block // 2048, 1), 32), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


def group_scale(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one scale [1] float32 of a group of weights, packed or dense; stays on their device."""
    largest = [
        (nf4.block_scales(w) if hasattr(w, "quant_state") else dense_weight(w, w.dtype)).abs().max().float()
        for w in weights
    ]
    return _scale(torch.stack(largest).max().view(1))


def _scale(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > SMALLEST, largest * (1 / LARGEST), 1.0)


def dequantize_e4m3(
    weights: Sequence[torch.Tensor],
    inverse: torch.Tensor,
    transposed: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """e4m3 of weights below each other times `inverse`, product and value rounded to float32 before.

    Args:
        weights: [N_i, K] each, packed or dense.
        inverse: [1] float32, 1 / `group_scale`.
        transposed: whether the result is [K, N].
        out: contiguous, for the result; in another dtype than e4m3 it takes the products, not yet rounded to e4m3.

    Returns:
        [N, K] or [K, N], contiguous.
    """
    rows = [weight_shape(w)[0] for w in weights]
    n, k = sum(rows), weight_shape(weights[0])[1]
    if out is None:
        out = torch.empty((k, n) if transposed else (n, k), dtype=E4M3, device=inverse.device)
    packed = [*takewhile(lambda w: hasattr(w, "quant_state"), weights)]
    sizes = rows[: len(packed)]
    aligned = bool(packed) and all(size % MULTIPLE == 0 for size in [*sizes, n])
    done = 0  # weights before those that the kernel does not read, as a gate in 16 bits behind gate and up
    if aligned and use_triton(weights[0]) and nf4.kernel_reads(packed, k):
        state, row_words = weights[0].quant_state, k // 8
        programs = sum(-(-r // _ROWS) for r in sizes) * -(-row_words // _WORDS)
        units = [r // MULTIPLE for r in sizes]
        launch(
            _weights_kernel, programs, out, state.code, inverse, *nf4.kernel_arguments(packed, units), n,
            MULTIPLE, row_words, state.blocksize // 8, _ROWS, _WORDS, state.nested, transposed,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        done = len(packed)
    for weight, part in [*zip(weights, (out.t() if transposed else out).split(rows))][done:]:
        part.copy_(dense_weight(weight, torch.float32) * inverse)
    return out


def product(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(scales codes) (weight_scales weight)^T.

    Args:
        codes: [T, K] e4m3. scales: [T, 1] float32.
        weight: [N, K] e4m3. weight_scales: [1, N] float32.
        dtype: of the result; bfloat16 on a GPU.

    Returns:
        [T, N]
    """
    if codes.is_cuda:
        return torch._scaled_mm(
            codes, weight.t(), scales, weight_scales, out_dtype=dtype, use_fast_accum=FAST_ACCUMULATION
        )
    return (codes.float() @ weight.float().t() * (scales * weight_scales)).to(dtype)


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """A group's frozen weights in e4m3; each orientation is made when it is first asked for, and stays.

    Args:
        weights: [N_i, K] each, packed or dense.
        scales: [1, max(N, K)] float32, the group's one scale for every row of either orientation.
        inverse: [1] float32, 1 / the scale.
    """

    weights: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    inverse: torch.Tensor

    @cached_property
    def plain(self) -> torch.Tensor:
        """[N, K]"""
        return dequantize_e4m3(self.weights, self.inverse)

    @cached_property
    def transposed(self) -> torch.Tensor:
        """[K, N]"""
        return dequantize_e4m3(self.weights, self.inverse, transposed=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T [T, N] of x [T, K], whose rows may be strided."""
        return product(*quantize_rows(x), self.plain, self.scales[:, : len(self.plain)], x.dtype)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """dy W [T, K] of dy [T, N], whose rows may be strided."""
        return product(*quantize_rows(dy), self.transposed, self.scales[:, : len(self.transposed)], dy.dtype)


def rounded_weights(projections: Sequence[Projection]) -> RoundedWeights:
    """The frozen weights of a group; only their scale is computed now."""
    weights = tuple(p.weight for p in projections)
    scale = group_scale(weights)
    scales = scale.expand(1, max(group_shape(projections))).contiguous()
    return RoundedWeights(weights, scales, scale.reciprocal())


def fits(projections: Sequence[Projection]) -> bool:
    """Whether the matrix units take a group's sizes: those of the whole product."""
    return all(size % MULTIPLE == 0 for size in group_shape(projections))


@dataclass(frozen=True)
class Fp8Weight(GroupWeight):
    """A group whose frozen weights are multiplied in e4m3; its LoRA term is added in one pass over the product."""

    rounded: RoundedWeights

    def backward_input(self, dy_buffer: torch.Tensor) -> torch.Tensor:
        n = self.out_features
        dx = self.rounded.backward(dy_buffer[:, :n])
        return expand(dy_buffer[:, n:], self.a.t(), dx, out=dx) if self.lora_columns else dx

    def _forward(self, x_buffer: torch.Tensor, y: torch.Tensor) -> None:
        k = self.in_features
        base = self.rounded.forward(x_buffer[:, :k])
        if self.lora_columns:
            expand(x_buffer[:, k:], self.scaled_b, base, out=y)
        else:
            y.copy_(base)

    def _forward_onto(
        self, x: torch.Tensor, xa: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        base = self.rounded.forward(x)
        if xa is not None:
            return expand(xa, self.scaled_b, residual, base, out=base)
        return base if residual is None else base.add_(residual)


def fp8_weight(
    projections: Sequence[Projection], rounded: RoundedWeights, dtype: torch.dtype, device: torch.device
) -> Fp8Weight:
    """A group's weights in e4m3 with its LoRA pairs and biases in dtype."""
    n, k = group_shape(projections)
    pad, bias_column = lora_layout(projections, device)
    a, scaled_b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((pad, k), (n, pad)))
    group = Fp8Weight(a, scaled_b, bias_column, rounded)
    pack_factors(projections, group)
    return group


@jit
def _rows_kernel(
    codes, scales, x, k, stride, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < k
    value = tl.load(x + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=0)
    scale = tl.where(largest > SMALLEST, largest * (1 / LARGEST), 1.0)
    tl.store(scales + row, scale)
    value *= tl.div_rn(1.0, scale)
    tl.store(codes + row * k + place, value.to(codes.dtype.element_ty), mask=inside)


@jit(**nf4.UNSPECIALIZED)
def _weights_kernel(
    out, lut, inverse,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    n, UNIT: tl.constexpr, ROW_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    across: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS  # programs along a row
    program, before, rows, packed, absmax, absmax2, code2, offset = nf4.group_member(
        tl.program_id(0), tl.cdiv(size_0 * UNIT, ROWS) * across, tl.cdiv(size_1 * UNIT, ROWS) * across,
        packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
        packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
        packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    )  # fmt: skip
    # sizes counted in units tell the compiler that rows of the transpose can be stored in vectors
    before, rows = before * UNIT, rows * UNIT
    row = program // across * ROWS + tl.arange(0, ROWS)
    column = program % across * WORDS + tl.arange(0, WORDS)
    word = row[:, None] * ROW_WORDS + column[None, :]
    inside = (row < rows)[:, None] & (column < ROW_WORDS)[None, :]
    values = nf4.decode(word, inside, lut, packed, absmax, absmax2, code2, offset, BLOCK_WORDS, NESTED)
    values = (values * tl.load(inverse)).to(out.dtype.element_ty)
    values = tl.reshape(values, (ROWS, WORDS * 8))
    row_in = row < rows
    row += before
    place = program % across * (WORDS * 8) + tl.arange(0, WORDS * 8)
    place_in = place < ROW_WORDS * 8
    if TRANSPOSED:
        at = place[:, None].to(tl.int64) * n + row[None, :]
        tl.store(out + at, tl.trans(values), mask=place_in[:, None] & row_in[None, :])
    else:
        at = row[:, None].to(tl.int64) * (ROW_WORDS * 8) + place[None, :]
        tl.store(out + at, values, mask=row_in[:, None] & place_in[None, :])
