"""Linear layers that share an input, read through whatever LoRA wraps them, and computed together.

The decoder asks for the outputs of a group (q, k, v; gate, up). A plain linear layer or a plain LoRA layer is read here
and takes the fused path of `kernels.lora`; everything else (DoRA, several active adapters, 8-bit bases, hooks) runs its
own forward, so a result never depends on which path was taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family
from oribi.kernels.lora import Projection
from oribi.kernels.lora_linear import lora_linear
from oribi.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward


def project(modules: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of linear layers on one input.

    Args:
        modules: linear layers, LoRA layers around them, or anything with their call.
        x: [..., K].

    Returns:
        One [..., N_i] tensor a module, in x's dtype.
    """
    projections = [read(module) for module in modules]
    if any(projection is None for projection in projections) or any_module_hooked():
        return [module(x) for module in modules]
    return lora_linear(x, projections)


def read(module: nn.Module) -> Projection | None:
    """Weight, bias and the one active LoRA pair of a layer; None if only the layer's own forward is right."""
    base = getattr(module, "base_layer", None)
    if base is None:
        return _plain(module)
    projection = _plain(base)
    if projection is None or hooked(module):
        return None
    active = (
        [name for name in module.active_adapters if name in module.lora_A]
        if hasattr(module, "lora_A")
        else None
    )
    if active is None or module.merged:
        return None
    if module.disable_adapters or not active:
        return projection
    name = active[0]
    a, b = module.lora_A[name], module.lora_B[name]
    # variants are PEFT's word for DoRA, aLoRA and the like; they change the formula
    if len(active) > 1 or name in getattr(module, "lora_variant", {}) or b.bias is not None:
        return None
    dropout = module.lora_dropout[name]
    if hooked(a) or hooked(b) or hooked(dropout):
        return None
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Projection(
        projection.weight, projection.bias, a.weight, b.weight, float(module.scaling[name]), rate
    )


def _plain(module: nn.Module) -> Projection | None:
    if not isinstance(module, nn.Linear) or hooked(module) or type(module).__name__ == "Linear8bitLt":
        return None
    return Projection(module.weight, module.bias)


def hooked(module: nn.Module) -> bool:
    """Whether something beside the module's own forward wants to run when it is called."""
    # accelerate's offload replaces forward on the instance; hooks may read or change what passes
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ) or "forward" in vars(module)


def every_module(root: nn.Module) -> list[nn.Module]:
    """A module and all below it; several times as fast as `modules`, and one that is shared comes more than once."""
    found = [root]
    for module in found:  # which grows
        found += [child for child in module._modules.values() if child is not None]
    return found


def any_module_hooked() -> bool:
    """Whether hooks of PyTorch's for all modules want to see every call."""
    return torch.nn.modules.module._has_any_global_hook()


class NamedParts(nn.Module):
    """A module whose parts lie under the checkpoint's names for them.

    Args:
        family: says which name a role has.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def add_part(self, role: str, module: nn.Module) -> None:
        """Stores the part that has a role."""
        self.add_module(self.family.attribute(role), module)

    def part(self, role: str) -> nn.Module:
        """The part that has a role, as it is now: PEFT may have put a LoRA layer around it."""
        return getattr(self, self.family.attribute(role))


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; the weight's dtype is the model's, and offset is added to it.

    Args:
        size: D; None: it has no weight. eps, offset, centred: as `kernels.rms_norm` takes them.
    """

    def __init__(self, size: int | None, eps: float, offset: float = 0.0, centred: bool = False) -> None:
        super().__init__()
        self.weight = None if size is None else nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset, self.centred = eps, offset, centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset, self.centred)

    @classmethod
    def of(cls, config: PretrainedConfig, family: Family, role: str, size: int | None) -> "RMSNorm":
        """A family's norm.

        Args:
            role: as in `Family.names`. size: D, or None.
        """
        eps, offset = getattr(config, family.eps_of_norm(role)), family.offset_of_norm(role)
        return cls(size, eps, offset, family.centred_norms)

    def compute(self, x: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `rms_norm_forward`, with its other arguments in `how`."""
        return rms_norm_forward(x, self.weight, self.eps, self.offset, centred=self.centred, **how)

    def backward(self, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, **how: Any) -> torch.Tensor:
        """dx, as `rms_norm_backward`, with its other arguments in `how`."""
        return rms_norm_backward(dy, x, rstd, self.weight, self.offset, centred=self.centred, **how)[0]
