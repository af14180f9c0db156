"""One token of every row through the decoder, on the family's own modules: what a CUDA graph records and a CPU runs.

B rows, D hidden size, H query heads, K key/value heads, E head_dim, C slots of a layer. Everything that changes from token
to token is in the tensors of a `DecodingState`, so the same calls on the same addresses serve all tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from oribi.kernels.causal_conv import causal_conv_step
from oribi.kernels.decode_attention import decode_attention, store_token
from oribi.kernels.dispatch import use_triton
from oribi.kernels.gated_mlp import gated_mlp_forward
from oribi.kernels.lora_unpacked import few_rows_linear
from oribi.kernels.output_gate import output_gate_forward
from oribi.kernels.rope import Angles, rope_forward
from oribi.models.decoding.gated_delta import GatedDeltaStep
from oribi.models.decoding.groups import PackedGroup, groups_of
from oribi.models.decoding.sampling import Choice
from oribi.models.decoding.state import DecodingState
from oribi.models.experts import ExpertsMLP
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import RMSNorm, read
from oribi.models.mixers.attention import Attention
from oribi.models.mixers.gated_delta import GatedDelta
from oribi.models.mixers.shared_attention import SharedAttention
from oribi.models.mixers.short_conv import ShortConv
from oribi.models.mlp import MLP
from oribi.models.per_layer import PerLayerInput

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

AnglesByKind = dict[str | None, Angles]


class Ring:
    """Where the tokens of one step lie in caches with C slots.

    Args:
        slots: C. length: [B] int64, cached tokens.
        used: slots that the longest row fills with this step's token, where the host knows; None reads all.
    """

    def __init__(self, slots: int, length: torch.Tensor, used: int | None) -> None:
        self.used = slots if used is None else min(used, slots)
        self._index = (length % slots)[:, None, None, None]
        filled = torch.arange(self.used, device=length.device) <= length[:, None]
        self.mask = filled[:, None, None, :]  # [B, 1, 1, used]

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> None:
        """Puts new [B, K, E] into the cache [B, K, C, E]."""
        cache.scatter_(2, self._index.expand(-1, new.shape[1], 1, new.shape[2]), new[:, :, None])


class AttentionStep:
    """Attention of one token per row over its cache.

    Args:
        attention: the module. state: holds its layer's cache.
    """

    def __init__(self, attention: Attention, state: DecodingState) -> None:
        self.attention, self.state = attention, state
        self.groups = groups_of(attention, state)
        self._norms = attention.qk_norms()
        self._fused = reads_with_kernels(state)

    def __call__(self, x: torch.Tensor, angles: AnglesByKind, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        a, state = self.attention, self.state
        qkv = self.groups["qkv"](x)
        keys, values = state.held[a.index].values()
        if self._fused:
            return self.groups["o"](self._by_kernels(qkv, keys, values, angles))
        q, k, v, gate = a.split(qkv)
        if a.qk_norm == "projection":
            q, k = (_norm(norm, t.flatten(1)).view(t.shape) for norm, t in zip(self._norms, (q, k)))
        if a.qk_norm == "head" and not a.norms_after_rope:
            q, k = (_norm(norm, t) for norm, t in zip(self._norms, (q, k)))
        if a.rotates:
            rope_forward(q, k, *angles[a.rope_kind], out=(q, k))
        if a.norms_after_rope:
            q, k = (_norm(norm, t) for norm, t in zip(self._norms, (q, k)))
        ring = rings[state.slots[a.index]]
        ring.write(keys, k)
        ring.write(values, v)
        cached = keys[:, :, : ring.used], values[:, :, : ring.used]
        out = attend(q, *cached, ring.mask, a.scale, a.softcap, a.sink_logits)
        return self.groups["o"]((out if gate is None else output_gate_forward(out, gate)).flatten(1))

    def _by_kernels(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, angles: AnglesByKind
    ) -> torch.Tensor:
        """Attention's output [B, H E]."""
        a, state, norms = self.attention, self.state, {}
        if a.qk_norm == "projection":
            for norm, part in zip(self._norms, qkv.split(a.widths, dim=1)):
                norm.compute(part, out=part)
        elif a.qk_norm == "head" and self._norms[0].weight is not None:
            q_norm, k_norm = self._norms
            norms = {
                "q_norm": q_norm.weight,
                "k_norm": k_norm.weight,
                "eps": q_norm.eps,
                "offset": q_norm.offset,
            }
        of_kind = angles[a.rope_kind] if a.rotates else None
        q, k, _, gate = a.split(qkv)
        # the kernel norms by weights, then rotates halves by cos and sin; it has no other way
        rotates_apart = of_kind is not None and (a.norms_after_rope or not of_kind.plain)
        if a.qk_norm == "head" and not a.norms_after_rope and (rotates_apart or not norms):
            for norm, t in zip(self._norms, (q, k)):
                norm.compute(t, out=t)
            norms = {}
        if rotates_apart:
            rope_forward(q, k, *of_kind, out=(q, k))
            of_kind = None
        cos, sin = of_kind[:2] if of_kind else (None, None)
        of_heads = qkv[:, : qkv.shape[1] - a.gate_columns]
        q = store_token(
            of_heads, keys, values, state.length, state.row, cos, sin, gated=a.gates_each_head, **norms
        )
        out = decode_attention(
            q, keys, values, state.length, state.row, state.counters, scale=a.scale, softcap=a.softcap,
            sinks=a.sink_logits,
        )  # fmt: skip
        return out if gate is None else output_gate_forward(out.view(gate.shape), gate).flatten(1)


def reads_with_kernels(state: DecodingState) -> bool:
    """Whether attention over a state's cache runs by kernels for single tokens."""
    return use_triton(state.token) and state.dtype.itemsize == 2


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per row and head.

    Args:
        q: [B, H, E]. keys, values: [B, K, C, E]. mask: [B, 1, 1, C] bool, True at filled slots.
        scale, softcap, sinks: as in `kernels.attention.decide`.

    Returns:
        [B, H, E].
    """
    # the query heads of a key head are its queries: no key is repeated
    grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
    else:
        scores = grouped @ keys.transpose(-1, -2)
        scores = (
            scale * scores if softcap is None else softcap * torch.tanh(scale / softcap * scores)
        ).masked_fill(~mask, -torch.inf)
        if sinks is not None:
            own = sinks.to(scores.dtype).view(keys.shape[1], -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, own], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = weights[..., : keys.shape[2]] @ values
    return out.reshape(q.shape)


class SharedAttentionStep(AttentionStep):
    """The same of a layer that reads the cache of its donor, which went before it in this step.

    Args:
        attention: the module. state: holds the donor's cache.
    """

    def __call__(self, x: torch.Tensor, angles: Angles, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        a, state = self.attention, self.state
        q, k, v = a.normed_and_rotated(self.groups["qkv"](x), angles[a.rope_kind])
        keys, values = state.held[a.donor].values()
        if self._fused:
            if k is not None:
                qkv = torch.cat([t.flatten(1) for t in (q, k, v)], dim=1)
                q = store_token(qkv, keys, values, state.length, state.row)
            shared = keys, values, state.length, state.row, state.counters
            return self.groups["o"](decode_attention(q, *shared, scale=a.scale))
        ring = rings[state.slots[a.donor]]
        if k is not None:
            ring.write(keys, k)
            ring.write(values, v)
        out = attend(q, keys[:, :, : ring.used], values[:, :, : ring.used], ring.mask, a.scale, None)
        return self.groups["o"](out.flatten(1))


class MLPStep:
    """The gated MLP of one token per row.

    Args:
        mlp: the module. state: of the rows.
    """

    def __init__(self, mlp: MLP, state: DecodingState) -> None:
        self.activation = mlp.activation
        self.groups = groups_of(mlp, state)

    def __call__(self, x: torch.Tensor, angles: AnglesByKind, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        gate_up = self.groups["gate_up"]
        if isinstance(gate_up, PackedGroup):
            return self.groups["down"](gate_up(x, self.activation))
        gate, up = gate_up(x).chunk(2, dim=1)
        return self.groups["down"](gated_mlp_forward(gate, up, self.activation))


class ExpertsStep:
    """The experts of one token per row.

    Args:
        core: the module. state: of the rows.
    """

    def __init__(self, core: ExpertsMLP, state: DecodingState) -> None:
        self.core, self.groups = core, {}

    def __call__(self, x: torch.Tensor, angles: AnglesByKind, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        return self.core(x)


class ShortConvStep:
    """The short convolution of one token per row.

    Args:
        mixer: the module. state: holds its layer's window.
    """

    def __init__(self, mixer: ShortConv, state: DecodingState) -> None:
        self.mixer, self.state = mixer, state
        self.groups = groups_of(mixer, state)

    def __call__(self, x: torch.Tensor, angles: AnglesByKind, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        b, c, x = self.groups["bcx"](x).chunk(3, dim=1)
        window = self.state.held[self.mixer.index]["window"]
        weight, bias = self.mixer.kernel()
        return self.groups["conv_out"](causal_conv_step(x, window, weight, bias, before=b, after=c))


class PerLayerInputStep:
    """What a layer adds of its own input, of one token per row.

    Args:
        core: the module. state: holds the inputs of the token.
    """

    def __init__(self, core: PerLayerInput, state: DecodingState) -> None:
        self.core, self.state = core, state
        self.groups = groups_of(core, state)

    def __call__(self, x: torch.Tensor, angles: Angles, rings: dict[int, Ring]) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        gate, own = self.groups["per_layer_gate"](x), self.state.per_layer[self.core.index]
        return self.groups["per_layer_output"](gated_mlp_forward(gate, own, self.core.activation))


# how one token per row goes through a mixer, an MLP or another part of a layer
STEPS: dict[type, Callable[[Any, DecodingState], Any]] = {
    Attention: AttentionStep,
    GatedDelta: GatedDeltaStep,
    SharedAttention: SharedAttentionStep,
    ShortConv: ShortConvStep,
    MLP: MLPStep,
    ExpertsMLP: ExpertsStep,
    PerLayerInput: PerLayerInputStep,
}


class DecodingStep:
    """Reads each row's last token, and appends the next one.

    Args:
        decoder: the model. state: of the rows. choice: how tokens are chosen.
        ends: [E] int64, tokens that end a row, or None. pad: what an ended row gets.

    Attributes:
        logits: [B, V] float32 of the last step where the host chooses and appends, else None.
    """

    def __init__(
        self,
        decoder: "DecoderForCausalLM",
        state: DecodingState,
        choice: Choice,
        ends: torch.Tensor | None,
        pad: int,
    ) -> None:
        self.decoder, self.state, self.choice, self.ends, self.pad = decoder, state, choice, ends, pad
        self.layers = [_LayerStep(layer, state) for layer in decoder.model.layers]
        self.logits: torch.Tensor | None = None
        if choice.by_host:
            shape = len(state.row), decoder.config.vocab_size
            self.logits = torch.empty(shape, dtype=torch.float32, device=state.token.device)

    def refresh(self) -> None:
        """Reads LoRA factors that may have been trained since."""
        for layer in self.layers:
            for part, _, _ in layer.parts:
                for group in part.groups.values():
                    group.refresh()

    def __call__(self, longest: int, used: int | None = None) -> None:
        """One token.

        Args:
            longest: as `RotaryAngles.angles` wants it.
            used: as `Ring` takes it; None where the step is recorded, and nothing may depend on the host.
        """
        state, model = self.state, self.decoder.model
        x = model.embedded(state.token).to(state.dtype)
        if model.embedding_multiplier != 1.0:
            x = x * model.embedding_multiplier
        if model.per_layer_size:
            state.per_layer = model.per_layer_inputs(state.token, x)
        angles = {kind: rotary.angles(state.length, longest) for kind, rotary in model.rotary.items()}
        slots = (
            () if reads_with_kernels(state) else set(state.slots) - {0}
        )  # a kernel finds its slots by itself
        rings = {count: Ring(count, state.length, used) for count in slots}
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, angles, rings)
        hidden, _ = _norm_of_sum(model.last_norm, x, branch, self.layers[-1].scale)
        state.length += 1
        self.take(hidden)

    def take(self, hidden: torch.Tensor) -> None:
        """Chooses the next tokens from hidden states [B, D] after the last norm, and appends them, or leaves their logits."""
        logits = last_logits(self.decoder, hidden)
        if self.logits is not None:
            self.logits.copy_(logits)
            return
        self.state.take(self.choice.tokens(logits, self.state), self.ends, self.pad)


class _LayerStep:
    def __init__(self, layer: DecoderLayer, state: DecodingState) -> None:
        self.scale, self.scalar, self.parallel = layer.residual_scale, layer.scalar, layer.parallel
        self.parts = [(STEPS[type(module)](module, state), pre, post) for module, pre, post in layer.parts()]

    def __call__(self, x, branch, angles, rings):
        """The residual stream and the branch that is to be added to it, [B, D] each, of those of the layer below."""
        for index, (part, pre, post) in enumerate(self.parts):
            if self.parallel and index > 0:  # which reads what the part before read
                x = self._sum(x, branch)
            elif pre is not None:
                n, x = _norm_of_sum(pre, x, branch, self.scale)
            else:
                n = x = x if branch is None else self._sum(x, branch)
            h = part(n, angles, rings)
            branch = h if post is None else _norm(post, h)
        if self.scalar is None:
            return x, branch
        return self._sum(x, branch) * self.scalar, None

    def _sum(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + (branch if self.scale == 1.0 else branch * self.scale)


def _norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.compute(x)[0]


def _norm_of_sum(
    norm: RMSNorm, x: torch.Tensor, branch: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + scale branch) and the sum."""
    if branch is None:
        return _norm(norm, x), x
    return norm.compute(branch, residual=x, residual_scale=scale)[:2]


def last_logits(decoder: "DecoderForCausalLM", hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] in float32 of hidden states [B, D] after the last norm."""
    head = read(decoder.lm_head)
    if head is None or head.a is not None or head.weight.dtype != hidden.dtype:
        return decoder.head_logits(hidden[:, None])[:, 0].float()
    return decoder.scaled_logits(few_rows_linear(hidden, head.weight, head.bias)).float()
