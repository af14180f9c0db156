"""Triton kernels of the gated delta rule in chunks, whose equations and letters are in `kernels/gated_delta.py`.

Forward: `solve_kernel` (G and T^-1 of every chunk), `vectors_kernel` (W and U), `scan_kernel` (states one after the other,
and N), `read_kernel`. Backward makes all but the outputs again; then come `local_kernel`, `scan_back_kernel` (states'
gradients one after the other, and dN), `matrices_kernel` and `gradient_kernel`. With bU = T^-T dN, all that dT and bW need
is there: dT = -bU N' and bW = -bU S'. Only the two scans follow the tokens; the others have a program per chunk and head.

What passes between kernels lies by chunk, [chunks, H, 64, n] or [chunks, H, F, E], with zeros in slots without a token.
`table` [chunks, 2] int32 has each chunk's first token and number of tokens, which is 0 where a fixed number of chunks is
more than the documents have; `first` [docs + 1] int32 has the first chunk of each document.

T^-1 is computed in float32: rows of its 16 x 16 blocks on the diagonal by substitution, what is below from these by
products as exact as float32's. Other products take operands in the inputs' dtype and add up in float32; states stay in
float32 while they pass from chunk to chunk.
"""

from oribi.kernels.dispatch import jit, tl


@jit
def _at(chunk, heads, head):
    """The place of a chunk's head among [chunks, H]."""
    return (chunk * heads + head).to(tl.int64)


@jit
def _tokens(x, start, length, token_stride, first, SIZE: tl.constexpr, COLS: tl.constexpr):
    """Columns from `first` of one head of a chunk's tokens [64, COLS], zero where there is none."""
    slot, col = tl.arange(0, 64), first + tl.arange(0, COLS)
    inside = (slot < length)[:, None]
    if SIZE % COLS:
        inside = inside & (col < SIZE)[None, :]
    at = (start + slot).to(tl.int64)[:, None] * token_stride + col[None, :]
    return tl.load(x + at, mask=inside, other=0.0)


@jit
def _store_tokens(x, values, start, length, token_stride, first, SIZE: tl.constexpr, COLS: tl.constexpr):
    slot, col = tl.arange(0, 64), first + tl.arange(0, COLS)
    inside = (slot < length)[:, None]
    if SIZE % COLS:
        inside = inside & (col < SIZE)[None, :]
    at = (start + slot).to(tl.int64)[:, None] * token_stride + col[None, :]
    tl.store(x + at, values.to(x.dtype.element_ty), mask=inside)


@jit
def _offsets(rows, columns, row_stride):
    return rows[:, None] * row_stride + columns[None, :]


@jit
def _tile(
    x, first_row, first_col, HEIGHT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """[ROWS, COLS] of a matrix [HEIGHT, SIZE], zero outside of it."""
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    if (HEIGHT % ROWS == 0) & (SIZE % COLS == 0):
        return tl.load(x + _offsets(row, col, SIZE))
    inside = (row < HEIGHT)[:, None] & (col < SIZE)[None, :]
    return tl.load(x + _offsets(row, col, SIZE), mask=inside, other=0.0)


@jit
def _store_tile(
    x, values, first_row, first_col,
    HEIGHT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    values = values.to(x.dtype.element_ty)
    if (HEIGHT % ROWS == 0) & (SIZE % COLS == 0):
        tl.store(x + _offsets(row, col, SIZE), values)
    else:
        inside = (row < HEIGHT)[:, None] & (col < SIZE)[None, :]
        tl.store(x + _offsets(row, col, SIZE), values, mask=inside)


@jit
def _decays(total, SIZE: tl.constexpr):
    """D [SIZE, SIZE] of G [SIZE]: the exponential never sees a positive number."""
    slot = tl.arange(0, SIZE)
    past = slot[:, None] >= slot[None, :]
    return tl.exp(tl.where(past, total[:, None] - total[None, :], -float("inf")))


@jit
def _inverse(lower):
    """(I + lower)^-1 [32, 32] of a strictly lower triangle, float32."""
    row, col = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    blocks = tl.sum(tl.reshape(tl.where(row // 16 == col // 16, lower, 0.0), [2, 16, 2, 16]), 2)
    i = tl.arange(0, 16)
    inverses = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, tl.zeros_like(blocks))
    for step in range(1, 16):
        here = (i == step)[None, :, None]
        line = tl.sum(tl.where(here, blocks, 0.0), 1)
        inverses -= tl.where(here, tl.sum(line[:, :, None] * inverses, 1)[:, None, :], 0.0)
    which = tl.arange(0, 2)
    same = which[:, None, None, None] == which[None, None, :, None]
    whole = tl.reshape(tl.where(same, inverses[:, :, None, :], 0.0), [32, 32])
    below = tl.where((row >= 16) & (col < 16), lower, 0.0)
    return whole - _product(_product(whole, below), whole)


@jit
def _product(a, b):
    """a b, as exact as in float32."""
    return tl.dot(a, b, input_precision="tf32x3")


@jit
def solve_kernel(
    k, g, b, table, sums, inverse, k_token, k_head, g_token, b_token, heads, group,
    KEY: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """G and T^-1 of a chunk's head: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], blocks of 32 tokens."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at, k, g, b = _at(chunk, heads, head), k + head // group * k_head, g + head, b + head
    slot = tl.arange(0, 32)
    token = (start + slot).to(tl.int64)
    above, below = slot < length, slot + 32 < length
    a_total = tl.cumsum(tl.load(g + token * g_token, mask=above, other=0.0).to(tl.float32), 0)
    b_decay = tl.load(g + (token + 32) * g_token, mask=below, other=0.0).to(tl.float32)
    b_total = tl.cumsum(b_decay, 0) + tl.sum(tl.where(slot == 31, a_total, 0.0), 0)
    tl.store(sums + at * 64 + slot, a_total)
    tl.store(sums + at * 64 + 32 + slot, b_total)
    a = tl.zeros([32, 32], tl.float32)
    c = tl.zeros([32, 32], tl.float32)
    d = tl.zeros([32, 32], tl.float32)
    for first in range(0, KEY, KEYS):
        col = first + tl.arange(0, KEYS)
        place = token[:, None] * k_token + col[None, :]
        inside = (col < KEY)[None, :]
        a_key = tl.load(k + place, mask=above[:, None] & inside, other=0.0)
        b_key = tl.load(k + place + 32 * k_token, mask=below[:, None] & inside, other=0.0)
        a = tl.dot(a_key, tl.trans(a_key), a)
        c = tl.dot(b_key, tl.trans(a_key), c)
        d = tl.dot(b_key, tl.trans(b_key), d)
    before = slot[:, None] > slot[None, :]
    a_strength = tl.load(b + token * b_token, mask=above, other=0.0).to(tl.float32)[:, None]
    b_strength = tl.load(b + (token + 32) * b_token, mask=below, other=0.0).to(tl.float32)[:, None]
    a = _inverse(tl.where(before, a_strength * a * _decays(a_total, 32), 0.0))
    d = _inverse(tl.where(before, b_strength * d * _decays(b_total, 32), 0.0))
    c = _product(_product(d, b_strength * c * tl.exp(b_total[:, None] - a_total[None, :])), a)
    inverse += at * 4096
    _store_tile(inverse, a, 0, 0, 64, 64, 32, 32)
    _store_tile(inverse, tl.zeros_like(a), 0, 32, 64, 64, 32, 32)
    _store_tile(inverse, -c, 32, 0, 64, 64, 32, 32)
    _store_tile(inverse, d, 32, 32, 64, 64, 32, 32)


@jit
def vectors_kernel(
    k, v, b, table, sums, inverse, w, u, k_token, k_head, v_token, v_head, b_token, heads, group,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """W and U of a chunk's head."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at, slot = _at(chunk, heads, head), tl.arange(0, 64)
    k, v = k + head // group * k_head, v + head * v_head
    token = (start + slot).to(tl.int64)
    strength = tl.load(b + token * b_token + head, mask=slot < length, other=0.0).to(tl.float32)
    solved = _tile(inverse + at * 4096, 0, 0, 64, 64, 64, 64).to(tl.float32)
    of_values = (solved * strength[None, :]).to(k.dtype.element_ty)
    for first in range(0, VALUE, VALUES):
        value = _tokens(v, start, length, v_token, first, VALUE, VALUES)
        _store_tile(u + at * 64 * VALUE, tl.dot(of_values, value), 0, first, 64, VALUE, 64, VALUES)
    of_keys = solved * (strength * tl.exp(tl.load(sums + at * 64 + slot)))[None, :]
    of_keys = of_keys.to(k.dtype.element_ty)
    for first in range(0, KEY, KEYS):
        key = _tokens(k, start, length, k_token, first, KEY, KEYS)
        _store_tile(w + at * 64 * KEY, tl.dot(of_keys, key), 0, first, 64, KEY, 64, KEYS)


@jit
def scan_kernel(
    k, w, n, sums, states, initial, final, table, first, k_token, k_head, heads, group,
    KEY: tl.constexpr, KEYS: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The states before each chunk of a document's head, some columns of them, and N, which goes where U is."""
    blocks: tl.constexpr = (VALUE + VALUES - 1) // VALUES
    program = tl.program_id(0)
    column, head, document = program % blocks * VALUES, program // blocks % heads, program // blocks // heads
    k += head // group * k_head
    slot = tl.arange(0, 64)
    state = tl.zeros([KEYS, VALUES], tl.float32)
    own = _at(document, heads, head) * KEY * VALUE
    if INITIAL:
        state += _tile(initial + own, 0, column, KEY, VALUE, KEYS, VALUES)
    for chunk in range(tl.load(first + document), tl.load(first + document + 1)):
        start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
        at = _at(chunk, heads, head)
        _store_tile(states + at * KEY * VALUE, state, 0, column, KEY, VALUE, KEYS, VALUES)
        reads = _tile(w + at * 64 * KEY, 0, 0, 64, KEY, 64, KEYS)
        new = _tile(n + at * 64 * VALUE, 0, column, 64, VALUE, 64, VALUES).to(tl.float32)
        new -= tl.dot(reads, state.to(reads.dtype))
        _store_tile(n + at * 64 * VALUE, new, 0, column, 64, VALUE, 64, VALUES)
        last = tl.load(sums + at * 64 + 63)
        until = tl.exp(last - tl.load(sums + at * 64 + slot))
        key = _tokens(k, start, length, k_token, 0, KEY, KEYS)
        state = tl.dot(tl.trans(key), (new * until[:, None]).to(key.dtype), state * tl.exp(last))
    if FINAL:
        _store_tile(final + own, state, 0, column, KEY, VALUE, KEYS, VALUES)


@jit
def read_kernel(
    q, k, n, sums, states, out, table, q_token, q_head, k_token, k_head, out_token, out_head, heads, group, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What a chunk's tokens read from the state before the chunk, and from the tokens before them in it."""
    blocks: tl.constexpr = (VALUE + VALUES - 1) // VALUES
    program = tl.program_id(0)
    column, head, chunk = program % blocks * VALUES, program // blocks % heads, program // blocks // heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at = _at(chunk, heads, head)
    q, k, states = q + head // group * q_head, k + head // group * k_head, states + at * KEY * VALUE
    scores = tl.zeros([64, 64], tl.float32)
    sums_of = tl.zeros([64, VALUES], tl.float32)
    for first in range(0, KEY, KEYS):
        query = _tokens(q, start, length, q_token, first, KEY, KEYS)
        key = _tokens(k, start, length, k_token, first, KEY, KEYS)
        scores = tl.dot(query, tl.trans(key), scores)
        sums_of = tl.dot(query, _tile(states, first, column, KEY, VALUE, KEYS, VALUES), sums_of)
    total = tl.load(sums + at * 64 + tl.arange(0, 64))
    new = _tile(n + at * 64 * VALUE, 0, column, 64, VALUE, 64, VALUES)
    sums_of *= tl.exp(total)[:, None]
    sums_of = tl.dot((scores * _decays(total, 64)).to(new.dtype), new, sums_of)
    _store_tokens(out + head * out_head, sums_of * scale, start, length, out_token, column, VALUE, VALUES)


@jit
def local_kernel(
    q, k, do, sums, dn, table, q_token, q_head, k_token, k_head, do_token, do_head, heads, group, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What dN of a chunk's head has of the chunk's own outputs."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at = _at(chunk, heads, head)
    q, k, do = q + head // group * q_head, k + head // group * k_head, do + head * do_head
    scores = tl.zeros([64, 64], tl.float32)
    for first in range(0, KEY, KEYS):
        query = _tokens(q, start, length, q_token, first, KEY, KEYS)
        key = _tokens(k, start, length, k_token, first, KEY, KEYS)
        scores = tl.dot(query, tl.trans(key), scores)
    decays = _decays(tl.load(sums + at * 64 + tl.arange(0, 64)), 64)
    p = tl.trans((scores * decays * scale).to(k.dtype.element_ty))
    for first in range(0, VALUE, VALUES):
        upstream = _tokens(do, start, length, do_token, first, VALUE, VALUES)
        _store_tile(dn + at * 64 * VALUE, tl.dot(p, upstream), 0, first, 64, VALUE, 64, VALUES)


@jit
def scan_back_kernel(
    q, k, w, do, dn, sums, dstates, table, first,
    q_token, q_head, k_token, k_head, do_token, do_head, heads, group, scale,
    KEY: tl.constexpr, KEYS: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind each chunk of a document's head, some columns of them; dN becomes whole."""
    blocks: tl.constexpr = (VALUE + VALUES - 1) // VALUES
    program = tl.program_id(0)
    column, head, document = program % blocks * VALUES, program // blocks % heads, program // blocks // heads
    q, k, do = q + head // group * q_head, k + head // group * k_head, do + head * do_head
    slot = tl.arange(0, 64)
    dstate = tl.zeros([KEYS, VALUES], tl.float32)
    begin, end = tl.load(first + document), tl.load(first + document + 1)
    for back in range(end - begin):
        chunk = end - 1 - back
        start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
        at = _at(chunk, heads, head)
        _store_tile(dstates + at * KEY * VALUE, dstate, 0, column, KEY, VALUE, KEYS, VALUES)
        total, last = tl.load(sums + at * 64 + slot), tl.load(sums + at * 64 + 63)
        key = _tokens(k, start, length, k_token, 0, KEY, KEYS)
        new = tl.dot(key, dstate.to(key.dtype)) * tl.exp(last - total)[:, None]
        new += _tile(dn + at * 64 * VALUE, 0, column, 64, VALUE, 64, VALUES).to(tl.float32)
        _store_tile(dn + at * 64 * VALUE, new, 0, column, 64, VALUE, 64, VALUES)
        upstream = _tokens(do, start, length, do_token, column, VALUE, VALUES).to(tl.float32)
        upstream = (upstream * (scale * tl.exp(total))[:, None]).to(key.dtype)
        query = _tokens(q, start, length, q_token, 0, KEY, KEYS)
        dstate = tl.dot(tl.trans(query), upstream, dstate * tl.exp(last))
        reads = _tile(w + at * 64 * KEY, 0, 0, 64, KEY, 64, KEYS)
        dstate = tl.dot(tl.trans(reads), (-new).to(key.dtype), dstate)


@jit
def matrices_kernel(
    k, v, b, do, n, dn, inverse, sums, dp, dt, dv, dg, db, table,
    k_token, k_head, v_token, v_head, b_token, do_token, do_head, dv_token, dg_token, db_token, heads, group, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of a chunk's head: dv; bU, which goes where dN is; the gradients of P and of T by the products of rows that they
    scale, P's with its decays and T's with decays and b; and what T gives to db and to the gradient of G.
    """
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at, slot = _at(chunk, heads, head), tl.arange(0, 64)
    k, v, do = k + head // group * k_head, v + head * v_head, do + head * do_head
    n, dn = n + at * 64 * VALUE, dn + at * 64 * VALUE
    token = (start + slot).to(tl.int64)
    strength = tl.load(b + token * b_token + head, mask=slot < length, other=0.0).to(tl.float32)
    solved = tl.trans(_tile(inverse + at * 4096, 0, 0, 64, 64, 64, 64))
    p_sum = tl.zeros([64, 64], tl.float32)
    t_sum = tl.zeros([64, 64], tl.float32)
    dstrength = tl.zeros([64], tl.float32)
    for column in range(0, VALUE, VALUES):
        new = tl.trans(_tile(n, 0, column, 64, VALUE, 64, VALUES))
        p_sum = tl.dot(_tokens(do, start, length, do_token, column, VALUE, VALUES), new, p_sum)
        bu = tl.dot(solved, _tile(dn, 0, column, 64, VALUE, 64, VALUES))
        _store_tile(dn, bu, 0, column, 64, VALUE, 64, VALUES)
        t_sum = tl.dot(bu.to(new.dtype), new, t_sum)
        value = _tokens(v, start, length, v_token, column, VALUE, VALUES).to(tl.float32)
        dstrength += tl.sum(bu * value, 1)
        bu *= strength[:, None]
        _store_tokens(dv + head * VALUE, bu, start, length, dv_token, column, VALUE, VALUES)
    decays = _decays(tl.load(sums + at * 64 + slot), 64)
    _store_tile(dp + at * 4096, p_sum * decays * scale, 0, 0, 64, 64, 64, 64)
    t_sum = tl.where(slot[:, None] > slot[None, :], -t_sum * decays, 0.0)
    _store_tile(dt + at * 4096, t_sum * strength[:, None], 0, 0, 64, 64, 64, 64)
    kk = tl.zeros([64, 64], tl.float32)
    for first in range(0, KEY, KEYS):
        key = _tokens(k, start, length, k_token, first, KEY, KEYS)
        kk = tl.dot(key, tl.trans(key), kk)
    t_sum *= kk
    tl.store(db + token * db_token + head, dstrength + tl.sum(t_sum, 1), mask=slot < length)
    t_sum *= strength[:, None]
    tl.store(dg + token * dg_token + head, tl.sum(t_sum, 1) - tl.sum(t_sum, 0), mask=slot < length)


@jit
def gradient_kernel(
    q, k, b, do, n, bu, dp, dt, sums, states, dstates, dq, dk, dg, db, table,
    q_token, q_head, k_token, k_head, b_token, do_token, do_head, dq_token, dk_token, dg_token, db_token,
    heads, group, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, g and b of a chunk's head; dq and dk are those of one value head."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = tl.load(table + 2 * chunk), tl.load(table + 2 * chunk + 1)
    if length == 0:
        return
    at, slot = _at(chunk, heads, head), tl.arange(0, 64)
    q, k, do = q + head // group * q_head, k + head // group * k_head, do + head * do_head
    n, bu, dp, dt = n + at * 64 * VALUE, bu + at * 64 * VALUE, dp + at * 4096, dt + at * 4096
    states, dstates = states + at * KEY * VALUE, dstates + at * KEY * VALUE
    token = (start + slot).to(tl.int64)
    strength = tl.load(b + token * b_token + head, mask=slot < length, other=0.0).to(tl.float32)
    total, last = tl.load(sums + at * 64 + slot), tl.load(sums + at * 64 + 63)
    since, until = tl.exp(total), tl.exp(last - total)
    dtotal = tl.load(dg + token * dg_token + head, mask=slot < length, other=0.0)
    dstrength = tl.load(db + token * db_token + head, mask=slot < length, other=0.0)
    # what the sum of all decays receives
    dlast = tl.zeros([64], tl.float32)
    kept = tl.zeros([KEYS], tl.float32)
    for first in range(0, KEY, KEYS):
        dquery = tl.zeros([64, KEYS], tl.float32)
        dread = tl.zeros([64, KEYS], tl.float32)
        dwrite = tl.zeros([64, KEYS], tl.float32)
        for column in range(0, VALUE, VALUES):
            state = tl.trans(_tile(states, first, column, KEY, VALUE, KEYS, VALUES))
            upstream = _tokens(do, start, length, do_token, column, VALUE, VALUES)
            dquery = tl.dot(upstream, state, dquery)
            dread = tl.dot(_tile(bu, 0, column, 64, VALUE, 64, VALUES), state, dread)
            dstate = tl.trans(_tile(dstates, first, column, KEY, VALUE, KEYS, VALUES))
            dwrite = tl.dot(_tile(n, 0, column, 64, VALUE, 64, VALUES), dstate, dwrite)
            kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        query = _tokens(q, start, length, q_token, first, KEY, KEYS)
        key = _tokens(k, start, length, k_token, first, KEY, KEYS)
        of_p = _tile(dp, 0, 0, 64, 64, 64, 64)
        dquery = tl.dot(of_p, key, dquery * (since * scale)[:, None])
        _store_tokens(dq + head * KEY, dquery, start, length, dq_token, first, KEY, KEYS)
        dtotal += tl.sum(dquery * query.to(tl.float32), 1)
        dwrite *= until[:, None]
        dlast += tl.sum(dwrite * key.to(tl.float32), 1)
        dwrite = tl.dot(tl.trans(of_p), query, dwrite)
        dtotal -= tl.sum(dwrite * key.to(tl.float32), 1)
        dread *= -since[:, None]
        along = tl.sum(dread * key.to(tl.float32), 1)
        dstrength += along
        dtotal += along * strength
        of_t = _tile(dt, 0, 0, 64, 64, 64, 64)
        dwrite = tl.dot(of_t, key, dwrite + dread * strength[:, None])
        dwrite = tl.dot(tl.trans(of_t), key, dwrite)
        _store_tokens(dk + head * KEY, dwrite, start, length, dk_token, first, KEY, KEYS)
    dtotal += tl.where(slot == 63, tl.sum(dlast, 0) + tl.exp(last) * tl.sum(kept, 0), 0.0)
    tl.store(dg + token * dg_token + head, tl.cumsum(dtotal, 0, reverse=True), mask=slot < length)
    tl.store(db + token * db_token + head, dstrength, mask=slot < length)
