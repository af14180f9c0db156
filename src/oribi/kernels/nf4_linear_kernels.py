"""Kernels of `nf4_linear` and `block_linear`, which say what they compute."""

from oribi.kernels.dispatch import jit, tl
from oribi.kernels.gated_mlp import probability_and_slope
from oribi.kernels.ggml_blocks import block_values
from oribi.kernels.nf4 import UNSPECIALIZED, group_member
from oribi.kernels.nf4_lookup import fill_table, operand_order, tile_rows, values, values_by_load


@jit
def down_kernel(
    out, x, a_0, a_1, a_2, rank_0, rank_1, rank_2, tokens, k,
    GROUP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(0) % GROUP
    chunk = tl.program_id(0) // GROUP % (R // 16)
    part = tl.program_id(0) // GROUP // (R // 16)
    a, rank = a_0, rank_0
    if member == 1:
        a, rank = a_1, rank_1
    if member == 2:
        a, rank = a_2, rank_2
    r = chunk * 16 + tl.arange(0, 16)
    t = tl.arange(0, T)
    sum_ = tl.zeros((16, T), dtype=tl.float32)
    for start in tl.static_range(0, PART, BLOCK_K):
        at = part * PART + start + tl.arange(0, BLOCK_K)
        k_in = at < k
        factor = tl.load(
            a + r[:, None] * k + at[None, :], mask=(r < rank)[:, None] & k_in[None, :], other=0.0
        )
        row = tl.load(x + t[:, None] * k + at[None, :], mask=(t < tokens)[:, None] & k_in[None, :], other=0.0)
        sum_ = tl.dot(factor.to(x.dtype.element_ty), tl.trans(row), sum_, input_precision="ieee")
    to = ((part * GROUP + member) * tokens + t[None, :]) * R + r[:, None]
    tl.store(out + to, sum_, mask=(t < tokens)[None, :])


# options of a kernel over the members of a group
MEMBERS = {
    "do_not_specialize": [*UNSPECIALIZED["do_not_specialize"], "one", "up_row", "tokens", "tiles",
                          *(f"{name}_{i}" for name in ("rank", "has_bias") for i in range(3))],
    "do_not_specialize_on_alignment": [f"{name}_{i}" for name in ("absmax", "absmax2", "code2", "offset") for i in range(3)],
}  # fmt: skip


@jit(**MEMBERS)
def up_kernel(
    out, x, lut,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1, scale_2, bias_0, bias_1, bias_2,
    has_bias_0, has_bias_1, has_bias_2, xa, residual, residual_scale, partials, counters,
    tokens, n_out, up_row, group, one, K: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, SPLITS: tl.constexpr, NESTED: tl.constexpr,
    LOOKS_UP: tl.constexpr, ACTIVATION: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, BYTES: tl.constexpr, W_PARTS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr,
    QUANTS: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, WORD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    # codes are NF4's, or where BYTES > 0 those of a `BlockType` with these fields, of which a program takes COLUMNS at a time
    place, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if ACTIVATION is not None:
        tile, before, size = place, size_0 * 0, size_0
        packed, absmax, absmax2, code2, offset = packed_0, absmax_0, absmax2_0, code2_0, offset_0
    else:
        tile, before, size, packed, absmax, absmax2, code2, offset = group_member(
            place, tl.cdiv(size_0, ROWS), tl.cdiv(size_1, ROWS),
            packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
            packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
            packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
        )  # fmt: skip
    table = 0
    if LOOKS_UP:
        table = fill_table(lut, x.dtype.element_ty, tokens)
        tl.debug_barrier()
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, T)
    sum_ = tl.zeros((ROWS, T), dtype=tl.float32)
    up = tl.zeros((ROWS, T), dtype=tl.float32)
    if split == 0:  # while the others read codes
        sum_, up = _lora_terms(
            sum_, up, n, t, before, size, up_row, size_0, size_1, b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1,
            scale_2, bias_0, bias_1, bias_2, has_bias_0, has_bias_1, has_bias_2, xa, group, tokens, x.dtype.element_ty,
            PARTS, R, ACTIVATION, LORA, BIAS,
        )  # fmt: skip
    if BYTES > 0:
        sum_, up = _block_products(
            sum_, up, x, n, t, split, size, up_row, tokens, packed, packed_1, K, SPLITS, COLUMNS, BYTES, W_PARTS, LENGTH, BITS,
            QUANTS, HIGH, ZERO, MINIMUM, WORD, APART, ACTIVATION,
        )  # fmt: skip
    else:
        sum_, up = _products(
            sum_, up, x, lut, table, n, tile * ROWS + tile_rows(ROWS, WARPS), t, split, size, up_row, tokens, packed, absmax,
            absmax2, code2, offset, packed_1, absmax_1, absmax2_1, code2_1, offset_1, one, K, SPLITS, NESTED, LOOKS_UP,
            ACTIVATION,
        )  # fmt: skip
    last = True
    if SPLITS > 1:
        PAIR: tl.constexpr = 1 if ACTIVATION is None else 2
        of_program = tl.arange(0, ROWS)[:, None] * T + t[None, :]
        mine = partials + tl.program_id(0).to(tl.int64) * (PAIR * ROWS * T)
        tl.store(mine + of_program, sum_)
        if ACTIVATION is not None:
            tl.store(mine + ROWS * T + of_program, up)
        tl.debug_barrier()  # all of the program's sums are written before it is counted
        last = tl.atomic_add(counters + place, 1) == SPLITS - 1
        if last:
            tl.debug_barrier()
            first = partials + place.to(tl.int64) * (SPLITS * PAIR * ROWS * T)
            sum_, up = sum_ * 0.0, up * 0.0
            for s in tl.static_range(SPLITS):
                # past the first cache, which another program's sums may have left stale
                sum_ += tl.load(first + s * (PAIR * ROWS * T) + of_program, cache_modifier=".cg")
                if ACTIVATION is not None:
                    up += tl.load(first + (s * PAIR + 1) * (ROWS * T) + of_program, cache_modifier=".cg")
            tl.store(counters + place, 0)
    if last:
        if ACTIVATION is not None:
            p, _ = probability_and_slope(sum_, ACTIVATION)
            sum_ = sum_ * p * up
        inside = (n < size)[:, None] & (t < tokens)[None, :]
        to = t[None, :] * n_out + (before + n)[:, None]
        if RESIDUAL:
            sum_ = tl.load(residual + to, mask=inside, other=0.0).to(tl.float32) + sum_ * residual_scale
        tl.store(out + to, sum_.to(out.dtype.element_ty), mask=inside)


@jit
def _lora_terms(
    sum_, up, n, t, before, size, up_row, size_0, size_1, b_0, b_1, b_2, rank_0, rank_1, rank_2, scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2, has_bias_0, has_bias_1, has_bias_2, xa, group, tokens, dtype: tl.constexpr,
    PARTS: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Both sums [ROWS, T] with the biases and LoRA terms of a program's rows."""
    member = (before >= size_0).to(tl.int32) + (before >= size_0 + size_1).to(tl.int32)
    if ACTIVATION is not None:
        member = 0
    b, rank, scale, bias, has_bias = b_0, rank_0, scale_0, bias_0, has_bias_0
    if member == 1:
        b, rank, scale, bias, has_bias = b_1, rank_1, scale_1, bias_1, has_bias_1
    if member == 2:
        b, rank, scale, bias, has_bias = b_2, rank_2, scale_2, bias_2, has_bias_2
    sum_ = _add_lora(
        sum_, n, t, size, b, rank, scale, bias, has_bias, xa + member * tokens * R, group, tokens,
        dtype, PARTS, R, LORA, BIAS,
    )  # fmt: skip
    if ACTIVATION is not None:
        if group > 1:
            b, rank, scale, bias, has_bias = b_1, rank_1, scale_1, bias_1, has_bias_1
        up = _add_lora(
            up, n + up_row, t, size + up_row, b, rank, scale, bias, has_bias, xa + (group - 1) * tokens * R, group,
            tokens, dtype, PARTS, R, LORA, BIAS,
        )  # fmt: skip
    return sum_, up


@jit
def _products(
    sum_, up, x, lut, table, n, of_tile, t, split, size, up_row, tokens, packed, absmax, absmax2, code2, offset, packed_1,
    absmax_1, absmax2_1, code2_1, offset_1, one, K: tl.constexpr, SPLITS: tl.constexpr, NESTED: tl.constexpr,
    LOOKS_UP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Both sums [ROWS, T] with W x^T over a program's part of K."""
    # what a block needs is loaded two blocks before: a warp waits at the first use of a load that is not there yet
    BLOCKS: tl.constexpr = (K // 64 + SPLITS - 1) // SPLITS
    block = split * BLOCKS
    row = _load_x(x, t, tokens, block, K)
    row_1 = _load_x(x, t, tokens, block + 1, K)
    end = tl.where(
        block + 1 < (split + 1) * BLOCKS, size, 0
    )  # past the program's part there is nothing to load
    codes, inner, outer = _load_block(of_tile, n, size, block, packed, absmax, absmax2, one, K, NESTED)
    codes_1, inner_1, outer_1 = _load_block(
        of_tile, n, end, block + 1, packed, absmax, absmax2, one, K, NESTED
    )
    if ACTIVATION is not None:
        up_end = tl.where(end > 0, up_row + size, 0)
        codes_up, inner_up, outer_up = _load_block(
            of_tile + up_row, n + up_row, up_row + size, block, packed_1, absmax_1, absmax2_1, one, K, NESTED
        )
        codes_up_1, inner_up_1, outer_up_1 = _load_block(
            of_tile + up_row, n + up_row, up_end, block + 1, packed_1, absmax_1, absmax2_1, one, K, NESTED
        )
    for step in range(BLOCKS):
        ahead = block + step + 2
        end = tl.where(ahead < (split + 1) * BLOCKS, size, 0)
        row_2 = _load_x(x, t, tokens, ahead, K)
        codes_2, inner_2, outer_2 = _load_block(
            of_tile, n, end, ahead, packed, absmax, absmax2, one, K, NESTED
        )
        if ACTIVATION is not None:
            up_end = tl.where(end > 0, up_row + size, 0)
            codes_up_2, inner_up_2, outer_up_2 = _load_block(
                of_tile + up_row, n + up_row, up_end, ahead, packed_1, absmax_1, absmax2_1, one, K, NESTED
            )
        xt = tl.trans(operand_order(row))
        scales = _scales(inner, outer, code2, offset, NESTED)
        w = _values(codes, lut, table, LOOKS_UP, x.dtype.element_ty)
        sum_ += tl.dot(w, xt, input_precision="ieee") * scales[:, None]
        row, row_1 = row_1, row_2
        codes, inner, outer = codes_1, inner_1, outer_1
        codes_1, inner_1, outer_1 = codes_2, inner_2, outer_2
        if ACTIVATION is not None:
            scales = _scales(inner_up, outer_up, code2_1, offset_1, NESTED)
            w = _values(codes_up, lut, table, LOOKS_UP, x.dtype.element_ty)
            up += tl.dot(w, xt, input_precision="ieee") * scales[:, None]
            codes_up, inner_up, outer_up = codes_up_1, inner_up_1, outer_up_1
            codes_up_1, inner_up_1, outer_up_1 = codes_up_2, inner_up_2, outer_up_2
    return sum_, up


@jit
def _block_products(
    sum_, up, x, n, t, split, size, up_row, tokens, packed, packed_up, K: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, BYTES: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr,
    QUANTS: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, WORD: tl.constexpr,
    APART: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Both sums [ROWS, T] with W x^T over a program's part of K, of ggml's blocks: values rounded to x's dtype as if written."""
    VALUES: tl.constexpr = PARTS * LENGTH
    BLOCK_WORDS: tl.constexpr = BYTES // WORD
    ROW_WORDS: tl.constexpr = K // VALUES * BLOCK_WORDS
    # a step is a block, COLUMNS at a time, or several small ones
    STEP: tl.constexpr = VALUES if VALUES > COLUMNS else COLUMNS
    STEPS: tl.constexpr = ((K + STEP - 1) // STEP + SPLITS - 1) // SPLITS
    GROUP: tl.constexpr = APART if BITS == 8 else 2 * APART  # columns
    unit = tl.arange(0, COLUMNS // GROUP)
    for step in range(STEPS):
        first = (split * STEPS + step) * STEP
        # what does not change from step to step is known: a group's place in its block
        for chunk in tl.static_range(0, STEP, COLUMNS):
            k = first + chunk + tl.arange(0, COLUMNS)
            xt = tl.trans(
                tl.load(
                    x + t[:, None] * K + k[None, :], mask=(t < tokens)[:, None] & (k < K)[None, :], other=0.0
                )
            )
            block = first // VALUES + unit // (VALUES // GROUP)
            of_block = ((chunk // GROUP + unit) % (VALUES // GROUP))[None, :, None, None, None, None, None]
            inside = ((n < size)[:, None] & (block < K // VALUES)[None, :])[
                :, :, None, None, None, None, None
            ]
            start = (n[:, None] * ROW_WORDS + block[None, :] * BLOCK_WORDS)[
                :, :, None, None, None, None, None
            ]
            w = block_values(
                packed, start, of_block, inside, PARTS, LENGTH, BITS, QUANTS, HIGH, ZERO, MINIMUM, WORD, APART
            )
            w = tl.reshape(w.to(x.dtype.element_ty), [n.shape[0], COLUMNS])
            sum_ = tl.dot(w, xt, sum_, input_precision="ieee")
            if ACTIVATION is not None:
                w = block_values(
                    packed_up, start + up_row * ROW_WORDS, of_block, inside, PARTS, LENGTH, BITS, QUANTS, HIGH, ZERO, MINIMUM, WORD, APART
                )  # fmt: skip
                w = tl.reshape(w.to(x.dtype.element_ty), [n.shape[0], COLUMNS])
                up = tl.dot(w, xt, up, input_precision="ieee")
    return sum_, up


@jit
def _load_x(x, t, tokens, block, K: tl.constexpr):
    """One block [T, 64] of x's columns, zero past the last."""
    at = block * 64 + tl.arange(0, 64)
    return tl.load(
        x + t[:, None] * K + at[None, :], mask=(t < tokens)[:, None] & (at < K)[None, :], other=0.0
    )


@jit
def _load_block(of_tile, n, end, block, packed, absmax, absmax2, one, K: tl.constexpr, NESTED: tl.constexpr):
    """What one block of rows below `end` needs: codes in the shape of `tile_rows` and 8 words, and both parts of its scales
    [ROWS]; zero past the last block.
    """
    word = tl.arange(0, 8)
    # `one` is 1, which the compiler must not know: it then loads two words per thread, as `nf4_lookup` wants them, not four
    word = (word // 2 * (2 * one) + word % 2)[None, None, None, None, :]
    end = tl.where(block < K // 64, end, 0)
    at = (of_tile * (K // 8) + block * 8)[:, :, :, :, None] + word
    codes = tl.load(
        packed.to(tl.pointer_type(tl.int32)) + at, mask=(of_tile < end)[:, :, :, :, None], other=0
    )
    at = n * (K // 64) + block
    inner = tl.load(absmax + at, mask=n < end, other=0)
    if NESTED:
        outer = tl.load(absmax2 + at // 256, mask=n < end, other=0.0)
    else:
        outer = tl.zeros_like(inner)
    return codes, inner, outer


@jit
def _scales(inner, outer, code2, offset, NESTED: tl.constexpr):
    """Scales [ROWS] of their parts; of what was not loaded anything finite, for codes of zeros meet an x of zeros."""
    if NESTED:
        scale = tl.load(code2 + inner.to(tl.int32)) * outer + tl.load(offset)
    else:
        scale = inner
    return scale


@jit
def _values(codes, lut, table, LOOKS_UP: tl.constexpr, dtype: tl.constexpr):
    if LOOKS_UP:
        w = values(codes, table, dtype)
    else:
        w = values_by_load(codes, lut, dtype)
    return w


@jit
def _add_lora(
    sum_, n, t, size, b, rank, scale, bias, has_bias, xa, group, tokens, dtype: tl.constexpr, PARTS: tl.constexpr,
    R: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """sum_ [ROWS, T] with a projection's bias and LoRA term."""
    if LORA:
        # beside a table outside of Triton's account, a factor of more columns would not fit into a program's 48 KB
        CHUNK: tl.constexpr = R if R < 64 else 64
        for start in tl.static_range(0, R, CHUNK):
            r = start + tl.arange(0, CHUNK)
            low = tl.zeros((CHUNK, t.shape[0]), dtype=tl.float32)
            for part in tl.static_range(PARTS):
                at = part * group * tokens * R + t[None, :] * R + r[:, None]
                low += tl.load(xa + at, mask=(t < tokens)[None, :], other=0.0)
            at = n.to(tl.int64)[:, None] * rank + r[None, :]
            factor = tl.load(b + at, mask=(n < size)[:, None] & (r < rank)[None, :], other=0.0)
            factor = (factor.to(tl.float32) * scale).to(dtype)
            sum_ = tl.dot(factor, low.to(dtype), sum_, input_precision="ieee")
    if BIAS:
        sum_ += tl.load(bias + n, mask=n < size * has_bias, other=0.0).to(tl.float32)[:, None]
    return sum_
