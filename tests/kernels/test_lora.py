"""Linear layers with LoRA: against PyTorch's own, in every precision, for groups, biases and missing adapters."""

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import dispatch, nf4
from oribi.kernels.lora import Projection, augmented_weight
from oribi.kernels.lora_expand import expand
from oribi.kernels.lora_linear import lora_linear, weights_kept
from tests.kernels.truth import (
    DEVICE,
    DTYPES,
    assert_twice_as_good,
    needs_kernels,
    nf4_packed,
    relative_error,
)

GROUPS = {
    "q|k|v": [(96, 4, True), (32, 4, True), (32, 4, True)],
    "gate|up": [(80, 3, False), (80, 5, False)],
    "one of two": [(48, 0, False), (48, 8, False)],
    "bias alone": [(40, 0, True)],
    "nothing added": [(40, 0, False)],
    "single": [(64, 16, False)],
    "wide": [(64, 70, True), (64, 130, False)],
}
IN_FEATURES, TOKENS = 64, 37


def group(name: str, dtype: torch.dtype, packed: bool = False) -> tuple[list[Projection], list[torch.Tensor]]:
    """Random projections, and their tensors in the order weight, bias, A, B."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    projections = []
    for n, rank, biased in GROUPS[name]:
        weight = (normal(n, IN_FEATURES) * 0.1).to(dtype)
        if packed:
            weight = nf4_packed(weight.float())
        factors = dtype if dtype is torch.float64 else torch.float32
        projections.append(
            Projection(
                weight,
                normal(n).to(dtype) if biased else None,
                (normal(rank, IN_FEATURES) * 0.1).to(factors).requires_grad_() if rank else None,
                (normal(n, rank) * 0.1).to(factors).requires_grad_() if rank else None,
                scale=0.75,
            )
        )
    return projections, [t for p in projections for t in (p.a, p.b) if t is not None]


def plain(x: torch.Tensor, projections: list[Projection], *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """PyTorch's own form, everything in x's dtype."""
    factors = list(factors)
    outputs = []
    for p in projections:
        bias = None if p.bias is None else p.bias.to(x.dtype)
        weight = nf4.reference(p.weight, torch.float32) if hasattr(p.weight, "quant_state") else p.weight
        y = F.linear(x, weight.to(x.dtype), bias)
        if p.a is not None:
            a, b = (factors.pop(0).to(x.dtype) for _ in range(2))
            y = y + F.linear(F.linear(x, a), b) * p.scale
        outputs.append(y)
    return tuple(outputs)


def ours(x: torch.Tensor, projections: list[Projection], *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    factors = list(factors)
    given = [
        Projection(p.weight, p.bias, *((factors.pop(0), factors.pop(0)) if p.a is not None else (None, None)), p.scale)
        for p in projections
    ]  # fmt: skip
    return tuple(lora_linear(x, given))


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_are_the_derivatives(name):
    projections, factors = group(name, torch.float64)
    x = torch.randn(5, IN_FEATURES, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *f: ours(x, projections, *f), (x, *factors), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_pytorch(name, dtype, packed):
    projections, factors = group(name, dtype, packed)
    x = torch.randn(TOKENS, IN_FEATURES, device=DEVICE).to(dtype).requires_grad_()
    upstream = [torch.randn(TOKENS, n, device=DEVICE) for n, _, _ in GROUPS[name]]
    assert_twice_as_good(
        lambda x, *f: ours(x, projections, *f),
        lambda x, *f: plain(x, projections, *f),
        [x, *factors],
        upstream,
    )


def test_rows_of_any_leading_shape():
    projections, _ = group("q|k|v", torch.float32)
    x = torch.randn(2, 3, 5, IN_FEATURES, device=DEVICE)
    for together, alone in zip(lora_linear(x, projections), lora_linear(x.reshape(30, -1), projections)):
        assert together.shape[:3] == (2, 3, 5)
        assert torch.equal(together.reshape(30, -1), alone)


def test_dropout_keeps_its_rate_and_its_scale():
    weight = torch.zeros(8, 64, device=DEVICE)
    one = torch.ones(1, 64, device=DEVICE)
    projection = Projection(weight, None, one, torch.ones(8, 1, device=DEVICE), 1.0, dropout=0.25)
    torch.manual_seed(0)
    (y,) = lora_linear(torch.ones(4000, 64, device=DEVICE), [projection])
    assert abs(y.mean().item() / 64 - 1) < 0.01
    assert y.std() > 1  # and it does drop


def test_trained_weights_and_biases_get_gradients():
    weight = torch.randn(8, 64, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, device=DEVICE, requires_grad=True)
    x = torch.randn(5, 64, device=DEVICE)
    lora_linear(x, [Projection(weight, bias)])[0].sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(8, -1), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((8,), 5.0, device=DEVICE))


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packing_kernel_writes_what_the_reference_writes(name, dtype):
    projections, _ = group(name, dtype)
    buffer = augmented_weight(projections, dtype, torch.device(DEVICE))
    with dispatch.reference_only():
        expected = augmented_weight(projections, dtype, torch.device(DEVICE))
    for part in ("w", "a", "scaled_b"):
        assert torch.equal(getattr(buffer, part), getattr(expected, part))


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "p"), [(1, 1, 16), (37, 200, 64), (65, 129, 192), (130, 256, 48)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_expansion_in_one_pass(dtype, tokens, n, p, with_residual):
    xa = torch.randn(tokens, p, device=DEVICE).to(dtype)
    b = torch.randn(n, p + 24, device=DEVICE).to(dtype)[:, :p]
    residual = torch.randn(tokens, n, device=DEVICE).to(dtype) if with_residual else None
    truth = xa.double() @ b.double().t() + (0 if residual is None else residual.double())
    plain_error = relative_error((xa @ b.t()) + (0 if residual is None else residual), truth)
    assert relative_error(expand(xa, b, residual), truth) <= max(2 * plain_error, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["new", "residual", "product", "wider"])
def test_expansion_of_a_transpose_onto_two_sums_and_into_either_of_them(dtype, place):
    tokens, n, p = 70, 136, 16
    xa, a = (
        torch.randn(tokens, p, device=DEVICE).to(dtype),
        torch.randn(p, n + 8, device=DEVICE).to(dtype)[:, :n],
    )
    residual, product = (torch.randn(tokens, n, device=DEVICE).to(dtype) for _ in range(2))
    truth = xa.double() @ a.double() + residual.double() + product.double()
    plain_error = relative_error(xa @ a + residual + product, truth)
    wider = torch.full((tokens, n + 24), 7.0, dtype=dtype, device=DEVICE)
    out = {"new": None, "residual": residual, "product": product, "wider": wider[:, :n]}[place]
    got = expand(xa, a.t(), residual, product, out=out)
    assert out is None or got is out
    assert relative_error(got, truth) <= max(2 * plain_error, 2e-6)
    assert (wider[:, n:] == 7).all()


@pytest.mark.parametrize("magnitude", [0.0, 8.0])
def test_a_small_adapter_is_not_rounded_away_beside_a_large_residual(magnitude):
    """Its term is a tenth of the spacing of bfloat16 numbers at the residual's magnitude, but 65,536 sums find it."""
    tokens, n, k, rank = 256, 256, 64, 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    torch.manual_seed(0)
    weight, a, b = (normal(n, k) * 0.05).bfloat16(), normal(rank, k) * 0.02, normal(n, rank) * 0.01
    x = normal(tokens, k).bfloat16()
    residual = (normal(tokens, n) * magnitude).bfloat16() if magnitude else None
    with_it, without = (
        augmented_weight(
            [Projection(weight, None, a, factor)], torch.bfloat16, x.device
        ).forward_onto(x, residual)[0].double()
        for factor in (b, b * 0)
    )  # fmt: skip
    term = x.double() @ a.double().t() @ b.double().t()
    share = ((with_it - without) * term).sum() / term.square().sum()
    assert 0.7 < share < 1.3


@pytest.mark.parametrize("name", GROUPS)
def test_kept_weights_give_the_same_output_and_follow_another_adapter(name):
    projections, _ = group(name, torch.float32, packed=True)
    other = [
        Projection(p.weight, p.bias, p.a, None if p.b is None else p.b.detach() + 1, p.scale)
        for p in projections
    ]
    x = torch.randn(3, IN_FEATURES, device=DEVICE)
    with torch.no_grad():
        expected, expected_other = lora_linear(x, projections), lora_linear(x, other)
        with weights_kept():
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(lora_linear(x, projections), expected))
                assert all(torch.equal(a, b) for a, b in zip(lora_linear(x, other), expected_other))


def test_kept_weights_are_dequantised_once_and_let_go(monkeypatch):
    projections, _ = group("q|k|v", torch.float32, packed=True)
    calls = []
    real = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = torch.randn(3, IN_FEATURES, device=DEVICE)
    with torch.no_grad(), weights_kept():
        for _ in range(3):
            lora_linear(x, projections)
    assert len(calls) == 1
    with torch.no_grad():
        lora_linear(x, projections)
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPS)
def test_weights_that_are_not_packed_are_read_where_they_lie(name, dtype, rows, monkeypatch):
    projections, factors = group(name, dtype)
    x = torch.randn(rows, IN_FEATURES, device=DEVICE).to(dtype)
    monkeypatch.setattr("oribi.kernels.lora_linear.augmented_weight", lambda *_: pytest.fail("a copy"))
    with torch.no_grad():
        truth = plain(x.double(), projections, *factors)
        theirs = plain(x, projections, *factors)
        with weights_kept():
            found = lora_linear(x, projections)
    for ours_, one, right in zip(found, theirs, truth):
        assert ours_.dtype == dtype
        assert relative_error(ours_, right) <= max(2 * relative_error(one, right), 2e-6)
