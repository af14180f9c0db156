"""The names that a model's experts and their routers have in checkpoints, and which of these tensors are float32 there."""

from collections.abc import Iterable

import torch
from torch import nn

from oribi.models.experts import CORRECTION, Experts
from oribi.models.unwrap import bare_name
from oribi.tensors import TensorSource


def expert_modules(model: nn.Module) -> dict[str, Experts]:
    """The experts of each layer by the module's name, without what PEFT put around them."""
    return {bare_name(name): module for name, module in model.named_modules() if isinstance(module, Experts)}


class Renamed:
    """A source whose tensors have other names.

    Args:
        source: of tensors. parts: of some names, each with what stands there instead.
    """

    def __init__(self, source: TensorSource, parts: Iterable[tuple[str, str]]) -> None:
        self._source = source
        self._names = {name: name for name in source.shapes()}
        for before, after in parts:
            self._names = {name.replace(before, after): own for name, own in self._names.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return {name: shapes[other] for name, other in self._names.items()}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        return self._source.read(self._names[name], device, dtype)

    def close(self) -> None:
        self._source.close()


def apart(source: TensorSource, model: nn.Module) -> TensorSource:
    """A model's tensors under its checkpoints' names, with each matrix of its experts by itself, as quantised checkpoints hold them."""
    renamed = renamed_parts(model)
    return Renamed(source, renamed) if renamed else source


def in_model_names(source: TensorSource, model: nn.Module) -> TensorSource:
    """What `apart` gave, under the model's own names; the source itself where it has no others."""
    renamed = renamed_parts(model)
    if not any(part in name for _, part in renamed for name in source.shapes()):
        return source
    return Renamed(source, [(part, own) for own, part in renamed])


def matrix_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the stacks of a model's experts, each with the names of its matrices."""
    return {
        f"{prefix}.{stack}": [
            f"{prefix}.{matrix.name}" for matrix in experts.matrices() if matrix.stack == stack
        ]
        for prefix, experts in expert_modules(model).items()
        for stack in experts.stacks
    }


def names_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Tensors of routers, under the checkpoints' names, that a checkpoint in `dtype` holds in float32.

    They are the corrections, since a cast would choose other experts, and matrices whose values `dtype` does not hold.
    """
    found = set()
    for name, module in model.named_modules():
        for leaf in getattr(module, "stay_in_float32", ()):
            values = getattr(module, leaf)
            if leaf == CORRECTION or not torch.equal(values.to(dtype).to(values.dtype), values):
                found.add(f"{bare_name(name)}.{leaf}")
    return {stored_name(name, model) for name in found}


def stored_name(name: str, model: nn.Module) -> str:
    """What a model's checkpoints call one of its tensors that is no stack."""
    for own, stored in renamed_parts(model):
        name = name.replace(own, stored)
    return name


def renamed_parts(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Parts of the model's names, each with what the family's checkpoints have there."""
    return next((one.rules.renamed for one in expert_modules(model).values()), ())
