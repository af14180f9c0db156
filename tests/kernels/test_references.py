"""The references, which are what runs without a GPU, against float64 truths, `gradcheck` and bitsandbytes."""

import pytest
import torch
from torch.autograd import gradcheck

from oribi.errors import DataError, ModelError
from oribi.kernels import cross_entropy, dispatch, gated_mlp, lora, nf4, nf4_linear, rms_norm, rope
from tests.kernels.truth import (
    assert_twice_as_good,
    nf4_packed,
    plain_gated_mlp,
    plain_loss,
    plain_rms_norm,
    plain_rope,
    relative_error,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def references():
    torch.manual_seed(0)
    with dispatch.reference_only():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 5, 64), (7, 129)])
def test_rms_norm(dtype, offset, shape):
    assert_twice_as_good(
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5, offset),
        lambda x, w: plain_rms_norm(x, w, 1e-5, offset),
        [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)],
        [torch.randn(shape)],
    )


def test_rms_norm_gradcheck_in_every_layout():
    wide = normal(3, 2 * 5 + 3)
    weight = normal(5)
    assert gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 1e-3, 1.0), (normal(4, 5), weight))
    assert gradcheck(lambda x, w: rms_norm.rms_norm(x[:, :10].view(3, 2, 5), w, 1e-3), (wide, weight))
    assert gradcheck(lambda x, w: rms_norm.rms_norm(x.t(), w, 1e-3), (normal(5, 4), weight))
    assert gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 1e-3, centred=True), (normal(4, 5), weight))
    assert gradcheck(lambda x: rms_norm.rms_norm(x, None, 1e-3), (normal(4, 5),))


def test_rms_norm_of_a_sum_and_its_gradient_are_those_of_the_separate_operations():
    x, residual, weight = normal(6, 10), normal(6, 10), normal(10)
    total = residual + 0.5 * x
    y = plain_rms_norm(total, weight, 1e-3, 0.0)
    dy, dtotal = torch.randn(6, 10).double(), torch.randn(6, 10).double()
    expected = torch.autograd.grad([y, total], [residual, weight], [dy, dtotal])
    got, s, rstd = rms_norm.rms_norm_forward(x.detach(), weight, 1e-3, residual=residual, residual_scale=0.5)
    dx, dweight = rms_norm.rms_norm_backward(dy, s, rstd, weight, dresidual=dtotal, weight_grad=True)
    for a, b in ((got, y), (s, total), (dx, expected[0]), (dweight, expected[1])):
        assert relative_error(a.detach(), b.detach()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20), (2, 1)])
def test_rope(dtype, head_dim, half):
    q, k, angle = (
        normal(5, 4, head_dim, dtype=dtype),
        normal(5, 2, head_dim, dtype=dtype),
        torch.randn(5, half),
    )
    upstream = [torch.randn(q.shape), torch.randn(k.shape)]
    assert_twice_as_good(rope.rope, plain_rope, [q, k, angle.cos(), angle.sin()], upstream)


def test_rope_gradcheck_and_inverse():
    angle = torch.randn(3, 2, dtype=torch.float64)
    q, k, scale = normal(3, 2, 6), normal(3, 1, 6), torch.rand(3, dtype=torch.float64) + 1
    assert gradcheck(lambda q, k: rope.rope(q, k, angle.cos(), angle.sin()), (q, k))
    assert gradcheck(lambda q, k: rope.rope(q[..., :4], k, angle.cos(), angle.sin(), scale, True), (q, k))
    q, k = q.detach(), k.detach()
    neighbours = rope.rope_forward(q, k, angle.cos(), angle.sin(), interleaved=True)[0]
    turned = (
        torch.view_as_complex(q[..., :4].unflatten(-1, (2, 2)))
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    assert relative_error(neighbours[..., :4], torch.view_as_real(turned).flatten(-2)) < 1e-15
    assert torch.equal(neighbours[..., 4:], q[..., 4:])
    turned = rope.rope_forward(q, k, angle.cos(), angle.sin())
    back = rope.rope_forward(*turned, angle.cos(), angle.sin(), inverse=True, out=turned)
    assert back[0] is turned[0]
    assert relative_error(back[0], q) < 1e-15
    assert relative_error(back[1], k) < 1e-15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_gated_mlp(dtype, activation):
    gate, up = normal(5, 33, dtype=dtype), normal(5, 33, dtype=dtype)
    assert_twice_as_good(
        lambda g, u: gated_mlp.gated_mlp(g, u, activation),
        lambda g, u: plain_gated_mlp(g, u, activation),
        [gate, up],
        [torch.randn(5, 33)],
    )


@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_gated_mlp_gradcheck_and_rebuilt_h(activation):
    gate, up = normal(3, 5), normal(3, 5)
    assert gradcheck(lambda g, u: gated_mlp.gated_mlp(g, u, activation), (gate, up))
    both = normal(4, 20, dtype=torch.bfloat16, grad=False)
    gate, up = both.chunk(2, 1)
    h = gated_mlp.gated_mlp_forward(gate, up, activation)
    dh = torch.randn(4, 10).bfloat16()
    fresh = gated_mlp.gated_mlp_backward(dh, gate, up, activation)
    in_place = gated_mlp.gated_mlp_backward(dh, gate, up, activation, dgate=gate, dup=up, h=dh)
    assert torch.equal(dh, h)
    assert torch.equal(in_place[0], fresh[0])
    assert torch.equal(in_place[1], fresh[1])


def test_an_unknown_activation_is_refused():
    with pytest.raises(ModelError, match="'relu' has no kernel"):
        gated_mlp.gated_mlp(normal(1, 2), normal(1, 2), "relu")


def packed_weight(n: int, k: int, **settings: object) -> torch.Tensor:
    return nf4_packed(torch.randn(n, k) * 0.02, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"blocksize": 128}])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 96), (5, 100), (31, 6)])
def test_nf4_follows_its_formula_at_any_row_length(dtype, settings, n, k):
    weight = packed_weight(n, k, **settings)
    got = nf4.dequantize([weight], dtype)
    assert torch.equal(got, nf4.reference(weight, dtype))
    assert got.shape == (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_equals_bitsandbytes(dtype):
    from bitsandbytes.functional import dequantize_4bit

    weights = [packed_weight(n, 128) for n in (24, 7)]
    for weight in weights:
        weight.quant_state.dtype = dtype
    expected = torch.cat([dequantize_4bit(w, w.quant_state) for w in weights])
    assert torch.equal(nf4.dequantize(weights, dtype), expected)
    out = torch.full((31, 160), float("nan"), dtype=dtype)[:, :128]
    assert nf4.dequantize(weights, dtype, out) is out
    assert torch.equal(out, expected)


def test_nf4_is_close_to_the_weight_it_came_from():
    dense = torch.randn(128, 256) * 0.02
    assert relative_error(nf4.dequantize([nf4_packed(dense)], torch.float32), dense) < 0.1


def test_nf4_refuses_repacked_weights_and_unequal_rows():
    weights = [packed_weight(64, 64), packed_weight(64, 128)]
    with pytest.raises(ModelError, match="row lengths differ"):
        nf4.dequantize(weights, torch.float32)
    weights[0].quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="rearranged"):
        nf4.dequantize(weights[:1], torch.float32)


def ours(rows, weight, targets, bias=None, divisor=1, softcap=None, logit_scale=1.0):
    return cross_entropy.linear_cross_entropy(
        rows, weight, targets, bias=bias, divisor=divisor, softcap=softcap, logit_scale=logit_scale
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0}, {"logit_scale": 0.25, "softcap": 5.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_every_gradient(dtype, settings, with_bias, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 128)  # several chunks
    targets = torch.randint(0, 131, (300,))
    targets[::3] = -100
    inputs = [normal(300, 24, dtype=dtype), normal(131, 24, dtype=dtype), targets]
    if with_bias:
        inputs.append(normal(131, dtype=dtype))
    assert_twice_as_good(
        lambda *x: ours(*x, divisor=37, **settings),
        lambda *x: plain_loss(*x, divisor=37, **settings),
        inputs,
        [torch.tensor(1.7)],
    )


@pytest.mark.parametrize("labels", [[0, 4, -100, 6, -100], [-100] * 5, [1, 2, 3, 4, 5]])
def test_loss_gradcheck(labels):
    targets = torch.tensor(labels)
    inputs = (normal(5, 4), normal(7, 4), normal(7))
    assert gradcheck(lambda r, w, b: ours(r, w, targets, b, 3, 2.0, 0.5), inputs)


def test_divisor_may_be_a_number_a_tensor_or_the_labelled_rows():
    rows, weight = normal(6, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32)
    targets = torch.tensor([1, -100, 3, 4, -100, 10])
    by_rows = ours(rows, weight, targets, divisor=None)
    assert torch.equal(by_rows, ours(rows, weight, targets, divisor=4))
    assert torch.equal(by_rows, ours(rows, weight, targets, divisor=torch.tensor(4)))
    assert relative_error(by_rows, torch.nn.functional.cross_entropy(rows @ weight.t(), targets)) < 1e-6
    assert ours(rows, weight, torch.full((6,), -100), divisor=None) == 0.0


def test_rows_found_before_the_forward_give_the_same_loss():
    rows, weight = normal(6, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32)
    targets = torch.tensor([1, -100, 3, 4, -100, 10])
    labelled = cross_entropy.labelled_rows(targets, 11)
    assert labelled.tolist() == [0, 2, 3, 5]
    found = cross_entropy.linear_cross_entropy(rows, weight, targets, labelled=labelled)
    assert torch.equal(found, ours(rows, weight, targets, divisor=None))
    every = cross_entropy.linear_cross_entropy_forward(rows, weight, targets, every_row=True)
    assert relative_error(every.loss, found.detach()) < 1e-6
    assert every.drows[1].abs().max() == 0


def test_unlabelled_rows_get_a_zero_gradient_and_do_not_matter():
    rows, weight = normal(6, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32, grad=False)
    targets = torch.tensor([1, -100, 3, 4, -100, 10])
    rows.data[targets == -100] = float("nan")
    ours(rows, weight, targets, divisor=None).backward()
    assert torch.isfinite(rows.grad).all()
    assert (rows.grad[targets == -100] == 0).all()


def test_nothing_is_formed_that_is_not_asked_for(monkeypatch):
    rows, weight = normal(6, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32, grad=False)
    targets = torch.arange(6)
    asked = []
    forward = cross_entropy.linear_cross_entropy_forward

    def spy(*arguments, **settings):
        asked.append(tuple(settings[name] for name in ("rows_grad", "weight_grad", "bias_grad")))
        return forward(*arguments, **settings)

    monkeypatch.setattr(cross_entropy, "linear_cross_entropy_forward", spy)
    loss = ours(rows, weight, targets)
    with torch.no_grad():
        assert torch.equal(ours(rows, weight, targets), loss)
    assert asked == [(True, False, False), (False, False, False)]


def test_float16_gradients_do_not_vanish_behind_a_large_divisor():
    rows, weight = normal(4, 8, dtype=torch.float16), normal(5000, 8, dtype=torch.float16, grad=False) * 0.01
    targets = torch.arange(4)
    loss = ours(rows, weight, targets, divisor=2**17)
    (loss * 2**17).backward()  # as a loss scaler does
    exact = rows.detach().double().requires_grad_()
    plain_loss(exact, weight.double(), targets).backward()
    assert relative_error(rows.grad, exact.grad) < 2e-3


def test_a_label_outside_the_vocabulary_is_named():
    rows, weight = normal(4, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32)
    for label in (11, -1):
        with pytest.raises(DataError, match=f"label {label} at position 2 .* from 0 to 10"):
            ours(rows, weight, torch.tensor([-100, 3, label, 0]))


def test_autocast_computes_logits_in_its_dtype():
    rows, weight = normal(4, 8, dtype=torch.float32), normal(11, 8, dtype=torch.float32)
    targets = torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(rows, weight, targets)
    loss.backward()
    expected = ours(rows.detach().bfloat16(), weight.detach().bfloat16(), targets)
    assert torch.equal(loss, expected)
    assert rows.grad.dtype is torch.float32
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("count", "vocab_size"), [(1, 100), (64, 32000), (1100, 32000), (5000, 262144), (10**5, 7)]
)
def test_chunks_are_even_aligned_and_bounded(count, vocab_size):
    rows, columns = cross_entropy.logits_shape(count, vocab_size, 2)
    assert 0 <= columns - vocab_size < 64
    assert rows % 128 == 0
    assert rows <= cross_entropy.CHUNK_ROWS
    assert rows * vocab_size * 2 <= cross_entropy.CHUNK_BYTES
    last = count % rows or rows
    assert count < rows or rows - last < 128 * (-(-count // rows))


def test_reference_only_ends_with_its_block():
    with dispatch.reference_only():
        pass
    assert not dispatch.use_triton(torch.ones(1))  # the fixture's block continues


@pytest.mark.parametrize("shape", [(64, 64), (300, 192), (7, 33)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_quantises_as_bitsandbytes_does(shape, double_quant):
    from bitsandbytes.functional import quantize_4bit

    dense = (torch.randn(shape) * 0.02).bfloat16()
    codes, state = nf4.quantize(dense, double_quant=double_quant)
    expected = quantize_4bit(dense, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    assert torch.equal(codes, expected[0])
    assert state.as_dict().keys() == expected[1].as_dict().keys()
    for name, value in expected[1].as_dict().items():
        own = state.as_dict()[name]
        assert torch.equal(own, value) if isinstance(value, torch.Tensor) else own == value, name


def test_linear_layers_on_few_rows_are_those_of_the_dequantised_weights():
    group = [
        lora.Projection(
            nf4_packed(torch.randn(24, 128)), torch.randn(24), torch.randn(4, 128), torch.randn(24, 4), 0.5
        ),
        lora.Projection(nf4_packed(torch.randn(24, 128))),
    ]
    x, residual = torch.randn(3, 128), torch.randn(3, 48)
    assert nf4_linear.reads(group, 64)
    assert not nf4_linear.reads(group, 65)
    assert not nf4_linear.reads([lora.Projection(torch.randn(24, 128))], 1)
    with dispatch.reference_only():
        y = nf4_linear.nf4_linear(x, group, None, residual=residual, residual_scale=0.5)
        h = nf4_linear.nf4_linear(x, group, None, activation="silu")
    one, two = (x.double() @ nf4.reference(p.weight, torch.float64).t() for p in group)
    one = one + group[0].bias.double() + x.double() @ group[0].a.double().t() @ group[0].b.double().t() * 0.5
    assert relative_error(y, residual.double() + torch.cat([one, two], 1) * 0.5) < 1e-6
    assert relative_error(h, torch.nn.functional.silu(one) * two) < 1e-6
