"""Causal attention with documents, padding, sliding windows and soft caps, on the fastest backend that can do it.

B rows, S queries a row, C keys a row, H query heads, K key/value heads, E head_dim. q [B, S, H, E]; k, v [B, C, K, E].
`out[b, s, h] = softmax(scale * q[b, s, h] @ k[b, :, h // (H/K)]^T + mask) @ v`, mask from `Visibility`.

Backends: `cudnn` (dense rows), `flash` (dense or packed documents, windows) and `reference` (PyTorch on any device,
one document at a time, so that no document can touch another). Packs of equally long documents are dense rows.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F


@dataclass
class Visibility:
    """Which keys each query may see; one object serves all layers of a forward.

    Args:
        batch, length: rows and queries a row.
        past: cached keys before the first query.
        real: [B, past + length] bool, False at padding; None if nothing is padded.
        cu_seqlens: [docs + 1] int32 offsets of packed documents (batch is 1), else None.
        max_length: tokens of the longest document.
    """

    batch: int
    length: int
    past: int = 0
    real: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_length: int = 0
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict, repr=False)
    _bounds: list[int] | None = field(default=None, repr=False)

    @property
    def uniform(self) -> bool:
        """Packed documents are all equally long: known on the host, without reading cu_seqlens."""
        return self.cu_seqlens is not None and self.max_length * (len(self.cu_seqlens) - 1) == self.length

    def bounds(self) -> list[int]:
        """Document offsets on the host; synchronises once a forward if they lie on a GPU."""
        if self._bounds is None:
            self._bounds = self.cu_seqlens.tolist()
        return self._bounds

    def mask(self, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[B or 1, 1, S, keys] bool, True where a query may look; keys are the last `keys` slots of the row.

        A static cache hands out more slots than tokens so far; its first slot is position 0.
        """
        if (keys, window) not in self._masks:
            total = self.past + self.length
            first = max(total - keys, 0)
            key = torch.arange(first, first + keys, device=device)
            query = torch.arange(self.past, total, device=device)[:, None]
            seen = key <= query
            if window is not None:
                seen &= query - key < window
            seen = seen[None, None]
            if self.real is not None:
                real = F.pad(self.real.bool(), (0, max(keys - total, 0)))[:, first : first + keys]
                # a padded query sees itself: a row that sees nothing has no softmax
                seen = seen & real[:, None, None, :] | (query == key)
            self._masks[(keys, window)] = seen
        return self._masks[(keys, window)]


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
        visibility: causality, documents and padding.
        scale: factor on the scores. window: keys a query may look back over, itself included. softcap: scores become
            softcap * tanh(score / softcap).

    Returns:
        [B, S, H, E] in q's dtype.
    """
    if visibility.uniform:
        rows, length = len(visibility.cu_seqlens) - 1, visibility.max_length
        split = [x.view(rows, length, *x.shape[2:]) for x in (q, k, v)]
        return attention(*split, Visibility(rows, length), scale, window, softcap).view(q.shape)
    if window is not None and window >= (visibility.max_length or k.shape[1]):
        window = None
    backend = choose_backend(q, visibility, window, softcap)
    if backend == "reference":
        return _reference(q, k, v, visibility, scale, window, softcap)
    return _Attention.apply(q, k, v, visibility.cu_seqlens, visibility.max_length, scale, window, backend)


def choose_backend(q: torch.Tensor, visibility: Visibility, window: int | None, softcap: float | None) -> str:
    """Name of the fastest backend that computes this attention exactly: "cudnn", "flash" or "reference"."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not q.is_cuda or not half or softcap is not None or visibility.real is not None or visibility.past:
        return "reference"
    major = torch.cuda.get_device_capability(q.device)[0]
    if major < 8 or q.shape[-1] > 256 or q.shape[-1] % 8:
        return "reference"
    # measured on an H100: cuDNN is 1.7-1.9 times as fast as the built-in flash kernels
    if major >= 9 and visibility.cu_seqlens is None and window is None and q.shape[-1] <= 128:
        return "cudnn"
    return "flash"


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_length: int,
    scale: float,
    window: int | None,
    backend: str,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Forward of the "cudnn" and "flash" backends: out [B, S, H, E] and what `attention_backward` needs besides."""
    if backend == "cudnn":
        qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            qh, kh, vh, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), (lse, seed, offset)
    left = -1 if window is None else window - 1
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[0], k[0], v[0]
    length = max_length if packed else q.shape[1]
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, length, length, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return out[None] if packed else out, (lse, seed, offset)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    cu_seqlens: torch.Tensor | None,
    max_length: int,
    scale: float,
    window: int | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v for `attention_forward`; dout and the results have the shapes of out, q, k, v."""
    lse, seed, offset = saved
    if backend == "cudnn":
        doh, qh, kh, vh, oh = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            doh,
            qh,
            kh,
            vh,
            oh,
            lse,
            seed,
            offset,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            True,
            scale=scale,
        )
        return tuple(x.transpose(1, 2) for x in grads)
    left = -1 if window is None else window - 1
    packed = cu_seqlens is not None
    if packed:
        dout, q, k, v, out = (x[0] for x in (dout, q, k, v, out))
    length = max_length if packed else q.shape[1]
    grads = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, length, length, 0.0, True, seed, offset,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return tuple(x[None] for x in grads) if packed else tuple(grads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_length, scale, window, backend):
        out, saved = attention_forward(q, k, v, cu_seqlens, max_length, scale, window, backend)
        ctx.save_for_backward(q, k, v, out, cu_seqlens, *saved)
        ctx.arguments = (max_length, scale, window, backend)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, cu_seqlens, *saved = ctx.saved_tensors
        grads = attention_backward(dout, q, k, v, out, tuple(saved), cu_seqlens, *ctx.arguments)
        return (*grads, None, None, None, None, None)


def _reference(q, k, v, visibility, scale, window, softcap):
    if visibility.cu_seqlens is not None:
        bounds = visibility.bounds()
        alone = replace(visibility, cu_seqlens=None, max_length=0, _masks={}, _bounds=None)
        parts = []
        for start, end in zip(bounds[:-1], bounds[1:]):
            if start == end:
                continue
            one = replace(alone, length=end - start, _masks={})
            parts.append(
                _dense(q[:, start:end], k[:, start:end], v[:, start:end], one, scale, window, softcap)
            )
        return torch.cat(parts, dim=1)
    return _dense(q, k, v, visibility, scale, window, softcap)


def _dense(q, k, v, visibility, scale, window, softcap):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is not None and window >= k.shape[2]:
        window = None
    simple = visibility.real is None and window is None and visibility.length == k.shape[2]
    mask = None if simple and softcap is None else visibility.mask(k.shape[2], window, q.device)
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    if gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(scale / softcap * (q @ k.transpose(-1, -2)))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)
