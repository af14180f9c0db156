"""Causal attention with documents, padding, sliding windows, soft caps and sinks, on the fastest backend that can do it.

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

from oribi.kernels import flash_attention_3
from oribi.kernels.attention_reference import attention_reference
from oribi.kernels.attention_sinks import heads_last, join_sinks, sink_gradient
from oribi.kernels.blocked_attention import blocked_attention_backward, blocked_attention_forward
from oribi.kernels.context_attention import shared_attention_backward, shared_attention_forward
from oribi.kernels.cudnn_attention import cudnn_attention_backward, cudnn_attention_forward
from oribi.kernels.dispatch import use_triton
from oribi.kernels.flash_attention import flash_attention_backward, flash_attention_forward
from oribi.kernels.visibility import Visibility

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
        sinks: [H], or None.
    """

    backend: str
    scale: float
    window: int | None
    softcap: float | None
    visibility: Visibility
    chunks: "tuple[Attend, ...]" = ()
    sinks: torch.Tensor | None = None

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
    sinks: torch.Tensor | None = None,
) -> Attend:
    """How one attention is computed: on the fastest backend that computes it exactly.

    Args:
        q: [B, S, H, E], read for device, dtype and head_dim.
        visibility: causality, documents and padding.
        scale: factor on the scores. window: keys a query may look back over, itself included. softcap: scores become
            softcap * tanh(score / softcap). keys: length of the key rows where they are longer than the queries.
        sinks: [H] a logit beside the scores of each head, or None.
    """
    if visibility.uniform and not visibility.past:  # packs of equally long documents are dense rows
        visibility = Visibility(len(visibility.cu_seqlens) - 1, visibility.max_length)
    longest = (visibility.max_length or keys or visibility.length) + visibility.past * visibility.tail
    if window is not None and window >= longest:
        window = None
    if visibility.shared is not None:
        chunks = tuple(
            decide(q, one.visibility, scale, window, softcap, sinks=sinks) for one in visibility.shared.chunks
        )
        return Attend("shared", scale, window, softcap, visibility, chunks)
    backend = choose_backend(q, visibility, window, softcap)
    return Attend(backend, scale, window, softcap, visibility, sinks=sinks)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visibility: Visibility,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q over k and v, differentiable in all three and in the sinks.

    Args:
        q: [B, S, H, E]; k, v: [B, C, K, E], last dimension contiguous, C >= S where keys are cached.
        visibility, scale, window, softcap, sinks: as in `decide`.

    Returns:
        [B, S, H, E] in q's dtype.
    """
    how = decide(q, visibility, scale, window, softcap, k.shape[1], sinks)
    if how.backend == "reference":
        return attention_reference(*(_laid_out(x, how) for x in (q, k, v)), how).reshape(q.shape)
    return _Attention.apply(q, k, v, how, sinks)


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
    out, saved = _forward(q, k, v, how)
    if how.sinks is not None and saved:  # the reference has them in its softmax
        join_sinks(out, heads_last(saved[0], how.backend), how.sinks)
    return out, saved


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attend
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`attention_forward` without sinks, except by the reference."""
    shape = q.shape
    q, k, v = (_laid_out(x, how) for x in (q, k, v))
    if how.backend == "reference":
        return attention_reference(q, k, v, how).reshape(shape), ()
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
            return torch.autograd.grad(attention_reference(*inputs, how), inputs, dout)
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
    def forward(ctx, q, k, v, how, sinks):
        out, saved = attention_forward(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *saved = ctx.saved_tensors
        dsinks = None
        if ctx.needs_input_grad[4]:
            dsinks = sink_gradient(dout, out, heads_last(saved[0], ctx.how.backend), ctx.how.sinks)
        return (*attention_backward(dout, q, k, v, out, tuple(saved), ctx.how), None, dsinks)
