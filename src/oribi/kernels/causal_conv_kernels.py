"""Triton kernels of the causal convolution, whose equations and letters are in `kernels/causal_conv.py`.

A program has a tile of tokens and channels: the W reads of an input fall into one tile, and memory gives it once.
"""

from oribi.kernels.dispatch import jit, tl

# All but dweight's kernel are launched without fused multiply-adds: z must come out the same in forward and backward.


@jit
def _place(SIZE: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    """The tokens and the channels of this program."""
    blocks: tl.constexpr = (SIZE + COLS - 1) // COLS
    row = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)
    return row, (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)


@jit
def _at(row, stride, col):
    return row.to(tl.int64)[:, None] * stride + col[None, :]


@jit
def _inputs(x_ptr, before_ptr, row, col, seen, x_stride, before_stride, BEFORE: tl.constexpr):
    """u of some tokens, zero where they are not seen."""
    u = tl.load(x_ptr + _at(row, x_stride, col), mask=seen, other=0.0).to(tl.float32)
    if BEFORE:
        u *= tl.load(before_ptr + _at(row, before_stride, col), mask=seen, other=0.0).to(tl.float32)
        u = u.to(x_ptr.dtype.element_ty).to(tl.float32)
    return u


@jit
def _convolved(
    x_ptr, before_ptr, weight_ptr, bias_ptr, start_ptr, row, col, tokens, x_stride, before_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    BIAS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """z of a tile."""
    z = tl.zeros([TOKENS, COLS], dtype=tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + col, mask=col < SIZE, other=0.0).to(tl.float32)[None, :]
    start = tl.load(start_ptr + row, mask=row < tokens, other=0)
    for back in tl.static_range(WIDTH):
        seen = ((row - back >= start) & (row < tokens))[:, None] & (col < SIZE)[None, :]
        u = _inputs(x_ptr, before_ptr, row - back, col, seen, x_stride, before_stride, BEFORE)
        weight = tl.load(weight_ptr + col * WIDTH + (WIDTH - 1 - back), mask=col < SIZE, other=0.0)
        z += u * weight.to(tl.float32)[None, :]
    return z


@jit(do_not_specialize=["tokens"])
def forward_kernel(
    x_ptr, before_ptr, after_ptr, weight_ptr, bias_ptr, start_ptr, y_ptr,
    tokens, x_stride, before_stride, after_stride, y_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    row, col = _place(SIZE, TOKENS, COLS)
    inside = (row < tokens)[:, None] & (col < SIZE)[None, :]
    y = _convolved(
        x_ptr, before_ptr, weight_ptr, bias_ptr, start_ptr, row, col, tokens, x_stride, before_stride,
        SIZE, WIDTH, TOKENS, COLS, BIAS, BEFORE,
    )  # fmt: skip
    if SILU:
        y *= tl.sigmoid(y)
    if AFTER:
        y *= tl.load(after_ptr + _at(row, after_stride, col), mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + _at(row, y_stride, col), y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens"])
def output_kernel(
    dy_ptr, x_ptr, before_ptr, after_ptr, weight_ptr, bias_ptr, start_ptr, dz_ptr, dafter_ptr,
    tokens, dy_stride, x_stride, before_stride, after_stride, dz_stride, dafter_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """dz, which may go where dy is, and dafter, which may go where after is: neither is read for another token."""
    row, col = _place(SIZE, TOKENS, COLS)
    inside = (row < tokens)[:, None] & (col < SIZE)[None, :]
    dz = tl.load(dy_ptr + _at(row, dy_stride, col), mask=inside, other=0.0).to(tl.float32)
    z = _convolved(
        x_ptr, before_ptr, weight_ptr, bias_ptr, start_ptr, row, col, tokens, x_stride, before_stride,
        SIZE, WIDTH, TOKENS, COLS, BIAS, BEFORE,
    )  # fmt: skip
    y, slope = z, z
    if SILU:
        p = tl.sigmoid(z)
        y, slope = z * p, p * (1 + z * (1 - p))
    if AFTER:
        after = tl.load(after_ptr + _at(row, after_stride, col), mask=inside, other=0.0).to(tl.float32)
        dafter = (dz * y).to(dafter_ptr.dtype.element_ty)
        tl.store(dafter_ptr + _at(row, dafter_stride, col), dafter, mask=inside)
        dz *= after
    if SILU:
        dz *= slope
    tl.store(dz_ptr + _at(row, dz_stride, col), dz.to(dz_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens"])
def input_kernel(
    dz_ptr, x_ptr, before_ptr, weight_ptr, start_ptr, dx_ptr, dbefore_ptr,
    tokens, dz_stride, x_stride, before_stride, dx_stride, dbefore_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dx and dbefore, which may go where x and before are: of other tokens, dz alone is read."""
    row, col = _place(SIZE, TOKENS, COLS)
    inside = (row < tokens)[:, None] & (col < SIZE)[None, :]
    du = tl.zeros([TOKENS, COLS], dtype=tl.float32)
    for ahead in tl.static_range(WIDTH):
        later = row + ahead
        seen = later < tokens
        start = tl.load(start_ptr + later, mask=seen, other=0)
        seen = (seen & (start <= row))[:, None] & (col < SIZE)[None, :]
        dz = tl.load(dz_ptr + _at(later, dz_stride, col), mask=seen, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col * WIDTH + (WIDTH - 1 - ahead), mask=col < SIZE, other=0.0)
        du += dz * weight.to(tl.float32)[None, :]
    dx = du
    if BEFORE:
        x = tl.load(x_ptr + _at(row, x_stride, col), mask=inside, other=0.0).to(tl.float32)
        before = tl.load(before_ptr + _at(row, before_stride, col), mask=inside, other=0.0).to(tl.float32)
        dbefore = (du * x).to(dbefore_ptr.dtype.element_ty)
        tl.store(dbefore_ptr + _at(row, dbefore_stride, col), dbefore, mask=inside)
        dx = du * before
    tl.store(dx_ptr + _at(row, dx_stride, col), dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens", "splits"])
def weight_kernel(
    dz_ptr, x_ptr, before_ptr, start_ptr, partial_ptr, tokens, splits, dz_stride, x_stride, before_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """One split's share of dw[W-1-back] for `back` < W, and of dbias for `back` = W."""
    blocks: tl.constexpr = (SIZE + COLS - 1) // COLS
    part = tl.program_id(0) // blocks
    back, split = part % (WIDTH + 1), part // (WIDTH + 1)
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    total = tl.zeros([TOKENS, COLS], dtype=tl.float32)
    for tile in range(split, tl.cdiv(tokens, TOKENS), splits):
        row = tile * TOKENS + tl.arange(0, TOKENS)
        inside = (row < tokens)[:, None] & (col < SIZE)[None, :]
        product = tl.load(dz_ptr + _at(row, dz_stride, col), mask=inside, other=0.0).to(tl.float32)
        if back < WIDTH:
            start = tl.load(start_ptr + row, mask=row < tokens, other=0)
            seen = (row - back >= start)[:, None] & inside
            product *= _inputs(x_ptr, before_ptr, row - back, col, seen, x_stride, before_stride, BEFORE)
        total += product
    tl.store(partial_ptr + part.to(tl.int64) * SIZE + col, tl.sum(total, axis=0), mask=col < SIZE)


@jit
def step_kernel(
    x_ptr, before_ptr, after_ptr, weight_ptr, bias_ptr, window_ptr, y_ptr, x_stride, before_stride, after_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < SIZE
    u = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        u *= tl.load(before_ptr + row * before_stride + col, mask=inside, other=0.0).to(tl.float32)
    new = u.to(window_ptr.dtype.element_ty)
    z = tl.zeros([BLOCK], dtype=tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col * WIDTH + (WIDTH - 1), mask=inside, other=0.0).to(tl.float32)
    z += new.to(tl.float32) * weight
    window = window_ptr + (row * SIZE + col) * (WIDTH - 1)
    # from the latest to the first: each is read before what follows it moves into its place
    for slot in tl.static_range(WIDTH - 2, -1, -1):
        held = tl.load(window + slot, mask=inside, other=0.0)
        tl.store(window + slot, new, mask=inside)
        weight = tl.load(weight_ptr + col * WIDTH + slot, mask=inside, other=0.0).to(tl.float32)
        z += held.to(tl.float32) * weight
        new = held
    y = z
    if SILU:
        y = z * tl.sigmoid(z)
    if AFTER:
        y *= tl.load(after_ptr + row * after_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * SIZE + col, y.to(y_ptr.dtype.element_ty), mask=inside)
