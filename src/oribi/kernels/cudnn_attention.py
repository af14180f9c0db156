"""Causal attention of dense rows by cuDNN, also of the last queries of a row over all of its keys.

B rows, S queries and C keys per row, H query heads, K key/value heads, E head_dim. cuDNN's causal mask begins at the first key.
So the C - S keys before the queries are a product without a mask, and the rest is a square; both are joined by their log-sum-exps:

    lse = log(e^l1 + e^l2)      out = e^(l1 - lse) o1 + e^(l2 - lse) o2

Each backward takes the joined out and lse, which makes its probabilities those of the whole row.
"""

import torch

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cudnn_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, Saved]:
    """Attention of queries that are the last of the keys.

    Args:
        q: [B, S, H, E]; k, v: [B, C, K, E], C >= S.
        scale: factor on the scores.

    Returns:
        out [B, S, H, E], and what backward needs beside the tensors.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    before = k.shape[2] - q.shape[2]
    out, *saved = _forward(q, k[:, :, before:], v[:, :, before:], scale, True)
    if before:
        other, *others = _forward(q, k[:, :, :before], v[:, :, :before], scale, False)
        out, saved[0] = joined_by_lse(out, saved[0], other, others[0])
    return out.transpose(1, 2), tuple(saved)


def cudnn_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Saved,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped as they are; dout and out are shaped as q."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    before = k.shape[2] - q.shape[2]
    dq, dk, dv = _backward(dout, q, k[:, :, before:], v[:, :, before:], out, saved, scale, True)
    if before:
        grads = _backward(dout, q, k[:, :, :before], v[:, :, :before], out, saved, scale, False)
        dq = dq + grads[0]
        dk, dv = (torch.cat([first, rest], dim=2) for first, rest in zip(grads[1:], (dk, dv)))
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))


def joined_by_lse(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from that over each.

    Args:
        out, other: [B, H, S, E]. lse, other_lse: log-sum-exps of their scores, [B, H, S] or with another dimension of 1.

    Returns:
        out in its dtype, and its lse in the shape given.
    """
    both = torch.logaddexp(lse, other_lse)
    shares = ((one - both).exp().reshape(*out.shape[:3], 1) for one in (lse, other_lse))
    return sum(x * share for x, share in zip((out, other), shares)).to(out.dtype), both


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, ...]:
    """out, lse, seed and offset; q [B, H, S, E], k and v [B, K, C, E]."""
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse, seed, offset


def _backward(dout, q, k, v, out, saved, scale, causal):
    lse, seed, offset = saved
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        seed,
        offset,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
