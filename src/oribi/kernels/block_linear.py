"""Linear layers on weights in ggml's blocks for few rows, as in decoding: the codes are read once, and no 16-bit weight is written.

Computes what `nf4_linear` does, with its kernels, of T rows (at most `MAX_ROWS`). A tile of W is decoded in registers to the
values that `BlockCodes.write` would write in x's dtype, and multiplied with x on the matrix units in float32. A group's layers
whose blocks are of one type share a launch: of q4_k_m's q, k and v, v may be Q6_K.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from oribi.kernels.dispatch import INTERPRETED, launch, use_triton
from oribi.kernels.gated_mlp import gated_mlp_forward
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes
from oribi.kernels.lora import Projection
from oribi.kernels.nf4_linear import (
    Tiling,
    down,
    group_fits,
    lora_arguments,
    multiprocessors,
    packed_reference,
    padded_rank,
    padded_rows,
    partial_sums,
)
from oribi.kernels.nf4_linear_kernels import up_kernel
from oribi.kernels.packed_weight import PackedWeight

MAX_ROWS = 16
# columns of a tile
_COLUMNS = 128


def reads_blocks(projections: Sequence[Projection], rows: int) -> bool:
    """Whether `block_linear` has kernels for a group and so many rows of x."""
    return (
        rows <= MAX_ROWS
        and all(_is_block(p.weight) for p in projections)
        and group_fits(projections)
        # without matrix units of Ampere or later it is faster to dequantise
        and (INTERPRETED or multiprocessors(projections[0].weight.packed.codes.get_device()) > 0)
    )


def _is_block(weight: torch.Tensor) -> bool:
    if not isinstance(weight, PackedWeight) or not isinstance(weight.packed, BlockCodes):
        return False
    codes = weight.packed.codes
    on_gpu = codes.is_cuda or INTERPRETED  # and not in host memory
    return on_gpu and codes.is_contiguous() and codes.data_ptr() % 16 == 0 and codes.nbytes < 2**31


def block_linear(
    x: torch.Tensor,
    projections: Sequence[Projection],
    counters: torch.Tensor,
    activation: str | None = None,
) -> torch.Tensor:
    """Outputs of a group of linear layers on few rows.

    Args and returns are those of `nf4_linear`, without a residual.
    """
    if not use_triton(x):
        return packed_reference(x, projections, None, 1.0, activation)
    rank = max(0 if p.a is None else p.a.shape[0] for p in projections)
    xa = down(x, projections, padded_rank(rank)) if rank else None
    runs = _runs(projections)
    if activation is not None and len(runs) > 1:  # gate and up are of two types
        gate, up = block_linear(x, projections, counters).chunk(2, dim=1)
        return gated_mlp_forward(gate, up, activation)
    n = sum(p.shape[0] for p in projections) // (1 if activation is None else 2)
    out = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    first = column = 0
    for run in runs:
        xa_of_run = None if xa is None or all(p.a is None for p in run) else xa[:, first:]
        _launch(x, run, len(projections), xa_of_run, counters, out, column, activation)
        first, column = first + len(run), column + sum(p.shape[0] for p in run)
    return out


def _runs(projections: Sequence[Projection]) -> list[list[Projection]]:
    """Neighbours of one type."""
    return [list(run) for _, run in groupby(projections, lambda p: p.weight.packed.kind)]


def _tiling(tokens: int, rows_of_w: int, k: int, paired: bool) -> Tiling:
    """The tiling of a shape: as many parts of K as fill a GPU.

    Args:
        tokens: T. rows_of_w: of all weights. k: K. paired: whether a program has rows of two weights.
    """
    rows = 64
    tiles = -(-rows_of_w // rows) // (2 if paired else 1)
    splits = 1
    while splits < 8 and tiles * splits < 300 and k // _COLUMNS >= 4 * splits:
        splits *= 2
    return Tiling(rows, splits, 4)


def _launch(
    x: torch.Tensor,
    run: Sequence[Projection],
    group: int,
    xa: torch.Tensor | None,
    counters: torch.Tensor,
    out: torch.Tensor,
    column: int,
    activation: str | None,
    tile: Tiling | None = None,
) -> None:
    """Writes the outputs of neighbours of one type into columns of out.

    Args:
        run: the layers. group: how many the whole group has, in x A^T. xa: x A^T from the run's first on.
        column: of the run's first output.
    """
    (tokens, k), paired = x.shape, activation is not None
    sizes, codes = [p.shape[0] for p in run], [p.weight.packed.codes for p in run]
    n, up_row = sum(sizes), 0
    if paired:  # gate and up of one layer lie below each other
        n //= 2
        sizes = [n] * 2
        if len(run) == 1:
            codes, up_row = codes * 2, n
    tile = tile or _tiling(tokens, sum(sizes), k, paired)
    tiles = -(-n // tile.rows) if paired else sum(-(-size // tile.rows) for size in sizes)
    padded = padded_rows(tokens)
    partials = partial_sums(out, tile, tiles * padded * (2 if paired else 1))
    weights = [argument for c, size in zip(codes, sizes) for argument in (c, c, c, c, c, size)]
    weights += weights[-6:] * (3 - len(sizes))
    factors, biased = lora_arguments(run, out, xa is not None)
    kind = BLOCK_TYPES[run[0].weight.packed.kind]
    launch(
        up_kernel, tiles * tile.splits, out[:, column:], x, out, *weights, *factors, out if xa is None else xa,
        out, 1.0, partials, counters, tokens, out.shape[1], up_row,
        group, 1, k, 0 if xa is None else len(xa), 16 if xa is None else xa.shape[3], padded, tile.rows,
        tile.warps, tile.splits, False, False, activation, xa is not None, biased, False,
        _COLUMNS, kind.nbytes, *kind.fields,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
