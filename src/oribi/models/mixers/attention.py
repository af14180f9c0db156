"""Attention: the mixer of most families, as a module and as the core of a layer's hand-written pass.

    q|k|v = n W_qkv      a = attention(rope(norm(q)), rope(norm(k)), v)      out = a W_o

B rows, S tokens per row, T = B * S, D hidden size, H query heads, K key/value heads, E head_dim. Norms of q and k, their
rotation, windows and soft caps are the family's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family
from oribi.kernels.attention import (
    Attend,
    attention,
    attention_backward,
    attention_forward,
    decide,
    head_groups,
)
from oribi.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from oribi.kernels.rope import rope, rope_forward
from oribi.models.core import Held, Result
from oribi.models.half import Kept
from oribi.models.linear_layers import RMSNorm, project

if TYPE_CHECKING:
    from oribi.models.layers import Batch


@dataclass
class Attending:
    """q, k, v as attention reads them, [B, S, heads, E], and what backward needs beside them.

    Args:
        p: q|k|v [T, (H + 2K) E], of which q, k and v are views where nothing normed them.
        how: the attention that is computed.
        angles: cos and sin of each token; None where nothing rotates.
        raw, rstd: q and k before their norms, and their 1/rms; empty without norms.
        out, saved: attention's output [T, H E], and what its backward wants.
    """

    p: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    how: Attend
    angles: tuple[torch.Tensor, torch.Tensor] | None
    raw: tuple[torch.Tensor, ...] = ()
    rstd: tuple[torch.Tensor, ...] = ()
    out: torch.Tensor | None = None
    saved: tuple[torch.Tensor, ...] = ()


class Attention(nn.Module):
    # `models.half.Core` says what these are
    attribute, input, output, output_result, row_wise = "self_attn", "qkv", "o", "x_mid", False
    masks_padding = False
    # its arithmetic takes as long as this much of a matrix product: 582 and 514 TFLOP/s in forward and backward of 32,768
    # tokens on an H100
    core_by_products = 1.22
    results = (
        Result("qkv", ("qkv.out", "qkv.lora"), made_by="qkv"),
        Result("qkv_xa", ("qkv.lora",), follows="qkv"),
        Result("attention", ("o.in",), made_by="core", balanced="keep"),
        Result("attention_saved", ("heads",), follows="attention", itemsize=4),  # the scores' log-sum-exp
        Result("x_mid", ("o.out",), made_by="o"),
        Result("o_xa", ("o.lora",), follows="x_mid"),
        Result("o", ("o.out",), made_by="o", before_norm=True),
    )

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.index = index
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.columns = {"heads": heads}
        configured = family.attention_bias == "config" and bool(getattr(config, "attention_bias", False))
        qkv_bias = configured or family.attention_bias == "qkv"
        if family.fused_projections:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=qkv_bias)
        else:
            for name, size in zip(("q_proj", "k_proj", "v_proj"), self.sizes):
                self.add_module(name, nn.Linear(config.hidden_size, size, bias=qkv_bias))
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=configured)
        self.qk_norm = family.qk_norm
        if self.qk_norm:
            q_size, k_size = (self.head_dim, self.head_dim) if self.qk_norm == "head" else self.sizes[:2]
            self.q_norm = RMSNorm(q_size, config.rms_norm_eps, family.norm_offset)
            self.k_norm = RMSNorm(k_size, config.rms_norm_eps, family.norm_offset)
        self.scale = self.head_dim**-0.5
        if family.attention_scale:
            self.scale = float(getattr(config, family.attention_scale)) ** family.attention_scale_power
        self.softcap = config.attn_logit_softcapping if family.softcaps else None
        self.window = window_of(config, family, index)
        self.rope_kind = config.layer_types[index] if family.rope_by_layer_type else None
        self.rotates = bool(config.no_rope_layers[index]) if family.no_rope_layers else True

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layers that share an input: q, k, v (or the one layer that holds them all), and o."""
        fused = hasattr(self, "qkv_proj")
        return {
            "qkv": [self.qkv_proj] if fused else [self.q_proj, self.k_proj, self.v_proj],
            "o": [self.o_proj],
        }

    def holds(self, length: int) -> dict[str, Held]:
        """Keys and values [K, C, E]; the token at position p lies in slot p mod C."""
        slots = length if self.window is None else min(length, self.window)
        held = Held((self.sizes[1] // self.head_dim, slots, self.head_dim), slots=1)
        return {"keys": held, "values": held}

    def core_flop(self, longest: float) -> float:
        """Of scores and of their product with the values."""
        # a token attends to half of its document, or to the window if that is less
        attended = longest / 2 if self.window is None else min(longest / 2, self.window)
        return 4.0 * self.sizes[0] * attended

    def core_backward_bytes(self, tokens: int, width: int) -> int:
        """Gradients of a, q, k and v; for a group of heads that of q in float32, of k and v by query head."""
        heads = self.sizes[0]
        portions = head_groups("flash", tokens * self.columns["heads"], self.sizes[1] // self.head_dim)
        return tokens * width * (heads + sum(self.sizes) + 4 * heads // portions)

    def autograd_columns(self) -> int:
        """q, k, v and the output; q and k before their norms, too, or beside v in one tensor."""
        numbers = sum(self.sizes) + self.sizes[0]
        return numbers + numbers // 2 if self.qk_norm or len(self.groups()["qkv"]) == 1 else numbers

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        rows, length = x.shape[:2]
        groups = self.groups()
        outputs = project(groups["qkv"], x)
        q, k, v = outputs[0].split(self.sizes, dim=-1) if len(outputs) == 1 else outputs
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(rows * length, -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rope(q, k, *batch.angles[self.rope_kind])
        q, k, v = (t.view(rows, length, -1, self.head_dim) for t in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, batch.visibility, self.scale, self.window, self.softcap)
        return project(groups["o"], out.reshape(rows, length, -1))[0]

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Attending:
        """q, k, v of q|k|v; without norms of their own, q and k are rotated in place, once."""
        angles = batch.angles[self.rope_kind] if self.rotates else None
        q, k, v = p.split(self.sizes, dim=1)
        raw = rstd = ()
        if self.qk_norm:
            raw = tuple(t.unflatten(1, (-1, self.head_dim)) if self.qk_norm == "head" else t for t in (q, k))
            norms = (self.q_norm, self.k_norm)
            normed = [rms_norm_forward(t, n.weight, n.eps, n.offset) for t, n in zip(raw, norms)]
            q, k = (y.reshape(len(p), -1) for y, _, _ in normed)
            rstd = tuple(r for _, _, r in normed)
        q, k, v = (t.unflatten(1, (-1, self.head_dim)) for t in (q, k, v))
        if angles and (self.qk_norm or fresh):
            rope_forward(q, k, *angles, out=(q, k))
        shape = batch.visibility.batch, batch.visibility.length
        q, k, v = (t.unflatten(0, shape) for t in (q, k, v))
        how = decide(q, batch.visibility, self.scale, self.window, self.softcap)
        return Attending(p, q, k, v, how, angles, raw, rstd)

    def run(self, prepared: Attending, kept: Kept) -> torch.Tensor:
        """Attention's output [T, H E], kept or computed."""
        out, saved = kept.take("attention"), kept.take("attention_saved")
        if out is None:
            out, saved = attention_forward(prepared.q, prepared.k, prepared.v, prepared.how)
            out = out.reshape(len(prepared.p), -1)
            kept.put("attention", out)
            kept.put("attention_saved", saved, "attention")
        prepared.out, prepared.saved = out, saved
        return out

    def backward(self, prepared: Attending, dh: torch.Tensor) -> None:
        """Writes the gradient of q|k|v over it."""
        shape = prepared.q.shape
        dq, dk, dv = attention_backward(
            dh.view(shape), prepared.q, prepared.k, prepared.v, prepared.out.view(shape), prepared.saved, prepared.how
        )  # fmt: skip
        prepared.out, prepared.saved = None, ()
        q, k, v = prepared.p.split(self.sizes, dim=1)
        v.copy_(dv.reshape(v.shape))
        dq, dk = (g.reshape(len(q), -1, self.head_dim) for g in (dq, dk))
        q, k = (part.unflatten(1, (-1, self.head_dim)) for part in (q, k))
        angles = prepared.angles
        if self.qk_norm:
            if angles:
                rope_forward(dq, dk, *angles, inverse=True, out=(dq, dk))
            both = zip((dq, dk), prepared.raw, prepared.rstd, (self.q_norm, self.k_norm))
            for d, x, rstd, norm in both:
                rms_norm_backward(d.reshape(x.shape), x, rstd, norm.weight, norm.offset, out=x)
        elif angles:
            rope_forward(dq, dk, *angles, inverse=True, out=(q, k))
        else:
            q.copy_(dq)
            k.copy_(dk)


def window_of(config: PretrainedConfig, family: Family, index: int) -> int | None:
    """Sliding window of a layer in tokens, or None where it sees everything before it."""
    if family.windows is None:
        return None
    if family.windows == "layer_types" and config.layer_types[index] != "sliding_attention":
        return None
    return config.sliding_window
