"""The trained tensors as a `TensorSource`: a loaded model under its checkpoint names, and what training changed.

Adapters, fully trained modules and new tokens are read from PEFT's wrappers and added in float32, as `save.change` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from oribi.errors import ExportError
from oribi.kernels.expert_linear import factors_by_expert
from oribi.kernels.packed_weight import dense_weight, is_packed
from oribi.models.expert_tensors import matrix_shape
from oribi.models.experts import Experts, StoredMatrix
from oribi.models.unwrap import base_model
from oribi.save.change import Change, LowRank
from oribi.tensors import TensorSource

Wrapper = BaseTunerLayer | AuxiliaryTrainingWrapper | TrainableTokensLayer


@dataclass(frozen=True)
class Slot:
    """One tensor of a loaded model: the module that holds it, and PEFT's wrappers around that module, outermost first.

    `matrix` is the part of it that a checkpoint holds by itself, where the tensor is a stack of experts.
    """

    module: nn.Module
    leaf: str
    wrappers: tuple[Wrapper, ...] = ()
    matrix: StoredMatrix | None = None

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


def stored_slots(model: nn.Module) -> dict[str, Slot]:
    """`slots_of` with each matrix of a stack of experts by itself, as the family's checkpoints hold them."""
    found = {}
    for name, slot in slots_of(model).items():
        if not isinstance(slot.module, Experts):
            found[name] = slot
            continue
        prefix = name.removesuffix(slot.leaf)
        for matrix in slot.module.matrices():
            if matrix.stack == slot.leaf:
                found[prefix + matrix.name] = replace(slot, matrix=matrix)
    return found


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
        self._slots = stored_slots(model)
        if getattr(model.config, "tie_word_embeddings", False):
            self._slots.pop("lm_head.weight", None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(slot) for name, slot in self._slots.items()}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        return _values(name, self._slots[name]).to(device=device, dtype=dtype)

    def close(self) -> None:
        pass


def plain_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's values where they lie; packed weights dequantised in float32.

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
    if is_packed(tensor):
        return dense_weight(tensor, torch.float32)
    if type(tensor).__name__ == "Int8Params":
        raise ExportError(
            f"{name} is quantised to 8 bit, which oribi does not read back. "
            "Load the model with load_in_4bit=True or load_in_16bit=True and attach the saved adapter"
        )
    return tensor.detach()


def _shape(slot: Slot) -> tuple[int, ...]:
    """The shape of what `_values` returns."""
    if slot.matrix is not None:
        return matrix_shape(slot.module, slot.matrix)
    state = getattr(slot.tensor, "quant_state", None)
    shape = tuple(slot.tensor.shape if state is None else state.shape)
    return shape[::-1] if _is_turned(slot) else shape


def _values(name: str, slot: Slot) -> torch.Tensor:
    """`plain_tensor` of a slot's tensor, or of the matrix of it that is meant."""
    if slot.matrix is None:
        values = plain_tensor(name, slot.tensor)
        return values.T if _is_turned(slot) else values
    packed = getattr(slot.tensor, "packed", None)
    if packed is not None and not getattr(slot.tensor, "is_sharded", False):
        return packed.matrix(slot.matrix.place, torch.float32)
    return plain_tensor(name, slot.tensor)[slot.matrix.expert, slot.matrix.rows]


def _is_turned(slot: Slot) -> bool:
    """Whether a packed weight is the transpose of what its checkpoint holds: transformers packs GPT-2's layers so."""
    packed = slot.leaf == "weight" and is_packed(slot.tensor)
    return packed and getattr(slot.module, "source_cls", None) is Conv1D


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first trained parameter that holds a nan or an infinity; None if all are finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            return name
    return None


def require_finite(model: nn.Module) -> None:
    """Stop before trained weights with nan or infinity are written.

    Raises:
        ExportError: a trained parameter is not finite.
    """
    bad = first_non_finite(model)
    if bad is not None:
        raise ExportError(
            f"{bad} holds values that are not finite, so nothing is written. Go on from the last checkpoint with a lower "
            "learning_rate"
        )


def changes_of(model: nn.Module) -> dict[str, Change]:
    """What training changed, under checkpoint names; a tensor that is absent is the base's own.

    Args:
        model: PEFT's model, or a plain model, of which nothing is adapted.

    Raises:
        ExportError: a kind of adapter that no single weight can express, adapters already merged into the base, or
            values that are not finite.
    """
    require_finite(model)
    adapted = hasattr(model, "peft_config")
    changes = {}
    for name, slot in stored_slots(model).items():
        change = Change()
        for wrapper in slot.wrappers:
            _read_wrapper(name, slot, wrapper, change)
        tensor = slot.tensor
        trained_in_place = tensor.requires_grad and change.replacement is None
        if adapted and trained_in_place:  # bias="all", or a parameter that the caller unfroze
            change.replacement = lambda name=name, slot=slot: _values(name, slot)
        if change:
            changes[name] = change
    return changes


def _read_wrapper(name: str, slot: Slot, wrapper: nn.Module, change: Change) -> None:
    if getattr(wrapper, "disable_adapters", False):
        return
    active = list(wrapper.active_adapters)
    if isinstance(wrapper, ModulesToSaveWrapper):
        kept = [adapter for adapter in active if adapter in wrapper.modules_to_save]
        if kept:
            inside = (
                wrapper.original_module.named_modules()
            )  # the wrapped module may be a part with layers of its own
            path = next((part for part, module in inside if module is slot.module), "")
            weight = getattr(wrapper.modules_to_save[kept[0]].get_submodule(path), slot.leaf)
            change.replacement = lambda: plain_tensor(name, weight)
        return
    if getattr(wrapper, "merged", False):
        raise ExportError(
            f"{name}: adapters are already merged into the base; call model.unmerge_adapter() first"
        )
    if isinstance(wrapper, TrainableTokensLayer):
        if slot.leaf == "weight":
            for adapter in (a for a in active if a in wrapper.trainable_tokens_delta):
                ids = torch.as_tensor(wrapper.token_indices[adapter], dtype=torch.int64)
                change.rows.append((ids, _host(wrapper.trainable_tokens_delta[adapter])))
    elif isinstance(wrapper, LoraLayer):
        for adapter in active:
            _read_lora(name, slot, wrapper, adapter, change)
    elif isinstance(wrapper, BaseTunerLayer):
        raise ExportError(
            f"{name}: oribi cannot merge an adapter of kind {type(wrapper).__name__}; it merges LoRA, rsLoRA, DoRA, "
            "modules_to_save and trainable_token_indices. Save the adapter alone with save_method='lora'"
        )


def _read_lora(name: str, slot: Slot, layer: LoraLayer, adapter: str, change: Change) -> None:
    variant = type(getattr(layer, "lora_variant", {}).get(adapter, None)).__name__
    plain = (
        "NoneType",
        "VeloraLinearVariant",
    )  # VeLoRA differs from LoRA in what it keeps for backward alone
    if variant not in (*plain, "DoraLinearVariant", "DoraEmbeddingVariant"):
        raise ExportError(
            f"{name}: PEFT's {variant} fits in no single weight that oribi can write; "
            "save the adapter alone with save_method='lora'"
        )
    if isinstance(layer, ParamWrapper):
        if adapter in layer.lora_A and slot.leaf == layer.parameter_name:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if slot.matrix is not None:
                alternating = slot.module.rules.alternating and slot.leaf == "gate_up_proj"
                of_each = factors_by_expert(a, b, layer.num_experts, alternating)
                a, b = (factor[slot.matrix.expert] for factor in of_each)
                b = b[slot.matrix.rows]
            elif slot.tensor.dim() > 2:
                a, b = factors_by_expert(a, b, layer.num_experts, alternating=False)
                if getattr(slot.module, "is_transposed", False):  # matrices [in, out], as PEFT asks, too
                    a, b = b.mT, a.mT
            change.updates.append(LowRank(_host(a), _host(b), layer.scaling[adapter]))
        return
    magnitude = None
    if variant not in plain:
        magnitude = _host(layer.lora_magnitude_vector[adapter].weight)
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if slot.leaf == "weight":
            turned = getattr(layer, "fan_in_fan_out", False) or _is_turned(slot)  # GPT-2 stores [K, N]
            a, b = _host(a.weight), _host(b.weight)
            a, b = (b.T, a.T) if turned else (a, b)
            change.updates.append(LowRank(a, b, layer.scaling[adapter], magnitude, columns=turned))
        elif slot.leaf == "bias" and b.bias is not None:
            change.offsets.append(_host(b.bias) * layer.scaling[adapter])
    elif adapter in layer.lora_embedding_A and slot.leaf == "weight":
        a, b = _host(layer.lora_embedding_A[adapter]), _host(layer.lora_embedding_B[adapter])
        change.updates.append(LowRank(b.T, a.T, layer.scaling[adapter], magnitude, columns=True))


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)


class MergedModel:
    """The trained tensors as a `TensorSource`, computed one at a time from a base and what training changed.

    Args:
        model: the trained model, PEFT's or plain.
        base: the weights under the adapter; None takes the loaded model's own, dequantised.

    Raises:
        ExportError: the base has other tensors than the model.
    """

    def __init__(self, model: nn.Module, base: TensorSource | None = None) -> None:
        self._loaded = LoadedModel(model)
        self.base = base if base is not None else self._loaded
        self.changes = changes_of(model)
        self._shapes = self._loaded.shapes()
        self._base_shapes = self.base.shapes()
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))
        slots = slots_of(model)
        self._embeddings = _tied_to("lm_head.weight", slots)
        if self.tied and self._embeddings and self._head_differs(slots):
            self.tied = False
            self._shapes["lm_head.weight"] = self._shapes[self._embeddings]
        replaced = {name for name, change in self.changes.items() if change.replacement is not None}
        missing = [
            name
            for name in self._shapes
            if self._source(name) not in self._base_shapes and name not in replaced
        ]
        if missing:
            raise ExportError(
                f"the base lacks {missing[0]} and {len(missing) - 1} more tensors of the trained model: "
                "it is another model"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """The trained tensor: the sum in float32, rounded once to `dtype`."""
        change = self.changes.get(name)
        if change is None:
            return self._resized(name, self.base.read(self._source(name), device, dtype))
        base = None
        if change.replacement is None:
            base = self._resized(name, self.base.read(self._source(name), device, torch.float32))
        return change.apply(base).to(device=device, dtype=dtype)

    def close(self) -> None:
        self.base.close()

    def _source(self, name: str) -> str:
        # a head that was tied starts from the embeddings, unless the base stores it
        return self._embeddings if name == "lm_head.weight" and name not in self._base_shapes else name

    def _head_differs(self, slots: dict[str, Slot]) -> bool:
        """Whether adapters changed a tied head and its embeddings in different ways."""
        head, embeddings = self.changes.get("lm_head.weight"), self.changes.get(self._embeddings)
        if head is None and embeddings is None:
            return False
        if head is None or embeddings is None:
            # with no wrapper around either, both are one parameter that was trained in place
            return bool(slots[self._embeddings].wrappers or slots["lm_head.weight"].wrappers)
        if head.updates or embeddings.updates or len(head.rows) != len(embeddings.rows):
            return True
        if any(not torch.equal(ours[1], theirs[1]) for ours, theirs in zip(head.rows, embeddings.rows)):
            return True
        if head.replacement is None or embeddings.replacement is None:
            return head.replacement is not embeddings.replacement
        return not torch.equal(head.replacement(), embeddings.replacement())

    def _resized(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The base's tensor at the trained model's size: new tokens' rows come from the loaded model."""
        shape = self._shapes[name]
        if tuple(base.shape) == shape:
            return base
        if base.dim() != len(shape) or tuple(base.shape[1:]) != shape[1:]:
            raise ExportError(
                f"{name} is {tuple(base.shape)} in the base and {shape} in the trained model: they are different models"
            )
        if len(base) > shape[0]:
            return base[: shape[0]]
        loaded = self._loaded.read(self._source(name), base.device, base.dtype)
        return torch.cat([base, loaded[len(base) :]])


def _tied_to(head: str, slots: dict[str, Slot]) -> str | None:
    """Name of the tensor that is the head's own parameter; None where the head has one for itself."""
    if head not in slots:
        return None
    return next(
        (name for name, slot in slots.items() if name != head and slot.tensor is slots[head].tensor), None
    )
