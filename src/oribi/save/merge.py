"""The merged checkpoint: adapters added to their base in float32, rounded once, written tensor by tensor."""

import copy
from pathlib import Path

import torch
from torch import nn

from oribi.errors import ConfigError, ExportError
from oribi.families import family_of
from oribi.models.unwrap import base_model
from oribi.save.nf4_checkpoint import nf4_config, pack, packed_bytes, packed_names
from oribi.save.shards import TensorPlan, shard_bytes, write_shards, write_unplanned
from oribi.save.trained import MergedModel
from oribi.tensors import TensorSource, all_finite

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU = torch.device("cpu")


def merged_dtype(model: nn.Module, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype of a merged checkpoint: as asked, else the model's, and bfloat16 for a float32 model.

    Raises:
        ConfigError: it is none of bfloat16, float16, float32.
    """
    if asked is None:
        dtype = getattr(model.config, "dtype", None)
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {asked!r}; expected bfloat16, float16 or float32")
    return dtype


class Checkpoint:
    """A merged checkpoint that will be written.

    Args:
        model: the trained model.
        merged: its merged tensors.
        dtype: dtype of the unquantised tensors.
        quantized: whether the linear layers become NF4.
    """

    def __init__(self, model: nn.Module, merged: MergedModel, dtype: torch.dtype, *, quantized: bool) -> None:
        self.model, self.merged, self.dtype, self.quantized = model, merged, dtype, quantized
        self.plans = [TensorPlan(name, shape, dtype) for name, shape in merged.shapes().items()]
        self.packed = packed_names(model) if quantized else set()

    @property
    def nbytes(self) -> int:
        return sum(
            packed_bytes(plan.nbytes // plan.dtype.itemsize) if plan.name in self.packed else plan.nbytes
            for plan in self.plans
        )

    def write(self, folder: Path, max_shard_size: str | int) -> None:
        """Write shards and config.json into an existing folder."""
        tensors = ((plan.name, read_finite(self.merged, plan.name, self.dtype)) for plan in self.plans)
        if self.quantized:
            write_unplanned(folder, pack(tensors, self.packed), shard_bytes(max_shard_size))
        else:
            write_shards(folder, self.plans, (tensor for _, tensor in tensors), shard_bytes(max_shard_size))
        inner = base_model(self.model)
        config = copy.deepcopy(inner.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if self.quantized:
            config.quantization_config = nf4_config(self.dtype)
        family = family_of(config)
        config.architectures = [family.architecture if family is not None else type(inner).__name__]
        config.dtype = self.dtype
        config.tie_word_embeddings = self.merged.tied
        config.get_text_config().vocab_size = inner.get_input_embeddings().weight.shape[0]
        config.save_pretrained(folder)


def read_finite(source: TensorSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in `dtype` on the CPU.

    Raises:
        ExportError: a value is not finite there.
    """
    tensor = source.read(name, _CPU, dtype)
    if not all_finite(tensor):
        finite = all_finite(source.read(name, _CPU, torch.float32))
        problem = (
            f"passes the range of {dtype}; use torch.bfloat16"
            if finite
            else "is not finite: training diverged"
        )
        raise ExportError(f"{name} has a value that {problem}")
    return tensor
