"""Linear layers on NF4 or 16-bit weights with LoRA, for a group that shares its input.

    y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T

T tokens, K in features, N_i out features, r_i rank, R = sum of r_i, N = sum of N_i. W_i is frozen in the fused path:
its gradient is never formed, and only x, S = x A^T [T, R] and the packed weights are kept for backward.

    U_i = scale_i dy_i B_i      dx = dy W + U A      dA = U^T x      dB_i = scale_i dy_i^T S_i

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oribi.kernels import nf4


@dataclass(frozen=True)
class Projection:
    """One linear layer and the LoRA pair on it.

    Args:
        weight: [N, K] in 16 or 32 bit, or bitsandbytes' packed Params4bit.
        bias: [N] or None.
        a, b: LoRA factors [r, K] and [N, r], or None without an adapter.
        scale: alpha / r (or alpha / sqrt(r)).
        dropout: probability with which an input element of the LoRA branch is zeroed now.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0


def lora_linear(x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
    """Outputs of a group of linear layers with LoRA on one input.

    Args:
        x: [..., K] in 16 or 32 bit; cast to autocast's dtype where autocast is on.
        projections: the group; weights that require a gradient take PyTorch's own linear.

    Returns:
        One [..., N_i] tensor a projection, in x's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    frozen = not any(
        p.weight.requires_grad or (p.bias is not None and p.bias.requires_grad) for p in projections
    )
    if frozen and not any(p.dropout for p in projections):
        return list(_LoraLinear.apply(x, projections, *(t for p in projections for t in (p.a, p.b))))
    return [_composed(x, p) for p in projections]


def _composed(x: torch.Tensor, p: Projection) -> torch.Tensor:
    """The same by PyTorch's autograd: trained weights and biases, and dropout."""
    if p.weight.requires_grad:
        y = F.linear(x, p.weight.to(x.dtype), None if p.bias is None else p.bias.to(x.dtype))
    else:
        (y,) = _LoraLinear.apply(x, [Projection(p.weight)], None, None)
        if p.bias is not None:
            y = y + p.bias.to(x.dtype)
    if p.a is not None:
        low = F.linear(F.dropout(x, p.dropout), p.a.to(x.dtype))
        y = y + F.linear(low, p.b.to(x.dtype)) * p.scale
    return y


def group_weight(projections: Sequence[Projection], dtype: torch.dtype) -> torch.Tensor:
    """The group's weights as one [N, K] matrix in dtype; packed weights are dequantised in one launch."""
    weights = [p.weight for p in projections]
    if all(hasattr(w, "quant_state") for w in weights):
        return nf4.dequantize(weights, dtype)
    dense = [nf4.dequantize([w], dtype) if hasattr(w, "quant_state") else w.to(dtype) for w in weights]
    return dense[0] if len(dense) == 1 else torch.cat(dense)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, *factors):
        rows = x.reshape(-1, x.shape[-1])
        weight = group_weight(projections, x.dtype)
        out = rows @ weight.t()
        sizes = split_sizes(projections, weight)
        lows = []
        for y, p in zip(out.split(sizes, dim=1), projections):
            if p.bias is not None:
                y += p.bias.to(x.dtype)
            if p.a is not None:
                low = rows @ p.a.to(x.dtype).t()
                y.addmm_(low, p.b.to(x.dtype).t(), alpha=p.scale)
                lows.append(low)
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[2:]) else None, *lows)
        ctx.projections, ctx.sizes, ctx.shape = projections, sizes, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out.split(sizes, dim=1))

    @staticmethod
    def backward(ctx, *grads):
        x, *lows = ctx.saved_tensors
        projections = ctx.projections
        dtype = next(g for g in grads if g is not None).dtype
        rows = ctx.shape[:-1].numel()
        grads = [
            next(g for g in grads if g is not None).new_zeros(rows, n) if g is None else g.reshape(rows, n)
            for g, n in zip(grads, ctx.sizes)
        ]
        dx = None
        if ctx.needs_input_grad[0]:
            dy = grads[0] if len(grads) == 1 else torch.cat(grads, dim=1)
            dx = dy @ group_weight(projections, dtype)
        factor_grads: list[torch.Tensor | None] = []
        lows = iter(lows)
        for dy, p in zip(grads, projections):
            if p.a is None:
                factor_grads += [None, None]
                continue
            low = next(lows)
            du = (dy @ p.b.to(dtype)) * p.scale
            if dx is not None:
                dx.addmm_(du, p.a.to(dtype))
            index = 2 + len(factor_grads)
            need_a, need_b = ctx.needs_input_grad[index], ctx.needs_input_grad[index + 1]
            factor_grads.append((du.t() @ x).to(p.a.dtype) if need_a else None)
            factor_grads.append((dy.t() @ low).to(p.b.dtype) * p.scale if need_b else None)
        return (None if dx is None else dx.view(ctx.shape), None, *factor_grads)


def split_sizes(projections: Sequence[Projection], weight: torch.Tensor) -> list[int]:
    """Out features of each projection of a group."""
    if len(projections) == 1:
        return [weight.shape[0]]
    return [
        (p.weight.quant_state.shape if hasattr(p.weight, "quant_state") else p.weight.shape)[0]
        for p in projections
    ]
