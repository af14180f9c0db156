"""Frozen weights as the merged GGUF file will have them: the sum of checkpoint and adapter quantised, less what the adapter adds.

The model then computes what the merged file computes, and gradients reach the LoRA pairs as if nothing were quantised
(straight through). Between two quantisations the pairs move on, and what they add since is added in full.

Source: straight-through estimator, Bengio et al. 2013 (arXiv:1308.3432).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from oribi.errors import ConfigError
from oribi.gguf.coded import CodedSource
from oribi.kernels.packed_weight import PackedWeight, ShiftedCodes
from oribi.models.packed_linear import PackedLinear
from oribi.models.unwrap import base_model, source_of
from oribi.save.base import open_base
from oribi.save.change import Change
from oribi.save.trained import LoadedModel, MergedModel, changes_of, slots_of

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Requantiser:
    """Quantises checkpoint and adapter together, as the export of the merged file does.

    Args:
        model: PEFT's, loaded with `train_for`, with plain LoRA pairs on layers whose codes are kept.

    Raises:
        ConfigError: the adapter has other parts.
        ExportError: the 16-bit checkpoint is not on this machine.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._base = model, open_base(model, "original")
        slots = slots_of(model)
        for name, change in changes_of(model).items():
            if change.plain_update is None or not isinstance(slots[name].module, PackedLinear):
                raise ConfigError(
                    f"{name}: training for one merged file takes plain LoRA on linear layers whose codes are kept; leave out what "
                    "else is trained, or save_method: gguf-adapter"
                )

    @torch.no_grad()
    def quantise(self, factors: Factors | None = None) -> Factors:
        """Gives every adapted layer the codes of the sum.

        Args:
            factors: a and b of each layer, on the CPU in float32; None: the adapter's as it is.

        Returns:
            The factors that were added.
        """
        merged = MergedModel(self.model, self._base)
        if factors is None:  # of a model in host memory they are its parameters, which training moves on
            found = {name: change.updates[0] for name, change in merged.changes.items()}
            factors = {name: (update.a.clone(), update.b.clone()) for name, update in found.items()}
        merged.changes = {name: _with(change, *factors[name]) for name, change in merged.changes.items()}
        method = source_of(self.model).identity.train_for
        coded = CodedSource(merged, base_model(self.model).config, LoadedModel(self.model).shapes(), method)
        slots = slots_of(self.model)
        for name, change in merged.changes.items():
            module, update = slots[name].module, change.updates[0]
            device = module.weight.device
            codes = ShiftedCodes(
                coded.read_blocks(name, device), update.a.to(device), update.b.to(device) * update.scale
            )
            module.weight = PackedWeight(codes, module.weight.dtype)
        return factors

    def weights(self) -> dict[str, PackedWeight]:
        """The adapted layers' frozen weights as they are, which `put` puts back."""
        slots = slots_of(self.model)
        return {name: slots[name].tensor for name in changes_of(self.model)}

    def put(self, weights: Mapping[str, PackedWeight]) -> None:
        """Puts weights back."""
        slots = slots_of(self.model)
        for name, weight in weights.items():
            slots[name].module.weight = weight


def _with(change: Change, a: torch.Tensor, b: torch.Tensor) -> Change:
    return Change(updates=[replace(change.updates[0], a=a, b=b)])
