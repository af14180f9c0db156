"""Linear layers on NF4 weights for few rows, as in decoding: the codes are read once, and no 16-bit weight is written.

    y_i = x W_i^T + b_i + scale_i (x A_i^T) B_i^T      or, of two, h = act(y_1) y_2;      then + residual

T rows (at most `MAX_ROWS`), K in features, N out features of a group that shares x (q, k, v; gate, up), R LoRA rank. A
weight's block of 64 values is looked up in x's dtype, multiplied with x on the matrix units, and then scaled in float32. A
program has some rows of W and one of `splits` parts of K; the last of a row's programs to end adds their sums, in the order
of the parts, so a result does not depend on which is last. One row of x has a kernel of its own (`nf4_row_kernel`). LoRA factors are read where they lie, in the dtype in which they
are trained, and rounded to x's as when they are packed.

Two launches: x A^T, in parts of K, and the rest. Beyond `MAX_ROWS`, dequantising costs less (`lora.augmented_weight`).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from oribi.kernels import nf4
from oribi.kernels.dispatch import INTERPRETED, launch, next_power_of_2, use_triton, wide
from oribi.kernels.gated_mlp import gated_mlp_forward
from oribi.kernels.lora import Projection
from oribi.kernels.nf4_linear_kernels import down_kernel, up_kernel
from oribi.kernels.nf4_row_kernel import ROWS, row_down_kernel, row_kernel
from oribi.kernels.packed_weight import dense_weight

# H200, microseconds of the second launch on q|k|v, o, gate|up and down of 8B, and of the alternatives without LoRA:
#   rows   here             bitsandbytes' gemm_4bit   dequantised, cuBLAS
#      1    8,  7, 25, 15   25, 11, 60, 31            33, 23, 144, 77
#     16   17, 14, 61, 32   72, 35, 137, 109          32, 22, 143, 76
#     64   30, 19, 97, 48   72, 34, 215, 112          33, 22, 143, 79
# One row takes 2.4 TB/s of codes, of 4.3 that the memory has. More take 1 TB/s: the wavefronts of look-ups and of single
# bytes of scales fill 80 % of the L1 cache's cycles. The first launch takes 2 for one row, 4 to 6 for more.
MAX_ROWS = 64
# counters that programs which share a result need: one for every 16 rows of the widest weight
_COUNTERS = 16384
# what `up_kernel` is told of ggml's blocks, where there are none
_NO_BLOCKS = (0,) * 11
# columns of x that a program of the first launch adds up
_PART = 512


def new_counters(device: torch.device) -> torch.Tensor:
    """Zeros that launches on one stream share; each leaves them zero."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def reads(projections: Sequence[Projection], rows: int) -> bool:
    """Whether `nf4_linear` has kernels for a group and so many rows of x."""
    weights = [p.weight for p in projections]
    if rows > MAX_ROWS or not all(hasattr(w, "quant_state") for w in weights):
        return False
    k = projections[0].shape[1]
    return (
        nf4.kernel_reads(weights, k)
        and k % 64 == 0
        and weights[0].quant_state.blocksize == 64
        and all(w.data_ptr() % 16 == 0 for w in weights)
        and all(w.quant_state.absmax.data_ptr() % 2 == 0 for w in weights)
        and group_fits(projections)
    )


def group_fits(projections: Sequence[Projection]) -> bool:
    """Whether the kernels can take a group, whatever codes its weights have."""
    factors = {t.dtype for p in projections for t in (p.a, p.b) if t is not None}
    biases = {p.bias.dtype for p in projections if p.bias is not None}
    return (
        len(projections) <= 3
        and len({p.shape[1] for p in projections}) == 1
        and len(factors) <= 1
        and len(biases) <= 1
        and max(p.shape[0] for p in projections) <= 16 * _COUNTERS
    )


def nf4_linear(
    x: torch.Tensor,
    projections: Sequence[Projection],
    counters: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    activation: str | None = None,
) -> torch.Tensor:
    """Outputs of a group of linear layers on few rows.

    Args:
        x: [T, K] contiguous.
        projections: a group that `reads` accepts; its factors are not trained through this.
        counters: of `new_counters`.
        residual: [T, N] contiguous, added to the outputs; not with an activation.
        residual_scale: factor on the outputs before the addition.
        activation: one of `gated_mlp.ACTIVATIONS`: the group is gate and up, or one layer that holds both, and the result h.

    Returns:
        [T, N], or [T, N / 2] of h, in x's dtype, rounded once.
    """
    if not use_triton(x):
        return packed_reference(x, projections, residual, residual_scale, activation)
    rank = max(0 if p.a is None else p.a.shape[0] for p in projections)
    xa = down(x, projections, padded_rank(rank)) if rank else None
    if len(x) == 1 and reads_row(x):
        return _row(x, projections, xa, residual, residual_scale, activation)
    return _up(x, projections, xa, counters, residual, residual_scale, activation)


def packed_reference(
    x: torch.Tensor,
    projections: Sequence[Projection],
    residual: torch.Tensor | None,
    residual_scale: float,
    activation: str | None,
) -> torch.Tensor:
    """`nf4_linear` in PyTorch, of weights in any codes."""
    outputs = []
    for p in projections:
        y = F.linear(wide(x), wide(dense_weight(p.weight, x.dtype)))
        if p.a is not None:
            xa = F.linear(x, p.a.to(x.dtype))
            y = y + wide(xa) @ wide((p.b * p.scale).to(x.dtype)).t()
        outputs.append(y if p.bias is None else y + wide(p.bias))
    y = torch.cat(outputs, dim=1)
    if activation is not None:
        gate, up = y.chunk(2, dim=1)
        return gated_mlp_forward(gate, up, activation).to(x.dtype)
    y = y * residual_scale
    return (y if residual is None else y + residual).to(x.dtype)


class Tiling(NamedTuple):
    """How a launch is cut: rows of W of a program, parts of K, and warps of a program."""

    rows: int
    splits: int
    warps: int


def tiling(tokens: int, rows_of_w: int, k: int, paired: bool) -> Tiling:
    """The tiling of a shape.

    Args:
        tokens: T. rows_of_w: of all weights. k: K. paired: whether a program has rows of two weights.
    """
    # H200, layers of 8B, 64 and 128 rows by 1 to 16 parts: the best for 1 and 16 tokens, within 8 % of it for 64; the worst
    # takes 1.3 to 2 times as long
    rows = 64
    tiles = rows_of_w // rows // (2 if paired else 1)
    splits = 1
    while splits < 8 and tiles * splits < (300 if tokens <= 16 else 150) and k // 64 >= 8 * splits:
        splits *= 2
    return Tiling(rows, splits, 4)


def partial_sums(out: torch.Tensor, tile: Tiling, columns: int) -> torch.Tensor:
    """Memory for the sums of parts of K: so many `columns` of each row of a program; of one part none, and out stands for it."""
    if tile.splits == 1:
        return out
    return torch.empty(tile.splits * tile.rows * columns, dtype=torch.float32, device=out.device)


def padded_rows(tokens: int) -> int:
    """Rows of x that a program's products have."""
    return max(next_power_of_2(tokens), 16)  # Triton gives fewer to a matrix unit that takes longer


def padded_rank(rank: int) -> int:
    """Columns that x A^T has for each layer."""
    return max(next_power_of_2(rank), 16)


def _factors(projections: Sequence[Projection]) -> list[object]:
    """A and B, rank and scale of three projections; one without an adapter has rank 0 and any pointers."""
    some = next(p for p in projections if p.a is not None)
    found: list[object] = []
    for i in range(3):
        p = projections[i] if i < len(projections) else None
        if p is None or p.a is None:
            found += [some.a, some.b, 0, 1.0]
        else:
            found += [p.a, p.b, p.a.shape[0], float(p.scale)]
    return found


def down(x: torch.Tensor, projections: Sequence[Projection], rank: int) -> torch.Tensor:
    """x A^T of a group in parts of K: [parts, group, T, R] float32."""
    tokens, k = x.shape
    if tokens == 1:
        return _row_down(x, projections, rank)
    parts = -(-k // _PART)
    xa = torch.empty(parts, len(projections), tokens, rank, dtype=torch.float32, device=x.device)
    factors = _factors(projections)
    launch(
        down_kernel, parts * len(projections) * (rank // 16), xa, x,
        *factors[0::4], *factors[2::4], tokens, k, len(projections), rank, padded_rows(tokens), _PART,
        64 if tokens > 32 else 128, num_warps=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return xa


def _row_down(x: torch.Tensor, projections: Sequence[Projection], rank: int) -> torch.Tensor:
    xa = torch.empty(1, len(projections), 1, rank, dtype=torch.float32, device=x.device)
    factors, k = _factors(projections), x.shape[1]
    block = min(next_power_of_2(k), 4096)
    launch(
        row_down_kernel, len(projections) * rank, xa, x, *factors[0::4], *factors[2::4], len(projections), rank, k, block,
        num_warps=max(1, block // 512), enable_fp_fusion=True,
    )  # fmt: skip
    return xa


def _up(
    x: torch.Tensor,
    projections: Sequence[Projection],
    xa: torch.Tensor | None,
    counters: torch.Tensor,
    residual: torch.Tensor | None,
    residual_scale: float,
    activation: str | None,
    tile: Tiling | None = None,
) -> torch.Tensor:
    tokens, k = x.shape
    sizes = [p.shape[0] for p in projections]
    paired, n = activation is not None, sum(sizes)
    if paired:  # gate and up of one layer lie below each other
        sizes = [n // 2] * 2
        n //= 2
    tile = tile or tiling(tokens, sum(sizes), k, paired)
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    tiles = -(-n // tile.rows) if paired else sum(-(-size // tile.rows) for size in sizes)
    padded = padded_rows(tokens)
    partials = partial_sums(out, tile, tiles * padded * (2 if paired else 1))
    looks_up = not INTERPRETED and x.dtype in (torch.float16, torch.bfloat16)
    members = _members(projections, sizes, paired, out, xa is not None)
    launch(
        up_kernel, tiles * tile.splits, out, x, *members.arguments, out if xa is None else xa,
        out if residual is None else residual, float(residual_scale), partials, counters, tokens, n, members.up_row,
        len(projections), 1, k, 0 if xa is None else len(xa), 16 if xa is None else xa.shape[3], padded, tile.rows,
        tile.warps, tile.splits, members.nested, looks_up, activation, xa is not None, members.biased,
        residual is not None, *_NO_BLOCKS, num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def reads_row(x: torch.Tensor) -> bool:
    """Whether one row of x has a kernel of its own: on the matrix units of Ampere and later."""
    return not INTERPRETED and x.dtype.itemsize == 2 and multiprocessors(x.get_device()) > 0


@lru_cache
def multiprocessors(device_index: int) -> int:
    """How many multiprocessors a GPU has; 0 where its matrix units cannot take the products of `row_kernel`."""
    properties = torch.cuda.get_device_properties(device_index)
    return properties.multi_processor_count if properties.major >= 8 else 0


def _row(
    x: torch.Tensor,
    projections: Sequence[Projection],
    xa: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
    activation: str | None,
    warps: int = 4,
    programs: int = 3,
) -> torch.Tensor:
    """`_up` for one row. `programs` is how many a multiprocessor has.

    H200, layers of 8B and 1B: 4 and 8 warps by 1 to 4 programs; the defaults are within 4 % of the best for each.
    """
    k, paired = x.shape[1], activation is not None
    sizes = [p.shape[0] for p in projections]
    n = sum(sizes)
    if paired:
        n //= 2
        sizes = [n] * 2
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    tiles = -(-n // 8) if paired else sum(-(-size // ROWS) for size in sizes)
    members = _members(projections, sizes, paired, out, xa is not None)
    launch(
        row_kernel, min(tiles, programs * multiprocessors(x.get_device())), out, x, *members.arguments,
        out if xa is None else xa, out if residual is None else residual, float(residual_scale), tiles, members.up_row,
        len(projections), k, 16 if xa is None else xa.shape[3], warps, members.nested,
        activation, xa is not None, members.biased, residual is not None, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


class _Members(NamedTuple):
    """What kernels choose from by a program's place in a group."""

    arguments: list[object]
    up_row: int
    nested: bool
    biased: bool


def _members(
    projections: Sequence[Projection], sizes: Sequence[int], paired: bool, out: torch.Tensor, lora: bool
) -> _Members:
    """Table, codes, scales, factors and biases of a group.

    Args:
        projections, sizes: of the group. paired: whether they are gate and up. out: stands for what is not there.
        lora: whether some have an adapter.
    """
    weights, up_row = [p.weight for p in projections], 0
    if paired and len(weights) == 1:
        weights, up_row = weights * 2, sizes[0]
    state = weights[0].quant_state
    factors, biased = lora_arguments(projections, out, lora)
    arguments = [state.code, *nf4.kernel_arguments(weights, sizes), *factors]
    return _Members(arguments, up_row, state.nested, biased)


def lora_arguments(
    projections: Sequence[Projection], out: torch.Tensor, lora: bool
) -> tuple[list[object], bool]:
    """Factors B, ranks, scales and biases of a group, and whether there are biases.

    Args:
        projections: the group. out: stands for what is not there. lora: whether some have an adapter.
    """
    biases = [p.bias for p in projections]
    some = next((b for b in biases if b is not None), out)
    biases = [some if b is None else b for b in biases] + [some] * 3
    has_bias = [int(p.bias is not None) for p in projections] + [0] * 3
    factors = _factors(projections) if lora else [out, out, 0, 1.0] * 3
    return [*factors[1::4], *factors[2::4], *factors[3::4], *biases[:3], *has_bias[:3]], some is not out
