"""Attention: the mixer of most families, as a module and as the core of a layer's hand-written pass.

    q|k|v = n W_qkv      a = attention(rope(norm(q)), rope(norm(k)), v)      out = a W_o  (or (a sigmoid(gate)) W_o)

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
from oribi.kernels.context_attention import exchange_bytes
from oribi.kernels.output_gate import output_gate, output_gate_backward, output_gate_forward
from oribi.kernels.rope import Angles, rope, rope_forward
from oribi.models.core import Held, Result
from oribi.models.half import Kept
from oribi.models.linear_layers import NamedParts, RMSNorm, project

if TYPE_CHECKING:
    from oribi.models.layers import Batch


@dataclass
class Attending:
    """q, k, v as attention reads them, [B, S, heads, E], and what backward needs beside them.

    Args:
        p: q|k|v [T, (H + 2K) E], with a gate behind each query head or behind v where the family has one, of which q, k and v
            are views where nothing normed them.
        how: the attention that is computed.
        angles: of each token; None where nothing rotates.
        gate: of the output [T, H, E], a view of p; None without one.
        raw, rstd: q and k before their norms, and their 1/rms; empty without norms.
        batch: where a layer leaves what others share with it, and finds it.
        out, saved: attention's output [T, H E], and what its backward wants.
    """

    p: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    how: Attend
    angles: Angles | None
    gate: torch.Tensor | None = None
    raw: tuple[torch.Tensor, ...] = ()
    rstd: tuple[torch.Tensor, ...] = ()
    out: torch.Tensor | None = None
    saved: tuple[torch.Tensor, ...] = ()
    batch: "Batch | None" = None


_RESULTS = (
    Result("qkv", ("qkv.out", "qkv.lora"), made_by="qkv"),
    Result("qkv_xa", ("qkv.lora",), follows="qkv"),
    Result("attention", ("o.in",), made_by="core", balanced="keep"),
    Result("attention_saved", ("heads",), follows="attention", itemsize=4),  # the scores' log-sum-exp
    Result("x_mid", ("o.out",), made_by="o"),
    Result("o_xa", ("o.lora",), follows="x_mid"),
    Result("o", ("o.out",), made_by="o", before_norm=True),
)
# where the sum of the layer's input and attention's output is nobody's input
_WITHOUT_SUM = (*_RESULTS[:4], Result("o_xa", ("o.lora",), follows="qkv"), _RESULTS[6])


class Attention(NamedParts):
    # `models.half.Core` says what these are
    attribute, input, output, output_result, row_wise = "self_attn", "qkv", "o", "x_mid", False
    masks_padding = needs_bounds = False
    needs_whole_rows: str | None = None
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    # its arithmetic takes as long as this much of a matrix product: 582 and 514 TFLOP/s in forward and backward of 32,768
    # tokens on an H100
    core_by_products = 1.22
    results = _RESULTS

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__(family)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.index = index
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.columns = {"heads": heads}
        self.gated = family.output_gate is not None
        self.gates_each_head = family.output_gate == "q_proj"
        # columns of the projections: those of q hold a gate behind each head, or a projection of its own gives it
        self.gate_columns = self.sizes[0] if self.gated and not self.gates_each_head else 0
        self.widths = [self.sizes[0] * (2 if self.gates_each_head else 1), *self.sizes[1:]]
        configured = family.attention_bias == "config"
        qkv_bias = family.attention_bias == "qkv" or (
            configured and bool(family.value(config, "attention_bias"))
        )
        output_bias = configured and bool(getattr(config, family.output_bias or "", False))
        inputs = dict(zip(("q_proj", "k_proj", "v_proj"), self.widths))
        if "qkv" in family.fused_projections:
            inputs = {"qkv_proj": sum(self.widths)}
        for role, size in inputs.items():
            self.add_part(role, nn.Linear(config.hidden_size, size, bias=qkv_bias))
        if self.gate_columns:
            inputs["output_gate"] = self.gate_columns
            self.widths.append(self.gate_columns)
            self.add_part("output_gate", nn.Linear(config.hidden_size, self.gate_columns, bias=False))
        self._inputs = tuple(inputs)
        self.add_part("o_proj", nn.Linear(self.sizes[0], config.hidden_size, bias=output_bias))
        norms_qk = family.qk_norm_field is None or getattr(config, family.qk_norm_field)
        self.qk_norm = family.qk_norm if norms_qk else None
        self.norms_after_rope = family.qk_norm_after_rope
        if self.qk_norm:
            q_size, k_size = (self.head_dim, self.head_dim) if self.qk_norm == "head" else self.sizes[:2]
            for role, size in (("q_norm", q_size), ("k_norm", k_size)):
                self.add_part(
                    role, RMSNorm.of(config, family, role, size if family.qk_norm_weights else None)
                )
        self.scale = self.head_dim**-0.5
        if isinstance(family.attention_scale, str):
            self.scale = float(getattr(config, family.attention_scale)) ** family.attention_scale_power
        elif family.attention_scale is not None:
            self.scale = family.attention_scale
        if family.query_factor:
            self.scale *= getattr(config, family.query_factor)
        if family.norms == "parallel":  # nothing reads the sum of x and the output
            self.output_result, self.results = None, _WITHOUT_SUM
        self.softcap = config.attn_logit_softcapping if family.softcaps is True else None
        self.window = window_of(config, family, index)
        if family.sinks:
            self.sinks = nn.Parameter(torch.empty(heads))
        self.rope_kind = config.layer_types[index] if family.rope_by_layer_type else None
        self.rotates = family.rotates(config, index)

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layers that share an input: q, k, v (or the one layer that holds them all) and a gate of its own; and o."""
        return {"qkv": [self.part(role) for role in self._inputs], "o": [self.part("o_proj")]}

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """[H] a logit beside the scores of each head; None without sinks."""
        return self._parameters.get("sinks")

    def qk_norms(self) -> tuple[RMSNorm, ...]:
        """The norms of q and k; none without them."""
        return (self.part("q_norm"), self.part("k_norm")) if self.qk_norm else ()

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
        """Gradients of a, q, k and v, the gated output; for a group of heads that of q in float32, of k and v by query head."""
        heads = self.sizes[0]
        portions = head_groups("flash", tokens * self.columns["heads"], self.sizes[1] // self.head_dim)
        return tokens * width * (heads * (1 + self.gated) + sum(self.sizes) + 4 * heads // portions)

    def exchange_bytes(self, tokens: int, width: int) -> int:
        """Bytes that backward takes beside it where processes share a row of so many tokens."""
        return exchange_bytes(tokens, self.sizes[1] // self.head_dim, self.head_dim, width)

    def autograd_columns(self) -> int:
        """q, k, v and the output; q and k before their norms, too, or beside v in one tensor; the gate, and what it gates."""
        numbers = sum(self.sizes) + self.sizes[0]
        twice = bool(self.qk_norm) or len(self.groups()["qkv"]) == 1
        return numbers + twice * (numbers // 2) + self.gated * 2 * self.sizes[0]

    def split(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q [..., H, E], k and v [..., K, E], and the gate [..., H, E] or None, views of p."""
        q, k, v, *gate = (part.unflatten(-1, (-1, self.head_dim)) for part in p.split(self.widths, dim=-1))
        if self.gates_each_head:
            return q[..., ::2, :], k, v, q[..., 1::2, :]
        return q, k, v, gate[0] if gate else None

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        rows, length = x.shape[:2]
        groups = self.groups()
        outputs = project(groups["qkv"], x)
        q, k, v, *gate = outputs[0].split(self.widths, dim=-1) if len(outputs) == 1 else outputs
        norms = self.qk_norms()
        if self.qk_norm == "projection":
            q, k = (norm(t) for norm, t in zip(norms, (q, k)))
        q, k, v = (t.reshape(rows * length, -1, self.head_dim) for t in (q, k, v))
        gate = gate[0].reshape(q.shape) if gate else None
        if self.gates_each_head:
            q, gate = q[:, ::2], q[:, 1::2]
        if self.qk_norm == "head" and not self.norms_after_rope:
            q, k = (norm(t) for norm, t in zip(norms, (q, k)))
        if self.rotates:
            q, k = rope(q, k, *batch.angles[self.rope_kind])
        if self.norms_after_rope:
            q, k = (norm(t) for norm, t in zip(norms, (q, k)))
        q, k, v = (t.view(rows, length, -1, self.head_dim) for t in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = attention(
            q, k, v, batch.visibility, self.scale, self.window, self.softcap, sinks=self.sink_logits
        )
        if gate is not None:
            out = output_gate(out.flatten(0, 1), gate)
        return project(groups["o"], out.reshape(rows, length, -1))[0]

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Attending:
        """q, k, v of q|k|v; without norms before their rotation, q and k are rotated in place, once."""
        angles = batch.angles[self.rope_kind] if self.rotates else None
        q, k, v, gate = self.split(p)
        raw = rstd = ()
        if angles and fresh and self._rotates_in_place:
            rope_forward(q, k, *angles, out=(q, k))
        if self.qk_norm:
            raw = tuple(t if self.qk_norm == "head" else t.flatten(1) for t in (q, k))
            normed = [norm.compute(t) for t, norm in zip(raw, self.qk_norms())]
            q, k = (y.reshape(len(p), -1, self.head_dim) for y, _, _ in normed)
            rstd = tuple(r for _, _, r in normed)
        if angles and not self._rotates_in_place:
            rope_forward(q, k, *angles, out=(q, k))
        shape = batch.visibility.batch, batch.visibility.length
        q, k, v = (t.unflatten(0, shape) for t in (q, k, v))
        how = decide(q, batch.visibility, self.scale, self.window, self.softcap, sinks=self.sink_logits)
        return Attending(p, q, k, v, how, angles, gate, raw, rstd)

    @property
    def _rotates_in_place(self) -> bool:
        """Whether q and k are rotated before anything else happens to them."""
        return not self.qk_norm or self.norms_after_rope

    def run(self, prepared: Attending, kept: Kept) -> torch.Tensor:
        """Attention's output [T, H E], kept or computed."""
        out, saved = kept.take("attention"), kept.take("attention_saved")
        if out is None:
            out, saved = attention_forward(prepared.q, prepared.k, prepared.v, prepared.how)
            out = out.reshape(len(prepared.p), -1)
            kept.put("attention", out)
            kept.put("attention_saved", saved, "attention")
        prepared.out, prepared.saved = out, saved
        if prepared.gate is None:
            return out
        return output_gate_forward(out.view(prepared.gate.shape), prepared.gate).view(out.shape)

    def backward(self, prepared: Attending, dh: torch.Tensor) -> None:
        """Writes the gradient of q|k|v over it."""
        shape, gate = prepared.q.shape, prepared.gate
        if gate is not None:
            dh, a = (t.view(gate.shape) for t in (dh, prepared.out))
            output_gate_backward(dh, a, gate, da=dh, dgate=gate)
        dq, dk, dv = attention_backward(
            dh.view(shape), prepared.q, prepared.k, prepared.v, prepared.out.view(shape), prepared.saved, prepared.how
        )  # fmt: skip
        prepared.out, prepared.saved = None, ()
        q, k, v, _ = self.split(prepared.p)
        v.copy_(dv.reshape(v.shape))
        dq, dk = (g.reshape(len(q), -1, self.head_dim) for g in (dq, dk))
        angles = prepared.angles
        if self.qk_norm:
            if angles and not self._rotates_in_place:
                rope_forward(dq, dk, *angles, inverse=True, out=(dq, dk))
            both = zip((dq, dk), prepared.raw, prepared.rstd, self.qk_norms())
            for d, x, rstd, norm in both:
                norm.backward(d.reshape(x.shape), x, rstd, out=x)
            if angles and self._rotates_in_place:
                rope_forward(q, k, *angles, inverse=True, out=(q, k))
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
