"""Weights in ggml's blocks are dequantised with the bits of the gguf package, by the reference and by the kernel."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from oribi.kernels.block_stack import BlockStack
from oribi.kernels.dispatch import INTERPRETED
from oribi.kernels.expert_stack import dequantize_stack
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes
from oribi.kernels.lora import Projection, augmented_weight
from oribi.kernels.packed_weight import PackedWeight
from tests.kernels.truth import DEVICE

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# the interpreter does not round to bfloat16 as GPUs do
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def random_codes(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Blocks of every code, with scales that are finite."""
    of = BLOCK_TYPES[kind]
    codes = np.random.default_rng(seed).integers(0, 256, (rows, columns // of.values, of.nbytes), np.uint8)
    for first in [0, 2] if of.minimum else [208] if of.parts == 16 else [0]:
        codes[..., first + 1] &= 0xBB  # no exponent of infinity
        codes[0, 0, first + 1] &= 0x80  # a scale below float16's normal numbers
    return torch.from_numpy(codes.reshape(rows, -1))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_values_have_the_bits_of_the_gguf_package(kind):
    rows, columns = 7, 768
    codes = random_codes(kind, rows, columns)
    expected = torch.from_numpy(dequantize(codes.numpy(), GGMLQuantizationType[kind]))
    for dtype in DTYPES:
        buffer = torch.full((rows + 1, columns + 16), 7.0, dtype=dtype, device=DEVICE)
        BlockCodes((rows, columns), kind, codes.to(DEVICE)).write(buffer[:rows, :columns])
        assert torch.equal(bits(buffer[:rows, :columns].cpu()), bits(expected.to(dtype)))
        assert (buffer[rows:] == 7).all()
        assert (buffer[:, columns:] == 7).all()


def random_stack(
    kinds: tuple[str, ...], experts: int, rows: int, columns: int
) -> tuple[BlockStack, torch.Tensor]:
    """A stack, and its values [E, N, K] as the gguf package has them."""
    stack, parts = BlockStack.empty((experts, len(kinds) * rows, columns), kinds, "cpu"), []
    for part, kind in enumerate(kinds):
        codes = random_codes(kind, experts * rows, columns, seed=part)
        stack.tensor(part).copy_(codes.view(experts, rows, -1))
        values = torch.from_numpy(dequantize(codes.numpy(), GGMLQuantizationType[kind]))
        parts.append(values.view(experts, rows, columns))
    return stack.moved(torch.device(DEVICE), stack.codes.to(DEVICE)), torch.cat(parts, dim=1)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in BLOCK_TYPES), ("Q4_K", "Q6_K"), ("Q5_0", "Q5_0")])
def test_stacks_of_experts_have_the_bits_of_the_gguf_package(kinds):
    experts, rows, columns = 3, 10, 512
    stack, expected = random_stack(kinds, experts, rows, columns)
    whole = len(kinds) * rows
    chosen = torch.tensor([2, 0, 2], device=DEVICE)
    for dtype in DTYPES:
        truth = expected.to(dtype)
        buffer = torch.full((3, whole + 16, columns + 16), 7.0, dtype=dtype, device=DEVICE)
        for experts_wanted, values in ((None, truth), (chosen, truth[[2, 0, 2]])):
            dequantize_stack(stack, dtype, buffer[:, :whole, :columns], experts_wanted)
            assert torch.equal(bits(buffer[:, :whole, :columns].cpu()), bits(values))
            assert (buffer[:, whole:] == 7).all()
            assert (buffer[:, :, columns:] == 7).all()
        last = stack.parts * experts - 1
        assert torch.equal(bits(stack.matrix(last, dtype).cpu()), bits(truth[2, whole - rows :]))
    assert stack.nbytes == sum(
        BLOCK_TYPES[k].nbytes * experts * rows * columns // BLOCK_TYPES[k].values for k in kinds
    )


def test_a_group_of_different_types_lies_in_one_buffer():
    kinds = ("Q4_K", "Q6_K", "Q8_0")
    packed = [BlockCodes((4, 256), kind, random_codes(kind, 4, 256)) for kind in kinds]
    dense = [torch.empty(4, 256) for _ in packed]
    for codes, out in zip(packed, dense):
        codes.write(out)
    weights = [PackedWeight(codes, torch.float32) for codes in packed]
    group = augmented_weight(
        [Projection(w) for w in [*weights, dense[0]]], torch.float32, torch.device("cpu")
    )
    assert torch.equal(group.w, torch.cat([*dense, dense[0]]))


def test_a_packed_weight_that_is_read_as_a_dense_one_gives_no_numbers():
    weight = PackedWeight(BlockCodes((4, 256), "Q8_0", random_codes("Q8_0", 4, 256)), torch.float32)
    assert (torch.ones(1, 256) @ weight.t()).isnan().all()
