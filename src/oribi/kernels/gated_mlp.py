"""The element-wise middle of a gated MLP: h = act(gate) * up.

Every activation is gate times a gate probability p, which keeps one formula for all:

    act(g) = g p(g)      p = sigmoid(z),  z = g (silu)  or  2 sqrt(2/pi) (g + 0.044715 g^3) (gelu_tanh)
                         p = (1 + erf(g / sqrt 2)) / 2 (gelu),  p = sigmoid(1.702 g) (swiglu_clamped)
    h = g p up      dup = dh g p      dgate = dh up (p + g p')      p' = p (1 - p) z'  or  exp(-g^2 / 2) / sqrt(2 pi)

swiglu_clamped takes min(gate, 7) for g and 1 + min(max(up, -7), 7) for up, and gives what lies beyond no gradient.

T tokens, I intermediate size. Computed in float32, rounded once on the store.

Source: GLU Variants Improve Transformer, Shazeer 2020 (arXiv:2002.05202); GELU, arXiv:1606.08415; gpt-oss' model card,
arXiv:2508.10925, for swiglu_clamped.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from oribi.errors import ModelError
from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, unit_stride, use_triton, wide

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "swiglu_clamped")
# of swiglu_clamped: the gate's slope in the sigmoid, and the largest gate and up
CLAMPED_ALPHA, CLAMPED_LIMIT = 1.702, 7.0
_CUBIC = 0.044715
_TWICE_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)


def gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, differentiable in both; backward keeps gate and up only.

    Args:
        gate, up: [T, I] in 16 or 32 bit; rows may be strided.
        activation: one of `ACTIVATIONS`.

    Returns:
        [T, I] in gate's dtype.

    Raises:
        ModelError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"activation {activation!r} has no kernel; it must be one of {', '.join(ACTIVATIONS)}"
        )
    return _GatedMLP.apply(gate, up, activation)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_mlp_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        dgate, dup, _ = gated_mlp_backward(dh, *ctx.saved_tensors, ctx.activation)
        return dgate, dup, None


def gated_mlp_forward(
    gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate, up: [T, I]; rows may be strided, the last dimension contiguous.
        activation: one of `ACTIVATIONS`.
        out: [T, I] for the result, strided rows allowed; may be gate or up.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if not use_triton(gate):
        for rows in _row_blocks(gate):
            g, u, _, _ = _clamped(wide(gate[rows]), wide(up[rows]), activation)
            torch.mul(_probability(g, activation).mul_(g), u, out=out[rows])
        return out
    gate, up = unit_stride(gate), unit_stride(up)
    tokens, size = gate.shape
    block, warps = _tile(size)
    launch(
        _forward_kernel, tokens * -(-size // block), gate, up, out, gate.stride(0), up.stride(0), out.stride(0),
        size, block, activation, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def gated_mlp_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of gate and up, and on request h once more, so that it need not be kept.

    Args:
        dh: [T, I] gradient of h; gate, up, activation: as in the forward.
        dgate, dup: [T, I] for the gradients; may be gate and up.
        h: [T, I] for h, equal to the forward's bit for bit; may be dh.

    Returns:
        dgate, dup, h (None unless it was asked for).
    """
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if dup is None else dup
    if not use_triton(gate):
        for rows in _row_blocks(gate):
            _backward_reference(rows, dh, gate, up, activation, dgate, dup, h)
        return dgate, dup, h
    dh, gate, up = unit_stride(dh), unit_stride(gate), unit_stride(up)
    tokens, size = gate.shape
    block, warps = _tile(size)
    launch(
        _backward_kernel, tokens * -(-size // block), dh, gate, up, dgate, dup, dup if h is None else h,
        dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), 0 if h is None else h.stride(0),
        size, block, activation, h is not None, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return dgate, dup, h


def _tile(size: int) -> tuple[int, int]:
    """Columns and warps of a program: 8 elements per thread are one 16-byte vector of 16-bit values."""
    block = min(next_power_of_2(size), 1024)
    return block, max(block // 256, 1)


# Both kernels are launched without fused multiply-adds: h must come out the same in both, whatever else each computes.


@jit
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, h_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + row * gate_stride + col, mask=col < SIZE, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + col, mask=col < SIZE, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu_clamped":
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0) + 1.0
    p, _ = probability_and_slope(g, ACTIVATION)
    h = g * p * u
    tl.store(h_ptr + row * h_stride + col, h.to(h_ptr.dtype.element_ty), mask=col < SIZE)


@jit
def _backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, REBUILD: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dh_ptr + row * dh_stride + col, mask=col < SIZE, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + col, mask=col < SIZE, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + col, mask=col < SIZE, other=0.0).to(tl.float32)
    raw_g, raw_u = g, u
    if ACTIVATION == "swiglu_clamped":
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0) + 1.0
    p, slope = probability_and_slope(g, ACTIVATION)
    dgate = d * u * (p + g * slope)
    dup = d * (g * p)
    if ACTIVATION == "swiglu_clamped":
        dgate = tl.where(raw_g > 7.0, 0.0, dgate)
        dup = tl.where(tl.abs(raw_u) > 7.0, 0.0, dup)
    if REBUILD:
        h = g * p * u
        tl.store(h_ptr + row * h_stride + col, h.to(h_ptr.dtype.element_ty), mask=col < SIZE)
    tl.store(dgate_ptr + row * dgate_stride + col, dgate.to(dgate_ptr.dtype.element_ty), mask=col < SIZE)
    tl.store(dup_ptr + row * dup_stride + col, dup.to(dup_ptr.dtype.element_ty), mask=col < SIZE)


@jit
def probability_and_slope(g, ACTIVATION: tl.constexpr):
    """p of float32 gates, as this file's docstring has it, and p'."""
    if ACTIVATION == "silu":
        p = tl.sigmoid(g)
        slope = p * (1 - p)
    elif ACTIVATION == "swiglu_clamped":
        p = tl.sigmoid(1.702 * g)
        slope = p * (1 - p) * 1.702
    elif ACTIVATION == "gelu_tanh":
        p = tl.sigmoid(1.5957691216057308 * g * (1 + 0.044715 * g * g))
        slope = p * (1 - p) * (1.5957691216057308 * (1 + 0.134145 * g * g))
    else:
        p = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        slope = tl.exp(-0.5 * g * g) * 0.3989422804014327
    return p, slope


def _row_blocks(x: torch.Tensor) -> list[slice]:
    """Rows [T, I] in portions whose float32 temporaries stay in a CPU's cache: 3 times as fast at [2000, 1536]."""
    step = max(65536 // max(x.shape[1], 1), 1) if x.device.type == "cpu" else max(len(x), 1)
    return [slice(first, first + step) for first in range(0, len(x), step)]


def _backward_reference(
    rows: slice,
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    h: torch.Tensor | None,
) -> None:
    """Writes some rows of the gradients, and of h where it is given."""
    g, u, no_gate, no_up = _clamped(wide(gate[rows]), wide(up[rows]), activation)
    d = wide(dh[rows])
    p = _probability(g, activation)
    gate_gradient = _probability_slope(g, p, activation).mul_(g).add_(p).mul_(d * u)
    activated = p.mul_(g)
    up_gradient = d * activated
    if no_gate is not None:
        gate_gradient.masked_fill_(no_gate, 0.0)
        up_gradient.masked_fill_(no_up, 0.0)
    if h is not None:
        torch.mul(activated, u, out=h[rows])
    dgate[rows], dup[rows] = gate_gradient, up_gradient  # after all is read: they may be the inputs


def _clamped(
    g: torch.Tensor, u: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """g and up as the formula takes them, and where gate and up get no gradient; None: nowhere."""
    if activation != "swiglu_clamped":
        return g, u, None, None
    limit = CLAMPED_LIMIT
    return g.clamp(max=limit), u.clamp(-limit, limit) + 1, g > limit, u.abs() > limit


def _probability(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "swiglu_clamped":
        return torch.sigmoid(CLAMPED_ALPHA * g)
    if activation == "silu":
        return torch.sigmoid(g)
    if activation == "gelu_tanh":
        return torch.sigmoid(_TWICE_SQRT_2_OVER_PI * g * (1 + _CUBIC * g * g))
    return 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))


def _probability_slope(g: torch.Tensor, p: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return (1 - p).mul_(p)
    if activation == "swiglu_clamped":
        return CLAMPED_ALPHA * p * (1 - p)
    if activation == "gelu_tanh":
        return (1 - p).mul_(p) * (_TWICE_SQRT_2_OVER_PI * (1 + 3 * _CUBIC * g * g))
    return torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
