"""The kernel of `nf4_linear` for one row of x: a program of warps takes 16 rows of W after one another, K in parts.

A warp's step is 16 rows by 8 blocks of 64 columns. Its lane 4g + t (g < 8, t < 4) reads of rows g and g + 8 the words
16 i + 4 t to 16 i + 4 t + 3, i < 4: half of block 2 i + t // 2. So four lanes read 64 bytes in a row. One row of x leaves
seven of the eight columns of a matrix unit's other operand free: they keep the blocks apart, which have different scales.
Column c has x at the columns of block c only, and lane 4g + t ends with the sums of rows g and g + 8 over blocks 2t and
2t + 1, each scaled in float32 and added up in the lane.

Written thread by thread (`nf4_row_thread`): every tensor has one element per thread, whose place `thread` says.
"""

from oribi.kernels.dispatch import jit, tl
from oribi.kernels.gated_mlp import probability_and_slope
from oribi.kernels.nf4 import group_member
from oribi.kernels.nf4_linear_kernels import MEMBERS
from oribi.kernels.nf4_row_thread import (
    TABLE_BYTES,
    fill_banked_table,
    load_codes,
    load_x,
    products,
    thread_index,
    whole_sums,
)

# rows of W of a tile
ROWS = 16


@jit
def _fetch(
    row, rows, row_offset, step, there, warp, quarter, packed, absmax, absmax2, K: tl.constexpr, WARPS: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """Codes of a lane's row in a step, and both parts of the scales of its two blocks; zeros if not `there`."""
    # a row past the last one is the last one once more, and is not stored
    row = tl.minimum(row, rows - 1).to(tl.int64) + row_offset
    block = (step * WARPS + warp) * 8
    left = tl.where(there, K // 64 - block - quarter // 2, 0)
    codes = load_codes(packed + (row * (K // 2) + block * 32 + quarter * 16), left)
    own = block + 2 * quarter
    at = row * (K // 64) + own
    first, second = (own < K // 64) & there, (own + 1 < K // 64) & there
    if NESTED and K % 128 == 0:  # both in one load, under one second scale
        both = tl.load((absmax + at).to(tl.pointer_type(tl.int16)), mask=first, other=0).to(tl.int32)
        inner, inner_1 = both & 255, (both >> 8) & 255
    else:
        inner = tl.load(absmax + at, mask=first, other=0)
        inner_1 = tl.load(absmax + at + 1, mask=second, other=0)
    outer, outer_1 = 0.0, 0.0
    if NESTED:
        outer = tl.load(absmax2 + at // 256, mask=first, other=0.0)
        outer_1 = outer
        if K % 128 != 0:
            outer_1 = tl.load(absmax2 + (at + 1) // 256, mask=second, other=0.0)
    return codes, inner, inner_1, outer, outer_1


@jit
def _scale(inner, outer, code2, offset, NESTED: tl.constexpr):
    scale = inner
    if NESTED:
        scale = tl.load(code2 + inner.to(tl.int32)) * outer + tl.load(offset)
    return scale


@jit
def _add_lora(
    sum_, n, n_in, thread, b, rank, scale, xa, dtype: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A lane's sum with its share of the LoRA term of row n: of 16 columns one in each of the first four warps."""
    for start in range(0, R, 16):
        r = start + thread // 32 * 4 + thread % 4
        inside = r < tl.minimum(rank, start + 16)
        factor = tl.load(b + n.to(tl.int64) * rank + r, mask=n_in & inside, other=0.0)
        low = tl.load(xa + r, mask=inside, other=0.0)
        sum_ += low * (factor.to(tl.float32) * scale).to(dtype).to(tl.float32)
    return sum_


@jit
def _fetch_pair(
    tile, step, there, thread,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    up_row, K: tl.constexpr, WARPS: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """`_fetch` of a lane's two rows: 8 apart, or of gate and up; and what their scales are looked up in."""
    g, quarter, warp = thread % 32 // 4, thread % 4, thread // 32
    if PAIRED:
        row = tile * 8 + g
        own = _fetch(
            row, size_0, 0, step, there, warp, quarter, packed_0, absmax_0, absmax2_0, K, WARPS, NESTED
        )
        other = _fetch(
            row, size_0, up_row, step, there, warp, quarter, packed_1, absmax_1, absmax2_1, K, WARPS, NESTED
        )
        return own, other, code2_0, offset_0, code2_1, offset_1
    place, _, size, packed, absmax, absmax2, code2, offset = group_member(
        tile, tl.cdiv(size_0, 16), tl.cdiv(size_1, 16),
        packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
        packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
        packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    )  # fmt: skip
    row = place * 16 + g
    own = _fetch(row, size, 0, step, there, warp, quarter, packed, absmax, absmax2, K, WARPS, NESTED)
    other = _fetch(row + 8, size, 0, step, there, warp, quarter, packed, absmax, absmax2, K, WARPS, NESTED)
    return own, other, code2, offset, code2, offset


@jit
def _products(
    x, table, thread, step, own, other, code2, offset, code2_b, offset_b, K: tl.constexpr, WARPS: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """What a step adds to the sums of a lane's two rows."""
    g, quarter = thread % 32 // 4, thread % 4
    column = (step * WARPS + thread // 32) * 512 + g // 2 * 128 + quarter * 32
    has_x = ((g % 2) == (quarter // 2)) & (column < K)
    values = load_x(x + column, has_x)
    codes, inner, inner_1, outer, outer_1 = own
    codes_b, inner_b, inner_b1, outer_b, outer_b1 = other
    y, y_1, y_b, y_b1 = products(codes, codes_b, values, table, thread, x.dtype.element_ty)
    y = y * _scale(inner, outer, code2, offset, NESTED)
    y += y_1 * _scale(inner_1, outer_1, code2, offset, NESTED)
    y_b = y_b * _scale(inner_b, outer_b, code2_b, offset_b, NESTED)
    y_b += y_b1 * _scale(inner_b1, outer_b1, code2_b, offset_b, NESTED)
    return y, y_b


@jit
def _finish(
    sum_, sum_b, tile, room, thread, out, size_0, size_1, size_2, b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1,
    scale_2, bias_0, bias_1, bias_2, has_bias_0, has_bias_1, has_bias_2, xa, residual, residual_scale, up_row, group,
    R: tl.constexpr, WARPS: tl.constexpr, ACTIVATION: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Adds what is added to a tile's sums, and stores its outputs."""
    dtype: tl.constexpr = out.dtype.element_ty
    PAIRED: tl.constexpr = ACTIVATION is not None
    OUT_ROWS: tl.constexpr = 8 if PAIRED else 16
    tile, before, size, b, xa_of, bias, _, _ = group_member(
        tile, tl.cdiv(size_0, OUT_ROWS), tl.cdiv(size_1, OUT_ROWS),
        b_0, xa, bias_0, bias_0, bias_0, size_0,
        b_1, xa + R, bias_1, bias_1, bias_1, size_1,
        b_2, xa + 2 * R, bias_2, bias_2, bias_2, size_2,
    )  # fmt: skip
    rank, scale, has_bias = rank_0, scale_0, has_bias_0
    if before >= size_0:
        rank, scale, has_bias = rank_1, scale_1, has_bias_1
        if before >= size_0 + size_1:
            rank, scale, has_bias = rank_2, scale_2, has_bias_2
    below, b_below, rank_below, scale_below, bias_below, has_bias_below = 8, b, rank, scale, bias, has_bias
    if PAIRED:
        below = up_row
        if group > 1:
            b_below, rank_below, scale_below, bias_below, has_bias_below = (
                b_1,
                rank_1,
                scale_1,
                bias_1,
                has_bias_1,
            )
    if LORA:
        n = tile * OUT_ROWS + thread % 32 // 4
        sum_ = _add_lora(sum_, n, n < size, thread, b, rank, scale, xa_of, dtype, R)
        inside = n < size if PAIRED else n + 8 < size
        if PAIRED:
            xa_of += (group - 1) * R
        sum_b = _add_lora(sum_b, n + below, inside, thread, b_below, rank_below, scale_below, xa_of, dtype, R)
    sum_, sum_b = whole_sums(sum_, sum_b, room, thread, WARPS)
    n = tile * OUT_ROWS + thread % OUT_ROWS
    inside = (thread < OUT_ROWS) & (n < size)
    if PAIRED:
        if BIAS:
            sum_ += tl.load(bias + n, mask=inside & (has_bias > 0), other=0.0).to(tl.float32)
            in_below = inside & (has_bias_below > 0)
            sum_b += tl.load(bias_below + n + below, mask=in_below, other=0.0).to(tl.float32)
        p, _ = probability_and_slope(sum_, ACTIVATION)
        y = sum_ * p * sum_b
    else:
        y = tl.where(thread % 16 < 8, sum_, sum_b)
        if BIAS:
            y += tl.load(bias + n, mask=inside & (has_bias > 0), other=0.0).to(tl.float32)
    if RESIDUAL:
        y = tl.load(residual + before + n, mask=inside, other=0.0).to(tl.float32) + y * residual_scale
    tl.store(out + before + n, y.to(dtype), mask=inside)


@jit(**MEMBERS)
def row_kernel(
    out, x, lut,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2,
    has_bias_0, has_bias_1, has_bias_2, xa, residual, residual_scale, tiles, up_row, group,
    K: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, NESTED: tl.constexpr,
    ACTIVATION: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    PAIRED: tl.constexpr = ACTIVATION is not None
    STEPS: tl.constexpr = (K + 512 * WARPS - 1) // (512 * WARPS)
    first, programs = tl.program_id(0), tl.num_programs(0)
    thread = thread_index(WARPS)
    # a step's codes are loaded during the one before it
    own, other, code2, offset, code2_b, offset_b = _fetch_pair(
        first, 0, True, thread,
        packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
        packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
        packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
        up_row, K, WARPS, NESTED, PAIRED,
    )  # fmt: skip
    shared = fill_banked_table(lut, thread, x.dtype.element_ty)
    table = shared + thread % 32 * 4
    sum_ = tl.zeros_like(thread).to(tl.float32)
    sum_b = sum_
    steps = tl.cdiv(tiles - first, programs) * STEPS
    for index in range(steps):
        after = index + 1
        next_own, next_other, next_code2, next_offset, next_code2_b, next_offset_b = _fetch_pair(
            first + after // STEPS * programs, after % STEPS, after < steps, thread,
            packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
            packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
            packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
            up_row, K, WARPS, NESTED, PAIRED,
        )  # fmt: skip
        y, y_b = _products(
            x, table, thread, index % STEPS, own, other, code2, offset, code2_b, offset_b, K, WARPS, NESTED
        )
        sum_ += y
        sum_b += y_b
        own, other = next_own, next_other
        code2, offset, code2_b, offset_b = next_code2, next_offset, next_code2_b, next_offset_b
        if after % STEPS == 0:
            done = index // STEPS
            # rooms in turn: one is read until the next barrier, and written again after it
            _finish(
                sum_, sum_b, first + done * programs, shared + (TABLE_BYTES + done % 2 * (WARPS * 64)), thread, out,
                size_0, size_1, size_2, b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1, scale_2, bias_0, bias_1,
                bias_2, has_bias_0, has_bias_1, has_bias_2, xa, residual, residual_scale, up_row, group,
                R, WARPS, ACTIVATION, LORA, BIAS, RESIDUAL,
            )  # fmt: skip
            sum_, sum_b = tl.zeros_like(sum_), tl.zeros_like(sum_b)


@jit
def row_down_kernel(
    out, x, a_0, a_1, a_2, rank_0, rank_1, rank_2, GROUP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x A^T [GROUP, R] in float32: a program has one column."""
    member, r = tl.program_id(0) // R, tl.program_id(0) % R
    a, rank = a_0, rank_0
    if member == 1:
        a, rank = a_1, rank_1
    if member == 2:
        a, rank = a_2, rank_2
    end = tl.where(r < rank, K, 0)
    sum_ = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        factor = tl.load(a + r * K + at, mask=at < end, other=0.0).to(x.dtype.element_ty)
        sum_ += factor.to(tl.float32) * tl.load(x + at, mask=at < end, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(sum_, 0))
