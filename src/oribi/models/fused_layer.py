"""One decoder layer differentiated by hand: a mixer half and an MLP half, one after the other on the residual stream.

    x_mid = x + mixer(norm(x))      y = x_mid + mlp(norm(x_mid))      (or x_mid + mlp(norm(x)), in parallel)

T tokens (rows flattened), D hidden size. `models/half.py` says how a half runs and what it keeps; this file drives the
halves. Each group of weights is dequantised once in forward and once in backward, where recomputation and the gradient
share it. Nobody needs y, which is never computed again.

The LoRA pairs are the only parameters trained here; a layer with anything else to train takes PyTorch's autograd. With
`layer.fp8`, products of the frozen weights are those of `kernels/fp8.py`, and the gradients are of the layer so
computed. Evaluation, generation and exports never come here: they are exact.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from oribi.errors import ModelError
from oribi.models.core import Keep, Result
from oribi.models.experts import ExpertsMLP
from oribi.models.experts_half import experts_half
from oribi.models.half import Factors, Half, Kept, LayerPass
from oribi.models.linear_layers import RMSNorm, any_module_hooked, hooked
from oribi.models.mixers.attention import Attention
from oribi.models.mlp import MLP
from oribi.models.trained_rows import taken

if TYPE_CHECKING:
    from oribi.models.layers import Batch, DecoderLayer

# the layer's input, which is never computed again
LAYER_INPUT = Result("x", ("hidden",), balanced="keep", memory="host")
POLICY_NAMES = ("speed", "balanced", "memory")


def policy(name: str, results: Sequence[Result]) -> Keep:
    """What a layer with these results keeps under a policy: "speed" (everything), "balanced", "memory" or "nothing"."""
    if name == "speed":
        return Keep()
    if name == "nothing":
        return Keep({r.name: "recompute" for r in (LAYER_INPUT, *results)})
    return Keep({r.name: getattr(r, name) for r in (LAYER_INPUT, *results) if r.follows is None})


# of a layer of attention and a gated MLP; `memory.plan` makes finer ones from the memory that is free
POLICIES = {name: policy(name, Attention.results + MLP.results) for name in POLICY_NAMES}


def fusible_halves(layer: "DecoderLayer") -> list[Half] | None:
    """The layer's halves if it can be differentiated by hand now, else None."""
    parts = layer.parts()
    # neither module is called by itself here
    if any_module_hooked() or any(hooked(module) for module, _, _ in parts):
        return None
    if any(isinstance(module, RMSNorm) and hooked(module) for module in layer.modules()):
        return None
    if any(parameter.requires_grad for parameter in _beside_linear_layers(layer)):
        return None
    halves = [
        (experts_half if isinstance(module, ExpertsMLP) else Half)(module, pre, post, layer.residual_scale)
        for module, pre, post in parts
    ]
    if None in halves:
        return None
    projections = [p for half in halves for group in half.groups.values() for p in group]
    return halves if all(p is not None and p.fusible for p in projections) else None


def _beside_linear_layers(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that no linear layer holds, which the pass has no gradients for: those of norms, say."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        if not isinstance(child, (nn.Linear, BaseTunerLayer)):
            yield from _beside_linear_layers(child)


def fused_layer(
    layer: "DecoderLayer", halves: list[Half], x: torch.Tensor, batch: "Batch", keep: Keep
) -> torch.Tensor:
    """The layer's output [B, S, D] for x [B, S, D], or [1, n, D] of the batch's trained rows alone, with gradients for x and
    every LoRA factor."""
    halves[0].rows = batch.trained_rows
    factors = [factor for half in halves for factor in half.factors()]
    reads = [half.reads for half in halves if half.reads]
    gives = next((half.gives for half in halves if half.gives), None)
    beside = [tensor for name in reads for tensor in batch.shared[name]]
    own = batch.part(reads) if reads or gives else batch
    layer_pass = LayerPass(layer, own, keep, x.dtype, x.device)
    y, *given = _FusedLayer.apply(x, halves, layer_pass, gives, *beside, *factors)
    if gives:
        batch.shared[gives] = tuple(given)
    return y


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, halves, layer_pass, gives, *beside):
        y = x.reshape(-1, x.shape[-1])
        kept = Kept(layer_pass)
        with torch.autocast(x.device.type, enabled=False):
            kept.put("x", y)
            if layer_pass.layer.parallel:
                mixer, mlp = halves
                y = mlp.forward(taken(y, mixer.rows), layer_pass, residual=mixer.forward(y, layer_pass))
            else:
                for half in halves:
                    y = half.forward(y, layer_pass)
            if layer_pass.layer.scalar is not None:
                y = y * layer_pass.layer.scalar
        ctx.halves, ctx.layer_pass, ctx.kept, ctx.shape = halves, layer_pass, kept, x.shape
        ctx.gives = gives
        shape = x.shape if layer_pass.batch.trained_rows is None else (1, *y.shape)
        return y.view(shape), *(layer_pass.batch.shared.pop(gives) if gives else ())

    @staticmethod
    def backward(ctx, dy, *given):
        halves, ctx.halves = ctx.halves, None
        if halves is None:
            raise ModelError(
                "backward was called twice on one forward; oribi's layers free what they kept, call forward again"
            )
        if ctx.layer_pass.batch.host_memory is not None:
            ctx.layer_pass.batch.host_memory.begin_backward()
        batch, reads = ctx.layer_pass.batch, [half.reads for half in halves if half.reads]
        needs_dx, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        dy = dy.reshape(-1, dy.shape[-1])
        if ctx.gives:
            batch.gradients[ctx.gives] = given
        with torch.autocast(dy.device.type, enabled=False):
            layer = ctx.layer_pass.layer
            differentiate = _parallel_backward if layer.parallel else _backward_one_by_one
            scaled = dy if layer.scalar is None else dy * layer.scalar
            dy, factors = differentiate(halves, ctx.kept.take("x"), scaled, needs_dx)
        beside = [grad for name in reads for grad in batch.gradients.pop(name)]
        found = [grad if want else None for grad, want in zip([*beside, *factors], wanted)]
        return (None if dy is None else dy.view(ctx.shape), None, None, None, *found)


def _backward_one_by_one(
    halves: list[Half], x: torch.Tensor, dy: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor | None, Factors]:
    """Gradients of x [T, D] and of all factors, where each half reads what the one before made."""
    inputs = [x]
    for half in halves[:-1]:
        inputs.append(half.restore(inputs[-1]))
    factors: Factors = []
    for index in reversed(range(len(halves))):
        first = index == 0
        place = None if first else halves[index - 1].place_for_dy
        dy, found = halves[index].backward(inputs.pop(), dy, place, needs_dx or not first)
        factors = found + factors
    return dy, factors


def _parallel_backward(
    halves: list[Half], x: torch.Tensor, dy: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor | None, Factors]:
    """The same, where both read x and their outputs are added to it."""
    mixer, mlp = halves
    dx, factors = mlp.backward(taken(x, mixer.rows), dy, torch.empty_like, needs_dx)
    dx, found = mixer.backward(x, dy, None, needs_dx, dx)
    return dx, found + factors
