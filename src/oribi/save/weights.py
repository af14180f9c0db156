"""The tensors of a loaded model under their checkpoint names, whatever PEFT wrapped around them.

The model is read as any other source of tensors is (`tensors.TensorSource`), one at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from oribi.errors import ExportError
from oribi.kernels.nf4 import dequantize
from oribi.models.unwrap import base_model

Wrapper = BaseTunerLayer | AuxiliaryTrainingWrapper | TrainableTokensLayer


@dataclass(frozen=True)
class Slot:
    """One tensor of a loaded model: the module that holds it, and PEFT's wrappers around that module, outermost first."""

    module: nn.Module
    leaf: str
    wrappers: tuple[Wrapper, ...] = ()

    @property
    def tensor(self) -> torch.Tensor:
        return getattr(self.module, self.leaf)


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every tensor of a model under its checkpoint name, whatever PEFT wrapped around it.

    Args:
        model: a causal language model, or PEFT's model around one.
    """
    inner = base_model(model)
    return dict(_walk(inner, "", ()))


def _walk(module: nn.Module, prefix: str, wrappers: tuple[Wrapper, ...]) -> Iterator[tuple[str, Slot]]:
    if isinstance(module, TrainableTokensWrapper):
        yield from _walk(module.token_adapter, prefix, wrappers)
    elif isinstance(module, ModulesToSaveWrapper):
        yield from _walk(module.original_module, prefix, (*wrappers, module))
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ExportError(f"{prefix.rstrip('.')}: oribi cannot merge PEFT's {type(module).__name__}")
    elif isinstance(module, BaseTunerLayer):
        yield from _walk(module.base_layer, prefix, (*wrappers, module))
    else:
        stateless = module._non_persistent_buffers_set
        buffers = [name for name in module._buffers if name not in stateless]
        for leaf in [*module._parameters, *buffers]:
            if getattr(module, leaf) is not None:
                yield prefix + leaf, Slot(module, leaf, wrappers)
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.", wrappers)


class LoadedModel:
    """The loaded model's own tensors without adapters, as a `TensorSource`: what the adapter was trained on."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = slots_of(model)
        if getattr(model.config, "tie_word_embeddings", False):
            self._slots.pop("lm_head.weight", None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        states = {name: getattr(slot.tensor, "quant_state", None) for name, slot in self._slots.items()}
        return {
            name: tuple(slot.tensor.shape if states[name] is None else states[name].shape)
            for name, slot in self._slots.items()
        }

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        return plain_tensor(name, self._slots[name].tensor).to(device=device, dtype=dtype)

    def close(self) -> None:
        pass


def plain_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's values where they lie; NF4 weights dequantised in float32.

    Raises:
        ExportError: the weight is quantised in another way, sharded, or has no storage.
    """
    if type(tensor).__name__ == "DTensor" or getattr(tensor, "is_sharded", False):
        raise ExportError(
            f"{name} is sharded over several processes. Save the adapter (save_pretrained), and export it from one process "
            "that loads it without fsdp"
        )
    if tensor.device.type == "meta":
        raise ExportError(f"{name} has no values: the model is offloaded or was never loaded")
    if getattr(tensor, "quant_state", None) is not None:
        return dequantize([tensor], torch.float32)
    if type(tensor).__name__ == "Int8Params":
        raise ExportError(
            f"{name} is quantised to 8 bit, which oribi does not read back. "
            "Load the model with load_in_4bit=True or load_in_16bit=True and attach the saved adapter"
        )
    return tensor.detach()
