"""Linear layers on few rows against float64: error at most twice that of PyTorch on the dequantised weights."""

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import dispatch, nf4_linear
from oribi.kernels.lora import Projection
from oribi.kernels.packed_weight import dense_weight
from tests.kernels.truth import DEVICE, DTYPES, cases, needs_kernels, nf4_packed, relative_error

pytestmark = [pytest.mark.gpu, needs_kernels]
# the interpreter, which takes seconds for each, has the smallest that cross the same borders
ROWS = [1, 3, 16, 17, 64] if dispatch.INTERPRETED else [1, 2, 3, 8, 16, 17, 33, 64]
LONG = 2112 if dispatch.INTERPRETED else 4096  # read in eight parts
WIDE = 20 if dispatch.INTERPRETED else 140  # a rank of several blocks, the last not full


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def projection(n: int, k: int, rank: int, bias: bool, factor_dtype=torch.float32, **settings) -> Projection:
    weight = nf4_packed(torch.randn(n, k, device=DEVICE) * 0.05, **settings)
    a = torch.randn(rank, k, device=DEVICE).mul(k**-0.5).to(factor_dtype) if rank else None
    b = torch.randn(n, rank, device=DEVICE).to(factor_dtype) if rank else None
    return Projection(weight, torch.randn(n, device=DEVICE) if bias else None, a, b, 0.7)


def layers_in(x, projections, residual, scale, activation, dtype):
    """The layers in a dtype, on the codes' exact values; the truth in float64."""
    outputs = []
    for p in projections:
        y = F.linear(x.to(dtype), dense_weight(p.weight, torch.float32).to(dtype))
        if p.a is not None:
            xa = F.linear(x.to(dtype), p.a.to(dtype))
            y = y + xa @ (p.b.to(dtype) * p.scale).to(dtype).t()
        outputs.append(y if p.bias is None else y + p.bias.to(dtype))
    y = torch.cat(outputs, 1)
    if activation is not None:
        gate, up = y.chunk(2, 1)
        act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
        return act[activation](gate) * up
    return y if residual is None else residual.to(dtype) + y * scale


def check(dtype, rows, projections, residual=False, scale=1.0, activation=None):
    k = projections[0].shape[1]
    n = sum(p.shape[0] for p in projections)
    x = torch.randn(rows, k, device=DEVICE).to(dtype)
    added = torch.randn(rows, n, device=DEVICE).to(dtype) if residual else None
    counters = nf4_linear.new_counters(x.device)
    assert nf4_linear.reads(projections, rows)
    settings = {"residual": added, "residual_scale": scale, "activation": activation}
    y = nf4_linear.nf4_linear(x, projections, counters, **settings)
    if not dispatch.INTERPRETED:  # it runs one program after the other, always in the same order
        assert torch.equal(y, nf4_linear.nf4_linear(x, projections, counters, **settings))
    assert not counters.any()
    exact = layers_in(x, projections, added, scale, activation, torch.float64)
    theirs = relative_error(layers_in(x, projections, added, scale, activation, dtype), exact)
    assert y.shape == exact.shape
    assert y.dtype is dtype
    # in float32: another order of additions, and the GPU's fast exp, which is good to a few 1e-7
    assert relative_error(y, exact) <= max(2 * theirs, 1e-6)


@cases({"dtype": DTYPES, "rows": ROWS})
def test_one_layer_of_any_number_of_rows(dtype, rows):
    check(dtype, rows, [projection(80, 320, 16, False)], residual=True)


@cases(
    {"dtype": DTYPES, "rows": [1, 5], "ranks": [(0, 0, 0), (16, 16, 16), (4, 0, WIDE)], "bias": [False, True]}
)
def test_a_group_of_three(dtype, rows, ranks, bias):
    check(dtype, rows, [projection(n, 256, r, bias and n > 40) for n, r in zip((100, 40, 64), ranks)])


@cases(
    {"dtype": DTYPES, "rows": [1, 3], "activation": ["silu", "gelu", "gelu_tanh"], "together": [False, True]}
)
def test_gate_and_up_end_in_their_activation(dtype, rows, activation, together):
    shapes = [(144, 16)] if together else [(72, 16), (72, 8)]
    check(dtype, rows, [projection(n, 512, r, True) for n, r in shapes], activation=activation)


# one to eight parts of K, each with a row length that ends inside the last
@cases({"dtype": DTYPES, "rows": [1, 2], "double_quant": [True, False], "k": [64, 192, 576, 1088, LONG]})
def test_any_row_length_and_kind_of_scales(dtype, rows, double_quant, k):
    check(dtype, rows, [projection(48, k, 8, False, dtype, double_quant=double_quant)], True, 0.3)
