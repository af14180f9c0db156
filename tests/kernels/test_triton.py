"""Triton kernels against float64 truths: on a GPU, or in Triton's interpreter when test_interpreted.py runs this file.

Sizes are 1, odd, above a block; inputs are views of wider buffers; outputs start as NaN.
"""

import pytest
import torch

from oribi.errors import DataError
from oribi.kernels import cross_entropy, dispatch, gated_mlp, nf4, rms_norm, rope
from tests.kernels.truth import (
    DEVICE,
    DTYPES,
    assert_twice_as_good,
    cases,
    needs_kernels,
    nf4_packed,
    plain_gated_mlp,
    plain_layer_norm,
    plain_loss,
    plain_rms_norm,
    plain_rope,
    poisoned,
    relative_error,
)

pytestmark = [pytest.mark.gpu, needs_kernels]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def padded(x: torch.Tensor, extra: int = 16) -> torch.Tensor:
    """The same values as a view of a buffer whose rows are longer."""
    wide = poisoned(*x.shape, dtype=x.dtype, width=x.shape[-1] + extra)
    return wide.copy_(x.detach())


def test_kernels_are_what_runs():
    assert dispatch.use_triton(torch.ones(1, device=DEVICE))
    with dispatch.reference_only():
        assert not dispatch.use_triton(torch.ones(1, device=DEVICE))
    assert not dispatch.use_triton(torch.ones(1, device=DEVICE, dtype=torch.float64))


@cases(
    {
        "dtype": DTYPES,
        "shape": [(1, 1), (3, 7), (5, 64), (33, 128), (3, 896), (2, 2049)],
        "offset": [0.0, 1.0],
    }
)
def test_rms_norm_and_its_gradients(dtype, shape, offset):
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    eps = 1e-5 if shape[1] > 1 else 0.3  # one value alone: without eps its gradient is zero
    assert_twice_as_good(
        lambda x, w: rms_norm.rms_norm(x, w, eps, offset),
        lambda x, w: plain_rms_norm(x, w, eps, offset),
        [x, weight],
        [torch.randn(shape, device=DEVICE)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 896)])
def test_norms_without_weights_or_around_the_mean_and_their_gradients(dtype, centred, weighted, shape):
    def plain(x, w):
        if centred:
            return plain_layer_norm(x, w if weighted else None, 1e-5)
        return plain_rms_norm(x, w if weighted else torch.ones_like(w), 1e-5, 0.0)

    assert_twice_as_good(
        lambda x, w: rms_norm.rms_norm(x + 0.5, w if weighted else None, 1e-5, 0.0, centred) + 0 * w.sum(),
        lambda x, w: plain(x + 0.5, w) + 0 * w.sum(),
        [normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)],
        [torch.randn(shape, device=DEVICE)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_inside_a_wider_buffer(dtype):
    tokens, heads, size = 5, 3, 32
    buffer = normal(tokens, heads * size + 24, dtype=dtype, grad=False)
    view = buffer[:, : heads * size].view(tokens, heads, size)
    weight = normal(size, dtype=dtype)
    alone = view.reshape(-1, size)
    y, same, rstd = rms_norm.rms_norm_forward(view, weight, 1e-6)
    assert same is view
    # another layout of threads may add in another order
    assert relative_error(y.view(-1, size), rms_norm.rms_norm_forward(alone, weight, 1e-6)[0]) < 1e-3
    dy = normal(tokens, heads, size, dtype=dtype, grad=False)
    expected = rms_norm.rms_norm_backward(dy.view(-1, size), alone, rstd.view(-1), weight)[0]
    after = buffer[:, heads * size :].clone()
    rms_norm.rms_norm_backward(dy, view, rstd, weight, out=view)
    assert relative_error(view, expected.view(view.shape)) < (1e-6 if dtype is torch.float32 else 5e-3)
    assert torch.equal(buffer[:, heads * size :].nan_to_num(7.0), after.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", ["x", "dy", "neither", "both"])
def test_rms_norm_of_any_views_through_autograd(dtype, sliced):
    # heads inside wider rows, and gradients whose layout is not the input's
    x, dy = normal(4, 5, 64, dtype=dtype, grad=False), normal(4, 5, 64, dtype=dtype, grad=False)
    if sliced in ("x", "both"):
        x = padded(x.view(4, 320)).unflatten(1, (5, 64))
    if sliced in ("dy", "both"):
        dy = padded(dy.transpose(0, 1).contiguous()).transpose(0, 1)
    assert_twice_as_good(
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: plain_rms_norm(x, w, 1e-5, 0.0),
        [x.requires_grad_(), normal(64, dtype=dtype)],
        [dy],
    )


@cases({"dtype": DTYPES, "scale": [1.0, 0.22], "shape": [(1, 64), (5, 100), (3, 1536)]})
def test_fused_residual_equals_the_separate_addition(dtype, scale, shape):
    x, residual = (padded(normal(*shape, dtype=dtype)) for _ in range(2))
    weight = normal(shape[1], dtype=dtype, grad=False)
    out = poisoned(*shape, dtype=dtype, width=shape[1] + 32)
    y, total, rstd = rms_norm.rms_norm_forward(
        x, weight, 1e-5, residual=residual, residual_scale=scale, out=out
    )
    apart = residual + x * scale if scale != 1.0 else residual + x
    if dtype is torch.float32:  # the kernel rounds the product and the sum at once
        assert relative_error(total, apart) < 1e-7
    else:
        assert torch.equal(total, apart)
    alone, _, rstd_alone = rms_norm.rms_norm_forward(total, weight, 1e-5)
    assert relative_error(y, alone) < (1e-6 if dtype is torch.float32 else 1e-3)
    assert relative_error(rstd, rstd_alone) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alias", ["none", "dy", "x", "dresidual"])
def test_rms_norm_backward_adds_the_residual_gradient_and_may_overwrite_its_inputs(dtype, alias):
    x, dy, dresidual = (padded(normal(5, 192, dtype=dtype)) for _ in range(3))
    weight = normal(192, dtype=dtype, grad=False)
    _, _, rstd = rms_norm.rms_norm_forward(x, weight, 1e-5)
    with dispatch.reference_only():
        expected, expected_weight = rms_norm.rms_norm_backward(
            dy, x, rstd, weight, dresidual=dresidual, weight_grad=True
        )
    out = {"none": poisoned(5, 192, dtype=dtype), "dy": dy, "x": x, "dresidual": dresidual}[alias]
    dx, dweight = rms_norm.rms_norm_backward(
        dy, x, rstd, weight, dresidual=dresidual, out=out, weight_grad=True
    )
    tolerance = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert relative_error(dx, expected) < tolerance
    assert relative_error(dweight, expected_weight) < 2 * tolerance
    assert dx.data_ptr() == out.data_ptr()


def test_dweight_of_many_rows_is_right_and_reproducible(monkeypatch):
    monkeypatch.setattr(rms_norm, "_WEIGHT_GRAD_PROGRAMS", 3)  # each walks over several blocks of rows
    x, dy = (torch.randn(10 * 8 - 3, 256, device=DEVICE) for _ in range(2))
    weight = torch.ones(256, device=DEVICE)
    rstd = rms_norm.rms_norm_forward(x, weight, 1e-5)[2]
    _, first = rms_norm.rms_norm_backward(dy, x, rstd, weight, weight_grad=True)
    _, second = rms_norm.rms_norm_backward(dy, x, rstd, weight, weight_grad=True)
    assert torch.equal(first, second)
    assert relative_error(first, (dy.double() * x.double() * rstd.double()[:, None]).sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "half"),
    [
        (1, 1, 1, 2, 1),
        (5, 4, 2, 64, 32),
        (3, 14, 2, 64, 32),
        (3, 9, 3, 96, 36),
        (4, 3, 1, 80, 40),
        (2, 4, 4, 64, 16),
    ],
)
def test_rope_and_its_gradient(dtype, tokens, heads, kv_heads, head_dim, half):
    q, k = normal(tokens, heads, head_dim, dtype=dtype), normal(tokens, kv_heads, head_dim, dtype=dtype)
    angle = torch.randn(tokens, half, device=DEVICE)
    assert_twice_as_good(
        rope.rope,
        plain_rope,
        [q, k, angle.cos(), angle.sin()],
        [torch.randn(q.shape, device=DEVICE), torch.randn(k.shape, device=DEVICE)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [16, 12])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_in_place_in_a_qkv_buffer_touches_only_q_and_k_and_rotates_back(dtype, half, interleaved):
    tokens, heads, kv_heads, head_dim = 5, 4, 2, 32
    buffer = normal(tokens, (heads + 2 * kv_heads) * head_dim + 8, dtype=dtype, grad=False)
    before = buffer.clone()

    def views(x):
        q = x[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        k = x[:, heads * head_dim : (heads + kv_heads) * head_dim].unflatten(1, (kv_heads, head_dim))
        return q, k

    angle = torch.randn(tokens, half, device=DEVICE)
    angles = rope.Angles(angle.cos(), angle.sin(), interleaved=interleaved)
    fresh = rope.rope_forward(*views(before), *angles)
    reference = rope.rope_forward(
        *(t.cpu().float() for t in views(before)), *(a.cpu() for a in angles[:2]), None, interleaved
    )
    for found, expected in zip(fresh, reference):
        assert relative_error(found.cpu(), expected) < (
            1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
        )
    if half * 2 == head_dim:
        scaled = rope.rope_forward(
            *views(before), *angles._replace(q_scale=torch.full((tokens,), 2.0, device=DEVICE))
        )
        assert torch.equal(scaled[0], 2 * fresh[0])
        assert torch.equal(scaled[1], fresh[1])
    rope.rope_forward(*views(buffer), *angles, out=views(buffer))
    assert all(torch.equal(a, b) for a, b in zip(views(buffer), fresh))
    assert torch.equal(buffer[:, 6 * head_dim :], before[:, 6 * head_dim :])
    rope.rope_forward(*views(buffer), *angles, inverse=True, out=views(buffer))
    assert relative_error(buffer, before) < (1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps)


@cases(
    {"dtype": DTYPES, "activation": gated_mlp.ACTIVATIONS, "shape": [(1, 1), (3, 7), (2, 1024), (3, 1025)]}
)
def test_gated_mlp_and_its_gradients(dtype, activation, shape):
    assert_twice_as_good(
        lambda gate, up: gated_mlp.gated_mlp(gate, up, activation),
        lambda gate, up: plain_gated_mlp(gate, up, activation),
        [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)],
        [torch.randn(shape, device=DEVICE)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_gated_mlp_backward_rebuilds_h_bit_for_bit_in_place(dtype, activation):
    both = normal(5, 2 * 1032, dtype=dtype, grad=False) * 3
    gate, up = both.chunk(2, 1)
    forward = gated_mlp.gated_mlp_forward(gate, up, activation)
    dh = normal(5, 1032, dtype=dtype, grad=False)
    fresh = gated_mlp.gated_mlp_backward(dh, gate, up, activation)
    assert fresh[2] is None
    dgate, dup, h = gated_mlp.gated_mlp_backward(dh, gate, up, activation, dgate=gate, dup=up, h=dh)
    assert torch.equal(h, forward)
    assert torch.equal(dgate, fresh[0])
    assert torch.equal(dup, fresh[1])
    assert both.data_ptr() == dgate.data_ptr()


def test_gated_mlp_survives_extreme_gates():
    gate = torch.tensor([[-1e4, -88.0, -0.0, 88.0, 1e4]], device=DEVICE)
    for activation in gated_mlp.ACTIVATIONS:
        dgate, dup, _ = gated_mlp.gated_mlp_backward(
            torch.ones_like(gate), gate, torch.ones_like(gate), activation
        )
        assert torch.isfinite(torch.stack([dgate, dup])).all()
        assert dgate[0, 0] == 0.0
        assert dgate[0, -1] == (0.0 if activation == "swiglu_clamped" else 1.0)


def packed_weight(
    n: int, k: int, double_quant: bool = True, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    return nf4_packed(torch.randn(n, k, device=DEVICE).to(dtype) * 0.02, double_quant=double_quant)


@cases(
    {
        "dtype": DTYPES,
        "double_quant": [True, False],
        "rows": [(1,), (64,), (67, 3), (65, 33, 33), (64, 64, 64)],
        "k": [64, 192, 1088],
    }
)
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype, double_quant, rows, k):
    from bitsandbytes.functional import dequantize_4bit

    weights = [packed_weight(n, k, double_quant) for n in rows]
    for weight in weights:
        weight.quant_state.dtype = dtype
    expected = torch.cat([dequantize_4bit(weight, weight.quant_state) for weight in weights])
    assert torch.equal(nf4.dequantize(weights, dtype), expected)
    out = poisoned(sum(rows), k, dtype=dtype, width=k + 32)
    assert nf4.dequantize(weights, dtype, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("k", [100, 36, 72])
def test_nf4_rows_that_end_inside_a_block_or_a_word(k):
    weight = packed_weight(48, k)
    assert torch.equal(nf4.dequantize([weight], torch.float16), nf4.reference(weight, torch.float16))


def loss_inputs(count: int, vocab_size: int, dtype: torch.dtype, labelled: float, bias: bool):
    rows, weight = normal(count, 48, dtype=dtype), normal(vocab_size, 48, dtype=dtype)
    targets = torch.randint(0, vocab_size, (count,), device=DEVICE)
    targets[torch.rand(count, device=DEVICE) >= labelled] = -100
    targets[0] = vocab_size - 1
    return [rows, weight, targets] + ([normal(vocab_size, dtype=dtype)] if bias else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "vocab_size", "labelled", "bias", "softcap", "logit_scale"),
    [
        (1, 1, 1.0, False, None, 1.0),
        (7, 127, 1.0, True, None, 1.0),
        (9, 1000, 0.5, False, 5.0, 1.0),
        (5, 16387, 0.6, True, 3.0, 0.25),
        (270, 300, 0.7, False, None, 0.125),
    ],
)
def test_loss_and_every_gradient(dtype, count, vocab_size, labelled, bias, softcap, logit_scale, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 128)  # several chunks
    inputs = loss_inputs(count, vocab_size, dtype, labelled, bias)

    def ours(rows, weight, targets, bias=None):
        return cross_entropy.linear_cross_entropy(
            rows, weight, targets, bias=bias, divisor=count, softcap=softcap, logit_scale=logit_scale
        )

    def theirs(rows, weight, targets, bias=None):
        return plain_loss(rows, weight, targets, bias, count, softcap, logit_scale)

    assert_twice_as_good(ours, theirs, inputs, [torch.tensor(1.7, device=DEVICE)])


def test_loss_of_all_rows_equals_loss_of_labelled_rows():
    # inside a CUDA graph all rows run; elsewhere only the labelled ones
    rows, weight, targets = loss_inputs(70, 131, torch.float32, 0.5, False)
    arguments = (rows.detach(), weight.detach(), targets)
    some = cross_entropy.linear_cross_entropy_forward(*arguments, weight_grad=True)
    every = cross_entropy.linear_cross_entropy_forward(
        *arguments, labelled=None, weight_grad=True, every_row=True
    )
    assert relative_error(every.loss, some.loss) < 1e-6
    assert relative_error(every.drows, some.drows) < 1e-6
    assert relative_error(every.dweight, some.dweight) < 1e-6
    assert (every.drows[targets == -100] == 0).all()


def test_a_label_outside_the_vocabulary_raises_or_makes_the_loss_nan():
    rows, weight, targets = loss_inputs(6, 131, torch.float32, 1.0, False)
    targets[3] = 131
    with pytest.raises(DataError, match="label 131 at position 3"):
        cross_entropy.linear_cross_entropy(rows, weight, targets)
    result = cross_entropy.linear_cross_entropy_forward(rows, weight, targets, every_row=True)
    assert result.loss.isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_scale_is_not_rounded_to_16_bit(dtype):
    gradient = normal(3, 1025, dtype=dtype, grad=False)
    factor = torch.tensor(1 / 3, device=DEVICE)
    scaled = cross_entropy.scale_gradient(gradient, factor, torch.float32)
    assert relative_error(scaled, gradient.double() * factor.double()) < 1e-7


on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@on_a_gpu
def test_loss_in_a_cuda_graph_follows_new_rows_and_labels():
    rows, weight, targets = (x.detach() for x in loss_inputs(130, 1000, torch.bfloat16, 0.6, False))
    divisor = torch.tensor(60, device=DEVICE)

    def run():
        return cross_entropy.linear_cross_entropy_forward(rows, weight, targets, divisor=divisor)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for count in (40, 70):
        rows.copy_(torch.randn_like(rows))
        targets.fill_(-100)
        targets[:count] = torch.randint(0, 1000, (count,), device=DEVICE)
        divisor.fill_(count)
        captured.drows.fill_(float("nan"))
        graph.replay()
        eager = run()
        assert relative_error(captured.loss, eager.loss) < 1e-6
        assert relative_error(captured.drows, eager.drows) < 1e-2
        assert (captured.drows[count:] == 0).all()


@on_a_gpu
@pytest.mark.slow
def test_rows_beyond_2_to_the_31_elements():
    tokens, size = 2**31 // 14336 + 3, 14336
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    gate = torch.zeros(tokens, size, dtype=torch.float16, device=DEVICE)
    gate[-2:] = torch.randn(2, size, device=DEVICE)
    h = gated_mlp.gated_mlp_forward(gate, gate, "silu")
    assert torch.equal(h[-2:], gated_mlp.gated_mlp_forward(gate[-2:].clone(), gate[-2:].clone(), "silu"))
    weight = torch.ones(size, dtype=torch.float16, device=DEVICE)
    y = rms_norm.rms_norm_forward(gate, weight, 1e-5, out=h)[0]
    assert torch.equal(y[-2:], rms_norm.rms_norm_forward(gate[-2:].clone(), weight, 1e-5)[0])
