"""Attention by PyTorch's own operations, on any device, and differentiated by its autograd.

B rows, S queries and C keys per row, H query heads, K key/value heads, E head_dim. Each document is apart, so that no document can
touch another.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from oribi.kernels.dispatch import wide
from oribi.kernels.visibility import Visibility

if TYPE_CHECKING:
    from oribi.kernels.attention import Attend

# keys up to which the reference lays documents side by side and keeps their scores: one call per document costs more
SHORT = 512


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: "Attend") -> torch.Tensor:
    """Attention as `kernels.attention` defines it: q [B, S, H, E] over k, v [B, C, K, E], each document of a pack apart."""
    visibility = how.visibility
    if not how.packed:
        return _dense(q, k, v, visibility, how)
    documents, longest = len(visibility.cu_seqlens) - 1, visibility.max_length
    past = visibility.past
    if not past and longest <= SHORT and documents * longest <= 2 * visibility.length:
        return _side_by_side(q, k, v, documents, longest, how)
    bounds = visibility.bounds()
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        if start < end:
            one = Visibility(1, end - start, 0 if start else past)
            keys = slice(start + past if start else 0, end + past)
            parts.append(_dense(q[:, start:end], k[:, keys], v[:, keys], one, how))
    return torch.cat(parts, dim=1)


def _side_by_side(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: int, longest: int, how: "Attend"
) -> torch.Tensor:
    """Each document as a row, padded at its end, where causal queries do not look."""
    slots = how.visibility.slots()

    def rows(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(documents * longest, *x.shape[2:]).index_copy(0, slots, x[0])
        return padded.view(documents, longest, *x.shape[2:])

    if how.visibility._rows is None:
        how.visibility._rows = Visibility(documents, longest)  # its masks serve all layers
    out = _dense(rows(q), rows(k), rows(v), how.visibility._rows, how)
    return out.flatten(0, 1).index_select(0, slots)[None]


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, how: "Attend"
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = how.window if how.window is not None and how.window < k.shape[2] else None
    simple = visibility.real is None and window is None and visibility.length == k.shape[2]
    by_scores = how.softcap is not None or how.sinks is not None
    mask = None if simple and not by_scores else visibility.mask(k.shape[2], window, q.device)
    if mask is None and q.device.type == "cpu" and k.shape[2] <= SHORT and torch.is_grad_enabled():
        return _causal(q, k, v, visibility, how.scale).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and (by_scores or not takes_groups(q, mask)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    if not by_scores:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=how.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    scores = q @ k.transpose(-1, -2)
    if how.softcap is None:
        scores = how.scale * scores
    else:
        scores = how.softcap * torch.tanh(how.scale / how.softcap * scores)
    scores = scores.masked_fill(~mask, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=wide(q[:0]).dtype).to(q.dtype)
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2)


def takes_groups(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether PyTorch runs grouped query heads without forming all scores.

    On a GPU only its flash kernels do. Its memory-efficient one takes masks, float32 and older GPUs, but a key per query head.

    Args:
        q: [B, H, S, E]. mask: of the scores, or None for causal ones.
    """
    if not q.is_cuda:
        return True
    half = q.dtype in (torch.float16, torch.bfloat16)
    return mask is None and half and torch.cuda.get_device_capability(q.device)[0] >= 8


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float
) -> torch.Tensor:
    """Plain causal attention in float32, its scores kept: PyTorch's CPU kernel takes 3 times as long with its backward.

    q [B, H, S, E]; k, v [B, K, S, E]. Measured on a Xeon with AMX, bfloat16, 40 documents of 50 tokens.
    """
    rows, heads, length, width = q.shape
    kv_heads = k.shape[1]
    qf, kf, vf = (wide(x) for x in (q, k, v))
    # the query heads of one key head are rows of one product
    scores = (qf * scale).reshape(rows, kv_heads, -1, width) @ kf.transpose(-1, -2)
    unseen = ~visibility.mask(length, None, q.device)[:, :, None]
    scores = scores.view(rows, kv_heads, heads // kv_heads, length, length).masked_fill(unseen, -torch.inf)
    weights = scores.softmax(-1).view(rows, kv_heads, -1, length)
    return (weights @ vf).view(rows, heads, length, width).to(q.dtype)
