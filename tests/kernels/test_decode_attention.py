"""One token's attention over a static cache: float64 truths, ring buffers of windows, and what is not valid yet."""

import pytest
import torch

from oribi.kernels import decode_attention, dispatch, nf4_linear
from oribi.kernels.decode_attention import store_token
from tests.kernels.truth import DEVICE, DTYPES, cases, needs_kernels, relative_error

pytestmark = [pytest.mark.gpu, needs_kernels]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def plain(q, k, v, lengths, rows, scale, softcap, sinks, dtype):
    """Row by row, over exactly the valid slots."""
    answers = []
    for b, (length, row) in enumerate(zip(lengths.tolist(), rows.tolist())):
        valid = min(length + 1, k.shape[2])
        group = q.shape[1] // k.shape[1]
        keys, values = (t[row, :, :valid].to(dtype).repeat_interleave(group, 0) for t in (k, v))
        s = (keys @ q[b].to(dtype)[:, :, None])[..., 0] * scale
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        if sinks is not None:
            s = torch.cat([s, sinks.to(dtype)[:, None]], 1)
        p = s.softmax(1)[:, :valid]
        answers.append((p[:, None] @ values)[:, 0].flatten())
    return torch.stack(answers)


def check(dtype, heads, kv_heads, head_dim, slots, lengths, softcap=None, sinks=False, rows=None):
    rows = torch.tensor(rows or list(range(len(lengths))), device=DEVICE)
    lengths = torch.tensor(lengths, device=DEVICE)
    q = normal(len(lengths), heads, head_dim, dtype=dtype)
    k, v = (normal(int(rows.max()) + 2, kv_heads, slots, head_dim, dtype=dtype) for _ in range(2))
    for cache in (k, v):  # a slot that holds no token may hold anything
        for b, row in enumerate(rows.tolist()):
            cache[row, :, int(lengths[b]) + 1 :] = float("nan")
    sink = normal(heads, dtype=dtype) if sinks else None
    counters = nf4_linear.new_counters(q.device)
    settings = {"scale": head_dim**-0.5, "softcap": softcap, "sinks": sink}
    out = decode_attention.decode_attention(q, k, v, lengths, rows, counters, **settings)
    if not dispatch.INTERPRETED:  # it runs one program after the other, always in the same order
        again = decode_attention.decode_attention(q, k, v, lengths, rows, counters, **settings)
        assert torch.equal(out, again)
    assert not counters.any()
    exact, theirs = (
        plain(q, k, v, lengths, rows, head_dim**-0.5, softcap, sink, d) for d in (torch.float64, dtype)
    )
    assert relative_error(out, exact) <= max(2 * relative_error(theirs, exact), 1e-6)


@cases(
    {
        "dtype": DTYPES,
        "heads, kv_heads, head_dim": [(4, 4, 64), (8, 1, 128), (6, 2, 96), (2, 1, 256), (14, 2, 64)],
    }
)
def test_every_grouping_and_head_size(dtype, heads, kv_heads, head_dim):
    check(dtype, heads, kv_heads, head_dim, 192, [0, 63, 64, 130])


@cases({"dtype": DTYPES, "softcap": [None, 20.0], "sinks": [False, True]})
def test_soft_caps_and_sinks_of_a_long_cache(dtype, softcap, sinks):
    slots = 320 if dispatch.INTERPRETED else 1024
    check(dtype, 4, 2, 64, slots, [slots - 1, slots * 2 // 3, 1], softcap, sinks, rows=[2, 0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_is_a_ring_of_the_last_tokens(dtype):
    check(dtype, 4, 2, 64, 40, [500, 39, 40, 12])


@cases({"dtype": DTYPES, "batch": [1, 3, 5 if dispatch.INTERPRETED else 70]})
def test_as_many_rows_as_come(dtype, batch, monkeypatch):
    """Few rows are split among programs, and many are not."""
    if dispatch.INTERPRETED:
        monkeypatch.setattr(decode_attention, "_PROGRAMS", 12)
    check(dtype, 4, 2, 64, 128, [7 * b % 128 for b in range(batch)])


def stored_plainly(qkv, heads, kv_heads, head_dim, norms, cos, sin, dtype):
    parts = qkv.to(dtype).view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    q, k = parts[0], parts[1]
    if norms:
        q, k = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (w.to(dtype) + 1.0)
            for x, w in ((q, norms[0]), (k, norms[1]))
        )
    if cos is not None:
        half = cos.shape[1]
        c, s = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
        q, k = (
            torch.cat(
                [
                    x[..., :half] * c - x[..., half : 2 * half] * s,
                    x[..., half : 2 * half] * c + x[..., :half] * s,
                    x[..., 2 * half :],
                ],
                -1,
            )
            for x in (q, k)
        )
    return q, k, parts[2]


@cases(
    {
        "dtype": DTYPES,
        "head_dim, half": [(64, 32), (96, 48), (80, 20), (64, 0), (128, 32)],
        "norms": [False, True],
        "gated": [False, True],
    }
)
def test_a_token_is_normed_rotated_and_stored(dtype, head_dim, half, norms, gated):
    heads, kv_heads, slots, rows = 6, 2, 16, torch.tensor([2, 0, 3], device=DEVICE)
    lengths = torch.tensor([0, 15, 37], device=DEVICE)
    qkv = normal(3, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    k_cache, v_cache = (normal(4, kv_heads, slots, head_dim, dtype=dtype) for _ in range(2))
    before = k_cache.clone(), v_cache.clone()
    angle = torch.rand(3, half, device=DEVICE) * 6 if half else None
    cos, sin = (None, None) if angle is None else (angle.cos(), angle.sin())
    weights = [normal(head_dim, dtype=dtype) for _ in range(2)] if norms else []
    settings = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6, "offset": 1.0} if norms else {}
    given = qkv
    if gated:  # each query head has a gate behind it, whose numbers must not matter
        q, kv = qkv.unflatten(1, (-1, head_dim)).split([heads, 2 * kv_heads], 1)
        given = torch.cat([torch.stack([q, torch.full_like(q, torch.nan)], 2).flatten(1, 2), kv], 1).flatten(
            1
        )
    q = store_token(given, k_cache, v_cache, lengths, rows, cos, sin, gated=gated, **settings)
    exact = stored_plainly(qkv, heads, kv_heads, head_dim, weights, cos, sin, torch.float64)
    theirs = stored_plainly(qkv, heads, kv_heads, head_dim, weights, cos, sin, dtype)
    slot = lengths % slots
    for ours, other, truth in zip((q, k_cache[rows, :, slot], v_cache[rows, :, slot]), theirs, exact):
        assert relative_error(ours, truth) <= max(2 * relative_error(other, truth), 2e-7)
    for cache, old in zip((k_cache, v_cache), before):  # nothing else is touched
        cache[rows, :, slot] = old[rows, :, slot]
        assert torch.equal(cache, old)
