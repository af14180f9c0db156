"""Frozen linear layers whose weights are the codes of a GGUF file, that they came from or that will be served."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from oribi.gguf.coded import CodedSource, PlannedFile
from oribi.gguf.source import GGUFSource
from oribi.kernels.ggml_blocks import BlockCodes
from oribi.kernels.lora import Projection
from oribi.kernels.lora_linear import lora_linear
from oribi.kernels.packed_weight import Codes, PackedWeight, ShiftedCodes, dense_weight
from oribi.models.checkpoint_tensors import expected_shapes
from oribi.models.quantization import Quantization


class PackedLinear(nn.Linear):
    """y = x W^T + b, where W is dequantised whenever it is read.

    The decoder reads weight and bias as of any linear layer; PEFT's layers call `forward`.

    Args:
        codes: of W [N, K], on the meta device until a checkpoint is read.
        dtype: of the values. bias: whether there is one.
    """

    def __init__(self, codes: Codes, dtype: torch.dtype, bias: bool) -> None:
        rows, columns = codes.shape
        super().__init__(columns, rows, bias=bias, device="meta", dtype=dtype)
        self.weight = PackedWeight(codes, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, [Projection(self.weight, self.bias)])[0]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Gives the values: the parameter itself has no storage, and whoever saves the model writes 16-bit weights."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = dense_weight(self.weight, self.weight.dtype)


def is_requantised(model: nn.Module) -> bool:
    """Whether a model's frozen weights are those of its merged GGUF file (`save.requantised`)."""
    return any(isinstance(getattr(p, "packed", None), ShiftedCodes) for p in model.parameters())


def planned_types(model: nn.Module, method: str) -> PlannedFile:
    """The types that a GGUF file gives to a model's tensors.

    Args:
        model: on the meta device. method: one of `KEPT_CODES`.

    Raises:
        ConfigError, ExportError: as `PlannedFile`.
    """
    return PlannedFile(model.config, expected_shapes(model), method)


def codes_of_layers(
    model: nn.Module, source: GGUFSource | PlannedFile, quantization: Quantization
) -> Iterator[tuple[str, nn.Linear, BlockCodes | None]]:
    """Linear layers that are covered, and the codes without values that each has in a GGUF file; None where they are not kept.

    Args:
        model: on the meta device. source: the file, or a checkpoint as one. quantization: which layers are covered.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and quantization.covers(name):
            kind = source.block_type(f"{name}.weight")
            shape = layer.out_features, layer.in_features
            yield name, layer, None if kind is None else BlockCodes.empty(shape, kind)


def keep_blocks(
    model: nn.Module, source: GGUFSource | CodedSource, quantization: Quantization, dtype: torch.dtype
) -> list[str]:
    """Puts a layer without values where a GGUF file's blocks will lie, on the meta device.

    Args:
        model: on the meta device. source: the file, or a checkpoint as one.
        quantization: which layers are covered. dtype: that they compute in.

    Returns:
        Notes for the user, on what is kept and what is not.
    """
    kept, dense = Counter(), []
    for name, layer, codes in codes_of_layers(model, source, quantization):
        if codes is None:
            dense.append(name)
            continue
        kept[codes.kind] += 1
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(codes, dtype, layer.bias is not None))
    of_kinds = ", ".join(f"{kind} {count}" for kind, count in kept.most_common())
    whose = "have the codes of a" if quantization.train_for else "keep the codes of the"
    method = f"{quantization.train_for} " if quantization.train_for else ""
    notes = [f"{kept.total()} linear layers {whose} {method}GGUF file ({of_kinds})"] * bool(kept)
    if dense:
        notes.append(
            f"{len(dense)} linear layers, {dense[0]} the first, are read as {str(dtype).removeprefix('torch.')}: the file has them "
            "unquantised, or in a type or an order whose codes are not kept"
        )
    types = source.other_stack_types() if isinstance(source, GGUFSource) else []  # other sources have none
    if types:
        notes.append(
            f"the file's experts ({', '.join(types)}) are quantised again, to NF4, which changes them by about 9 % of their size, so that "
            "the file with the adapter beside it is not quite what is trained: merge it. load_in_4bit=False keeps their values"
        )
    return notes
