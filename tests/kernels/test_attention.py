"""Attention: every backend that this machine has, against float64, dense, packed, windowed and grouped."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from oribi.kernels import attention as op
from oribi.kernels import flash_attention_3
from oribi.kernels.attention import Visibility, attention, attention_backward, attention_forward, decide
from tests.kernels.truth import DEVICE, relative_error

SCALE = 0.3
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]


def truth(q, k, v, lengths: list[int], window: int | None, softcap: float | None) -> torch.Tensor:
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
                out[row, at, h] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[row, at, h // groups]
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


def errors(visibility, lengths, q, k, v, window=None, softcap=None) -> list[float]:
    """Relative errors of out, dq, dk, dv against float64."""
    dout = torch.randn(q.shape, device=DEVICE).to(q.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = truth(*exact, lengths, window, softcap)
    expected = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    how = decide(q, visibility, SCALE, window, softcap)
    out, saved = attention_forward(q, k, v, how)
    found = [out, *attention_backward(dout, q, k, v, out, saved, how)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    autograd = attention(*leaves, visibility, SCALE, window, softcap)
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
        op.F,
        "scaled_dot_product_attention",
        lambda q, k, v, *given, **named: (
            asked.append((named["enable_gqa"], k.shape[1])) or product(q, k, v, *given, **named)
        ),
    )
    monkeypatch.setattr(op, "takes_groups", lambda q, mask: False)
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
