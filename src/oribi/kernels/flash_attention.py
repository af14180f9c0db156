"""Causal attention with soft caps, which no built-in kernel computes: no score ever reaches device memory.

T tokens in documents that lie one after the other, H query heads, K key/value heads, E head_dim. A document's query i
sees its keys max(i - window + 1, 0) .. i, with scores softcap * tanh(scale * q . k / softcap). Where a document has more
keys than queries, its queries are those of the last keys.

Forward keeps out and the log-sum-exp of each query's scores. Backward computes the scores again in two passes, one that
owns rows of dq and one that owns rows of dk and dv, so that nothing is added atomically: two runs are equal to the bit.

Source: FlashAttention-2, Dao 2023 (arXiv:2307.08691).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl


class Tiles(NamedTuple):
    """Queries and keys that a program multiplies at a time, its warps, and tiles that are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


# bytes of shared memory that a program may have -> tiles of the forward, of dq, and of dk and dv, for heads of 129 to 256 numbers.
# Found by compiling: none spills registers in its loop but the first row's dk and dv (33 of 1,120 instructions) and forward (3). It has
# 64 rows for each four warps, without which Hopper's wide products are not used; in the last, two tiles fit.
WIDE_TILES = (
    (232448, (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2))),
    (166912, (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2))),
    (0, (Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2), Tiles(32, 32, 8, 2))),
)


def tiles_for(width: int, device: torch.device) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of the forward, of dq, and of dk and dv.

    Args:
        width: E. device: that the kernels run on.
    """
    if width <= 128:
        return Tiles(128, 64, 8 if width > 64 else 4, 2), *[Tiles(64, 64, 4, 2)] * 2
    return next(tiles for needed, tiles in WIDE_TILES if needed <= shared_bytes(device))


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on a GPU; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def flash_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    softcap: float,
    keys: tuple[torch.Tensor, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every document.

    Args:
        q: [T, H, E]; k, v: [T, K, E], last dimension contiguous.
        cu_seqlens: [docs + 1] int32 offsets of the documents; the last is T. max_length: tokens of the longest.
        scale, window, softcap: as above.
        keys: offsets of the documents' keys, and those of the longest, where they differ from the queries'.

    Returns:
        out [T, H, E] in q's dtype, and the log-sum-exp [H, T] float32.
    """
    tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    tile, _, _ = tiles_for(width, q.device)
    cu_keys = cu_seqlens if keys is None else keys[0]
    launch(
        _forward_kernel, _programs(cu_seqlens, max_length, tile.queries) * heads, q, k, v, out, lse, cu_seqlens, cu_keys,
        -(-max_length // tile.queries), tokens, *_shape(q, k, v), scale, softcap, window or 0,
        width, next_power_of_2(width), tile.queries, tile.keys, window is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def flash_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    softcap: float,
    keys: tuple[torch.Tensor, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, contiguous, in their dtypes; dout and out are [T, H, E], the rest as in forward."""
    tokens, heads, width = q.shape
    dout, out = dout.contiguous(), out.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)  # sum of dout * out of each query: the softmax's gradient subtracts it
    _, tile, key_tile = tiles_for(width, q.device)
    cu_keys, most_keys = (cu_seqlens, max_length) if keys is None else keys
    shared = tokens, *_shape(q, k, v), scale, softcap, window or 0, width, next_power_of_2(width)
    launch(
        _dq_kernel, _programs(cu_seqlens, max_length, tile.queries) * heads, q, k, v, dout, out, dq, lse, delta,
        cu_seqlens, cu_keys, -(-max_length // tile.queries), *shared, tile.queries, tile.keys, window is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = key_tile
    launch(
        _dkv_kernel, _programs(cu_keys, most_keys, tile.keys) * k.shape[1], q, k, v, dout, dk, dv, lse, delta,
        cu_seqlens, cu_keys, -(-most_keys // tile.keys), *shared, tile.queries, tile.keys, window is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq, dk, dv


def _programs(cu_seqlens: torch.Tensor, max_length: int, tile: int) -> int:
    return (len(cu_seqlens) - 1) * -(-max_length // tile)


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    """H, heads of q per head of k, and the strides of tokens and heads."""
    strides = (x.stride(i) for x in (q, k, v) for i in (0, 1))
    return q.shape[1], q.shape[1] // k.shape[1], *strides


@jit
def _place(cu_seqlens, cu_keys, blocks, heads):
    """This program's block, head, and of its document the first query, the queries, the first key, and the keys before the queries."""
    program = tl.program_id(0)
    document = program // heads // blocks
    start = tl.load(cu_seqlens + document)
    length = tl.load(cu_seqlens + document + 1) - start
    first_key = tl.load(cu_keys + document)
    before = tl.load(cu_keys + document + 1) - first_key - length
    return program // heads % blocks, program % heads, start, length, first_key, before


@jit
def _tile(x, start, first, rows, length, token_stride, columns, WIDTH: tl.constexpr):
    """[rows, columns] of one head from a document's token `first` on, zero outside the document."""
    # the base is one number, and what each thread adds to it stays the same from tile to tile
    base = x + (start + first).to(tl.int64) * token_stride
    at = rows[:, None] * token_stride + columns[None, :]
    return tl.load(base + at, mask=_inside(first + rows < length, columns, WIDTH), other=0.0)


@jit
def _store_tile(x, values, start, first, rows, length, token_stride, columns, WIDTH: tl.constexpr):
    base = x + (start + first).to(tl.int64) * token_stride
    at = rows[:, None] * token_stride + columns[None, :]
    inside = _inside(first + rows < length, columns, WIDTH)
    tl.store(base + at, values.to(x.dtype.element_ty), mask=inside)


@jit
def _inside(rows, columns, WIDTH: tl.constexpr):
    inside = rows[:, None]
    if columns.shape[0] != WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return inside


@jit
def _scores(products, scale, softcap):
    """Scores of q . k, and their slope by scale * q . k."""
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scale / softcap * products))
    return softcap * tanh, 1.0 - tanh * tanh


@jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@jit
def _first_key(first_query, window, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the tiles of keys begin that the queries from `first_query` on see."""
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(first_query - window + 1, 0) // KEYS * KEYS
    return lowest


@jit
def _seen(queries, keys, length, before, window, WINDOWED: tl.constexpr):
    seen = (keys <= before + queries) & (queries < length)
    if WINDOWED:
        seen = seen & (before + queries - keys < window)
    return seen


@jit
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, cu_keys, blocks, tokens, heads, group, q_token, q_head, k_token, k_head, v_token, v_head,
    scale, softcap, window,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    block, head, start, length, first_key, before = _place(cu_seqlens, cu_keys, blocks, heads)
    first = block * QUERIES
    if first >= length:
        return
    columns, rows, key_rows = tl.arange(0, COLUMNS), tl.arange(0, QUERIES), tl.arange(0, KEYS)
    queries = first + rows
    q_tile = _tile(q + head * q_head, start, first, rows, length, q_token, columns, WIDTH)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    last = before + tl.minimum(first + QUERIES, length)
    for at in range(_first_key(before + first, window, KEYS, WINDOWED), last, KEYS):
        keys = at + key_rows
        k_tile = _tile(
            k + head // group * k_head, first_key, at, key_rows, before + length, k_token, columns, WIDTH
        )
        scores, _ = _scores(tl.dot(q_tile, tl.trans(k_tile)), scale, softcap)
        scores = tl.where(
            _seen(queries[:, None], keys[None, :], length, before, window, WINDOWED), scores, -float("inf")
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that sees none of these keys
        p = _exp(scores - base[:, None])
        shrink = _exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _tile(
            v + head // group * v_head, first_key, at, key_rows, before + length, v_token, columns, WIDTH
        )
        sums = sums * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
        top = new_top
    inside = queries < length
    total = tl.where(inside, total, 1.0)
    _store_tile(
        out + head * WIDTH, sums / total[:, None], start, first, rows, length, heads * WIDTH, columns, WIDTH
    )
    tl.store(lse + head.to(tl.int64) * tokens + start + queries, top + tl.log(total), mask=inside)


@jit
def _dq_kernel(
    q, k, v, dout, out, dq, lse, delta, cu_seqlens, cu_keys, blocks, tokens, heads, group,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softcap, window,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    block, head, start, length, first_key, before = _place(cu_seqlens, cu_keys, blocks, heads)
    first = block * QUERIES
    if first >= length:
        return
    columns, rows, key_rows = tl.arange(0, COLUMNS), tl.arange(0, QUERIES), tl.arange(0, KEYS)
    queries = first + rows
    q_tile = _tile(q + head * q_head, start, first, rows, length, q_token, columns, WIDTH)
    d_tile = _tile(dout + head * WIDTH, start, first, rows, length, heads * WIDTH, columns, WIDTH)
    o_tile = _tile(out + head * WIDTH, start, first, rows, length, heads * WIDTH, columns, WIDTH)
    at_row = head.to(tl.int64) * tokens + start + queries
    row_delta = tl.sum(d_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + at_row, row_delta, mask=queries < length)
    row_lse = tl.load(lse + at_row, mask=queries < length, other=0.0)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    last = before + tl.minimum(first + QUERIES, length)
    for at in range(_first_key(before + first, window, KEYS, WINDOWED), last, KEYS):
        keys = at + key_rows
        k_tile = _tile(
            k + head // group * k_head, first_key, at, key_rows, before + length, k_token, columns, WIDTH
        )
        v_tile = _tile(
            v + head // group * v_head, first_key, at, key_rows, before + length, v_token, columns, WIDTH
        )
        scores, slope = _scores(tl.dot(q_tile, tl.trans(k_tile)), scale, softcap)
        seen = _seen(queries[:, None], keys[None, :], length, before, window, WINDOWED)
        p = tl.where(seen, _exp(scores - row_lse[:, None]), 0.0)
        dp = tl.dot(d_tile, tl.trans(v_tile))
        ds = p * (dp - row_delta[:, None]) * slope * scale
        sums += tl.dot(ds.to(k_tile.dtype), k_tile)
    _store_tile(dq + head * WIDTH, sums, start, first, rows, length, heads * WIDTH, columns, WIDTH)


@jit
def _dkv_kernel(
    q, k, v, dout, dk, dv, lse, delta, cu_seqlens, cu_keys, blocks, tokens, heads, group,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softcap, window,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    block, kv_head, start, length, first_key, before = _place(cu_seqlens, cu_keys, blocks, kv_heads)
    first, known = block * KEYS, before + length
    if first >= known:
        return
    columns, rows, query_rows = tl.arange(0, COLUMNS), tl.arange(0, KEYS), tl.arange(0, QUERIES)
    keys = first + rows
    k_tile = _tile(k + kv_head * k_head, first_key, first, rows, known, k_token, columns, WIDTH)
    v_tile = _tile(v + kv_head * v_head, first_key, first, rows, known, v_token, columns, WIDTH)
    k_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    v_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    highest = length
    if WINDOWED:
        highest = tl.minimum(first + KEYS - 1 + window - before, length)
    lowest = tl.maximum(first - before, 0) // QUERIES * QUERIES
    for member in range(group):
        head = kv_head * group + member
        for at in range(lowest, highest, QUERIES):
            queries = at + query_rows
            inside = queries < length
            at_row = head.to(tl.int64) * tokens + start + queries
            row_lse = tl.load(lse + at_row, mask=inside, other=0.0)
            row_delta = tl.load(delta + at_row, mask=inside, other=0.0)
            q_tile = _tile(q + head * q_head, start, at, query_rows, length, q_token, columns, WIDTH)
            d_tile = _tile(dout + head * WIDTH, start, at, query_rows, length, heads * WIDTH, columns, WIDTH)
            scores, slope = _scores(tl.dot(k_tile, tl.trans(q_tile)), scale, softcap)
            seen = _seen(queries[None, :], keys[:, None], length, before, window, WINDOWED)
            p = tl.where(seen, _exp(scores - row_lse[None, :]), 0.0)
            v_sums += tl.dot(p.to(d_tile.dtype), d_tile)
            dp = tl.dot(v_tile, tl.trans(d_tile))
            ds = p * (dp - row_delta[None, :]) * slope * scale
            k_sums += tl.dot(ds.to(q_tile.dtype), q_tile)
    _store_tile(dk + kv_head * WIDTH, k_sums, first_key, first, rows, known, kv_heads * WIDTH, columns, WIDTH)
    _store_tile(dv + kv_head * WIDTH, v_sums, first_key, first, rows, known, kv_heads * WIDTH, columns, WIDTH)
