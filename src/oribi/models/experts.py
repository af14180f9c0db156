"""A layer's experts in place of its MLP: the router, the stacks of weights, and the layer that autograd differentiates.

    l = n W_r^T      w, e = route(l)      y_t = sum over the k experts e of t: w_te (act(n_t G_e^T) (n_t U_e^T)) D_e^T

and biases in the families that have them. T tokens, D hidden size, E experts, I columns of an expert's gate and up. gate|up of all experts is one parameter [E, 2I, D], down
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
from oribi.kernels.routing import RouterRule, choose, sort_by_expert, weigh
from oribi.models.core import Result
from oribi.models.linear_layers import NamedParts, hooked
from oribi.models.mlp import SharedMLP

if TYPE_CHECKING:
    from oribi.models.layers import Batch

STACKS = ("gate_up_proj", "down_proj")
CORRECTION = "e_score_correction_bias"
# a linear layer of one row, which stays in 16 bits and gets an adapter only by name
SHARED_GATE = "shared_expert_gate"


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
            config.num_experts_per_tok,
            rules.normalises(config),
            rules.added,
            getattr(config, rules.least) if rules.least else 0.0,
            float(getattr(config, rules.scale)) if rules.scale else 1.0,
            *((config.n_group, config.topk_group) if rules.groups else ()),
        )
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(count)) if rules.biases else None
        self.stay_in_float32 = ("weight",) if rules.in_float32 else ()
        if rules.correction == "router":
            self.register_buffer(CORRECTION, torch.zeros(count))
            self.stay_in_float32 += (CORRECTION,)
        elif rules.correction is not None:
            self.add_module(rules.correction, Correction(count))

    @property
    def correction(self) -> torch.Tensor | None:
        """[E] float32, added to the scores by which experts are chosen."""
        own = self._buffers.get(CORRECTION)
        return next((part.e_score_correction_bias[0] for part in self.children()), own)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, E] of x [T, D]; `weight` is the router's own, with what an adapter adds."""
        if not self.stay_in_float32:
            return F.linear(x, weight, self.bias)
        return F.linear(wide(x), weight.to(wide(x).dtype), self.bias)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The experts [T, k] int64 of each token."""
        return choose(logits.detach(), self.rule, self.correction)

    def weigh(self, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The weights [T, k] of the chosen experts."""
        return weigh(logits, experts, self.rule)


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
    weight = module.weight
    for a, b, scale in changes:
        weight = weight + ((b @ a) * scale).to(weight.dtype)
    return module, weight


class ExpertsMLP(NamedParts):
    """The router and the experts of a layer, and the MLP beside them that every token takes."""

    # of `models.experts_half.ExpertsHalf`
    output_result, row_wise = None, True
    results = (Result("gate_up", ("experts_gate_up",), made_by="experts"),)

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__(family)
        rules = family.experts
        self.add_part("router", Router(config, family))
        experts = Experts(
            getattr(config, rules.count), config.hidden_size, getattr(config, rules.size), rules
        )
        self.add_part("experts", experts)
        self.activation = activation_of(config)
        self.used = config.num_experts_per_tok
        if rules.shared_size(config):
            size = rules.shared_size(config)
            gate = self._shared_gate if rules.shared_gate else None
            self.add_part("shared_experts", SharedMLP(config, family, index, size, gate))
            self.results = (*self.results, *self.shared.results)
        if rules.shared_gate:
            self.add_part(SHARED_GATE, nn.Linear(config.hidden_size, 1, bias=False))

    def _shared_gate(self) -> nn.Module:
        """The gate of the MLP beside the experts."""
        return self._modules[SHARED_GATE]

    @property
    def shared(self) -> SharedMLP | None:
        """The MLP beside the experts."""
        return self._modules.get(self.family.attribute("shared_experts"))

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
        logits = router.logits(flat, router_weight)
        experts = router.choose(logits)
        weights = router.weigh(logits, experts)
        routing = sort_by_expert(experts, len(router.weight))
        ids = routing.of_rows(experts)
        rows = expert_linear(flat[routing.tokens], stacks["gate_up_proj"], ids, routing.offs)
        gate, up = rows.chunk(2, dim=1)
        rows = expert_linear(gated_mlp(gate, up, self.activation), stacks["down_proj"], ids, routing.offs)
        y = combine(rows, routing, weights).view(x.shape)
        return y if self.shared is None else y + self.shared(x)
