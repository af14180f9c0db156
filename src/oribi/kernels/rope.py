"""Rotary position embeddings of q and k.

    (a, b) -> (a cos - b sin, b cos + a sin)

where a and b are the first and second half of the R rotary dimensions of a head; the other E - R pass through. The
backward is the rotation by the opposite angle. T tokens, H query heads, K key heads, E head_dim.

Source: RoFormer, Su et al. 2021 (arXiv:2104.09864), in the halves layout of GPT-NeoX and Llama checkpoints.
"""

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, unit_stride, use_triton, warps_for, wide

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
    q, k = unit_stride(q), unit_stride(k)
    out_q, out_k = (
        (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)) if out is None else out
    )
    if not use_triton(q):
        sin = -sin if inverse else sin
        return _reference(q, cos, sin, out_q), _reference(k, cos, sin, out_k)
    tokens, half = cos.shape
    head_dim = q.shape[-1]
    in_place = out_q.data_ptr() == q.data_ptr() and out_k.data_ptr() == k.data_ptr()
    rest = 0 if in_place else head_dim - 2 * half
    q_block, k_block, half_block = (next_power_of_2(n) for n in (q.shape[1], k.shape[1], half))
    launch(
        _kernel, tokens, q, k, out_q, out_k, cos.contiguous(), sin.contiguous(),
        *q.stride()[:2], *k.stride()[:2], *out_q.stride()[:2], *out_k.stride()[:2],
        q.shape[1], k.shape[1], q_block, k_block, half, half_block, rest, next_power_of_2(rest) if rest else 1,
        inverse, num_warps=warps_for(q_block * half_block), enable_fp_fusion=False,
    )  # fmt: skip
    return out_q, out_k


# Launched without fused multiply-adds: in place or not, and recomputed, the rotation comes out the same to the bit.
@jit
def _kernel(
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, cos_ptr, sin_ptr,
    q_stride, q_head, k_stride, k_head, out_q_stride, out_q_head, out_k_stride, out_k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, HALF_BLOCK)
    cos = tl.load(cos_ptr + token * HALF + col, mask=col < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + col, mask=col < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    _rotate(
        q_ptr + token * q_stride, out_q_ptr + token * out_q_stride, q_head, out_q_head, cos, sin,
        Q_HEADS, Q_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK,
    )  # fmt: skip
    _rotate(
        k_ptr + token * k_stride, out_k_ptr + token * out_k_stride, k_head, out_k_head, cos, sin,
        K_HEADS, K_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK,
    )  # fmt: skip


@jit
def _rotate(
    x_ptr, out_ptr, x_head, out_head, cos, sin,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token; both halves are read before either is written, so out may be x."""
    head = tl.arange(0, HEADS_BLOCK)
    col = tl.arange(0, HALF_BLOCK)
    inside = (head < HEADS)[:, None] & (col < HALF)[None, :]
    at = head[:, None] * x_head + col[None, :]
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    first = a * cos[None, :] - b * sin[None, :]
    second = b * cos[None, :] + a * sin[None, :]
    to = head[:, None] * out_head + col[None, :]
    tl.store(out_ptr + to, first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + to + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)
        inside = (head < HEADS)[:, None] & (rest < REST)[None, :]
        through = tl.load(x_ptr + head[:, None] * x_head + rest[None, :] + 2 * HALF, mask=inside)
        tl.store(out_ptr + head[:, None] * out_head + rest[None, :] + 2 * HALF, through, mask=inside)


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
