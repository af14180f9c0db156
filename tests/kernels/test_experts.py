"""Products of rows sorted by expert, and stacks packed as NF4 and MXFP4: kernels against float64 truths and their own libraries.

On a GPU, or in Triton's interpreter when test_interpreted.py runs this file; references on any machine.
"""

import pytest
import torch

from oribi.kernels import dispatch, grouped, nf4
from oribi.kernels.expert_linear import StackProjection, expert_linear
from oribi.kernels.expert_rows import combine, products_and_weighted, take_rows
from oribi.kernels.expert_stack import PackedStack, dequantize_stack
from oribi.kernels.mxfp4 import MXFP4Stack
from oribi.kernels.packed_weight import PackedWeight
from oribi.kernels.routing import RouterRule, choose, sort_by_expert, weigh, weigh_backward
from tests.kernels.truth import DEVICE, relative_error

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DTYPES = [torch.float32] if dispatch.INTERPRETED else [torch.float32, torch.bfloat16]
COUNTS = {
    "unequal": [5, 0, 40, 1, 18],
    "one expert": [0, 0, 64, 0, 0],
    "equal": [16, 16, 16, 16],
    "above a tile": [300, 3, 150],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bounds(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values in the first columns of wider rows, NaN behind them."""
    whole = torch.full((*shape[:-1], shape[-1] + 16), float("nan"), device=DEVICE, dtype=dtype)
    view = whole[..., : shape[-1]]
    view.copy_(torch.randn(shape, device=DEVICE))
    return view


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grouped_product_is_each_groups_own(counts, dtype):
    rows, n, k = sum(counts), 72, 48
    a, b = strided(rows, k, dtype=dtype), strided(len(counts), n, k, dtype=dtype)
    offs = bounds(counts)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    truth = torch.einsum("rk,rnk->rn", a.double().cpu(), b.double().cpu()[ids])
    out = strided(rows, n, dtype=dtype)
    grouped.grouped_matmul(a, b.transpose(1, 2), offs, out=out)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    assert relative_error(out.cpu(), truth) < tolerance
    back = grouped.grouped_matmul(out, b, offs)
    assert (
        relative_error(back.cpu(), torch.einsum("rn,rnk->rk", out.double().cpu(), b.double().cpu()[ids]))
        < tolerance
    )


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grouped_outer_product_is_each_groups_own_and_zero_without_rows(counts, dtype):
    rows, offs = sum(counts), bounds(counts)
    a, b = strided(rows, 24, dtype=dtype), strided(rows, 40, dtype=dtype)
    found = grouped.grouped_outer(a, b, offs)
    assert found.dtype is torch.float32
    for group, (one, other) in enumerate(zip(a.split(counts), b.split(counts))):
        truth = one.double().t() @ other.double()
        if len(one):
            assert relative_error(found[group].cpu(), truth.cpu()) < 1e-6
        else:
            assert not found[group].any()


def packed_stack(experts: int = 3, rows: int = 160, columns: int = 192, parts: int = 2, double: bool = True):
    """A random stack, packed, and its matrices as bitsandbytes packs each."""
    weights = torch.randn(experts * parts, rows // parts, columns)
    stack = PackedStack.empty((experts, rows, columns), parts, double, DEVICE)
    alone = [nf4.quantize(weight, double_quant=double) for weight in weights]
    for place, (codes, state) in enumerate(alone):
        stack.put(place, codes, state)
    return stack, alone


def dense(codes: torch.Tensor, state: object, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state.dtype = dtype
    return dequantize_4bit(codes, state)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_matrix_of_a_stack_has_bitsandbytes_bits(dtype, double):
    # 15,360 values have 240 blocks: a second scale is shared by fewer than 256
    stack, alone = packed_stack(double=double)
    truth = torch.stack([dense(*one, dtype) for one in alone]).view(3, 160, 192)
    out = torch.full((3, 176, 208), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_stack(stack, dtype, out[:, :160, :192])
    assert torch.equal(out[:, :160, :192].cpu(), truth)
    assert out[:, 160:].isnan().all()
    chosen = torch.tensor([2, 0, 2], device=DEVICE)
    assert torch.equal(dequantize_stack(stack, dtype, experts=chosen).cpu(), truth[[2, 0, 2]])
    assert torch.equal(stack.matrix(3, dtype).cpu(), truth[1, 80:])
    assert stack.nbytes < 0.55 * 3 * 160 * 192 or not double


@pytest.mark.parametrize("columns", [72, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_rows_are_taken_combined_and_compared_in_one_pass(dtype, columns):
    tokens, count = 9, 3
    routing = sort_by_expert(torch.rand(tokens, 8, device=DEVICE).topk(count, dim=-1)[1], 8)
    x = strided(tokens, columns, dtype=dtype)
    rows = take_rows(x, routing.tokens, strided(tokens * count, columns, dtype=dtype))
    assert torch.equal(rows, x[routing.tokens])
    weights = torch.rand(tokens, count, device=DEVICE).to(dtype)
    truth = x.double() * weights.double().sum(-1, keepdim=True)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    with torch.no_grad():
        assert relative_error(combine(rows, routing, weights).cpu(), truth.cpu()) < tolerance
        assert relative_error(combine(rows, routing, None).cpu(), count * x.double().cpu()) < tolerance
    other, each = strided(tokens * count, columns, dtype=dtype), routing.of_rows(weights)
    products, scaled = (rows.double() * other.double()).sum(-1), rows.double() * each.double()[:, None]
    assert relative_error(products_and_weighted(rows, other, each).cpu(), products.cpu()) < tolerance
    assert relative_error(rows.cpu(), scaled.cpu()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_weights_have_the_bits_of_transformers(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.randint(0, 256, (3, 160, 6, 16), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(1, 255, (3, 160, 6), dtype=torch.uint8, device=DEVICE)
    scales[scales > 250] = 0  # 2^-127 is no normal number
    truth = convert_moe_packed_tensors(codes, scales, dtype=dtype).mT  # it makes them [in, out]
    stack = MXFP4Stack((3, 160, 192), 2, codes.flatten(2), scales)
    out = torch.full((3, 176, 208), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_stack(stack, dtype, out[:, :160, :192])
    assert torch.equal(out[:, :160, :192], truth)
    assert out[:, 160:].isnan().all()
    chosen = torch.tensor([2, 0, 2], device=DEVICE)
    assert torch.equal(dequantize_stack(stack, dtype, experts=chosen), truth[[2, 0, 2]])
    assert torch.equal(stack.matrix(3, dtype), truth[1, 80:])
    assert stack.nbytes == 3 * 160 * 192 * 17 // 32


@pytest.mark.skipif(dispatch.INTERPRETED, reason="nothing of Triton's is in it")
@pytest.mark.parametrize("packed", [True, False])
def test_biases_and_alternating_rows_of_b_are_those_of_the_plain_formula(packed):
    stack, _ = packed_stack(experts=4)
    dense = dequantize_stack(stack, torch.float32)
    a, b = torch.randn(4 * 5, 192, device=DEVICE), torch.randn(160, 5 * 4, device=DEVICE)
    bias = torch.randn(4, 160, device=DEVICE)
    x, offs = torch.randn(64, 192, device=DEVICE), bounds([5, 0, 41, 18])
    ids = torch.arange(4, device=DEVICE).repeat_interleave(torch.tensor([5, 0, 41, 18], device=DEVICE))
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    weight = PackedWeight(stack, torch.float32) if packed else dense
    y = expert_linear(x, StackProjection(weight, a, b, 0.5, bias, alternating=True), ids, offs)
    by_expert = b.view(160, 5, 4).permute(2, 0, 1)  # rows g0, u0, g1, ...
    by_expert = torch.cat([by_expert[:, ::2], by_expert[:, 1::2]], dim=1)
    every = dense + 0.5 * by_expert @ a.view(4, 5, 192)
    expected = torch.einsum("rk,rnk->rn", x, every[ids]) + bias[ids]
    assert relative_error(y, expected) < 1e-5
    dy = torch.randn_like(y)
    for found, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.skipif(dispatch.INTERPRETED, reason="nothing of Triton's is in it")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "topk_softmax"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"normalise": True}, {"normalise": True, "added": 0.1, "least": 0.7, "scale": 1.7}, {"scale": 0.5}],
    ids=["", "normalised", "bounded", "scaled"],
)
def test_a_routers_gradient_equals_autograds(kind, rule):
    logits = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    rule = RouterRule(kind, 3, groups=4, kept_groups=2, **rule)
    experts = choose(logits.detach(), rule, torch.randn(8))
    assert all(len({one // 2 for one in of_token}) <= 2 for of_token in experts.tolist())
    weights = weigh(logits, experts, rule)
    dweights = torch.randn_like(weights)
    (expected,) = torch.autograd.grad(weights, logits, dweights)
    found = weigh_backward(dweights, logits.detach(), experts, rule)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.skipif(dispatch.INTERPRETED, reason="nothing of Triton's is in it")
def test_rows_are_sorted_by_expert_and_then_by_token():
    experts = torch.tensor([[3, 0], [0, 3], [2, 3]])
    routing = sort_by_expert(experts, 5)
    assert routing.offs.tolist() == [2, 2, 3, 6, 6]
    assert routing.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    values = torch.arange(6)
    assert torch.equal(routing.of_tokens(routing.of_rows(values)).reshape(-1), values)


@pytest.mark.skipif(dispatch.INTERPRETED, reason="nothing of Triton's is in it")
def test_few_rows_read_the_weights_of_their_experts_alone():
    stack, _ = packed_stack(experts=8)
    weight = PackedWeight(stack, torch.float32)
    a, b = torch.randn(8 * 4, 192, device=DEVICE), torch.randn(160, 4 * 8, device=DEVICE)
    projection = StackProjection(weight, a, b, 0.5)
    x = torch.randn(3, 192, device=DEVICE)
    ids = torch.tensor([1, 6, 6], device=DEVICE)
    offs = torch.searchsorted(ids, torch.arange(8, device=DEVICE), right=True, out_int32=True)
    every = expert_linear(x, projection, ids, offs)
    with torch.no_grad():
        few = expert_linear(x, projection, ids, offs)
    assert relative_error(few, every) < 1e-6
