"""Attention of one new token per row over a static cache, and the token's keys and values on their way into it.

    s = scale q K^T (soft-capped: c tanh(s / c))      o = softmax([s, sink]) V without the sink's part

B rows, H query heads, K key/value heads, E head_dim, R rotary dimensions. The cache [rows, K, slots, E] has no padding: a
row's token p lies in slot p mod slots, so a layer with a sliding window has a ring of exactly `window` slots, and
min(length + 1, slots) of them are valid. Lengths are read on the device: one recorded launch serves all of them.

A row's slots are split among programs, and the last to end merges their results in the order of the slots.

Source: Flash-Decoding, Dao et al. 2023 (split keys); FlashAttention-2 (arXiv:2307.08691).
"""

import torch

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton, wide

# programs of a launch where there is work for them: two for each of an H200's 132 multiprocessors
_PROGRAMS = 264
# slots that a program looks at together, and the fewest that are worth a program; of wide heads fewer fit in the shared
# memory of a Turing card
_SLOTS = 64


def store_token(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    length: torch.Tensor,
    row: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    """q of a token normed and rotated; its k likewise and its v written to the cache.

    Args:
        qkv: [B, (H + 2K) E], or [B, (2H + 2K) E] where it is gated; rows may be strided.
        k_cache, v_cache: [rows, K, slots, E] contiguous, in qkv's dtype.
        length: [B] int64 tokens before this one, so its position.
        row: [B] int64 row of the cache.
        cos, sin: [B, R/2] float32, R <= E; None where nothing is rotated.
        q_norm, k_norm: [E] weights of RMSNorms of each head, or None.
        eps, offset: of the norms.
        gated: whether each query head is followed by a gate of its size, which is not read.

    Returns:
        [B, H, E] in qkv's dtype.
    """
    _, kv_heads, slots, head_dim = k_cache.shape
    rows, step = len(qkv), 1 + gated
    heads = (qkv.shape[1] // head_dim - 2 * kv_heads) // step
    q = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not use_triton(qkv):
        parts = qkv.unflatten(1, (-1, head_dim)).split([heads * step, kv_heads, kv_heads], dim=1)
        q.copy_(_normed_and_rotated(parts[0][:, ::step], q_norm, eps, offset, cos, sin))
        slot = length % slots
        k_cache[row, :, slot] = _normed_and_rotated(parts[1], k_norm, eps, offset, cos, sin).to(qkv.dtype)
        v_cache[row, :, slot] = parts[2]
        return q
    half = 0 if cos is None else cos.shape[1]
    width = max(
        half, head_dim - half
    )  # a head in two parts, of which the first has the first halves of the pairs
    some = next((t for t in (q_norm, k_norm) if t is not None), qkv)
    launch(
        _store_kernel, rows * (heads + 2 * kv_heads), q, qkv, k_cache, v_cache, length, row,
        length if cos is None else cos, length if sin is None else sin, some if q_norm is None else q_norm,
        some if k_norm is None else k_norm, float(eps), float(offset), slots, qkv.stride(0), step, heads, kv_heads, head_dim, half,
        next_power_of_2(width), q_norm is not None, k_norm is not None, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return q


def _normed_and_rotated(x, norm, eps, offset, cos, sin):
    x = wide(x)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (wide(norm) + offset)
    if cos is None:
        return x
    half = cos.shape[1]
    a, b, cos, sin = x[..., :half], x[..., half : 2 * half], cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)


@jit
def _store_kernel(
    q_out, qkv, k_cache, v_cache, length, row, cos_ptr, sin_ptr, q_norm, k_norm, eps, offset, slots, qkv_stride,
    STEP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    NORMS_Q: tl.constexpr, NORMS_K: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    b, head = (tl.program_id(0) // ALL).to(tl.int64), tl.program_id(0) % ALL
    col = tl.arange(0, WIDTH)
    source = qkv + b * qkv_stride + (tl.minimum(head, HEADS) * (STEP - 1) + head) * E
    at = tl.load(length + b)
    cached = ((tl.load(row + b) * KV_HEADS + (head - HEADS) % KV_HEADS) * slots + at % slots) * E
    # the first HALF columns and what is left: their partners, and the columns that pass through
    first, second = col < HALF, col < E - HALF
    x = tl.load(source + col, mask=first, other=0.0).to(tl.float32)
    y = tl.load(source + HALF + col, mask=second, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMS_Q:  # noqa: SIM102  only the inner one is decided on the device
            if head < HEADS:
                x, y = _normed(x, y, q_norm, col, first, second, eps, offset, E, HALF)
        if NORMS_K:  # noqa: SIM102
            if head >= HEADS:
                x, y = _normed(x, y, k_norm, col, first, second, eps, offset, E, HALF)
        if HALF > 0:
            cos = tl.load(cos_ptr + b * HALF + col, mask=first, other=1.0)
            sin = tl.load(sin_ptr + b * HALF + col, mask=first, other=0.0)
            x, y = x * cos - y * sin, y * cos + x * sin
    to = q_out + (b * HEADS + head) * E
    if head >= HEADS:
        to = k_cache + cached
    if head >= HEADS + KV_HEADS:
        to = v_cache + cached
    tl.store(to + col, x.to(q_out.dtype.element_ty), mask=first)
    tl.store(to + HALF + col, y.to(q_out.dtype.element_ty), mask=second)


@jit
def _normed(x, y, weight, col, first, second, eps, offset, E: tl.constexpr, HALF: tl.constexpr):
    rstd = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / E + eps)
    wx = tl.load(weight + col, mask=first, other=0.0).to(tl.float32) + offset
    wy = tl.load(weight + HALF + col, mask=second, other=0.0).to(tl.float32) + offset
    return x * rstd * wx, y * rstd * wy


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    length: torch.Tensor,
    row: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per row and head over the row's valid slots.

    Args:
        q: [B, H, E] contiguous.
        k_cache, v_cache: [rows, K, slots, E] contiguous, K dividing H; the query's own token is stored.
        length: [B] int64 tokens before the query's.
        row: [B] int64 row of the cache.
        counters: zeros int32 of at least B * K, which the launch leaves zero (`nf4_linear.new_counters`).
        scale: of the scores.
        softcap: c of c tanh(s / c), or None.
        sinks: [H] logits that take part in the softmax and have no value, or None.

    Returns:
        [B, H E] in q's dtype.
    """
    if not use_triton(q):
        return _reference(q, k_cache, v_cache, length, row, scale, softcap, sinks)
    rows, heads, head_dim = q.shape
    _, kv_heads, slots, _ = k_cache.shape
    group = heads // kv_heads
    block = _SLOTS if head_dim <= 128 else _SLOTS // 2 if head_dim <= 256 else _SLOTS // 4
    splits = max(1, min(_PROGRAMS // (rows * kv_heads), 32, -(-slots // block)))
    width, queries = next_power_of_2(head_dim), max(next_power_of_2(group), 16)
    out = torch.empty(rows, heads * head_dim, dtype=q.dtype, device=q.device)
    sums = torch.empty(rows * kv_heads * splits, queries, width, dtype=torch.float32, device=q.device)
    logs = torch.empty(rows * kv_heads * splits, 2, queries, dtype=torch.float32, device=q.device)
    launch(
        _attention_kernel, rows * kv_heads * splits, out, q, k_cache, v_cache, length, row,
        logs if sinks is None else sinks, sums, logs, counters, float(scale), float(softcap or 1.0), slots,
        kv_heads, group, queries, head_dim, width, splits, block, softcap is not None, sinks is not None,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _reference(q, k_cache, v_cache, length, row, scale, softcap, sinks):
    rows, heads, head_dim = q.shape
    _, kv_heads, slots, _ = k_cache.shape
    k, v = wide(k_cache[row]), wide(v_cache[row])
    scores = wide(q).view(rows, kv_heads, -1, head_dim) @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    valid = torch.arange(slots, device=q.device) < (length[:, None] + 1)
    scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    # whatever lies in a slot that is not valid yet must not reach the sum: 0 * nan is nan
    v = v.masked_fill(~valid[:, None, :, None], 0.0)
    if sinks is not None:
        sink = wide(sinks).view(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).to(q.dtype).reshape(rows, heads * head_dim)


@jit
def _attention_kernel(
    out, q, k_cache, v_cache, length, row, sinks, sums, logs, counters, scale, softcap, slots,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    b, kv_head = pair // KV_HEADS, pair % KV_HEADS
    valid = tl.minimum(tl.load(length + b) + 1, slots).to(tl.int32)
    share = tl.cdiv(tl.cdiv(valid, SPLITS), BLOCK) * BLOCK
    busy = tl.cdiv(valid, share)  # programs that have slots
    g, e = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    head = (b * KV_HEADS + kv_head).to(tl.int64) * GROUP + g
    q_in = (g < GROUP)[:, None] & (e < E)[None, :]
    if split < busy:
        query = tl.load(q + head[:, None] * E + e[None, :], mask=q_in, other=0.0)
        cached = (tl.load(row + b) * KV_HEADS + kv_head) * slots * E
        largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES,), dtype=tl.float32)
        sum_ = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
        for start in range(split * share, tl.minimum((split + 1) * share, valid), BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = (slot < valid)[:, None] & (e < E)[None, :]
            at = cached + slot[:, None].to(tl.int64) * E + e[None, :]
            k = tl.load(k_cache + at, mask=inside, other=0.0)
            v = tl.load(v_cache + at, mask=inside, other=0.0)
            s = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:
                s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
            s = tl.where((slot < valid)[None, :], s, float("-inf"))
            higher = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp(s - higher[:, None])
            shrink = tl.exp(largest - higher)
            total = total * shrink + tl.sum(p, 1)
            sum_ = tl.dot(p.to(v.dtype), v, sum_ * shrink[:, None], input_precision="ieee")
            largest = higher
        mine = tl.program_id(0).to(tl.int64)
        tl.store(sums + mine * QUERIES * WIDTH + g[:, None] * WIDTH + e[None, :], sum_)
        tl.store(logs + mine * 2 * QUERIES + g, largest)
        tl.store(logs + mine * 2 * QUERIES + QUERIES + g, total)
    tl.debug_barrier()  # all of the program's results are written before it is counted
    if tl.atomic_add(counters + pair, 1) == SPLITS - 1:
        tl.debug_barrier()
        largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES,), dtype=tl.float32)
        if SINKS:
            largest = tl.load(sinks + kv_head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32)
            total += 1.0
        sum_ = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
        for one in range(busy):
            # past the first cache, which another program's results may have left stale
            theirs = (pair * SPLITS + one).to(tl.int64)
            high = tl.load(logs + theirs * 2 * QUERIES + g, cache_modifier=".cg")
            weight = tl.load(logs + theirs * 2 * QUERIES + QUERIES + g, cache_modifier=".cg")
            part = tl.load(
                sums + theirs * QUERIES * WIDTH + g[:, None] * WIDTH + e[None, :], cache_modifier=".cg"
            )
            higher = tl.maximum(largest, high)
            shrink, grow = tl.exp(largest - higher), tl.exp(high - higher)
            total = total * shrink + weight * grow
            sum_ = sum_ * shrink[:, None] + part * grow[:, None]
            largest = higher
        sum_ = sum_ / total[:, None]
        tl.store(out + head[:, None] * E + e[None, :], sum_.to(out.dtype.element_ty), mask=q_in)
        tl.store(counters + pair, 0)
