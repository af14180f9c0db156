"""Linear layers on ggml's blocks against float64: error at most twice that of PyTorch on the dequantised weights."""

import pytest
import torch

from oribi.kernels import block_linear, dispatch, nf4_linear
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes
from oribi.kernels.lora import Projection
from oribi.kernels.packed_weight import PackedWeight, dense_weight
from tests.kernels.test_ggml_blocks import random_codes
from tests.kernels.test_nf4_linear import layers_in
from tests.kernels.truth import DEVICE, DTYPES, cases, needs_kernels, relative_error

pytestmark = [pytest.mark.gpu, needs_kernels]
ROWS = [1, 3, 16] if dispatch.INTERPRETED else [1, 2, 3, 8, 15, 16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def projection(kind: str, n: int, k: int, rank: int, bias: bool = False) -> Projection:
    """A layer with every code, whose scales make values of about 0.05."""
    codes = BlockCodes((n, k), kind, random_codes(kind, n, k, seed=n + k))
    of = BLOCK_TYPES[kind]
    blocks = codes.codes.view(n, -1, of.nbytes)
    # below 2^-4, and 2^-4 in steps of integers there
    for first in [208] if of.parts == 16 else [0, 2] if of.minimum else [0]:
        blocks[..., first + 1] = blocks[..., first + 1] & 0x83 | (0x04 if of.parts > 2 else 0x1C)
    codes.codes = codes.codes.to(DEVICE)
    a = torch.randn(rank, k, device=DEVICE).mul(k**-0.5) if rank else None
    b = torch.randn(n, rank, device=DEVICE) if rank else None
    weight = PackedWeight(codes, torch.float32)
    return Projection(weight, torch.randn(n, device=DEVICE) if bias else None, a, b, 0.7)


def check(dtype, rows, projections, activation=None):
    k = projections[0].shape[1]
    x = torch.randn(rows, k, device=DEVICE).to(dtype)
    counters = nf4_linear.new_counters(x.device)
    assert block_linear.reads_blocks(projections, rows)
    y = block_linear.block_linear(x, projections, counters, activation)
    if not dispatch.INTERPRETED:  # it runs one program after the other, always in the same order
        assert torch.equal(y, block_linear.block_linear(x, projections, counters, activation))
    assert not counters.any()
    exact = layers_in(x, projections, None, 1.0, activation, torch.float64)
    theirs = relative_error(layers_in(x, projections, None, 1.0, activation, dtype), exact)
    assert y.shape == exact.shape
    assert y.dtype is dtype
    assert relative_error(y, exact) <= max(2 * theirs, 1e-6)


# a row length that ends inside a tile of columns where the type allows one, and rows that end inside a tile of rows
@cases({"kind": list(BLOCK_TYPES), "dtype": DTYPES, "rows": ROWS})
def test_one_layer_of_each_type(kind, dtype, rows):
    k = 768 if BLOCK_TYPES[kind].values == 256 else 352
    check(dtype, rows, [projection(kind, 80, k, 16)])


@cases({"dtype": DTYPES, "rows": [1, 5], "kind": ["Q4_K", "Q6_K", "Q5_0"]})
def test_a_long_row_is_added_up_in_parts(dtype, rows, kind):
    check(dtype, rows, [projection(kind, 37, 5120, 4)])


@cases(
    {"dtype": DTYPES, "rows": [1, 5], "ranks": [(0, 0, 0), (16, 16, 16), (4, 0, 20), (0, 4, 0)],
     "kinds": [("Q4_K", "Q4_K", "Q6_K"), ("Q6_K", "Q4_K", "Q6_K"), ("Q5_K",) * 3], "bias": [False, True]}
)  # fmt: skip
def test_a_group_of_three_of_one_type_or_several(dtype, rows, ranks, kinds, bias):
    sizes = (100, 40, 64)
    check(
        dtype, rows, [projection(kind, n, 256, r, bias and n > 40) for kind, n, r in zip(kinds, sizes, ranks)]
    )


@cases(
    {"dtype": DTYPES, "rows": [1, 3], "activation": ["silu", "gelu_tanh"],
     "kinds": [("Q4_K",), ("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("Q8_0", "Q8_0"), ("Q5_1",)]}
)  # fmt: skip
def test_gate_and_up_end_in_their_activation(dtype, rows, activation, kinds):
    n = 144 if len(kinds) == 1 else 72
    check(dtype, rows, [projection(kind, n, 512, 16, True) for kind in kinds], activation=activation)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_weights_are_those_that_are_written_in_16_bits(kind):
    """Of rows of the unit matrix, the outputs are the weights, in the bits in which `BlockCodes.write` writes them."""
    layer = projection(kind, 72, 512, 0)
    dtype = torch.float16 if dispatch.INTERPRETED else torch.bfloat16
    written = dense_weight(layer.weight, dtype)
    for first in (0, 240, 496):
        x = torch.eye(512, dtype=dtype, device=DEVICE)[first : first + 16]
        y = block_linear.block_linear(x, [layer], nf4_linear.new_counters(x.device))
        assert torch.equal(y, written[:, first : first + 16].t())


def test_what_it_has_no_kernel_for_is_left_to_others():
    layer = projection("Q4_K", 64, 256, 0)
    assert block_linear.reads_blocks([layer], block_linear.MAX_ROWS)
    assert not block_linear.reads_blocks([layer], block_linear.MAX_ROWS + 1)
    assert not block_linear.reads_blocks([layer, Projection(torch.randn(64, 256, device=DEVICE))], 1)
    assert not block_linear.reads_blocks([layer] * 4, 1)
