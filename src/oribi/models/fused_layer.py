"""One decoder layer differentiated by hand, so that what it keeps for backward is a choice and not a consequence.

    n1 = norm(x)    q|k|v = n1 W_qkv    a = attention(rope(q), rope(k), v)    x_mid = x + a W_o
    n2 = norm(x_mid)    gate|up = n2 W_gu    h = act(gate) up    y = x_mid + h W_down

T tokens (rows flattened), D hidden size. Backward needs x, q|k|v, a, x_mid and gate|up; `Keep` says of each whether it
stays, waits in host memory or is computed again. The output of the down projection is needed by nobody and is never
computed again; norms, rope and h are rebuilt on the way. Each group of weights is dequantised once in forward and once
in backward, where recomputation and the gradient share it. The MLP takes the tokens in portions: its gate|up and h are
the widest results there are, and must not grow with the context. The gradients do not depend on `Keep`, to the bit.

The LoRA pairs are the only parameters trained here; a layer with anything else to train takes PyTorch's autograd.

With `layer.fp8`, products of the frozen weights are those of `kernels/fp8.py`, and the gradients are of the layer so
computed. Evaluation, generation and exports never come here: they are exact.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from oribi.errors import ModelError
from oribi.kernels import fp8, lora
from oribi.kernels.attention import Attend, attention_backward, attention_forward, decide
from oribi.kernels.gated_mlp import gated_mlp_backward, gated_mlp_forward
from oribi.kernels.lora import GroupWeight, Projection, augmented_weight
from oribi.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from oribi.kernels.rope import rope_forward
from oribi.models.host_memory import Parcel
from oribi.models.projections import any_module_hooked, hooked, read

if TYPE_CHECKING:
    from oribi.models.layers import Batch, DecoderLayer, RMSNorm

Place = Literal["keep", "host", "recompute"]

# tokens that an MLP computes at a time; so many keep the matrix products at full speed
MLP_TOKENS = 16384


class Keep(dict[str, Place]):
    """Where each result of a layer is between forward and backward, by name; one without an entry stays on the device.

    "weights" are the layer's dequantised weights, kept from step to step ("keep") or made again ("recompute", unless
    there is an entry); they never wait in host memory.
    """

    def __missing__(self, name: str) -> Place:
        return "recompute" if name == "weights" else "keep"


# by name; `train.recompute` makes finer ones from the memory that is free
POLICIES = {
    "speed": Keep(),
    "balanced": Keep(
        qkv="recompute", x_mid="recompute", gate_up="recompute", o="recompute", down="recompute"
    ),
    "memory": Keep(
        x="host",
        qkv="recompute",
        attention="recompute",
        x_mid="recompute",
        gate_up="recompute",
        o="recompute",
        down="recompute",
    ),
}


@dataclass
class LayerGroups:
    """The four groups of linear layers of one decoder layer, read through their LoRA wrappers."""

    qkv: list[Projection]
    o: list[Projection]
    gate_up: list[Projection]
    down: list[Projection]

    def all(self) -> tuple[list[Projection], ...]:
        """The groups in order."""
        return self.qkv, self.o, self.gate_up, self.down

    def factors(self) -> list[torch.Tensor | None]:
        """A and B of every projection in order, as the autograd function takes them."""
        return [t for group in self.all() for p in group for t in (p.a, p.b)]


def fusible_groups(layer: "DecoderLayer") -> LayerGroups | None:
    """The layer's groups if it can be differentiated by hand now, else None."""
    attn, mlp = layer.self_attn, layer.mlp
    if hooked(attn) or hooked(mlp) or any_module_hooked():  # neither is called by itself here
        return None
    groups = LayerGroups(
        *(
            [read(module) for module in modules]
            for modules in (attn.qkv_modules(), [attn.o_proj], mlp.gate_up_modules(), [mlp.down_proj])
        )
    )
    for group in groups.all():
        if any(p is None or not p.fusible for p in group):
            return None
    if any(norm.weight.requires_grad or norm.observed for norm in layer.norm_modules()):
        return None
    return groups


def fused_layer(
    layer: "DecoderLayer", groups: LayerGroups, x: torch.Tensor, batch: "Batch", keep: Keep
) -> torch.Tensor:
    """The layer's output [B, S, D] for x [B, S, D], with gradients for x and every LoRA factor."""
    return _FusedLayer.apply(x, layer, groups, batch, keep, *groups.factors())


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, groups, batch, keep, *factors):
        step = _Step(layer, groups, batch, keep, x.dtype, x.device)
        kept: dict[str, object] = {}
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            step.put(kept, "x", flat)
            weight = step.weight("qkv")
            room, _ = step.enter(step.norm_before_attention, flat, weight)
            qkv = weight.forward(room)
            if keep["qkv"] != "recompute":
                kept["low_qkv"] = weight.low(room)
            del room
            rotated = step.rotate(qkv, weight.spare)
            step.put(kept, "qkv", qkv)
            a, extra = attention_forward(rotated.q, rotated.k, rotated.v, step.attend(rotated))
            del rotated, qkv
            a = a.reshape(len(flat), -1)
            step.put(kept, "attention", a)
            if keep["attention"] != "recompute":
                kept["attention_extra"] = extra
            weight = step.weight("o")
            x_mid, low, product = step.leave(a, flat, weight, step.norm_after_attention)
            if keep["x_mid"] != "recompute":
                kept["low_o"] = low
            step.put(kept, "x_mid", x_mid)
            step.put(kept, "o", product)
            del a, product
            weights = step.weight("gate_up"), step.weight("down")
            parts = portions(len(flat))
            kept["mlp"] = [{} for _ in parts]
            ys = [_mlp(step, x_mid[rows], weights, mlp) for rows, mlp in zip(parts, kept["mlp"])]
            y = ys[0] if len(ys) == 1 else torch.cat(ys)
        ctx.step, ctx.kept, ctx.shape = step, kept, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise ModelError(
                "backward was called twice on one forward; oribi's layers free what they kept, call forward again"
            )
        if ctx.step.batch.host_memory is not None:
            ctx.step.batch.host_memory.turn()
        needs_dx, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        with torch.autocast(dy.device.type, enabled=False):
            dx, factors = _backward(ctx.step, kept, dy.reshape(-1, dy.shape[-1]), needs_dx)
        factors = [grad if want else None for grad, want in zip(factors, wanted)]
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None, *factors)


def portions(tokens: int) -> list[slice]:
    """The rows that an MLP computes at a time: equal portions of at most MLP_TOKENS, whatever is kept of them."""
    tokens = max(tokens, 1)  # an empty batch is one empty portion
    count = -(-tokens // MLP_TOKENS)
    size = -(-tokens // (count * 128)) * 128  # a matrix tile's rows
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _mlp(
    step: "_Step",
    x: torch.Tensor,
    weights: tuple[GroupWeight, GroupWeight],
    kept: dict[str, object],
) -> torch.Tensor:
    """y of some rows of x_mid [t, D]; weights are those of gate|up and down."""
    weight, weight_down = weights
    room, _ = step.enter(step.norm_before_mlp, x, weight)
    gate_up = weight.forward(room)
    step.put(kept, "gate_up", gate_up)
    if "gate_up" in kept:
        kept["low_gate_up"] = weight.low(room)
    del room
    h = step.gated(gate_up, weight)
    del gate_up
    y, low, product = step.leave(h, x, weight_down, step.norm_after_mlp)
    if "gate_up" in kept:
        kept["low_down"] = low
    step.put(kept, "down", product)
    return y


def _mlp_backward(
    step: "_Step",
    kept: dict[str, object],
    x: torch.Tensor,
    dy: torch.Tensor,
    weights: tuple[GroupWeight, GroupWeight],
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """For some rows of x_mid and dy [t, D]: gradient of norm(x_mid), 1/rms of x_mid, and the factors' gradients."""
    weight, weight_down = weights
    room, rstd = step.enter(step.norm_before_mlp, x, weight)
    gate_up, down = _fetch(kept, "gate_up"), _fetch(kept, "down")
    low, low_down = kept.pop("low_gate_up", None), kept.pop("low_down", None)
    again = gate_up is None
    if again:
        gate_up = weight.forward(room)
        low = weight.low(room)
    n2 = room[:, : weight.in_features]
    if down is None and step.norm_after_mlp is not None:
        down = step.leave(step.gated(gate_up, weight), x, weight_down, step.norm_after_mlp)[2]
    dout = step.add_backward(dy, down, step.norm_after_mlp, weight_down)
    u = weight_down.backward_low(dout)
    dh = weight_down.backward_input(dout)
    del down
    gate, up = gate_up[:, : weight.out_features].chunk(2, dim=1)
    # gate|up becomes its gradient and dh becomes h: at 8B and 4096 tokens that saves 350 MB
    gated_mlp_backward(dh, gate, up, step.layer.mlp.activation, dgate=gate, dup=up, h=dh)
    if again:
        low_down = weight_down.forward_low(dh)
    factors = step.factors("down", dout, u, dh, low_down)
    del dout, dh, gate, up
    u = weight.backward_low(gate_up)
    dn = weight.backward_input(gate_up)
    return dn, rstd, step.factors("gate_up", gate_up, u, n2, low) + factors


def _fetch(kept: dict[str, object], name: str) -> torch.Tensor | None:
    value = kept.pop(name, None)
    return value.take() if isinstance(value, Parcel) else value


def _sum(grads: list[list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """The portions' gradients of each factor, added."""
    return [None if of_one[0] is None else sum(of_one[1:], of_one[0]) for of_one in zip(*grads)]


def _backward(
    step: "_Step", kept: dict[str, object], dy: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x [T, D] and of every factor, in order; empties `kept`."""
    x = _fetch(kept, "x")
    # what forward did not keep, up to gate|up; nobody needs the output of the down projection
    weight_qkv, qkv = None, _fetch(kept, "qkv")
    low_qkv, was_kept = kept.pop("low_qkv", None), qkv is not None
    if not was_kept:
        weight_qkv = step.weight("qkv")
        room = step.enter(step.norm_before_attention, x, weight_qkv)[0]
        qkv = weight_qkv.forward(room)
        low_qkv = weight_qkv.low(room)
        del room
    spare = qkv.shape[1] - sum(step.layer.self_attn.sizes)
    rotated = step.rotate(qkv, spare, already=was_kept)
    how = step.attend(rotated)
    a, extra = _fetch(kept, "attention"), kept.pop("attention_extra", None)
    if a is None:
        a, extra = attention_forward(rotated.q, rotated.k, rotated.v, how)
        a = a.reshape(len(x), -1)
    weight_o, x_mid, o, low_o = None, _fetch(kept, "x_mid"), _fetch(kept, "o"), kept.pop("low_o", None)
    if x_mid is None or (o is None and step.norm_after_attention is not None):
        weight_o = step.weight("o")
        x_mid, low_o, o = step.leave(a, x, weight_o, step.norm_after_attention)
    weights = step.weight("gate_up"), step.weight("down")
    # the gradient of x_mid is that of o's output unless something lies between: then it is written where it is needed
    shared = step.norm_after_attention is None and step.layer.residual_scale == 1.0
    room = dx_mid = None
    factors_mlp = []
    for rows, mlp in zip(portions(len(x)), kept.pop("mlp")):
        dn, rstd, factors = _mlp_backward(step, mlp, x_mid[rows], dy[rows], weights)
        factors_mlp.append(factors)
        if dx_mid is None:  # not before the widest buffers are free
            weight_o = weight_o or step.weight("o")
            room = weight_o.output_room(len(x)) if shared else torch.empty_like(x_mid)
            dx_mid = room[:, : x_mid.shape[1]]
        step.enter_backward(dn, x_mid[rows], rstd, dy[rows], step.norm_before_mlp, dx_mid[rows])
        del dn
    del weights, x_mid
    dout = room if shared else step.add_backward(dx_mid, o, step.norm_after_attention, weight_o)
    del room
    u = weight_o.backward_low(dout)
    da = weight_o.backward_input(dout)
    factors_o = step.factors("o", dout, u, a, low_o)
    del dout, weight_o, o
    shape = rotated.q.shape
    grads = attention_backward(da.view(shape), rotated.q, rotated.k, rotated.v, a.view(shape), extra, how)
    del da, a, extra
    step.rotate_backward(grads, rotated, qkv)  # q|k|v becomes its gradient
    del grads, rotated
    if weight_qkv is None:
        weight_qkv = step.weight("qkv")
    u = weight_qkv.backward_low(qkv)
    room, rstd = step.enter(step.norm_before_attention, x, weight_qkv)
    n1 = room[:, : weight_qkv.in_features]
    factors_qkv = step.factors("qkv", qkv, u, n1, low_qkv)
    dx = None
    if needs_dx:
        dn = weight_qkv.backward_input(qkv)
        dx = step.enter_backward(dn, x, rstd, dx_mid, step.norm_before_attention)
    return dx, factors_qkv + factors_o + _sum(factors_mlp)


@dataclass
class _Rotated:
    """q, k, v as attention reads them, [B, S, heads, E], and what the norms of q and k need in backward."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    raw: tuple[torch.Tensor, ...] = ()
    rstd: tuple[torch.Tensor, ...] = ()


class _Step:
    """The layer's pieces on one batch; forward and recomputation call the same ones."""

    def __init__(
        self,
        layer: "DecoderLayer",
        groups: LayerGroups,
        batch: "Batch",
        keep: Keep,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layer, self.groups, self.batch, self.dtype, self.device = layer, groups, batch, dtype, device
        self.keep = keep
        self.norm_before_attention = layer.input_layernorm if layer.norms != "post" else None
        self.norm_after_attention = layer.post_attention_layernorm if layer.norms != "pre" else None
        self.norm_before_mlp = {
            "pre": layer.post_attention_layernorm,
            "sandwich": getattr(layer, "pre_feedforward_layernorm", None),
            "post": None,
        }[layer.norms]
        self.norm_after_mlp = layer.post_feedforward_layernorm if layer.norms != "pre" else None

    def put(self, kept: dict[str, object], name: str, tensor: torch.Tensor | None) -> None:
        """Leaves a result for backward where `Keep` wants it."""
        place = self.keep[name]
        if tensor is not None and place != "recompute":
            waits = place == "host" and tensor.is_cuda
            kept[name] = self.batch.host_memory.put(tensor, self) if waits else tensor

    def weight(self, name: str) -> GroupWeight:
        """A group's weights, dequantised, with their LoRA pairs."""
        projections = getattr(self.groups, name)
        keeps = self.keep["weights"] == "keep"
        if not (keeps or self.layer.fp8):
            return augmented_weight(projections, self.dtype, self.device)
        # what the weights were made of: a loaded, merged or moved weight is another one
        source = (self.dtype, *((p.weight.data_ptr(), p.weight._version) for p in projections))
        known = self.layer.dequantized.get(name)
        earlier = known[1] if known is not None and known[0] == source else None
        if self.layer.fp8:
            rounded = earlier or fp8.rounded_weights(projections)
            self.layer.dequantized[name] = (source, rounded)
            # of a copy that is not kept, only the scale stays
            return fp8.fp8_weight(
                projections, rounded if keeps else replace(rounded), self.dtype, self.device
            )
        group = augmented_weight(projections, self.dtype, self.device, earlier)
        self.layer.dequantized[name] = (source, group.buffer)
        return group

    def factors(
        self, name: str, dy: torch.Tensor, u: torch.Tensor | None, x: torch.Tensor, low: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Gradients of a group's LoRA factors; dy [T, N + P]."""
        projections = getattr(self.groups, name)
        return lora.backward_factors(dy[:, : sum(p.shape[0] for p in projections)], u, x, low, projections)

    def enter(
        self, norm: "RMSNorm | None", x: torch.Tensor, weight: GroupWeight
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A group's input [T, K + P] with norm(x), or x where no norm comes first, in front; and 1/rms of x [T]."""
        room = weight.input_room(len(x))
        place = room[:, : weight.in_features]
        if norm is None:
            place.copy_(x)
            return room, None
        return room, rms_norm_forward(x, norm.weight, norm.eps, norm.offset, out=place)[2]

    def enter_backward(
        self,
        dn: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor | None,
        dresidual: torch.Tensor,
        norm: "RMSNorm | None",
        room: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient of x [T, D], which the residual stream and a group's input share; over dn, or into `room`."""
        out = dn if room is None else room[:, : dn.shape[1]]
        if norm is None:
            return torch.add(dn, dresidual, out=out)
        return rms_norm_backward(dn, x, rstd, norm.weight, norm.offset, dresidual=dresidual, out=out)[0]

    def leave(
        self, x: torch.Tensor, residual: torch.Tensor, weight: GroupWeight, norm: "RMSNorm | None"
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """residual + scale * norm(x W) [T, D], S, and the product before the norm where one follows."""
        scale = self.layer.residual_scale
        if norm is None and scale == 1.0:
            return *weight.forward_onto(x, residual), None
        product, low = weight.forward_onto(x, None)
        h = product if norm is None else rms_norm_forward(product, norm.weight, norm.eps, norm.offset)[0]
        return residual + (h * scale if scale != 1.0 else h), low, None if norm is None else product

    def add_backward(
        self, dy: torch.Tensor, product: torch.Tensor | None, norm: "RMSNorm | None", weight: GroupWeight
    ) -> torch.Tensor:
        """Gradient of the product that `leave` made, in the first columns of [T, N + P]."""
        room = weight.output_room(len(dy))
        place = room[:, : weight.out_features]
        scale = self.layer.residual_scale
        if scale != 1.0:
            dy = dy * scale
        if norm is None:
            place.copy_(dy)
        else:
            _, _, rstd = rms_norm_forward(product, norm.weight, norm.eps, norm.offset)
            rms_norm_backward(dy, product, rstd, norm.weight, norm.offset, out=place)
        return room

    def gated(self, gate_up: torch.Tensor, weight: GroupWeight) -> torch.Tensor:
        """h [T, I] of gate|up [T, N + P]."""
        gate, up = gate_up[:, : weight.out_features].chunk(2, dim=1)
        return gated_mlp_forward(gate, up, self.layer.mlp.activation)

    def rotate(self, qkv: torch.Tensor, spare: int, already: bool = False) -> _Rotated:
        """q, k, v of q|k|v [T, N + P]; without norms of their own, q and k are rotated in place, once."""
        attn = self.layer.self_attn
        q, k, v = qkv[:, : qkv.shape[1] - spare].split(attn.sizes, dim=1)
        raw = rstd = ()
        if attn.qk_norm:
            raw = tuple(t.unflatten(1, (-1, attn.head_dim)) if attn.qk_norm == "head" else t for t in (q, k))
            norms = (attn.q_norm, attn.k_norm)
            normed = [rms_norm_forward(t, n.weight, n.eps, n.offset) for t, n in zip(raw, norms)]
            q, k = (y.reshape(len(qkv), -1) for y, _, _ in normed)
            rstd = tuple(r for _, _, r in normed)
        q, k, v = (t.unflatten(1, (-1, attn.head_dim)) for t in (q, k, v))
        if attn.rotates and (attn.qk_norm or not already):
            rope_forward(q, k, *self.batch.angles[attn.rope_kind], out=(q, k))
        shape = self.batch.visibility.batch, self.batch.visibility.length
        return _Rotated(*(t.unflatten(0, shape) for t in (q, k, v)), raw, rstd)

    def rotate_backward(self, grads: tuple[torch.Tensor, ...], rotated: _Rotated, qkv: torch.Tensor) -> None:
        """Writes the gradient of q|k|v over it, from the gradients of attention's q, k and v."""
        attn = self.layer.self_attn
        parts = qkv[:, : sum(attn.sizes)].split(attn.sizes, dim=1)
        parts[2].copy_(grads[2].reshape(parts[2].shape))
        dq, dk = (g.reshape(len(qkv), -1, attn.head_dim) for g in grads[:2])
        q, k = (part.unflatten(1, (-1, attn.head_dim)) for part in parts[:2])
        if attn.qk_norm:
            if attn.rotates:
                rope_forward(dq, dk, *self.batch.angles[attn.rope_kind], inverse=True, out=(dq, dk))
            both = zip((dq, dk), rotated.raw, rotated.rstd, (attn.q_norm, attn.k_norm))
            for d, x, rstd, norm in both:
                rms_norm_backward(d.reshape(x.shape), x, rstd, norm.weight, norm.offset, out=x)
        elif attn.rotates:
            rope_forward(dq, dk, *self.batch.angles[attn.rope_kind], inverse=True, out=(q, k))
        else:
            q.copy_(dq)
            k.copy_(dk)

    def attend(self, rotated: _Rotated) -> Attend:
        """The attention that this layer computes on this batch."""
        attn = self.layer.self_attn
        return decide(rotated.q, self.batch.visibility, attn.scale, attn.window, attn.softcap)
