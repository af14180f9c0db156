"""The gate on a mixer's output, per channel of each head.

    h = a s      s = sigmoid(gate)      da = dh s      dgate = dh a s (1 - s)

T tokens, H heads, E head_dim. Computed in float32, rounded once on the store.

Source: Gated Attention for Large Language Models, Qiu et al. 2025 (arXiv:2505.06708).
"""

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, unit_stride, use_triton, wide


def output_gate(a: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """a times the gate's sigmoid, differentiable in both.

    Args:
        a, gate: [T, H, E] in 16 or 32 bit; tokens and heads may be strided.

    Returns:
        [T, H, E] in a's dtype.
    """
    return _OutputGate.apply(a, gate)


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, gate):
        ctx.save_for_backward(a, gate)
        return output_gate_forward(a, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return output_gate_backward(dh, *ctx.saved_tensors)


def output_gate_forward(a: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As `output_gate`, without gradients."""
    h = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if not use_triton(a):
        return h.copy_(wide(a) * torch.sigmoid(wide(gate)))
    a, gate = unit_stride(a), unit_stride(gate)
    launch(
        _forward_kernel, a.shape[0] * a.shape[1], a, gate, h, *a.stride()[:2], *gate.stride()[:2], *a.shape[1:],
        next_power_of_2(a.shape[2]), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return h


def output_gate_backward(
    dh: torch.Tensor,
    a: torch.Tensor,
    gate: torch.Tensor,
    *,
    da: torch.Tensor | None = None,
    dgate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a and of the gate.

    Args:
        dh: [T, H, E] gradient of h; a, gate: as in the forward.
        da, dgate: [T, H, E] for the gradients, strided tokens and heads allowed; may be dh or a, and gate.
    """
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if da is None else da
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    if not use_triton(a):
        d, s = wide(dh), torch.sigmoid(wide(gate))
        both = d * s, d * wide(a) * s * (1 - s)
        return da.copy_(both[0]), dgate.copy_(both[1])
    dh, a, gate = unit_stride(dh), unit_stride(a), unit_stride(gate)
    strides = (stride for t in (dh, a, gate, da, dgate) for stride in t.stride()[:2])
    launch(
        _backward_kernel, a.shape[0] * a.shape[1], dh, a, gate, da, dgate, *strides, *a.shape[1:],
        next_power_of_2(a.shape[2]), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return da, dgate


@jit
def _forward_kernel(
    a_ptr, gate_ptr, h_ptr, a_stride, a_head, gate_stride, gate_head,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    col = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + token * a_stride + head * a_head + col, mask=col < E, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + head * gate_head + col, mask=col < E, other=0.0)
    h = a * tl.sigmoid(gate.to(tl.float32))
    tl.store(h_ptr + row * E + col, h.to(h_ptr.dtype.element_ty), mask=col < E)


@jit
def _backward_kernel(
    dh_ptr, a_ptr, gate_ptr, da_ptr, dgate_ptr, dh_stride, dh_head, a_stride, a_head, gate_stride, gate_head,
    da_stride, da_head, dgate_stride, dgate_head, HEADS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    col = tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + token * dh_stride + head * dh_head + col, mask=col < E, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + token * a_stride + head * a_head + col, mask=col < E, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + head * gate_head + col, mask=col < E, other=0.0)
    s = tl.sigmoid(gate.to(tl.float32))
    da, dgate = dh * s, dh * a * s * (1 - s)
    at = token * da_stride + head * da_head + col
    tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=col < E)
    at = token * dgate_stride + head * dgate_head + col
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=col < E)
