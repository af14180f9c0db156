"""Attention by blocks of queries: documents, windows, grouped heads, several blocks; in PyTorch, and by kernels where they run."""

import pytest
import torch

from oribi.kernels import attention, dispatch
from oribi.kernels import blocked_attention as op
from tests.kernels.test_attention import SCALE, errors, inputs, pack_of, truth
from tests.kernels.truth import DEVICE, DTYPES, assert_twice_as_good


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *shape):
        out, lse = op.blocked_attention_forward(q, k, v, *shape)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, dout):
        return (*op.blocked_attention_backward(dout, *ctx.saved_tensors, *ctx.shape), *[None] * 4)


def starts(lengths: list[int]) -> torch.Tensor:
    begins = torch.tensor([0, *lengths[:-1]], device=DEVICE).cumsum(0)
    return begins.repeat_interleave(torch.tensor(lengths, device=DEVICE)).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES if dispatch.INTERPRETED or DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize(
    ("rows", "lengths", "heads", "kv_heads"), [(1, [100], 3, 1), (1, [70, 1, 29], 4, 2), (2, [70], 4, 2)]
)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_and_its_gradients(dtype, rows, lengths, window, heads, kv_heads, monkeypatch):
    if dtype is torch.float32 and DEVICE == "cuda":
        pytest.skip("a GPU multiplies float32 as TF32; the op is for 16 bit")
    monkeypatch.setattr(op, "SCORES", 1)  # the smallest blocks
    monkeypatch.setattr(op, "_ROWS", 32)
    monkeypatch.setattr(op, "_TILE", 32)
    q, k, v = inputs(rows, sum(lengths), heads, kv_heads, 24, dtype)
    shape = (starts(lengths) if len(lengths) > 1 else None, max(lengths), SCALE, window)
    assert_twice_as_good(
        lambda q, k, v: Attention.apply(q, k, v, *shape),
        lambda q, k, v: truth(q, k, v, lengths, window, None),
        [x.detach().requires_grad_() for x in (q, k, v)],
        [torch.randn(q.shape, device=DEVICE)],
    )


def test_two_runs_are_equal_to_the_bit_and_documents_do_not_touch(monkeypatch):
    monkeypatch.setattr(op, "SCORES", 1)
    monkeypatch.setattr(op, "_ROWS", 32)
    lengths = [70, 5, 60]
    q, k, v = (x.clone() for x in inputs(1, sum(lengths), 4, 2, 32, DTYPES[1]))
    shape = (starts(lengths), max(lengths), SCALE, None)
    out, lse = op.blocked_attention_forward(q, k, v, *shape)
    dout = torch.randn(q.shape, device=DEVICE).to(q.dtype)
    first = op.blocked_attention_backward(dout, q, k, v, out, lse, *shape)
    for once, again in zip(first, op.blocked_attention_backward(dout, q, k, v, out, lse, *shape)):
        assert torch.equal(once, again)
    for x in (q, k, v):
        x[:, 70:75] = torch.randn_like(x[:, 70:75])
    changed, _ = op.blocked_attention_forward(q, k, v, *shape)
    assert torch.equal(out[:, :70], changed[:, :70])
    assert torch.equal(out[:, 75:], changed[:, 75:])
    assert not torch.equal(out[:, 70:75], changed[:, 70:75])


def test_scores_stay_within_their_bytes_whatever_the_context():
    for rows, heads, length in ((1, 16, 2048), (2, 16, 2048), (1, 16, 32768), (1, 32, 131072)):
        block = op.queries_per_block(rows, heads, length)
        assert 64 <= block <= 1024
        assert block == 64 or rows * heads * block * length <= op.SCORES


def test_documents_of_a_pack_begin_where_its_offsets_say():
    assert torch.equal(pack_of([3, 1, 4]).doc_start(torch.device(DEVICE)), starts([3, 1, 4]))


@pytest.mark.parametrize("lengths", [[90], [50, 1, 39], [30, 30, 30]])
def test_attention_runs_it_where_it_is_chosen(lengths, monkeypatch):
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "blocked")
    q, k, v = inputs(1, sum(lengths), 4, 2, 24, torch.float32)
    visibility = pack_of(lengths) if len(lengths) > 1 else attention.Visibility(1, 90)
    assert max(errors(visibility, lengths, q, k, v)) < (1e-5 if DEVICE == "cpu" else 2e-3)
