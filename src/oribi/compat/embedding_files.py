"""An embedding model's files: opened, with or without an adapter, and written, each compared with the trained model."""

import copy
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file, find_adapter_config_file

from oribi.errors import ConfigError, ExportError, ModelError
from oribi.models.adapter_files import (
    PEFT_REFUSALS,
    adapter_tensors,
    read_tensors,
    require_exact_tensors,
    shapes_of,
)
from oribi.models.unfused import require_exact_nf4
from oribi.models.unwrap import base_model
from oribi.save.folder import finished_folder
from oribi.save.hub import MERGED_KEYWORDS, read_accepted, upload_folder
from oribi.save.merged import read_finite
from oribi.save.one_writer import by_first_process
from oribi.save.trained import MergedModel
from oribi.text import say_notes

_PROBES = (
    "The quick brown fox.",
    "Which planet is the largest?",
    "A short text about the price of bread in 1950.",
)
# largest distance of two embeddings of length 1: 16-bit weights are rounded once more when they are written
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


def require_library() -> None:
    """Raise ImportError with the command that installs sentence-transformers, where it is missing."""
    if find_spec("sentence_transformers") is None:
        raise ImportError(
            "FastSentenceTransformer needs sentence-transformers: pip install 'oribi[embeddings]'"
        )


def nf4_settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings of doubly quantised NF4."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def open_embedder(
    name: str,
    device: torch.device,
    loading: dict[str, Any],
    hub: dict[str, Any],
    pooling: str,
    options: dict[str, Any],
    notes: list[str],
) -> Any:
    """A SentenceTransformer from a directory or the hub: a model, or the adapter of one on its base.

    Args:
        name: of the model or adapter. device: where it computes.
        loading: of transformers' from_pretrained. hub: token, revision and trust_remote_code.
        pooling: how tokens become one vector where the files do not say it.
        options: of SentenceTransformer.
        notes: takes one line for each decision.

    Raises:
        ModelError: it cannot be loaded.
    """
    asked = {"token": hub.get("token"), "revision": hub.get("revision"), "cache_dir": options.get("cache_folder"),
             "local_files_only": options.get("local_files_only", False)}  # fmt: skip
    file = find_adapter_config_file(name, **asked)
    if file is None:
        model = _load(name, device, loading, hub, options)
        _pool(model, name, _file(name, "modules.json", asked) is not None, pooling, notes)
        return model
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{file} names no base_model_name_or_path; put the folder or hub name of the model there"
        )
    notes.append(f"{name} is an adapter on {base}")
    model = _load(base, device, loading, {**hub, "revision": None}, options)
    found = _file(name, "modules.json", asked)
    if found is not None:
        _take_modules(model, name, json.loads(found.read_text(encoding="utf-8")), asked)
    else:
        _pool(
            model, base, _file(base, "modules.json", {**asked, "revision": None}) is not None, pooling, notes
        )
    inner = model.transformers_model
    try:
        adapted = PeftModel.from_pretrained(
            inner, name, is_trainable=True, **{k: v for k, v in asked.items() if v is not None}
        )
        weights = _file(name, "adapter_model.safetensors", asked)
    except (*PEFT_REFUSALS, OSError) as error:
        raise ModelError(f"{name}: PEFT cannot put this adapter on {base}: {error}") from error
    if weights is None:
        raise ModelError(f"{name} has no adapter_model.safetensors")
    expected = shapes_of(adapter_tensors(adapted, "default"))
    require_exact_tensors(weights, shapes_of(read_tensors(weights)), expected, {})
    replace_inner(model, inner, adapted)
    return model


def _file(name: str, file: str, asked: dict[str, Any]) -> Path | None:
    """One file of a directory or a repository; None where it has no such file."""
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **asked)
    return None if found is None else Path(found)


def _take_modules(model: Any, name: str, entries: list[dict[str, Any]], asked: dict[str, Any]) -> None:
    """Gives a base the modules after the transformer that lie beside its adapter.

    Raises:
        ModelError: one is no module of sentence-transformers.
    """
    where = {"cache_folder": asked["cache_dir"], **{k: v for k, v in asked.items() if k != "cache_dir"}}
    del model[1:]
    for entry in entries[1:]:
        place, _, kind = entry["type"].rpartition(".")
        if place.partition(".")[0] != "sentence_transformers":
            raise ModelError(
                f"{name}: modules.json names {entry['type']}, which is no module of sentence-transformers"
            )
        loaded = getattr(import_module(place), kind).load(name, subfolder=entry["path"], **where)
        model.append(loaded.to(model.device))


def replace_inner(model: Any, old: nn.Module, new: nn.Module) -> None:
    """Puts another module in the place of one inside a SentenceTransformer's modules."""
    for module in model:
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)


def _load(
    name: str, device: torch.device, loading: dict[str, Any], hub: dict[str, Any], options: dict[str, Any]
) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        place = None if "device_map" in loading else str(device)
        model = SentenceTransformer(name, device=place, model_kwargs=loading, **hub, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged file may end anywhere in the model's class
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ModelError(f"{name}: sentence-transformers cannot load it: {reason}") from error
    if model.transformers_model is None:
        raise ModelError(f"{name}: it has no transformers model inside, so there is nothing to train")
    require_exact_nf4(model.transformers_model, name, device)
    return model


def _pool(model: Any, name: str, stated: bool, pooling: str, notes: list[str]) -> None:
    """Pools tokens as asked, where the model's files do not say how.

    Args:
        model: as loaded. name: for notes.
        stated: whether it has files of sentence-transformers.
        pooling: as asked for.
        notes: takes a line.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    if not stated:
        notes.append(f"{name} has no files of sentence-transformers: its tokens are pooled by {pooling!r}")
        at = next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)
        made = Pooling(model[0].get_embedding_dimension(), pooling)
        if at is None:
            model.append(made)
        else:
            model[at] = made
    elif pooling != "mean":
        found = next((str(m.pooling_mode) for m in model if isinstance(m, Pooling)), "none")
        if pooling not in found:
            notes.append(f"pooling_mode={pooling!r} has no effect: the model's own files say {found}")


@by_first_process
def save_merged_embeddings(
    model: Any, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **accepted: Any
) -> str | None:
    """Write the trained model as one folder that `SentenceTransformer(folder)` loads, and compare its embeddings.

    Args:
        model: the trained model.
        save_directory: created; files of an earlier export in it are replaced when this one is complete.
        tokenizer: accepted and not needed: the model has its own.
        save_method: "merged_16bit" (LoRA added to the weights in float32, and rounded once), or "lora" (the adapter).
        accepted: keywords of other libraries' calls, see `save.hub`.

    Returns:
        The folder; None in processes that are not the main one.

    Raises:
        ConfigError: an argument has an unknown value.
        ExportError: what was written gives other embeddings than the trained model.
    """
    if save_method not in ("merged_16bit", "lora", None):
        raise ConfigError(
            f"save_method = {save_method!r}; an embedding model is written as 'merged_16bit' or 'lora'"
        )
    options = read_accepted(accepted, MERGED_KEYWORDS, "save_pretrained_merged")
    if not options.is_main_process:
        return None
    inner = model.transformers_model
    packed = bool(getattr(base_model(inner), "is_loaded_in_4bit", False))
    size = sum(p.numel() * 4 for p in inner.parameters())
    with finished_folder(save_directory, size) as folder:
        written = model if save_method == "lora" else merged_copy(model)
        written.save_pretrained(str(folder))
        _compare(model, folder, packed and save_method == "lora")
    if packed and save_method == "lora":
        say_notes(
            [
                "the adapter was trained on NF4 weights: load its base so, or write 'merged_16bit' for any program"
            ]
        )
    if options.push_to_hub:
        upload_folder(Path(save_directory), Path(save_directory).name, options)
    return str(save_directory)


def merged_copy(model: Any) -> Any:
    """The trained model without LoRA and in no 4 bits, its weights on the CPU; the rest is shared with the original.

    Raises:
        ExportError: an adapter cannot be expressed in the weights, or a value is not finite.
    """
    from sentence_transformers import SentenceTransformer

    inner, outer = base_model(model.transformers_model), model.transformers_model
    dtype = _dtype(model)
    merged = MergedModel(outer)
    config = copy.deepcopy(inner.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(inner)._from_config(config, dtype=dtype)
    plain.load_state_dict(
        {name: read_finite(merged, name, dtype) for name in merged.shapes()}, strict=True, assign=True
    )
    modules = []
    for module in model:
        if any(child is outer for child in module.children()):
            module, original = copy.copy(module), module
            module._modules = {k: plain if v is outer else v for k, v in original._modules.items()}
        modules.append(module)
    return SentenceTransformer(
        modules=modules, device="cpu", prompts=model.prompts, default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name, truncate_dim=model.truncate_dim,
    )  # fmt: skip


@by_first_process
def save_embedder(model: Any, path: str, *arguments: Any, **keywords: Any) -> None:
    """`SentenceTransformer.save_pretrained`, and the adapter's file read back.

    Raises:
        ExportError: the file holds other values than the model.
    """
    type(model).save_pretrained(model, path, *arguments, **keywords)
    outer, file = model.transformers_model, Path(path) / "adapter_model.safetensors"
    if not isinstance(outer, PeftModel) or not file.is_file():
        return
    stored, expected = read_tensors(file), adapter_tensors(outer, outer.active_adapter)
    different = [
        name
        for name, tensor in expected.items()
        if not torch.equal(stored.get(name, tensor[:0]), tensor.cpu())
    ]
    if different:
        raise ExportError(f"{file}: {len(different)} tensors differ from the model, {different[0]} the first")


def _dtype(model: Any) -> torch.dtype:
    dtype = model.transformers_model.config.dtype
    return dtype if dtype in _TOLERANCE else torch.float32


def _compare(model: Any, folder: Path, packed: bool) -> None:
    """Loads what was written as a program that knows nothing of this model does, and compares embeddings with it.

    Raises:
        ExportError: they differ.
    """
    device, dtype = model.device, _dtype(model)
    loading: dict[str, Any] = {"dtype": dtype}
    if packed:
        loading |= {"quantization_config": nf4_settings(dtype), "device_map": {"": device}}
    outside = open_embedder(str(folder), device, loading, {"trust_remote_code": False}, "mean", {}, [])
    trains = model.training
    expected, found = (
        m.eval()
        .encode(list(_PROBES), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        .cpu()
        for m in (model, outside)
    )
    model.train(trains)
    distance = (expected.float() - found.float()).norm(dim=-1).max().item()
    if not distance <= _TOLERANCE[dtype]:
        raise ExportError(
            f"what was written gives other embeddings than the trained model: they lie {distance:.3g} apart, and rounding "
            f"explains at most {_TOLERANCE[dtype]}. Nothing was kept"
        )
