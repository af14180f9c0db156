"""Rotary position embeddings of q and k.

    (a, b) -> (a cos - b sin, b cos + a sin)

where a and b are the first and second half of the R rotary dimensions of a head, or neighbours in it; the other E - R pass
through. q may be scaled by a factor of its token. The backward is the rotation by the opposite angle, with the same
scale. T tokens, H query heads, K key heads, E head_dim.

Source: RoFormer, Su et al. 2021 (arXiv:2104.09864): neighbours are its layout (GLM, ERNIE), halves that of GPT-NeoX and Llama
checkpoints.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, unit_stride, use_triton, warps_for, wide

Pair = tuple[torch.Tensor, torch.Tensor]


class Angles(NamedTuple):
    """How each token is rotated, as `rope` takes it.

    Args:
        cos, sin: [T, R/2] float32, R <= E.
        q_scale: [T] float32 factors of the rotated q, or None.
        interleaved: the pairs are neighbours.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None = None
    interleaved: bool = False

    @property
    def plain(self) -> bool:
        """Whether they are cos and sin of halves, and no more."""
        return self.q_scale is None and not self.interleaved


def rope(q: torch.Tensor, k: torch.Tensor, *angles: torch.Tensor | bool | None) -> Pair:
    """q and k rotated by each token's angles, differentiable in both.

    Args:
        q: [T, H, E]; k: [T, K, E], in 16 or 32 bit.
        angles: cos, sin and what else `Angles` has, in its order.

    Returns:
        [T, H, E] and [T, K, E].
    """
    return _Rope.apply(q, k, *Angles(*angles))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, *angles):
        ctx.angles = angles
        return rope_forward(q, k, *angles)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return (*rope_forward(dq, dk, *ctx.angles, inverse=True), None, None, None, None)


def rope_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None = None,
    interleaved: bool = False,
    *,
    inverse: bool = False,
    out: Pair | None = None,
) -> Pair:
    """q and k rotated by each token's angles, in one launch.

    Args:
        q: [T, H, E]; k: [T, K, E]; tokens and heads may be strided (views of one q|k|v buffer).
        cos, sin, q_scale, interleaved: as of `Angles`; where q is scaled, R = E.
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
        of_q = (cos, sin) if q_scale is None else (cos * q_scale[:, None], sin * q_scale[:, None])
        return _reference(q, *of_q, interleaved, out_q), _reference(k, cos, sin, interleaved, out_k)
    tokens, half = cos.shape
    head_dim = q.shape[-1]
    in_place = out_q.data_ptr() == q.data_ptr() and out_k.data_ptr() == k.data_ptr()
    rest = 0 if in_place else head_dim - 2 * half
    q_block, k_block, half_block = (next_power_of_2(n) for n in (q.shape[1], k.shape[1], half))
    launch(
        _kernel, tokens, q, k, out_q, out_k, cos.contiguous(), sin.contiguous(), cos if q_scale is None else q_scale,
        *q.stride()[:2], *k.stride()[:2], *out_q.stride()[:2], *out_k.stride()[:2],
        q.shape[1], k.shape[1], q_block, k_block, half, half_block, rest, next_power_of_2(rest) if rest else 1,
        inverse, q_scale is not None, interleaved, num_warps=warps_for(q_block * half_block), enable_fp_fusion=False,
    )  # fmt: skip
    return out_q, out_k


# Launched without fused multiply-adds: in place or not, and recomputed, the rotation comes out the same to the bit.
@jit
def _kernel(
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, cos_ptr, sin_ptr, scale_ptr,
    q_stride, q_head, k_stride, k_head, out_q_stride, out_q_head, out_k_stride, out_k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr, SCALED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, HALF_BLOCK)
    cos = tl.load(cos_ptr + token * HALF + col, mask=col < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + col, mask=col < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    q_cos, q_sin = cos, sin
    if SCALED:
        scale = tl.load(scale_ptr + token)
        q_cos, q_sin = cos * scale, sin * scale
    _rotate(
        q_ptr + token * q_stride, out_q_ptr + token * out_q_stride, q_head, out_q_head, q_cos, q_sin,
        Q_HEADS, Q_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK, INTERLEAVED,
    )  # fmt: skip
    _rotate(
        k_ptr + token * k_stride, out_k_ptr + token * out_k_stride, k_head, out_k_head, cos, sin,
        K_HEADS, K_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK, INTERLEAVED,
    )  # fmt: skip


@jit
def _rotate(
    x_ptr, out_ptr, x_head, out_head, cos, sin,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """All heads of one token; both of a pair are read before either is written, so out may be x."""
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    PARTNER: tl.constexpr = 1 if INTERLEAVED else HALF
    head = tl.arange(0, HEADS_BLOCK)
    col = tl.arange(0, HALF_BLOCK)
    inside = (head < HEADS)[:, None] & (col < HALF)[None, :]
    at = head[:, None] * x_head + col[None, :] * STEP
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + PARTNER, mask=inside, other=0.0).to(tl.float32)
    first = a * cos[None, :] - b * sin[None, :]
    second = b * cos[None, :] + a * sin[None, :]
    to = head[:, None] * out_head + col[None, :] * STEP
    tl.store(out_ptr + to, first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + to + PARTNER, second.to(out_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)
        inside = (head < HEADS)[:, None] & (rest < REST)[None, :]
        through = tl.load(x_ptr + head[:, None] * x_head + rest[None, :] + 2 * HALF, mask=inside)
        tl.store(out_ptr + head[:, None] * out_head + rest[None, :] + 2 * HALF, through, mask=inside)


def _reference(x, cos, sin, interleaved, out):
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    pair = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(half), slice(half, 2 * half))
    )
    a, b = (wide(x[..., one]) for one in pair)
    first, second = a * cos - b * sin, b * cos + a * sin
    if out.data_ptr() != x.data_ptr():
        out[..., 2 * half :] = x[..., 2 * half :]
    out[..., pair[0]] = first
    out[..., pair[1]] = second
    return out
