"""The LoRA pairs and biases of a group of linear layers, packed beside its weights: [A; 0] and the block diagonal sB.

T tokens, K in features, N out features and P LoRA columns of the group; `lora` says where each lies.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton

if TYPE_CHECKING:
    from oribi.kernels.lora import GroupWeight, Projection


def pack_factors(projections: Sequence["Projection"], group: "GroupWeight") -> None:
    """Fills a group's `a` and `scaled_b`."""
    if not group.lora_columns:
        return
    if use_triton(group.a) and len(projections) <= 3:
        _pack_factors_triton(projections, group)
        return
    row = column = 0
    for p in projections:
        n, rank = p.shape[0], 0 if p.a is None else p.a.shape[0]
        rows = group.scaled_b[row : row + n]
        # columns are strided, and writing them takes longer than it should: zeros only where no factor lies
        for others in (rows[:, :column], rows[:, column + rank :]):
            if others.shape[1]:
                others.zero_()
        if p.a is not None:
            group.a[column : column + rank] = p.a.detach()
            torch.mul(p.b.detach(), p.scale, out=rows[:, column : column + rank])
            column += rank
        if p.bias is not None:
            rows[:, group.bias_column] = p.bias.detach()
        row += n
    group.a[column:].zero_()


def _pack_factors_triton(projections: Sequence["Projection"], group: "GroupWeight") -> None:
    arguments: list[object] = []
    for i in range(3):
        p = projections[i] if i < len(projections) else None
        # an absent factor is never read: its sizes are 0, and any pointer will do
        a, b, bias = (None, None, None) if p is None else (p.a, p.b, p.bias)
        arguments += [
            group.a if a is None else a, group.a if b is None else b, group.a if bias is None else bias,
            0 if p is None else p.shape[0], 0 if a is None else a.shape[0], int(bias is not None),
            1.0 if p is None else float(p.scale),
        ]  # fmt: skip
    n, k, pad = group.out_features, group.in_features, group.lora_columns
    b_blocks, a_blocks = -(-n // 32), -(-k // 2048)
    launch(
        _pack_kernel, b_blocks + pad * a_blocks, group.scaled_b, group.a, group.scaled_b.stride(0), group.a.stride(0),
        n, k, b_blocks, a_blocks,
        *arguments, pad, next_power_of_2(pad), 32, 2048, num_warps=4,
    )  # fmt: skip


@jit
def _block(source, row, col, rows, cols):
    """source [rows, cols] at (row, col) in float32, zero outside it."""
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return tl.load(source + row.to(tl.int64) * cols + col, mask=inside, other=0.0).to(tl.float32)


@jit
def _pack_kernel(
    b_out, a_out, b_stride, a_stride, n, k, b_blocks, a_blocks,
    a0, b0, bias0, n0, r0, has0, s0, a1, b1, bias1, n1, r1, has1, s1, a2, b2, bias2, n2, r2, has2, s2,
    P: tl.constexpr, P2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < b_blocks:  # rows of [N, P]
        row = pid * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        col = tl.arange(0, P2)[None, :]
        bias = col - r0 - r1 - r2
        value = _block(b0, row, col, n0, r0) * s0 + _block(bias0, row, bias, n0 * has0, 1)
        value += _block(b1, row - n0, col - r0, n1, r1) * s1 + _block(bias1, row - n0, bias, n1 * has1, 1)
        value += _block(b2, row - n0 - n1, col - r0 - r1, n2, r2) * s2
        value += _block(bias2, row - n0 - n1, bias, n2 * has2, 1)
        tl.store(
            b_out + row.to(tl.int64) * b_stride + col,
            value.to(b_out.dtype.element_ty),
            mask=(row < n) & (col < P),
        )
    else:  # rows of [P, K]
        place = ((pid - b_blocks) % a_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        line = (pid - b_blocks) // a_blocks + place * 0
        factor = _block(a0, line, place, r0, k) + _block(a1, line - r0, place, r1, k)
        factor += _block(a2, line - r0 - r1, place, r2, k)
        start = a_out + line.to(tl.int64) * a_stride
        tl.store(start + place, factor.to(a_out.dtype.element_ty), mask=place < k)
