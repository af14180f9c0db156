"""The function of a group of linear layers with LoRA on one input, as autograd and inference call it.

    y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T

`lora.py` has the products and the letters.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from oribi.kernels.lora import AugmentedWeight, Projection, augmented_weight, backward_factors
from oribi.kernels.lora_unpacked import UnpackedWeight, unpacked

KeptWeight = AugmentedWeight | UnpackedWeight


def lora_linear(x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
    """Outputs of a group of linear layers with LoRA on one input.

    Args:
        x: [..., K] in 16 or 32 bit; cast to autocast's dtype where autocast is on.
        projections: the group; weights that require a gradient take PyTorch's own linear.

    Returns:
        One [..., N_i] tensor per projection, in x's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if all(p.fusible for p in projections):
        sizes = [p.shape[0] for p in projections]
        if _kept.groups is not None and not torch.is_grad_enabled():
            return list(kept_weight(projections, x.dtype, x.device).linear(x)[0].split(sizes, dim=-1))
        y = _LoraLinear.apply(x, projections, *(t for p in projections for t in (p.a, p.b)))
        return list(y.split(sizes, dim=-1))
    return [_composed(x, p) for p in projections]


class _KeptGroups(threading.local):
    # ids of a group's tensors and the dtype -> the group, which keeps those ids taken, and what was made of it
    groups: dict[tuple, tuple[Sequence[Projection], KeptWeight]] | None = None


_kept = _KeptGroups()


@contextmanager
def weights_kept(wanted: bool = True) -> Iterator[None]:
    """Inside the block, groups that this thread computes without gradients are prepared once, or not once if not `wanted`.

    Packed weights are dequantised, and the factors of others packed. For generation, which asks for every weight once per
    token; no weight or factor may change inside.
    """
    before = _kept.groups
    _kept.groups = ({} if before is None else before) if wanted else None
    try:
        yield
    finally:
        _kept.groups = before


def kept_weight(
    projections: Sequence[Projection], dtype: torch.dtype, device: torch.device
) -> KeptWeight | None:
    """A group's weights and pairs, prepared once; None outside `weights_kept`."""
    if _kept.groups is None:
        return None
    key = (dtype, *((id(p.weight), id(p.a), id(p.b), p.scale) for p in projections))
    if key not in _kept.groups:
        make = UnpackedWeight if unpacked(projections, dtype) else augmented_weight
        _kept.groups[key] = projections, make(projections, dtype, device)
    return _kept.groups[key][1]


def _composed(x: torch.Tensor, p: Projection) -> torch.Tensor:
    """The same by PyTorch's autograd: trained weights and biases, and dropout."""
    if p.weight.requires_grad:
        y = F.linear(x, p.weight.to(x.dtype), None if p.bias is None else p.bias.to(x.dtype))
    else:
        y = _LoraLinear.apply(x, [Projection(p.weight)], None, None)
        if p.bias is not None:
            y = y + p.bias.to(x.dtype)
    if p.a is not None:
        xa = F.linear(F.dropout(x, p.dropout), p.a.to(x.dtype))
        y = y + F.linear(xa, p.b.to(x.dtype)) * p.scale
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, *factors):
        group = augmented_weight(projections, x.dtype, x.device)
        y, x_buffer = group.linear(x)
        ctx.save_for_backward(x_buffer if any(ctx.needs_input_grad[2:]) else None)
        ctx.projections, ctx.shape = projections, x.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        (x_buffer,) = ctx.saved_tensors
        group = augmented_weight(ctx.projections, dy.dtype, dy.device)
        dy_buffer = group.output_buffer(dy[..., 0].numel())
        dy_buffer[:, : group.out_features] = dy.reshape(len(dy_buffer), -1)
        dyb = group.compute_dyb(dy_buffer)
        dx = group.backward_input(dy_buffer).view(ctx.shape) if ctx.needs_input_grad[0] else None
        factors: list[torch.Tensor | None] = [None] * (len(ctx.needs_input_grad) - 2)
        if x_buffer is not None:
            k = group.in_features
            dy = dy_buffer[:, : group.out_features]
            factors = backward_factors(dy, dyb, x_buffer[:, :k], x_buffer[:, k:], ctx.projections)
        wanted = ctx.needs_input_grad[2:]
        return (dx, None, *(grad if need else None for grad, need in zip(factors, wanted)))
