"""Sizes of a layer's experts, which the account of bytes and arithmetic multiplies by tokens.

E experts, of which a token takes k; a stack has weights [N, K] per expert and P columns beside them (`kernels/expert_linear.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from oribi.kernels.expert_linear import columns_beside
from oribi.models.expert_tensors import fits_stack
from oribi.models.experts import STACKS, Experts, ExpertsMLP
from oribi.models.experts_half import MOST_ROWS
from oribi.models.layers import DecoderLayer
from oribi.models.unwrap import bare_module


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of the experts of one layer.

    Args:
        count: E. used: k.
        stacks: name -> (N, K, P).
        width: bytes of a number.
        norms: results as wide as the layer's input that PyTorch's autograd keeps for norms of the experts' own.
    """

    count: int
    used: int
    stacks: Mapping[str, tuple[int, int, int]]
    width: int
    norms: int = 0

    def columns(self) -> dict[str, int]:
        """Numbers per token of what may be kept, by the names of `models.core.Result`."""
        n, _, p = self.stacks["gate_up_proj"]
        return {"experts_gate_up": self.used * (n + p)}

    def routing_bytes(self, tokens: int) -> int:
        """Bytes of what was chosen, which stay from forward to backward whatever is kept: four int64 a row, int32 bounds."""
        return 4 * 8 * self.used * tokens + 4 * self.count * -(-tokens // (MOST_ROWS // self.used))

    @property
    def buffers(self) -> int:
        """Bytes of both stacks' dequantised weights with their LoRA factors."""
        return self.count * self.width * sum((n + p) * (k + p) for n, k, p in self.stacks.values())

    @property
    def traffic(self) -> float:
        """Bytes that forward and backward move to dequantise both stacks: half a byte of codes read, a number written."""
        return 2 * (0.5 + self.width) * self.count * sum(n * k for n, k, _ in self.stacks.values())

    @property
    def router_flop(self) -> int:
        """Arithmetic of the logits of one token."""
        return 2 * self.count * self.stacks["gate_up_proj"][1]

    def flop(self, names: Sequence[str] = STACKS) -> int:
        """Arithmetic of stacks' forward for one token."""
        return self.used * sum(2 * (k * p + n * (k + p)) for n, k, p in map(self.stacks.get, names))

    def backward_bytes(self, tokens: int, makes_gate_up: bool) -> int:
        """Device bytes of the experts' backward beside what was kept and the gradient of the layer's output.

        Args:
            tokens: of the micro-batch. makes_gate_up: whether gate|up is computed again there.
        """
        (up, d, p_up), (_, i, p_down) = (self.stacks[name] for name in STACKS)
        rows = min(tokens * self.used, MOST_ROWS)
        # h and the gradients of h and of the output; then the rows' inputs and their gradients
        columns = max(2 * i + p_down + d + p_down, 2 * d + p_up) + makes_gate_up * (up + p_up)
        return rows * columns * self.width + self.buffers

    def autograd_columns(self) -> int:
        """Numbers per token that PyTorch's autograd keeps: the rows' inputs, gate|up, h and the output."""
        (up, d, p_up), (_, i, p_down) = (self.stacks[name] for name in STACKS)
        return self.norms * d + self.used * (d + p_up + up + i + p_down + d)


def experts_shape(core: object, ranks: Mapping[str, Sequence[int]], width: int) -> ExpertsShape | None:
    """The sizes of an `ExpertsMLP`, with or without weights; None of another core.

    Args:
        ranks: of each stack's pairs, as `LayerShape` has them. width: bytes of a number.
    """
    if not isinstance(core, ExpertsMLP):
        return None
    experts = experts_of(core)
    sizes = {name: getattr(experts, name).shape for name in STACKS}
    biases = experts.rules.biases
    stacks = {
        name: (n, k, columns_beside(sum(ranks.get(name, ())), biases)) for name, (_, n, k) in sizes.items()
    }
    # outputs of the experts and of the MLP beside them; the router's input after each of three steps
    norms = 2 * core.own_norms + 3 * (bare_module(core.part("router")).norm is not None)
    return ExpertsShape(len(experts.down_proj), core.used, stacks, width, norms)


def experts_of(core: ExpertsMLP) -> Experts:
    """The stacks inside whatever PEFT put around them."""
    return next(module for module in core.part("experts").modules() if isinstance(module, Experts))


def packable_parameters(model: nn.Module) -> dict[str, int]:
    """How many weights each parameter has that NF4 packs: of a model's linear layers and of its experts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = module.in_features * module.out_features
        elif isinstance(module, Experts):
            fitting = (stack for stack in STACKS if fits_stack(module, stack))
            found |= {f"{name}.{stack}": getattr(module, stack).numel() for stack in fitting}
    return found


def multiplied(model: nn.Module) -> Iterator[tuple[str, nn.Module, float, bool]]:
    """What tokens are multiplied with: linear layers, and experts of which each token takes a share.

    Yields:
        A module's name, the module, the weights in it that one token meets, and whether they are trained.
    """
    shares: dict[int, float] = {}  # of modules inside an `ExpertsMLP`
    for name, module in model.named_modules():
        # in some families no module of its layer
        core = next(iter(module.experts_mlp), None) if isinstance(module, DecoderLayer) else module
        if isinstance(core, ExpertsMLP):
            experts = experts_of(core)
            share = core.used / len(experts.down_proj)
            shares |= {
                id(inner): share
                for wrapper in core.part("experts").modules()
                if isinstance(wrapper, ParamWrapper) and wrapper.num_experts > 1
                for inner in (*wrapper.lora_A.values(), *wrapper.lora_B.values())
            }
            for stack in (getattr(experts, stack) for stack in STACKS):
                yield name, experts, share * stack.numel(), stack.requires_grad
        elif isinstance(module, nn.Linear):
            weights = module.in_features * module.out_features
            yield name, module, shares.get(id(module), 1.0) * weights, module.weight.requires_grad
