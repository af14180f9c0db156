"""The gate on a mixer's output: against float64, strided and in place. The kernel's tests run in the interpreter too."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from oribi.kernels.output_gate import output_gate, output_gate_backward, output_gate_forward
from tests.kernels.truth import DEVICE, DTYPES, assert_twice_as_good, needs_kernels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(dtype: torch.dtype, device: str) -> None:
    a = torch.randn(7, 3, 20, device=device).to(dtype).requires_grad_()
    gate = torch.randn(7, 3, 20, device=device).to(dtype).requires_grad_()
    assert_twice_as_good(
        output_gate, lambda a, g: a * torch.sigmoid(g), [a, gate], [torch.randn(7, 3, 20, device=device)]
    )
    # each head's gate behind its query, gradients over what they are of
    both = torch.randn(7, 6, 20, device=device).to(dtype)
    dh, a, gate = torch.randn(7, 3, 20, device=device).to(dtype), a.detach(), both[:, 1::2]
    # a CPU's vectorised sigmoid differs from that of strided numbers in the last bit
    assert_close(output_gate_forward(a, gate), output_gate_forward(a, gate.contiguous()))
    fresh, queries = output_gate_backward(dh, a, gate.contiguous()), both[:, ::2].clone()
    output_gate_backward(dh, a, gate, da=dh, dgate=gate)
    assert_close(dh, fresh[0])
    assert_close(gate, fresh[1])
    assert torch.equal(both[:, ::2], queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_and_its_gradients(dtype):
    check(dtype, "cpu")
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert gradcheck(output_gate, inputs)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_gates(dtype):
    check(dtype, DEVICE)
