"""e4m3 products of frozen weights: references against the formula, kernels against references.

Triton's interpreter rounds to e4m3 wrongly (ties away from zero, a carry lost), so kernels are compared there before that
last step; a GPU compares the codes themselves.
"""

import pytest
import torch

from oribi.kernels import dispatch, fp8, nf4
from oribi.kernels.lora import Projection, augmented_weight
from tests.kernels.truth import (
    DEVICE,
    DTYPES,
    HAS_E4M3,
    cases,
    needs_e4m3,
    needs_kernels,
    nf4_packed,
    poisoned,
    relative_error,
)

GROUPS = [((64,), 64), ((144, 16, 32), 192), ((64, 64, 64), 1088), ((272,), 48)]
# half the distance of neighbours with three bits of mantissa
ROUNDING = 2.0**-4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def packed(n: int, k: int, **settings: object) -> torch.Tensor:
    return nf4_packed(torch.randn(n, k, device=DEVICE) * 0.02, **settings)


def rows(dtype: torch.dtype, tokens: int, k: int) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, as a view of wider ones."""
    x = torch.randn(tokens, k, device=DEVICE) * 10.0 ** torch.linspace(-4, 3, tokens, device=DEVICE)[:, None]
    x[tokens // 2] = 0
    return poisoned(tokens, k, dtype=dtype, width=k + 16).copy_(x)


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.float(), right.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_by_a_scale_of_their_own(dtype):
    x = rows(dtype, 7, 96)
    with dispatch.reference_only():
        codes, scales = fp8.quantize_rows(x)
    assert codes.dtype is torch.float8_e4m3fn
    assert scales.shape == (7, 1)
    largest = x.float().abs().amax(1)
    zeros = largest == 0
    assert torch.equal(codes.float().abs().amax(1), torch.where(zeros, 0.0, 448.0))
    assert torch.equal(scales[zeros], torch.ones(1, 1, device=DEVICE))
    error = (codes.float() * scales - x.float()).abs()
    # below the smallest normal number, 2^-6, neighbours are 2^-9 apart
    assert (error <= torch.maximum(x.float().abs() * ROUNDING, scales * 2.0**-10) * 1.0001).all()


def test_what_is_not_finite_stays_so_and_what_is_tiny_counts_as_zero():
    x = torch.ones(4, 16, device=DEVICE)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 1e-38
    with dispatch.reference_only():
        codes, scales = fp8.quantize_rows(x)
    finite = (codes.float() * scales).isfinite().all(1)
    assert finite.tolist() == [True, False, False, True]
    assert not codes[3].float().any()


@pytest.mark.parametrize(("sizes", "k"), [*GROUPS, ((65, 3), 100)])
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"blocksize": 128}])
def test_weights_are_rounded_by_one_scale_and_both_orientations_hold_the_same(sizes, k, settings):
    weights = [packed(n, k, **settings) for n in sizes]
    with dispatch.reference_only():
        scale = fp8.group_scale(weights)
        dense = nf4.dequantize(weights, torch.float32)
        codes = fp8.dequantize_e4m3(weights, scale.reciprocal())
        transposed = fp8.dequantize_e4m3(weights, scale.reciprocal(), transposed=True)
    assert equal(codes, (dense * scale.reciprocal()).to(torch.float8_e4m3fn))
    assert codes.float().abs().max() == 448
    assert equal(transposed, codes.t())
    assert transposed.is_contiguous()
    assert relative_error(codes.float() * scale, dense) < 0.03


def test_weights_in_16_bit_are_rounded_alike():
    weights = [torch.randn(n, 64, device=DEVICE).to(torch.bfloat16) for n in (48, 16)]
    scale = fp8.group_scale(weights)
    assert scale.item() == pytest.approx(max(w.abs().max().item() for w in weights) / 448)
    codes = fp8.dequantize_e4m3(weights, scale.reciprocal(), transposed=True)
    assert equal(codes, (torch.cat(weights).float() * scale.reciprocal()).to(torch.float8_e4m3fn).t())


def test_weights_of_zeros_have_a_scale():
    assert fp8.group_scale([torch.zeros(16, 16, device=DEVICE)]).item() == 1.0


def test_sizes_that_the_matrix_units_take():
    def group(*sizes: int, k: int = 64) -> list[Projection]:
        return [Projection(torch.empty(n, k)) for n in sizes]

    assert fp8.fits(group(64, 16))
    assert not fp8.fits(group(64, 8))
    assert fp8.fits(group(24, 24, k=64))  # of the product, whatever is in it
    assert fp8.fits(group(64, 64, 1, 15))
    assert not fp8.fits(group(64, k=72))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_a_group_computes_the_formula_of_rounded_operands_and_its_gradient(dtype, rank, biased):
    if DEVICE == "cuda" and (dtype is torch.float32 or not HAS_E4M3):
        pytest.skip("a GPU's products of e4m3 are in bfloat16, from compute capability 8.9 on")
    sizes, k, tokens = (64, 32, 16), 96, 37

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE) * 0.1

    projections = [
        Projection(
            packed(n, k), normal(n).to(dtype) if biased else None, normal(rank, k) if rank else None,
            normal(n, rank) if rank else None, 0.75,
        )
        for n in sizes
    ]  # fmt: skip
    n, device = sum(sizes), torch.device(DEVICE)
    rounded = fp8.rounded_weights(projections)
    group = fp8.fp8_weight(projections, rounded, dtype, device)
    exact = augmented_weight(projections, dtype, device)
    weight = rounded.plain.double() * fp8.group_scale([p.weight for p in projections]).double()
    x_buffer = group.input_buffer(tokens)
    x_buffer[:, :k] = normal(tokens, k)
    y = group.forward(x_buffer)[:, :n]
    codes, scales = fp8.quantize_rows(x_buffer[:, :k])
    truth = (codes.double() * scales) @ weight.t() + x_buffer[:, k:].double() @ group.scaled_b.double().t()
    tolerance = 1e-6 if dtype is torch.float32 else 6e-3
    assert relative_error(y, truth) < tolerance
    residual = normal(tokens, n).to(dtype)
    onto, xa = group.forward_onto(x_buffer[:, :k], residual)
    assert relative_error(onto, truth + residual.double()) < tolerance
    assert (xa is None) == (not group.lora_columns)
    alone, _ = group.forward_onto(x_buffer[:, :k], None)
    assert relative_error(alone, truth) < tolerance
    dy_buffer = group.output_buffer(tokens)
    dy_buffer[:, :n] = normal(tokens, n)
    group.compute_dyb(dy_buffer)
    dx = group.backward_input(dy_buffer)
    codes, scales = fp8.quantize_rows(dy_buffer[:, :n])
    truth = (codes.double() * scales) @ weight + dy_buffer[:, n:].double() @ group.a.double()
    assert relative_error(dx, truth) < tolerance
    # and it is near the exact one: two operands with an error of about 2.6 % each
    assert relative_error(dx, exact.backward_input(dy_buffer)) < 0.05
    exact_buffer = exact.input_buffer(tokens)
    exact_buffer[:, :k] = x_buffer[:, :k]
    assert relative_error(y, exact.forward(exact_buffer)[:, :n]) < 0.05


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 16), (7, 100), (5, 2049)])
def test_the_kernel_scales_rows_as_the_reference_does(dtype, tokens, k):
    x = rows(dtype, tokens, k)
    got = fp8.quantize_rows(x, poisoned(tokens, k, dtype=torch.float32))
    with dispatch.reference_only():
        expected = fp8.quantize_rows(x, poisoned(tokens, k, dtype=torch.float32))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@needs_kernels
@pytest.mark.gpu
@cases({"sizes, k": GROUPS, "transposed": [False, True], "double_quant": [False, True]})
def test_the_kernel_decodes_weights_in_both_orientations(sizes, k, transposed, double_quant):
    weights = [packed(n, k, double_quant=double_quant) for n in sizes]
    inverse = fp8.group_scale(weights).reciprocal()
    out = poisoned(*((k, sum(sizes)) if transposed else (sum(sizes), k)), dtype=torch.float32)
    assert fp8.dequantize_e4m3(weights, inverse, transposed, out) is out
    expected = nf4.dequantize(weights, torch.float32) * inverse
    assert torch.equal(out, expected.t() if transposed else expected)


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_decodes_weights_before_others_in_16_bit(transposed):
    """As of an MLP beside experts, whose gate is one row."""
    codes = [packed(64, 128), packed(64, 128)]
    dense = [torch.randn(n, 128, device=DEVICE).to(torch.bfloat16) for n in (1, 63)]
    weights = [*codes, *dense]
    inverse = fp8.group_scale(weights).reciprocal()
    out = poisoned(*((128, 192) if transposed else (192, 128)), dtype=torch.float32)
    assert fp8.dequantize_e4m3(weights, inverse, transposed, out) is out
    expected = torch.cat([nf4.dequantize(codes, torch.float32), *(one.float() for one in dense)]) * inverse
    assert torch.equal(out, expected.t() if transposed else expected)


@needs_e4m3
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "k"), [(1, 16), (9, 4096), (5, 14336), (3, 28672), (2, 57344)])
def test_a_gpu_rounds_rows_to_the_reference_s_codes(dtype, tokens, k):
    x = rows(dtype, tokens, k)
    got = fp8.quantize_rows(x)
    with dispatch.reference_only():
        expected = fp8.quantize_rows(x)
    assert equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@needs_e4m3
@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "k"), [*GROUPS, ((4096, 1024, 1024), 4096), ((2048,), 14336)])
def test_a_gpu_rounds_weights_to_the_reference_s_codes(sizes, k):
    weights = [packed(n, k) for n in sizes]
    inverse = fp8.group_scale(weights).reciprocal()
    with dispatch.reference_only():
        expected = fp8.dequantize_e4m3(weights, inverse)
    assert equal(fp8.dequantize_e4m3(weights, inverse), expected)
    assert equal(fp8.dequantize_e4m3(weights, inverse, transposed=True), expected.t())
