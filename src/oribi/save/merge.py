"""The merged checkpoint: adapters added to their base in float32, rounded once, written tensor by tensor.

The base is one of
    "dequantized"  the loaded weights themselves, NF4 read back: exactly the function that was trained, no download
    "original"     the 16-bit checkpoint that was loaded: better weights, not those the adapter was trained on
    "auto"         both merged, the one with the lower loss on held-out rows kept
    a folder       another 16-bit checkpoint of the same model
"""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from oribi.errors import ConfigError, ExportError
from oribi.models.checkpoint import SafetensorsSource, TensorSource
from oribi.models.families import family_of
from oribi.models.gguf_source import GGUFSource
from oribi.save.adapter import MergedModel, save_adapter
from oribi.save.folder import finished_folder, gigabytes
from oribi.save.shards import TensorPlan, shard_bytes, write_shards

METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Merged:
    """What `save_merged` wrote: the folder, the base it chose and why, and the size in bytes."""

    directory: Path
    base: str
    reason: str
    nbytes: int


def save_merged(
    model: nn.Module,
    directory: str | os.PathLike,
    tokenizer: object | None = None,
    save_method: Literal["merged_16bit", "merged_4bit", "merged_4bit_forced", "lora"] = "merged_16bit",
    *,
    base: str = "dequantized",
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Merged:
    """Write the trained model as one folder that any program loads, or its adapter alone.

    Args:
        model: the trained model, PEFT's or plain.
        directory: created; files of an earlier export in it are replaced at once when this one is complete.
        tokenizer: saved with the model; None saves none.
        save_method: "merged_16bit", "merged_4bit" (the merge quantised to NF4 again), or "lora".
        base: "dequantized", "original", or a folder, see above.
        dtype: dtype written by "merged_16bit"; None keeps bfloat16 or float16 of the model and makes float32 bfloat16.
        max_shard_size: a shard ends before it would pass this size.

    Raises:
        ConfigError: an argument has an unknown value.
        ExportError: the merge cannot be expressed or does not fit on the disk.
    """
    if save_method not in METHODS:
        raise ConfigError(f"save_method = {save_method!r}; expected one of {', '.join(METHODS)}")
    directory = Path(directory)
    if save_method == "lora":
        save_adapter(model, directory, tokenizer)
        return Merged(directory, "", "the adapter alone", _size_of(directory))
    dtype = dtype or merged_dtype(model)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    merged = MergedModel(model, open_base(model, base))
    plans = [TensorPlan(name, shape, dtype) for name, shape in merged.shapes().items()]
    size = sum(plan.nbytes for plan in plans)
    print(
        f"oribi: merged model, {len(plans)} tensors in {dtype}: {gigabytes(size)} into {directory}",
        flush=True,
    )
    with finished_folder(directory, size) as partial:
        tensors = (read_finite(merged, plan.name, dtype) for plan in plans)
        write_shards(partial, plans, tensors, shard_bytes(max_shard_size))
        save_config(model, partial, dtype, tied=merged.tied)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Merged(directory, base, "", size)


def open_base(model: nn.Module, base: str) -> TensorSource | None:
    """The weights under the adapter; None stands for the loaded ones.

    Raises:
        ExportError: the original checkpoint is not on this machine, or is itself quantised.
    """
    if base == "dequantized":
        return None
    source = getattr(model, "oribi", None)
    name = base
    if base == "original":
        name = source.name_or_path if source is not None else model.config._name_or_path
    if os.path.isfile(name):
        return GGUFSource(Path(name))
    folder = checkpoint_folder(name)
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise ExportError(f"{folder} has no {missing[0]}: it is no complete safetensors checkpoint")
    weights = SafetensorsSource([folder / shard for shard in shards])
    if any(".quant_state." in name for name in weights.shapes()):
        raise ExportError(
            f"{folder} holds 4-bit weights; base='original' needs the 16-bit checkpoint. "
            "Give base='dequantized', or base= the folder or name of the 16-bit checkpoint"
        )
    return weights


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint: itself, or a hub name's folder in the local cache.

    Raises:
        ExportError: it is not on this machine.
    """
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = name.removesuffix("-bnb-4bit")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ExportError(
            f"the 16-bit checkpoint {name!r} is not on this machine. Give base='dequantized', which needs no download, "
            f"or download it first: hf download {name}"
        ) from error


def merged_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a merged checkpoint when none is asked for."""
    dtype = getattr(model.config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def read_finite(source: TensorSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in `dtype` on the CPU.

    Raises:
        ExportError: a value is not finite there.
    """
    tensor = source.read(name, torch.device("cpu"), dtype)
    if not torch.isfinite(tensor).all():
        finite = torch.isfinite(source.read(name, torch.device("cpu"), torch.float32)).all()
        problem = (
            f"passes the range of {dtype}; use torch.bfloat16"
            if finite
            else "is not finite: training diverged"
        )
        raise ExportError(f"{name} has a value that {problem}")
    return tensor


def save_config(model: nn.Module, folder: Path, dtype: torch.dtype, *, tied: bool) -> None:
    """Write config.json and generation_config.json of a merged checkpoint: no quantisation, the family's class."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    family = family_of(config)
    config.architectures = [family.architecture if family is not None else type(inner).__name__]
    config.dtype = dtype
    config.tie_word_embeddings = tied
    config.vocab_size = inner.get_input_embeddings().weight.shape[0]
    config.save_pretrained(folder)
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(folder)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
