"""RMSNorm, with the residual addition before it in the same pass.

    s = residual + c x  (or x)      y = s rstd (w + offset)      rstd = 1 / sqrt(mean(s^2) + eps)

    ds = rstd (g - s rstd^2 mean(g s)) + dresidual,  g = dy (w + offset)      dw = sum over tokens of dy s rstd

T tokens, H heads (where each head of a token is normalised alone), D normalised size. Computed in float32, rounded once
on the store. A frozen weight never pays for dw.

Source: Root Mean Square Layer Normalization, Zhang and Sennrich 2019 (arXiv:1910.07467).
"""

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import wide


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMSNorm over the last dimension, differentiable in x and weight.

    Args:
        x: [..., D] in 16 or 32 bit.
        weight: [D].
        eps: added to the mean square.
        offset: added to the weight; Gemma's checkpoints hold weight - 1.

    Returns:
        [..., D] in x's dtype.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        rows = as_rows(x)
        y, _, rstd = rms_norm_forward(rows, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            as_rows(dy), as_rows(x), rstd, weight, ctx.offset, weight_grad=ctx.needs_input_grad[1]
        )
        return dx.view(x.shape), dweight, None, None


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [T, D], or as it is where it is [T, H, D]; copied only where its rows have no common stride."""
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm of x, or of residual + residual_scale * x, in one pass.

    Args:
        x: [T, D] or [T, H, D]; rows may be strided, the last dimension contiguous.
        weight: [D].
        eps, offset: as in `rms_norm`.
        residual: as x; added before the norm.
        residual_scale: factor on x before the addition; the product and the sum are each rounded to x's dtype.
        out: where y goes, strided rows allowed; may be x where residual is None.

    Returns:
        y in x's dtype; the normalised input (x itself without residual); rstd [T] or [T, H] float32.
    """
    return _forward_reference(x, weight, eps, offset, residual, residual_scale, out)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    offset: float = 0.0,
    *,
    dresidual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the normalised input, the residual stream's gradient added in the same pass.

    Args:
        dy: gradient of y, shaped as x, strided rows allowed.
        x: the normalised input that `rms_norm_forward` returned.
        rstd, weight, offset: as in the forward.
        dresidual: gradient that reaches the sum on the residual path; added to dx.
        out: where dx goes; may be dy, x or dresidual.
        weight_grad: whether to form dweight, in an order of additions that never changes.

    Returns:
        dx in dy's dtype; dweight [D] in the weight's dtype, or None.
    """
    return _backward_reference(dy, x, rstd, weight, offset, dresidual, out, weight_grad)


def _forward_reference(x, weight, eps, offset, residual, residual_scale, out):
    total = x
    if residual is not None:
        total = residual + (x if residual_scale == 1.0 else x * residual_scale)
    s = wide(total)
    rstd = torch.rsqrt(s.square().mean(-1) + eps)
    y = s * rstd[..., None] * (wide(weight) + offset)
    y = y.to(x.dtype) if out is None else out.copy_(y)
    return y, total, rstd


def _backward_reference(dy, x, rstd, weight, offset, dresidual, out, weight_grad):
    s, g = wide(x), wide(dy)
    normed = s * rstd[..., None]
    dweight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_grad else None
    g = g * (wide(weight) + offset)
    dx = rstd[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + wide(dresidual)
    return dx.to(dy.dtype) if out is None else out.copy_(dx), dweight
