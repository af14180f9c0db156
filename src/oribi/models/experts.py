"""A layer's experts in place of its MLP: the router, the stacks of weights, and the layer that autograd differentiates.

    l = n W_r^T      w, e = route(l)      y_t = sum over the k experts e of t: w_te (act(n_t G_e^T) (n_t U_e^T)) D_e^T

and biases in the families that have them; in some the router has a norm of its own. T tokens, D hidden size, E experts, I columns of an expert's gate and up. gate|up of all experts is one parameter [E, 2I, D], down
another [E, D, I], under the names that transformers has for them, so that PEFT's `target_parameters` reach them. Where they
are packed, the parameter has the shape, dtype and device of the weights, and codes and scales in place of them. Gate lies before up,
whatever a checkpoint's stacks have; only the rows of LoRA's B are the checkpoint's, since PEFT saves them as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.families import Family, activation_of
from oribi.families.expert_rules import ExpertRules
from oribi.kernels.dispatch import wide
from oribi.kernels.expert_linear import StackProjection, expert_linear
from oribi.kernels.expert_rows import combine
from oribi.kernels.gated_mlp import gated_mlp
from oribi.kernels.routing import RouterRule, choose, sort_by_expert, weigh, weigh_backward
from oribi.models.core import Result
from oribi.models.linear_layers import NamedParts, RMSNorm, hooked
from oribi.models.mlp import SharedMLP

if TYPE_CHECKING:
    from oribi.models.layers import Batch

STACKS = ("gate_up_proj", "down_proj")
CORRECTION = "e_score_correction_bias"
# a linear layer of one row, which stays in 16 bits and gets an adapter only by name
SHARED_GATE = "shared_expert_gate"


# of experts whose output a norm follows: that output
_BEFORE_NORM = (Result("experts", ("hidden",), made_by="experts_down", balanced="keep"),)


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of a stack, or one vector of biases, as a checkpoint that holds each by itself names it.

    Args:
        name: in the checkpoint, from the experts' module on: "3.up_proj.weight".
        stack: the stack's attribute. expert: which. rows: of the expert's [N, K] in the stack.
        place: among the stack's matrices.
        stored_rows: of the expert's [N, K] in a checkpoint's stack, and of LoRA's B.
    """

    name: str
    stack: str
    expert: int
    rows: slice
    place: int
    stored_rows: slice


class Router(nn.Module):
    """The matrix [E, D] that gives the logits, and its bias; never packed, and trained only with all other weights.

    Attributes:
        stay_in_float32: names of what is float32 whatever the model is: a cast would choose other experts.
    """

    def __init__(self, config: PretrainedConfig, family: Family) -> None:
        super().__init__()
        rules, count = family.experts, getattr(config, family.experts.count)
        self.rule = RouterRule(
            rules.router,
            getattr(config, rules.used),
            rules.normalises(config),
            rules.added,
            getattr(config, rules.least) if rules.least else 0.0,
            float(getattr(config, rules.scale)) if rules.scale else 1.0,
            *((config.n_group, config.topk_group) if rules.groups else ()),
        )
        holder = self if rules.router_part is None else nn.Module()
        holder.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        if rules.router_part is not None:
            self.add_module(rules.router_part, holder)
        self._part = rules.router_part
        self.bias = nn.Parameter(torch.empty(count)) if rules.biases else None
        self.stay_in_float32 = ("weight",) if rules.in_float32 else ()
        if rules.correction == "router":
            self.register_buffer(CORRECTION, torch.zeros(count))
            self.stay_in_float32 += (CORRECTION,)
        elif rules.correction is not None:
            self.add_module(rules.correction, Correction(count))
        self.norm = None
        if rules.router_norm:
            self.norm = RMSNorm.of(config, family, "router_norm", None)
            self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(count)) if rules.expert_scale else None

    @property
    def matrix(self) -> nn.Parameter:
        """[E, D]."""
        return self.weight if self._part is None else self._modules[self._part].weight

    @property
    def correction(self) -> torch.Tensor | None:
        """[E] float32, added to the scores by which experts are chosen."""
        own = self._buffers.get(CORRECTION)
        return next(
            (part.e_score_correction_bias[0] for part in self.children() if isinstance(part, Correction)), own
        )

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, E] of x [T, D]: of what the experts read, or of the residual stream where the router has a norm.

        Args:
            weight: the router's own, with what an adapter adds.
        """
        if self.norm is not None:
            # rounded after each factor, as in transformers: near ties are decided alike
            x = self.norm(x) * self.scale.to(x.dtype) * x.shape[-1] ** -0.5
        if not self.stay_in_float32:
            return F.linear(x, weight, self.bias)
        return F.linear(wide(x), weight.to(wide(x).dtype), self.bias)

    def logits_backward(
        self, dlogits: torch.Tensor, x: torch.Tensor, dresidual: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Adds to the gradient of x [T, D], of a router with a norm, what comes through the logits.

        Args:
            dlogits: [T, E]. x: what `logits` read. dresidual: the gradient of x otherwise. out: where the sum goes.
        """
        dn = dlogits.to(x.dtype) @ self.matrix.to(x.dtype)
        dn = dn * self.scale.to(x.dtype) * x.shape[-1] ** -0.5
        self.norm.backward(dn, x, self.norm.compute(x)[2], dresidual=dresidual, out=out)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The experts [T, k] int64 of each token."""
        return choose(logits.detach(), self.rule, self.correction)

    def weigh(self, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The weights [T, k] of the chosen experts."""
        return weigh(logits, experts, self.rule, self.per_expert_scale)

    def weigh_backward(
        self, dweights: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """Gradient [T, E] of the logits, float32, from that of the weights [T, k]."""
        return weigh_backward(dweights, logits, experts, self.rule, self.per_expert_scale)


class Correction(nn.Module):
    """A router's correction [1, E], where checkpoints have it in a part of the router's."""

    stay_in_float32 = (CORRECTION,)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer(CORRECTION, torch.zeros(1, count))


class Experts(nn.Module):
    """The stacks of a layer, dense or, once they are loaded so, packed (`PackedWeight`).

    Attributes:
        in_stacks: whether the checkpoint has them so, and a merge will.
    """

    is_transposed = False  # PEFT asks: a stack is [experts, out, in]

    def __init__(self, count: int, hidden_size: int, size: int, rules: ExpertRules) -> None:
        super().__init__()
        self.rules, self.in_stacks = rules, rules.stored != "each"
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, size))
        if rules.biases:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * size))
            self.down_proj_bias = nn.Parameter(torch.empty(count, hidden_size))

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of all stacks, those of the biases after those of the weights."""
        return (*STACKS, *(f"{name}_bias" for name in STACKS if f"{name}_bias" in self._parameters))

    def matrices(self) -> Iterator[StoredMatrix]:
        """Every matrix, expert by expert, and every vector of biases."""
        size, hidden = self.down_proj.shape[2], self.down_proj.shape[1]
        leaves = {"weight": "", "bias": "_bias"} if self.rules.biases else {"weight": ""}
        for expert in range(len(self.down_proj)):
            for leaf, suffix in leaves.items():
                for part, name in enumerate(("gate_proj", "up_proj")):
                    rows = slice(part * size, (part + 1) * size)
                    stored = slice(part, 2 * size, 2) if self.rules.alternating else rows
                    place = 2 * expert + part
                    yield StoredMatrix(
                        f"{expert}.{name}.{leaf}", f"gate_up_proj{suffix}", expert, rows, place, stored
                    )
                whole = slice(0, hidden)
                yield StoredMatrix(
                    f"{expert}.down_proj.{leaf}", f"down_proj{suffix}", expert, whole, expert, whole
                )


def read_experts(module: nn.Module) -> dict[str, StackProjection] | None:
    """The stacks of an `Experts`, read through what PEFT wraps around it; None if only its own forward would be right.

    Args:
        module: the experts, or PEFT's `ParamWrapper` around them, one for each adapted stack.
    """
    pairs = {}
    while isinstance(module, ParamWrapper):
        if hooked(module):
            return None
        active = [name for name in module.active_adapters if name in module.lora_A]
        if active and not (module.disable_adapters or module.merged):
            if len(active) > 1 or module.fan_in_fan_out:
                return None
            a, b = module.lora_A[active[0]], module.lora_B[active[0]]
            if hooked(a) or hooked(b):
                return None
            pairs[module.parameter_name] = a.weight, b.weight, float(module.scaling[active[0]])
        module = module.base_layer
    if isinstance(module, BaseTunerLayer) or hooked(module):
        return None
    return {
        name: StackProjection(
            getattr(module, name),
            *pairs.get(name, ()),
            bias=getattr(module, f"{name}_bias", None),
            alternating=module.rules.alternating and name == "gate_up_proj",
        )
        for name in STACKS
    }


def read_router(module: nn.Module) -> tuple[Router, torch.Tensor] | None:
    """A router and its matrix [E, D], with the pair that PEFT may have put on it; None if only its own forward would be right."""
    changes = []
    while isinstance(module, ParamWrapper):
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not (module.disable_adapters or module.merged):
            changes += [
                (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
                for name in active
            ]
        module = module.base_layer
    if not isinstance(module, Router):
        return None
    weight = module.matrix
    for a, b, scale in changes:
        weight = weight + ((b @ a) * scale).to(weight.dtype)
    return module, weight


class ExpertsMLP(NamedParts):
    """The router and the experts of a layer, and the MLP beside them that every token takes.

        y = experts(n) + m(n)      or, with norms of their own,      y = norm(experts(norm(x))) + norm(m(norm(x)))

    Args:
        config, family, index: of the layer.
        layer: owns the parts where checkpoints have them in the layer itself; this is then no module of it.
    """

    # of `models.experts_half.ExpertsHalf`
    output_result, row_wise = None, True
    results = (Result("gate_up", ("experts_gate_up",), made_by="experts"),)

    def __init__(
        self, config: PretrainedConfig, family: Family, index: int, layer: NamedParts | None = None
    ) -> None:
        super().__init__(family)
        rules = family.experts
        self._layer = () if layer is None else (layer,)  # no second name for the parts
        self.add_part("router", Router(config, family))
        experts = Experts(
            getattr(config, rules.count), config.hidden_size, getattr(config, rules.size), rules
        )
        self.add_part("experts", experts)
        self.activation = activation_of(config)
        self.used, self.own_norms = getattr(config, rules.used), rules.own_norms
        if self.own_norms:
            self.results = (*self.results, *_BEFORE_NORM)
        if rules.shared_size(config):
            size = rules.shared_size(config)
            gate = self._shared_gate if rules.shared_gate else None
            self.add_part("shared_experts", SharedMLP(config, family, index, size, gate))
            self.results = (*self.results, *self.shared.results)
        if rules.shared_gate:
            self.add_part(SHARED_GATE, nn.Linear(config.hidden_size, 1, bias=False))

    @property
    def _owner(self) -> nn.Module:
        """The module whose attributes the parts are."""
        return self._layer[0] if self._layer else self

    def add_part(self, role: str, module: nn.Module) -> None:
        """Stores the part that has a role."""
        self._owner.add_module(self.family.attribute(role), module)

    def part(self, role: str) -> nn.Module:
        """The part that has a role, as it is now."""
        return getattr(self._owner, self.family.attribute(role))

    def norm(self, role: str) -> RMSNorm | None:
        """A norm of the experts' own, or of the MLP's beside them; None where they have none."""
        return self.part(role) if self.own_norms else None

    def _shared_gate(self) -> nn.Module:
        """The gate of the MLP beside the experts."""
        return self._owner._modules[SHARED_GATE]

    @property
    def shared(self) -> SharedMLP | None:
        """The MLP beside the experts."""
        return self._owner._modules.get(self.family.attribute("shared_experts"))

    def groups(self) -> dict[str, list[nn.Module]]:
        """Those of the MLP beside the experts: an adapter of the experts lies on parameters."""
        return {} if self.shared is None else self.shared.groups()

    def stacks(self) -> dict[str, StackProjection] | None:
        """The stacks with the one active adapter; None if they cannot be read."""
        return read_experts(self.part("experts"))

    def forward(self, x: torch.Tensor, batch: "Batch | None" = None) -> torch.Tensor:
        stacks, read = self.stacks(), read_router(self.part("router"))
        if stacks is None or read is None:
            raise ModelError(
                "the experts have several active adapters, hooks, or an adapter of another kind than LoRA on parameters: activate "
                "one adapter (set_adapter), and name the experts in target_parameters"
            )
        router, router_weight = read
        flat = x.reshape(-1, x.shape[-1])
        reads = flat if not self.own_norms else self.norm("experts_input_norm")(flat)
        logits = router.logits(reads if router.norm is None else flat, router_weight)
        experts = router.choose(logits)
        weights = router.weigh(logits, experts)
        routing = sort_by_expert(experts, len(router_weight))
        ids = routing.of_rows(experts)
        rows = expert_linear(reads[routing.tokens], stacks["gate_up_proj"], ids, routing.offs)
        gate, up = rows.chunk(2, dim=1)
        rows = expert_linear(gated_mlp(gate, up, self.activation), stacks["down_proj"], ids, routing.offs)
        y = combine(rows, routing, weights).view(x.shape)
        if self.own_norms:
            shared = self.norm("shared_output_norm")(self.shared(self.norm("mlp_input_norm")(x)))
            return self.norm("experts_output_norm")(y) + shared
        return y if self.shared is None else y + self.shared(x)
