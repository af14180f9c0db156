"""Rows in the experts' order: taken from their tokens, added up for each token, and compared with each other.

    x_r = n_t(r)      y_t = sum over the k rows r of t: w_r o_r      d_r = a_r . b_r

T tokens, k experts of a token, R = T k rows, C columns. Each is one pass over the rows, which are the most that a layer of
experts moves: at Qwen3-30B-A3B's sizes and 4096 tokens the rows of 2048 columns take 134 MB. Sums are float32, in one order.
"""

import torch

from oribi.kernels.dispatch import jit, launch, tl, unit_stride, use_triton, wide
from oribi.kernels.routing import Routing

# columns that a program moves at a time: 16 bytes of 16-bit numbers for each of 128 threads
_COLUMNS = 1024


def take_rows(x: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x[tokens], written to `out`.

    Args:
        x: [T, C]. tokens: [R] int64.
        out: [R, C]. Rows of both may be strided.
    """
    if not use_triton(x):
        return out.copy_(x[tokens])
    if len(tokens):
        x = unit_stride(x)
        launch(
            _take_kernel, len(tokens), x, tokens, out, x.stride(0), out.stride(0), x.shape[1], _COLUMNS, num_warps=4
        )  # fmt: skip
    return out


def combine(rows: torch.Tensor, routing: Routing, weights: torch.Tensor | None) -> torch.Tensor:
    """[T, C]: the sum of each token's rows [R, C], weighted by [T, k] or not, rounded once; differentiable in both."""
    if use_triton(rows) and not torch.is_grad_enabled() and len(rows):
        tokens, count = routing.experts.shape
        out = rows.new_empty(tokens, rows.shape[1])
        blocks = -(-rows.shape[1] // _COLUMNS)
        launch(
            _combine_kernel, tokens * blocks, rows, routing.rows, rows if weights is None else weights.contiguous(), out,
            rows.stride(0), rows.shape[1], blocks, count, _COLUMNS, weights is not None, num_warps=4,
        )  # fmt: skip
        return out
    of_tokens = routing.of_tokens(rows)
    if weights is None:
        weights = rows.new_ones(of_tokens.shape[:2])
    return torch.bmm(weights.to(rows.dtype)[:, None], of_tokens)[:, 0]


def products_and_weighted(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The inner products [R] of the rows of a and b; afterwards a's rows are multiplied by their weights.

    Args:
        a, b: [R, C], rows may be strided. weights: [R].

    Returns:
        float32 (float64 of float64).
    """
    if use_triton(a):
        out = torch.empty(len(a), dtype=torch.float32, device=a.device)
        if len(a):
            launch(
                _products_kernel, len(a), a, b, weights, out, a.stride(0), b.stride(0), a.shape[1], _COLUMNS,
                num_warps=4,
            )  # fmt: skip
        return out
    out = (wide(a) * wide(b)).sum(-1)
    a *= weights[:, None]
    return out


@jit
def _take_kernel(x_ptr, tokens, out_ptr, x_stride, out_stride, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = column < columns
        tl.store(
            out_ptr + row * out_stride + column,
            tl.load(x_ptr + token * x_stride + column, mask=inside),
            mask=inside,
        )


@jit
def _combine_kernel(
    rows_ptr, places, weights, out_ptr, rows_stride, columns, blocks,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for one in tl.static_range(COUNT):
        place = tl.load(places + token * COUNT + one)
        part = tl.load(rows_ptr + place * rows_stride + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * COUNT + one).to(tl.float32)
        total += part
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _products_kernel(a_ptr, b_ptr, weights, out, a_stride, b_stride, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = column < columns
        place = a_ptr + row * a_stride + column
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += a * b
        tl.store(place, (a * weight).to(a_ptr.dtype.element_ty), mask=inside)
    tl.store(out + row, tl.sum(total, 0))
