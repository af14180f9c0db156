"""Causal attention with documents, padding, sliding windows and soft caps, on the fastest backend that can do it.

B rows, S queries and C keys per row, H query heads, K key/value heads, E head_dim. q [B, S, H, E]; k, v [B, C, K, E].
`out[b, s, h] = softmax(scale * q[b, s, h] @ k[b, :, h // (H/K)]^T + mask) @ v`, mask from `Visibility`.

A row that processes share is attended in chunks (`kernels/context_attention.py`), whose queries are the last of their keys.

Backends: `cudnn` (dense rows), `flash` (dense or packed documents, windows), `flash3` (the same, where FlashAttention 3
is installed), `triton` (with soft caps too), `blocked` (heads wider than 256, on any GPU) and `reference` (PyTorch on any device, each document apart, so that no
document can touch another). Packs of equally long documents are dense rows. FlashAttention 2 is PyTorch's own `flash`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oribi.kernels import flash_attention_3
from oribi.kernels.blocked_attention import blocked_attention_backward, blocked_attention_forward
from oribi.kernels.context_attention import shared_attention_backward, shared_attention_forward
from oribi.kernels.cudnn_attention import cudnn_attention_backward, cudnn_attention_forward
from oribi.kernels.dispatch import use_triton, wide
from oribi.kernels.flash_attention import flash_attention_backward, flash_attention_forward
from oribi.kernels.visibility import Visibility

# keys up to which the reference lays documents side by side and keeps their scores: one call per document costs more
SHORT = 512
# tokens from which on FlashAttention 3 is faster than cuDNN
LONG_ROWS = 8192
# queries of all heads that keep a GPU busy through attention's backward: more are taken in portions of the heads
GROUP_QUERIES = 2**18
# backend -> tensors that its forward leaves for its backward
SAVED_TENSORS = {"reference": 0, "triton": 1, "blocked": 1, "flash3": 1, "flash": 3, "cudnn": 3}


@dataclass(frozen=True)
class Attend:
    """One attention decided: backend and layout. `decide` makes it, `attention_forward` and `_backward` carry it out.

    Args:
        chunks: of a row that processes share, how each of this process's chunks is attended; `backend` is then "shared".
    """

    backend: str
    scale: float
    window: int | None
    softcap: float | None
    visibility: Visibility
    chunks: "tuple[Attend, ...]" = ()

    @property
    def packed(self) -> bool:
        """Documents of several lengths lie in one row."""
        return self.visibility.cu_seqlens is not None


def decide(
    q: torch.Tensor,
    visibility: Visibility,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    keys: int = 0,
) -> Attend:
    """How one attention is computed: on the fastest backend that computes it exactly.

    Args:
        q: [B, S, H, E], read for device, dtype and head_dim.
        visibility: causality, documents and padding.
        scale: factor on the scores. window: keys a query may look back over, itself included. softcap: scores become
            softcap * tanh(score / softcap). keys: length of the key rows where they are longer than the queries.
    """
    if visibility.uniform and not visibility.past:  # packs of equally long documents are dense rows
        visibility = Visibility(len(visibility.cu_seqlens) - 1, visibility.max_length)
    longest = (visibility.max_length or keys or visibility.length) + visibility.past * visibility.tail
    if window is not None and window >= longest:
        window = None
    if visibility.shared is not None:
        chunks = tuple(decide(q, one.visibility, scale, window, softcap) for one in visibility.shared.chunks)
        return Attend("shared", scale, window, softcap, visibility, chunks)
    return Attend(choose_backend(q, visibility, window, softcap), scale, window, softcap, visibility)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visibility: Visibility,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of q over k and v, differentiable in all three.

    Args:
        q: [B, S, H, E]; k, v: [B, C, K, E], last dimension contiguous, C >= S where keys are cached.
        visibility, scale, window, softcap: as in `decide`.

    Returns:
        [B, S, H, E] in q's dtype.
    """
    how = decide(q, visibility, scale, window, softcap, k.shape[1])
    if how.backend == "reference":
        return _reference(*(_laid_out(x, how) for x in (q, k, v)), how).reshape(q.shape)
    return _Attention.apply(q, k, v, how)


def choose_backend(q: torch.Tensor, visibility: Visibility, window: int | None, softcap: float | None) -> str:
    """Name of the fastest backend that computes this attention, as the file's docstring lists them."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not q.is_cuda or not half or visibility.real is not None:
        return "reference"
    if visibility.past and not visibility.tail:
        return "reference"
    if q.shape[-1] > 256:
        return "blocked" if softcap is None else "reference"
    major = torch.cuda.get_device_capability(q.device)[0]
    if major < 8 or q.shape[-1] % 8:
        return "reference"
    if softcap is not None:
        return "triton" if use_triton(q) else "reference"
    # cuDNN's backward adds up in an order that changes from run to run; flash has one that does not, and heeds the wish
    if torch.are_deterministic_algorithms_enabled():
        return "flash"
    # measured on an H100: cuDNN is 1.7-1.9 times as fast as the built-in flash kernels, FlashAttention 3 up to twice as
    # fast, and on long rows 1.1 times as fast as cuDNN
    third = major == 9 and flash_attention_3.installed()
    dense = visibility.cu_seqlens is None and window is None and q.shape[-1] <= 128
    if major >= 9 and dense and not (third and visibility.length >= LONG_ROWS):
        return "cudnn"
    return "flash3" if third else "flash"


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attend
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """out, shaped as q, and what `attention_backward` needs besides q, k, v and out (nothing for "reference")."""
    if how.chunks:
        return shared_attention_forward(q, k, v, how.visibility.shared, how.chunks, attention_forward)
    shape = q.shape
    q, k, v = (_laid_out(x, how) for x in (q, k, v))
    if how.backend == "reference":
        return _reference(q, k, v, how).reshape(shape), ()
    if how.backend == "cudnn":
        out, saved = cudnn_attention_forward(q, k, v, how.scale)
        return out.reshape(shape), saved
    if how.backend == "triton":
        out, lse = flash_attention_forward(q, k, v, *_triton_extent(q, how))
        return out.view(shape), (lse,)
    if how.backend == "blocked":
        out, lse = blocked_attention_forward(q, k, v, *_blocked_extent(q, k, how))
        return out.reshape(shape), (lse,)
    if how.backend == "flash3":
        out, lse = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **_flash3_extent(q, k, how))[:2]
        return out.reshape(shape), (lse,)
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_flash_extent(q, k, how), 0.0, True, False, scale=how.scale, **_flash_window(how)
    )
    return out.reshape(shape), (lse, seed, offset)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    how: Attend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped as they are; dout is shaped as out. "reference" runs its forward again."""
    if how.chunks:
        counts = [SAVED_TENSORS[chunk.backend] for chunk in how.chunks]
        return shared_attention_backward(
            dout, q, k, v, out, saved, counts, how.visibility.shared, how.chunks, attention_backward
        )
    shapes = q.shape, k.shape, v.shape
    tensors = dout, q, k, v, out = [_laid_out(x, how) for x in (dout, q, k, v, out)]
    groups = head_groups(how.backend, q.numel() // q.shape[-1], k.shape[-2])
    if groups == 1:
        grads = _backward(tensors, saved, how)
    else:
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lse, *rest = saved
        heads = 1 if lse.dim() > 2 else 0  # of a pack [H, T], of rows [B, H, S] and more
        parts = zip(*(x.chunk(groups, -2) for x in (*tensors, *grads)), lse.chunk(groups, heads))
        for *inputs, dq, dk, dv, one_lse in parts:
            for place, grad in zip((dq, dk, dv), _backward(inputs, (one_lse.contiguous(), *rest), how)):
                place.copy_(grad)
    return tuple(grad.reshape(shape) for grad, shape in zip(grads, shapes))


def head_groups(backend: str, queries: int, kv_heads: int) -> int:
    """Portions of the heads in which attention's backward runs, so that its work space does not grow with the context.

    Args:
        backend: as `choose_backend` names it.
        queries: B * S * H. kv_heads: K, which the portions divide.
    """
    if backend not in ("cudnn", "flash", "flash3"):
        return 1
    most = max(queries // GROUP_QUERIES, 1)
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)


def _backward(
    tensors: Sequence[torch.Tensor], saved: tuple[torch.Tensor, ...], how: Attend
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v from dout, q, k, v and out, all laid out for the backend."""
    dout, q, k, v, out = tensors
    if how.backend == "reference":
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(_reference(*inputs, how), inputs, dout)
    if how.backend == "triton":
        return flash_attention_backward(dout, q, k, v, out, *saved, *_triton_extent(q, how))
    if how.backend == "blocked":
        return blocked_attention_backward(dout, q, k, v, out, *saved, *_blocked_extent(q, k, how))
    if how.backend == "flash3":
        return torch.ops.flash_attn_3.bwd(dout, q, k, v, out, *saved, **_flash3_extent(q, k, how))[:3]
    if how.backend == "cudnn":
        return cudnn_attention_backward(dout, q, k, v, out, saved, how.scale)
    lse, seed, offset = saved
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *_flash_extent(q, k, how), 0.0, True, seed, offset,
        scale=how.scale, **_flash_window(how),
    )  # fmt: skip


def _laid_out(x: torch.Tensor, how: Attend) -> torch.Tensor:
    """As the backend wants it: [tokens, heads, E] for triton, and of a pack for both flash; else [rows, tokens, heads, E]."""
    if how.backend == "triton":
        return x.flatten(0, 1)
    if how.packed and how.backend in ("flash", "flash3"):
        return x[0]
    rows = how.visibility.batch
    return x if x.shape[0] == rows else x.view(rows, -1, *x.shape[2:])


def _flash_extent(
    q: torch.Tensor, k: torch.Tensor, how: Attend
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    if not how.packed:
        return None, None, q.shape[1], k.shape[1]
    visibility = how.visibility
    keys, longest = visibility.key_documents(q.device)
    return visibility.cu_seqlens, keys, visibility.max_length, longest


def _triton_extent(q: torch.Tensor, how: Attend) -> tuple[object, ...]:
    documents, keys = how.visibility.documents(q.device), how.visibility.key_documents(q.device)
    return *documents, how.scale, how.window, how.softcap, keys if how.visibility.past else None


def _blocked_extent(
    q: torch.Tensor, k: torch.Tensor, how: Attend
) -> tuple[torch.Tensor | None, int, float, int | None]:
    if not how.packed:
        return None, k.shape[1], how.scale, how.window
    longest = how.visibility.key_documents(q.device)[1]
    return how.visibility.doc_start(q.device), longest, how.scale, how.window


def _flash_window(how: Attend) -> dict[str, int]:
    return {"window_size_left": -1 if how.window is None else how.window - 1, "window_size_right": 0}


def _flash3_extent(q: torch.Tensor, k: torch.Tensor, how: Attend) -> dict[str, object]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    packed = dict(zip(names, _flash_extent(q, k, how))) if how.packed else {}
    windowed = {} if how.window is None else _flash_window(how)
    return {**packed, **windowed, "softmax_scale": how.scale, "is_causal": how.window is None}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, how):
        out, saved = attention_forward(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *saved = ctx.saved_tensors
        return (*attention_backward(dout, q, k, v, out, tuple(saved), ctx.how), None)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attend) -> torch.Tensor:
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: int, longest: int, how: Attend
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, how: Attend
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = how.window if how.window is not None and how.window < k.shape[2] else None
    simple = visibility.real is None and window is None and visibility.length == k.shape[2]
    mask = None if simple and how.softcap is None else visibility.mask(k.shape[2], window, q.device)
    if mask is None and q.device.type == "cpu" and k.shape[2] <= SHORT and torch.is_grad_enabled():
        return _causal(q, k, v, visibility, how.scale).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and (how.softcap is not None or not takes_groups(q, mask)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    if how.softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=how.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    scores = how.softcap * torch.tanh(how.scale / how.softcap * (q @ k.transpose(-1, -2)))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide(q[:0]).dtype).to(q.dtype)
    return (weights @ v).transpose(1, 2)


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
