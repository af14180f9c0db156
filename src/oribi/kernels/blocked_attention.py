"""Causal attention of heads that are too wide for a flash kernel: matrix products of blocks of queries, scores in float32.

B rows, S tokens per row, H query heads, K key/value heads, E head_dim, N queries of a block, C keys that the block may see.

    X = scale Q k^T, masked      P = softmax(X)      out = P v
    dP = dO v^T      dX = P (dP - rowsum(dO out)) scale      dq = dX k      dk = dX^T Q      dv = P^T dO

The query heads of one key head are rows of one product, so no key is repeated. Only one block's scores exist at a time,
in float32; P and dX are rounded to the operands' dtype. Blocks follow each other in one order and add up in float32:
two runs are equal to the bit. What a kernel does is the mask and the softmax between the products; nothing depends on
the documents' places on the host, so a recorded step serves all packs of its size. Where there are more keys than queries,
the queries are those of the last keys.
"""

from typing import NamedTuple

import torch

from oribi.kernels.dispatch import jit, launch, tl, use_triton, wide

# scores of a block over all heads: in backward, float32 and 16 bits of two such blocks take 400 MB
SCORES = 2**25
# rows and keys that a program looks at together
_ROWS, _TILE = 8, 128


def queries_per_block(rows: int, heads: int, length: int) -> int:
    """N.

    Args:
        rows: B. heads: H. length: S, the most keys that a block sees.
    """
    fitting = SCORES // max(rows * heads * length, 1) // 64 * 64
    return min(max(fitting, 64), 1024)


def blocked_backward_bytes(
    rows: int, heads: int, kv_heads: int, length: int, width: int, itemsize: int
) -> int:
    """Device bytes that `blocked_attention_backward` takes beside its inputs and results: B, H, K, S, E, bytes of a number."""
    scores = rows * heads * min(queries_per_block(rows, heads, length), length) * length
    return scores * 2 * (4 + itemsize) + 2 * rows * kv_heads * length * width * (4 + itemsize)


def blocked_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_keys: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of documents in rows.

    Args:
        q: [B, S, H, E]. k, v: [B, S or more, K, E], K dividing H.
        first_keys: [keys] int32, where the document of each token begins, which is the same in all rows; None: at 0.
        longest: tokens of the longest document.
        scale: of the scores. window: keys that a query may look back over, itself included; None: all.

    Returns:
        out [B, S, H, E] in q's dtype, and the log-sum-exp of each query's scores, [B, S, H] float32.
    """
    shape, kv_heads = q.shape, k.shape[2]
    keys, values = _by_head(k), _by_head(v)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:3], dtype=wide(q[:0]).dtype, device=q.device)
    for block in _blocks(shape, k.shape[1], longest, window):
        scores = _product(block.rows(q, kv_heads), block.keys(keys).mT)
        p, logs = _softmax(scores, first_keys, block, scale, window, q.dtype)
        block.put(out, torch.bmm(p, block.keys(values)), kv_heads)
        block.put(lse[..., None], logs[..., None], kv_heads)
    return out, lse


def blocked_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    first_keys: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, contiguous, in their dtypes; dout and out are [B, S, H, E], the rest as in forward."""
    shape, kv_heads = q.shape, k.shape[2]
    keys, values = _by_head(k), _by_head(v)
    dq = torch.empty(shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(keys.shape, dtype=lse.dtype, device=q.device)
    dv = torch.zeros_like(dk)
    for block in _blocks(shape, k.shape[1], longest, window):
        of_q, of_out, of_dout = (block.rows(x, kv_heads) for x in (q, out, dout))
        delta = (wide(of_dout) * wide(of_out)).sum(-1)
        scores = _product(of_q, block.keys(keys).mT)
        dscores = _product(of_dout, block.keys(values).mT)
        logs = block.rows(lse[..., None], kv_heads)[..., 0]
        p, dx = _softmax_backward(scores, dscores, logs, delta, first_keys, block, scale, window, q.dtype)
        del scores, dscores
        block.keys(dv).add_(_product(p.mT, of_dout))
        block.put(dq, torch.bmm(dx, block.keys(keys)), kv_heads)
        block.keys(dk).add_(_product(dx.mT, of_q))
    # back to [B, S, K, E]
    return dq, *(x.unflatten(0, (shape[0], -1)).transpose(1, 2).to(q.dtype).contiguous() for x in (dk, dv))


class _Block(NamedTuple):
    """Queries of the keys first .. last - 1, and the keys from `lowest` on that any of them may see; `before` keys have no query."""

    first: int
    last: int
    lowest: int
    before: int

    def rows(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[B K, (H / K) N, ...] of x [B, S, H, ...]: the queries of all heads that share a key head."""
        part = x[:, self.first - self.before : self.last - self.before].unflatten(2, (kv_heads, -1))
        return part.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1).contiguous()

    def put(self, x: torch.Tensor, rows: torch.Tensor, kv_heads: int) -> None:
        """Writes what `rows` reads."""
        part = x[:, self.first - self.before : self.last - self.before].unflatten(2, (kv_heads, -1))
        part.copy_(rows.view(len(x), kv_heads, part.shape[3], -1, x.shape[-1]).permute(0, 3, 1, 2, 4))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B K, C, E] of x [B K, S, E]."""
        return x[:, self.lowest : self.last]


def _blocks(shape: torch.Size, keys: int, longest: int, window: int | None) -> list[_Block]:
    rows, length, heads, _ = shape
    size = queries_per_block(rows, heads, keys)
    back = longest if window is None else min(longest, window)
    before = keys - length
    return [
        _Block(first, min(first + size, keys), max(first - back + 1, 0), before)
        for first in range(before, keys, size)
    ]


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[B K, S, E] of x [B, S, K, E]."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # float32 out of 16-bit operands: scores of several hundred would lose their differences
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(wide(left), wide(right))


def _seen(
    first_keys: torch.Tensor | None, block: _Block, window: int | None, scores: torch.Tensor
) -> torch.Tensor:
    """[N, C] bool, where a query may look."""
    query = torch.arange(block.first, block.last, device=scores.device)[:, None]
    key = torch.arange(block.lowest, block.last, device=scores.device)
    seen = key <= query
    if first_keys is not None:
        seen &= key >= first_keys[block.first : block.last, None]
    return seen if window is None else seen & (query - key < window)


def _softmax(scores, first_keys, block, scale, window, dtype):
    """P in `dtype` and the log-sum-exp [B K, rows] of scores [B K, rows, C], float32."""
    if not use_triton(scores):
        seen = _seen(first_keys, block, window, scores)
        grouped = (scores * scale).unflatten(1, (-1, len(seen))).masked_fill(~seen, -torch.inf).flatten(1, 2)
        logs = grouped.logsumexp(-1)
        return (grouped - logs[..., None]).exp().to(dtype), logs
    p = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    logs = torch.empty(scores.shape[:2], dtype=torch.float32, device=scores.device)
    launch(
        _softmax_kernel, -(-logs.numel() // _ROWS), scores, p, logs, *_extent(first_keys, block, window, logs),
        float(scale), _ROWS, _TILE, first_keys is not None, window is not None, num_warps=4,
    )  # fmt: skip
    return p, logs


def _softmax_backward(scores, dscores, logs, delta, first_keys, block, scale, window, dtype):
    """P and dX in `dtype`, [B K, rows, C], of scores and their softmax's gradient dP."""
    if not use_triton(scores):
        seen = _seen(first_keys, block, window, scores)
        p = (scores * scale - logs[..., None]).exp()
        p = p.unflatten(1, (-1, len(seen))).masked_fill(~seen, 0.0).flatten(1, 2)
        return p.to(dtype), (p * (dscores - delta[..., None]) * scale).to(dtype)
    p, dx = (torch.empty(scores.shape, dtype=dtype, device=scores.device) for _ in range(2))
    launch(
        _backward_kernel, -(-logs.numel() // _ROWS), scores, dscores, p, dx, logs, delta,
        *_extent(first_keys, block, window, logs), float(scale), _ROWS, _TILE, first_keys is not None,
        window is not None, num_warps=4,
    )  # fmt: skip
    return p, dx


def _extent(first_keys, block, window, logs):
    documents, (first, last, lowest, _) = logs if first_keys is None else first_keys, block
    return documents, logs.numel(), first, last - first, lowest, last - lowest, window or 0


@jit
def _keys_of(
    rows,
    count,
    first_keys,
    first_query,
    queries,
    lowest,
    window,
    PACKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """The first and the last key, counted from the block's, that the queries of these rows see."""
    query = first_query + rows % queries
    first = rows * 0
    if PACKED:
        first = tl.maximum(tl.load(first_keys + query, mask=rows < count, other=0) - lowest, 0)
    if WINDOWED:
        first = tl.maximum(query - window + 1 - lowest, first)
    return first, query - lowest


@jit
def _scores_of(scores, rows, count, first, last, at, keys, scale):
    """Scores [ROWS, TILE] of keys `at`, -inf where a query does not look, and their offsets."""
    offsets = rows.to(tl.int64)[:, None] * keys + at[None, :]
    seen = (rows < count)[:, None] & (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
    return tl.load(scores + offsets, mask=seen, other=float("-inf")) * scale, seen, offsets


@jit(do_not_specialize=["count", "first_query", "queries", "lowest", "keys", "window"])
def _softmax_kernel(
    scores, p, logs, first_keys, count, first_query, queries, lowest, keys, window, scale,
    ROWS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, last = _keys_of(rows, count, first_keys, first_query, queries, lowest, window, PACKED, WINDOWED)
    largest = tl.full((ROWS, TILE), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for start in range(tl.min(first, 0) // TILE * TILE, tl.max(last, 0) + 1, TILE):
        at = start + tl.arange(0, TILE)
        x, seen, offsets = _scores_of(scores, rows, count, first, last, at, keys, scale)
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.exp(x - higher)
        largest = higher
    highest = tl.max(largest, 1)
    log = highest + tl.log(tl.sum(total * tl.exp(largest - highest[:, None]), 1))
    tl.store(logs + rows, log, mask=rows < count)
    for start in range(0, keys, TILE):
        at = start + tl.arange(0, TILE)
        x, seen, offsets = _scores_of(scores, rows, count, first, last, at, keys, scale)
        inside = (rows < count)[:, None] & (at < keys)[None, :]
        tl.store(p + offsets, tl.exp(x - log[:, None]).to(p.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["count", "first_query", "queries", "lowest", "keys", "window"])
def _backward_kernel(
    scores, dscores, p, dx, logs, deltas, first_keys, count, first_query, queries, lowest, keys, window, scale,
    ROWS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, last = _keys_of(rows, count, first_keys, first_query, queries, lowest, window, PACKED, WINDOWED)
    log = tl.load(logs + rows, mask=rows < count, other=0.0)
    delta = tl.load(deltas + rows, mask=rows < count, other=0.0)
    for start in range(0, keys, TILE):
        at = start + tl.arange(0, TILE)
        x, seen, offsets = _scores_of(scores, rows, count, first, last, at, keys, scale)
        dp = tl.load(dscores + offsets, mask=seen, other=0.0)
        inside = (rows < count)[:, None] & (at < keys)[None, :]
        weight = tl.exp(x - log[:, None])
        tl.store(p + offsets, weight.to(p.dtype.element_ty), mask=inside)
        change = weight * (dp - delta[:, None]) * scale
        tl.store(dx + offsets, change.to(dx.dtype.element_ty), mask=inside)
