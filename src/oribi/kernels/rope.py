"""Rotary position embeddings of q and k.

    (a, b) -> (a cos - b sin, b cos + a sin)

where a and b are the first and second half of the R rotary dimensions of a head; the other E - R pass through. The
backward is the rotation by the opposite angle. T tokens, H query heads, K key heads, E head_dim.

Source: RoFormer, Su et al. 2021 (arXiv:2104.09864), in the halves layout of GPT-NeoX and Llama checkpoints.
"""

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import wide

Pair = tuple[torch.Tensor, torch.Tensor]


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    """q and k rotated by each token's angles, differentiable in both.

    Args:
        q: [T, H, E]; k: [T, K, E], in 16 or 32 bit.
        cos, sin: [T, R/2] float32, R <= E.

    Returns:
        [T, H, E] and [T, K, E].
    """
    return _Rope.apply(q, k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_forward(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return (*rope_forward(dq, dk, *ctx.saved_tensors, inverse=True), None, None)


def rope_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    out: Pair | None = None,
) -> Pair:
    """q and k rotated by each token's angles, in one launch.

    Args:
        q: [T, H, E]; k: [T, K, E]; tokens and heads may be strided (views of one q|k|v buffer).
        cos, sin: [T, R/2] float32, R <= E.
        inverse: rotate back, which is also the gradient of the rotation.
        out: where q and k go; may be q and k themselves.

    Returns:
        The rotated q and k.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out_q, out_k = (
        (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)) if out is None else out
    )
    sin = -sin if inverse else sin
    return _reference(q, cos, sin, out_q), _reference(k, cos, sin, out_k)


def _reference(x, cos, sin, out):
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b = wide(x[..., :half]), wide(x[..., half : 2 * half])
    first, second = a * cos - b * sin, b * cos + a * sin
    if out.data_ptr() != x.data_ptr():
        out[..., 2 * half :] = x[..., 2 * half :]
    out[..., :half] = first
    out[..., half : 2 * half] = second
    return out
