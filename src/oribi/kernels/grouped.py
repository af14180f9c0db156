"""Products of rows that are sorted by group with a matrix of each group: rows by expert, say.

    y_r = a_r B_g(r)          c_g = sum over the rows r of g: a_r^T b_r

R rows, G groups, rows [offs[g-1], offs[g]) are group g's; K, N, P columns. How many rows a group has is known on the device
alone: no shape depends on it, nothing waits for the host, and a recorded graph serves any routing. PyTorch's own grouped
product is fast on compute capability 9 and 10 and waits for the host elsewhere; a Triton kernel serves the others.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton, wide

# rows, columns and depth of a program's tile; at 256 rows a group, as Qwen3-30B-A3B has of 4096 tokens, two tiles fill a group
_ROWS, _COLUMNS, _DEPTH = 128, 128, 32


def grouped_matmul(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row of a times the matrix of its group.

    Args:
        a: [R, K], rows may be strided.
        b: [G, K, N] in a's dtype, strided in any way.
        offs: [G] int32, where each group's rows end; the last is R.
        out: [R, N] for the result, rows may be strided.

    Returns:
        [R, N], summed in float32 and rounded once.
    """
    if not use_triton(a):
        out = a.new_empty(len(a), b.shape[2]) if out is None else out
        for group, rows in _groups(offs):
            torch.mm(a[rows], b[group], out=out[rows]) if out.is_contiguous() else out[rows].copy_(
                a[rows] @ b[group]
            )
        return out
    if len(a) and torch_is_fast(a):
        y = F.grouped_mm(a, b, offs=offs)
        return y if out is None else out.copy_(y)
    out = a.new_empty(len(a), b.shape[2]) if out is None else out
    if len(a):
        _launch_matmul(a, b, offs, out)
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """a^T b over the rows of each group, zero for a group without rows.

    Args:
        a: [R, P]. b: [R, K]. Rows may be strided.
        offs: [G] int32, where each group's rows end; the last is R.

    Returns:
        [G, P, K] in float32 (float64 of float64), the dtype in which it is summed.
    """
    out = torch.empty(
        len(offs), a.shape[1], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32), device=a.device
    )
    if not use_triton(a):
        for group, rows in _groups(offs):
            torch.mm(wide(a[rows]).t(), wide(b[rows]), out=out[group])
        return out
    p, k = out.shape[1:]
    # one side is as narrow as a pair's rank
    block_p, block_k = (64 if p > 16 else 16), min(_COLUMNS, max(next_power_of_2(k), 16))
    launch(
        _outer_kernel, len(offs) * -(-p // block_p) * -(-k // block_k), a, b, out, offs, a.stride(0), b.stride(0), p, k,
        block_p, block_k, _DEPTH, a.dtype == torch.float32, num_warps=4,
    )  # fmt: skip
    return out


def _groups(offs: torch.Tensor) -> list[tuple[int, slice]]:
    """Each group and its rows; waits for the device."""
    ends = offs.tolist()
    return [(group, slice(start, end)) for group, (start, end) in enumerate(zip([0, *ends], ends))]


def torch_is_fast(a: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product of a takes a GPU's own kernel, which reads the groups' bounds on the device.

    Source: pytorch/pytorch issues 161407 and 184334; elsewhere it copies the bounds to the host and loops.
    """
    known = use_triton(a) and a.is_cuda and a.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return known and _major(a.get_device()) in (9, 10)


@lru_cache
def _major(device_index: int) -> int:
    return torch.cuda.get_device_capability(device_index)[0]


def _launch_matmul(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, out: torch.Tensor) -> None:
    rows, groups = len(a), len(offs)
    block_rows = min(_ROWS, max(16, 1 << (rows // groups).bit_length()))
    # tiles of each group in turn; at most so many, whatever the groups' sizes are
    tiles = -(-rows // block_rows) + groups
    starts = F.pad(offs[:-1], (1, 0))
    ends = torch.cumsum((offs - starts + block_rows - 1) // block_rows, 0, dtype=torch.int32)
    tile = torch.arange(tiles, dtype=torch.int32, device=a.device)
    group = torch.searchsorted(ends, tile, right=True, out_int32=True)
    known = group.clamp(max=groups - 1)
    first = starts[known] + (tile - F.pad(ends[:-1], (1, 0))[known]) * block_rows
    n, k = out.shape[1], a.shape[1]
    launch(
        _matmul_kernel, tiles * -(-n // _COLUMNS), a, b, out, group, first, offs, a.stride(0), *b.stride(), out.stride(0),
        n, k, groups, block_rows, _COLUMNS, _DEPTH, a.dtype == torch.float32,
        num_warps=8 if block_rows == 128 else 4, num_stages=3,
    )  # fmt: skip


@jit
def _matmul_kernel(
    a_ptr, b_ptr, out_ptr, group_ptr, first_ptr, offs_ptr, a_stride, b_group, b_row, b_column, out_stride, n, k, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0) // blocks
    group = tl.load(group_ptr + tile)
    if group < groups:  # the others are tiles that no group fills
        row = tl.load(first_ptr + tile) + tl.arange(0, ROWS)
        column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        inside = row < tl.load(offs_ptr + group)
        depth = tl.arange(0, DEPTH)
        start = row.to(tl.int64) * a_stride
        b_start = b_ptr + group.to(tl.int64) * b_group + column[None, :].to(tl.int64) * b_column
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for at in range(0, k, DEPTH):
            place = at + depth
            a = tl.load(
                a_ptr + start[:, None] + place[None, :],
                mask=inside[:, None] & (place < k)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_start + place[:, None].to(tl.int64) * b_row,
                mask=(place < k)[:, None] & (column < n)[None, :],
                other=0.0,
            )
            total += tl.dot(a, b, input_precision="ieee" if EXACT else "tf32")
        where = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(where, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < n)[None, :])


@jit
def _outer_kernel(
    a_ptr, b_ptr, out_ptr, offs_ptr, a_stride, b_stride, p, k,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    p_blocks, k_blocks = tl.cdiv(p, BLOCK_P), tl.cdiv(k, BLOCK_K)
    group = tl.program_id(0) // (p_blocks * k_blocks)
    place = tl.program_id(0) % (p_blocks * k_blocks)
    left = place // k_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    right = place % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(offs_ptr + group)
    start = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
    for at in range(start, end, DEPTH):
        row = at + tl.arange(0, DEPTH)
        inside = row < end
        a = tl.load(
            a_ptr + row[None, :].to(tl.int64) * a_stride + left[:, None],
            mask=inside[None, :] & (left < p)[:, None],
            other=0.0,
        )
        b = tl.load(
            b_ptr + row[:, None].to(tl.int64) * b_stride + right[None, :],
            mask=inside[:, None] & (right < k)[None, :],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee" if EXACT else "tf32")
    where = out_ptr + group.to(tl.int64) * p * k + left[:, None].to(tl.int64) * k + right[None, :]
    tl.store(where, total, mask=(left < p)[:, None] & (right < k)[None, :])
