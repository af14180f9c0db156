"""Attention: every backend that this machine has, against float64, dense, packed, windowed and grouped."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from oribi.kernels import attention as op
from oribi.kernels import attention_reference, flash_attention_3
from oribi.kernels.attention import Visibility, attention, attention_backward, attention_forward, decide
from tests.kernels.truth import DEVICE, relative_error

SCALE = 0.3
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]


def truth(q, k, v, lengths: list[int], window: int | None, softcap: float | None, sinks=None) -> torch.Tensor:
    """Softmax attention by its definition, one document and one head at a time."""
    out = torch.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        start = 0
        for n in lengths:
            at = slice(start, start + n)
            start += n
            for h in range(q.shape[2]):
                scores = SCALE * q[row, at, h] @ k[row, at, h // groups].T
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                back = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
                hidden = back < 0 if window is None else (back < 0) | (back >= window)
                scores = scores.masked_fill(hidden, -torch.inf)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].expand(n, 1)], dim=1)
                out[row, at, h] = scores.softmax(-1)[:, :n] @ v[row, at, h // groups]
    return out


def inputs(rows: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
    torch.manual_seed(0)
    # slices of one q|k|v buffer with room behind it, as the decoder hands them over
    sizes = [heads, kv_heads, kv_heads]
    buffer = torch.randn(rows, length, (sum(sizes) + 1) * head_dim, device=DEVICE).to(dtype)
    parts = buffer[..., :-head_dim].split([n * head_dim for n in sizes], dim=-1)
    return [part.unflatten(-1, (-1, head_dim)) for part in parts]


def pack_of(lengths: list[int]) -> Visibility:
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return Visibility(1, sum(lengths), cu_seqlens=bounds, max_length=max(lengths))


def errors(visibility, lengths, q, k, v, window=None, softcap=None, sinks=None) -> list[float]:
    """Relative errors of out, dq, dk, dv against float64."""
    dout = torch.randn(q.shape, device=DEVICE).to(q.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = truth(*exact, lengths, window, softcap, None if sinks is None else sinks.double())
    expected = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    how = decide(q, visibility, SCALE, window, softcap, sinks=sinks)
    out, saved = attention_forward(q, k, v, how)
    found = [out, *attention_backward(dout, q, k, v, out, saved, how)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    autograd = attention(*leaves, visibility, SCALE, window, softcap, sinks)
    assert relative_error(autograd, out) < 1e-2
    by_autograd = torch.autograd.grad(autograd, leaves, dout)
    for a, b in zip(by_autograd, found[1:]):
        assert relative_error(a, b) < 1e-2
    return [relative_error(x, t) for x, t in zip(found, expected)]


@pytest.mark.parametrize("lengths", [[13], [5, 1, 7], [4, 4, 4]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_float32_reference_equals_the_definition(lengths, window, softcap):
    q, k, v = inputs(1, sum(lengths), 4, 2, 16, torch.float32)
    visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
    assert max(errors(visibility, lengths, q, k, v, window, softcap)) < 1e-5


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sinks_take_their_share_of_every_softmax(window, softcap):
    q, k, v = inputs(1, 13, 4, 2, 16, torch.float32)
    sinks = torch.randn(4, device=DEVICE)
    assert max(errors(pack_of([5, 1, 7]), [5, 1, 7], q, k, v, window, softcap, sinks)) < 1e-5


def sink_gradient(how: op.Attend, dout, q, k, v) -> list[torch.Tensor]:
    """out and the gradients of q, k, v and of the sinks, by the backend that `how` names."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, how.sinks)]
    out = op._Attention.apply(*leaves[:3], replace(how, sinks=leaves[3]), leaves[3])
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_are_joined_to_a_backend_that_knows_none_of_them(window):
    q, k, v = inputs(1, 13, 4, 2, 16, torch.float32)
    visibility, dout = pack_of([5, 1, 7]), torch.randn(1, 13, 4, 16, device=DEVICE)
    sinks = torch.randn(4, device=DEVICE)
    how = replace(decide(q, visibility, SCALE, window, sinks=sinks), backend="blocked")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected = truth(*exact[:3], [5, 1, 7], window, None, exact[3])
    expected = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    for found, wanted in zip(sink_gradient(how, dout, q, k, v), expected):
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("lengths", "window"), [([130], None), ([130], 17), ([63, 1, 100, 7], None), ([63, 1, 100, 7], 20)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks_on_the_gpu_equal_the_definition(lengths, window, head_dim):
    q, k, v = inputs(1, sum(lengths), 8, 2, head_dim, torch.bfloat16)
    visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
    sinks, dout = torch.randn(8, device=DEVICE), torch.randn(q.shape, device=DEVICE).bfloat16()
    assert max(errors(visibility, lengths, q, k, v, window, None, sinks)) < 1e-2
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected = torch.autograd.grad(truth(*exact[:3], lengths, window, None, exact[3]), exact, dout.double())
    found = sink_gradient(decide(q, visibility, SCALE, window, sinks=sinks), dout, q, k, v)[1:]
    assert all(relative_error(one, wanted) < 1e-2 for one, wanted in zip(found, expected))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grouped_rows_with_padding_run_without_forming_all_scores(dtype):
    q, k, v = (x.detach().requires_grad_() for x in inputs(2, 200, 8, 2, 64, dtype))
    real = torch.ones(2, 200, dtype=torch.bool, device=DEVICE)
    real[1, :50] = False
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):  # fails where neither can
        attention(q, k, v, Visibility(2, 200, real=real), SCALE).float().sum().backward()
        if dtype is torch.float32:
            attention(q, k, v, Visibility(2, 200), SCALE).sum().backward()


def test_keys_are_repeated_where_only_plain_products_would_take_groups(monkeypatch):
    q, k, v = inputs(2, 24, 4, 2, 16, torch.float32)
    real = torch.ones(2, 24, dtype=torch.bool, device=DEVICE)
    real[1, :5] = False
    expected = attention(q, k, v, Visibility(2, 24, real=real), SCALE)
    product, asked = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        attention_reference.F,
        "scaled_dot_product_attention",
        lambda q, k, v, *given, **named: (
            asked.append((named["enable_gqa"], k.shape[1])) or product(q, k, v, *given, **named)
        ),
    )
    monkeypatch.setattr(attention_reference, "takes_groups", lambda q, mask: False)
    assert relative_error(attention(q, k, v, Visibility(2, 24, real=real), SCALE), expected) < 1e-6
    assert asked == [(False, 4)]


@pytest.mark.parametrize(
    ("backend", "queries", "kv_heads", "groups"),
    [
        ("cudnn", 4096 * 32, 8, 1), ("cudnn", 32768 * 32, 8, 4), ("flash", 2**24, 8, 8), ("flash", 2**24, 6, 6),
        ("flash", 5 * 2**18, 6, 3), ("triton", 2**24, 8, 1), ("reference", 2**24, 8, 1),
    ],
)  # fmt: skip
def test_portions_of_the_heads_grow_in_number_with_the_context(backend, queries, kv_heads, groups):
    assert op.head_groups(backend, queries, kv_heads) == groups


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "window", "softcap", "backend"),
    [
        ([130], None, None, "cudnn"),
        ([64, 64], None, None, "cudnn"),
        ([130], 17, None, "flash"),
        ([63, 1, 100, 7], None, None, "flash"),
        ([63, 1, 100, 7], 20, None, "flash"),
        ([63, 1, 100, 7], 20, 5.0, "triton"),
        ([64, 64], None, 5.0, "triton"),
    ],
)
@pytest.mark.parametrize("kv_heads", [8, 2])
class TestOnTheGpu:
    pytestmark = gpu

    def test_error_is_at_most_twice_pytorchs_math(
        self, head_dim, dtype, lengths, window, softcap, backend, kv_heads
    ):
        q, k, v = inputs(1, sum(lengths), 8, kv_heads, head_dim, dtype)
        visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
        chosen = decide(q, visibility, SCALE, window, softcap).backend
        if torch.cuda.get_device_capability()[0] >= 9 and (head_dim <= 128 or backend == "triton"):
            assert chosen == ("flash3" if backend == "flash" and flash_attention_3.installed() else backend)
        ours = errors(visibility, lengths, q, k, v, window, softcap)
        reference = op.choose_backend
        op.choose_backend = lambda *a: "reference"
        try:
            math = errors(visibility, lengths, q, k, v, window, softcap)
        finally:
            op.choose_backend = reference
        for mine, theirs in zip(ours, math):
            assert mine <= max(2 * theirs, 1e-2 if dtype is torch.bfloat16 else 2e-3)

    def test_portions_of_the_heads_give_the_gradients_of_the_whole(
        self, head_dim, dtype, lengths, window, softcap, backend, kv_heads, monkeypatch
    ):
        q, k, v = inputs(1, sum(lengths), 8, kv_heads, head_dim, dtype)
        visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
        how = decide(q, visibility, SCALE, window, softcap)
        out, saved = attention_forward(q, k, v, how)
        whole = attention_backward(out, q, k, v, out, saved, how)
        monkeypatch.setattr(op, "GROUP_QUERIES", 1)
        assert op.head_groups(how.backend, q[..., 0].numel(), kv_heads) == (
            kv_heads if how.backend in ("cudnn", "flash", "flash3") else 1
        )
        for a, b in zip(attention_backward(out, q, k, v, out, saved, how), whole):
            assert relative_error(a, b) < (4e-3 if dtype is torch.bfloat16 else 5e-4)

    def test_a_changed_document_leaves_the_others_bit_identical(
        self, head_dim, dtype, lengths, window, softcap, backend, kv_heads
    ):
        if len(lengths) < 2:
            pytest.skip("one document")
        q, k, v = inputs(1, sum(lengths), 8, kv_heads, head_dim, dtype)
        before = attention(q, k, v, pack_of(lengths), SCALE, window, softcap)
        changed = slice(lengths[0], lengths[0] + lengths[1])
        for x in (q, k, v):
            x[:, changed] = torch.randn_like(x[:, changed])
        after = attention(q, k, v, pack_of(lengths), SCALE, window, softcap)
        assert torch.equal(before[:, : changed.start], after[:, : changed.start])
        assert torch.equal(before[:, changed.stop :], after[:, changed.stop :])
        assert not torch.equal(before[:, changed], after[:, changed])

    def test_equal_runs_are_bit_identical_where_that_is_asked_for(
        self, head_dim, dtype, lengths, window, softcap, backend, kv_heads
    ):
        q, k, v = inputs(1, sum(lengths), 8, kv_heads, head_dim, dtype)
        visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            how = decide(q, visibility, SCALE, window, softcap)
            assert how.backend != "cudnn"
            runs = []
            for _ in range(3):
                out, saved = attention_forward(q, k, v, how)
                runs.append([out, *attention_backward(out, q, k, v, out, saved, how)])
        finally:
            torch.use_deterministic_algorithms(before)
        assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again))
