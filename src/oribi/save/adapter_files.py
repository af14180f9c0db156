"""The adapter's own files: written as the class that users load names its modules, read back, and compared.

An adapter means something on one base only, so a base whose weights were changed in memory has no adapter file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from oribi.errors import ConfigError, ExportError, ModelError
from oribi.models.adapter_config import read_adapter_config
from oribi.models.adapter_files import (
    AdapterRecord,
    adapter_tensors,
    base_tables,
    read_tensors,
)
from oribi.models.expert_factors import separate_factors, stacked_factors
from oribi.models.expert_names import expert_modules
from oribi.models.files import Location
from oribi.models.load_adapter import require_adapter_fits
from oribi.models.packed_linear import is_requantised
from oribi.models.plain_peft import try_in_plain_peft
from oribi.models.unwrap import bare_name, base_model, source_of
from oribi.save.base import changed_base, table_slots
from oribi.save.trained import Slot, require_finite, slots_of

WEIGHTS = "adapter_model.safetensors"
MERGE_FIRST = (
    "An adapter's file would name a base that is not what it was trained on. Write the whole model "
    "(save_pretrained_merged, or save_pretrained_gguf, with base='dequantized'); to train further adapters on it, load "
    "that folder"
)


def write_adapter(
    model: nn.Module,
    folder: Path,
    *,
    chat_template: Any = None,
    allow_changed_base: bool = False,
    selected_adapters: Sequence[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    **options: Any,
) -> list[str]:
    """Write the adapters in PEFT's format into a folder, with a record of their base, and read them back.

    Args:
        model: PEFT's model.
        folder: created; the adapter "default" goes into it, others into folders of their names.
        chat_template: the tokenizer's; None takes what the trainer left on the model.
        allow_changed_base: whether a base that was changed in memory is put on record (a checkpoint, which the same
            script resumes) or refused.
        selected_adapters: their names; None writes all.
        save_embedding_layers: whether the embeddings and the head go into the files; "auto": if they have rows that the
            checkpoint lacks or that differ from it.
        options: further ones of PEFT's save_pretrained.

    Returns:
        What could not be tested, one line each.

    Raises:
        ExportError: the model has no adapter, its values are not finite, or its base is not what its files hold.
    """
    if not isinstance(model, PeftModel):
        raise ExportError("save_method='lora' needs a model with an adapter; this model has none")
    require_finite(model)
    changed = changed_base(model)
    if changed and not allow_changed_base:
        raise ExportError(
            f"the base's weights were changed after it was loaded ({len(changed)} tensors, {changed[0]} the first), by "
            f"merging an adapter into it or otherwise. {MERGE_FIRST}"
        )
    adapters = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    PeftModel.save_pretrained(
        model, str(folder), selected_adapters=adapters, save_embedding_layers=False, **options
    )
    untested = []
    for adapter in adapters if options.get("is_main_process", True) else ():
        target = Path(folder) if adapter == "default" else Path(folder) / adapter
        _record(model, changed, chat_template, target)
        if not (target / WEIGHTS).is_file() or options.get("path_initial_model_for_weight_conversion"):
            untested.append(f"{target}: PEFT wrote it in a form of its own, which is not read back")
            continue
        _complete(model, adapter, target, save_embedding_layers)
        why = check_files(model, adapter, target)
        untested += [f"{target} in plain PEFT: {why}"] * bool(why)
    return untested


def _complete(model: PeftModel, adapter: str, folder: Path, with_tables: str | bool) -> None:
    """Add the embeddings that no checkpoint has, and give modules the names of the class that users load."""
    path, settings = folder / WEIGHTS, model.peft_config[adapter]
    tables = (
        changed_tables(model, adapter) if with_tables == "auto" else base_tables(model) if with_tables else {}
    )
    names = getattr(source_of(model), "names", None)
    moves = names is not None and isinstance(settings, LoraConfig)
    if not tables and not moves:
        return
    tensors = {
        **load_file(path),
        **{name: table.detach().cpu().contiguous() for name, table in tables.items()},
    }
    if moves:
        tensors = names.written(tensors)
        outside = names.settings_outside(settings, _adapted(model, adapter))
        outside.inference_mode = True
        outside.save_pretrained(str(folder))
    save_file(tensors, path, metadata={"format": "pt"})


def write_separately(model: PeftModel, folder: Path) -> None:
    """Write the pairs of each expert by themselves in place of an adapter's files, and read them back.

    Raises:
        ConfigError: there are no experts that programs read so, or their pairs cannot be told apart.
        ExportError: what was written is not the adapter.
    """
    inner, (adapter, *others) = base_model(model), model.peft_config
    experts = expert_modules(inner)
    if others or not experts or any(one.rules.stored != "each" for one in experts.values()):
        raise ConfigError(
            "save_method = 'lora_per_expert': it is for models with one adapter whose checkpoints hold each expert by itself; "
            "programs read other models' experts as 'lora' writes them"
        )
    layers = {
        bare_name(name): (module.r[adapter], module.lora_alpha[adapter])
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer)
        and adapter in module.lora_A
        and not hasattr(module, "parameter_name")
    }
    stored = load_file(folder / WEIGHTS)
    settings, tensors = separate_factors(model.peft_config[adapter], stored, experts, layers)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_files(model, adapter, folder)


def _adapted(model: PeftModel, adapter: str) -> list[str]:
    """The base's names of the modules and parameters that have a LoRA pair of an adapter."""
    inner = base_model(model)
    return [
        ".".join(filter(None, (bare_name(name), getattr(module, "parameter_name", None))))
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A)
    ]


def _record(model: PeftModel, changed: list[str], chat_template: Any, folder: Path) -> None:
    source = source_of(model)
    if source is None or source.identity is None:
        return
    template = source.chat_template if chat_template is None else chat_template
    positions = source.positions(base_model(model).config)
    record = AdapterRecord(
        source.identity,
        source.max_seq_length,
        template,
        tuple(changed),
        positions,
        source.labels,
        source.kept_in_16bit,
        is_requantised(model),
    )
    record.write(folder)


def changed_tables(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Embeddings and head, by their names in the adapter's file, with rows that the checkpoint lacks or that differ from it."""
    sums = getattr(source_of(model), "sums", {})
    slots = slots_of(model) if sums else {}
    found = {}
    for name, slot in table_slots(model, slots).items():
        before, table = sums.get(name), slot.tensor
        if before is None or _trained_whole(slot, adapter):
            continue
        rows = before.changed_rows(table)
        if len(before.rows) != len(table) or not set(rows or ()) <= _trained_rows(slot, adapter):
            found |= {key: value for key, value in base_tables(model).items() if value is table}
    # names of one tied matrix: the first will do
    return {key: value for key, value in found.items() if key == next(k for k in found if found[k] is value)}


def _trained_whole(slot: Slot, adapter: str) -> bool:
    return any(isinstance(w, ModulesToSaveWrapper) and adapter in w.modules_to_save for w in slot.wrappers)


def _trained_rows(slot: Slot, adapter: str) -> set[int]:
    """Rows whose values the adapter has itself."""
    rows: set[int] = set()
    for wrapper in slot.wrappers:
        if isinstance(wrapper, TrainableTokensLayer) and adapter in wrapper.token_indices:
            rows |= set(wrapper.token_indices[adapter])
    return rows


def check_files(model: PeftModel, adapter: str, folder: Path) -> str | None:
    """Read an adapter's files as a program does that knows nothing of this model, without the base's weights.

    PEFT puts the settings on the class that the base's config.json names, a skeleton without storage, and must find a
    place there for each tensor and a tensor for each place; the values must be those in memory.

    Returns:
        Why the class could not be tried; None where it was.

    Raises:
        ExportError: the files are not the adapter.
    """
    path = folder / WEIGHTS
    source = source_of(model)
    names = getattr(source, "names", None)
    try:
        stored = read_tensors(path)
        inner = names.read(stored) if names is not None else stored
        settings = model.peft_config[adapter]
        if isinstance(settings, LoraConfig):  # each expert's pair by itself is one of a stack in memory
            inner = stacked_factors(settings, inner, expert_modules(base_model(model)))[1]
        require_adapter_fits(model, path, inner, adapter)
        _require_equal(model, path, inner, adapter)
        return _try_outside(source, stored, folder)
    except ModelError as error:
        raise ExportError(f"what was written is not the adapter: {error}") from error


def _require_equal(model: PeftModel, path: Path, found: dict[str, torch.Tensor], adapter: str) -> None:
    expected = {**base_tables(model), **adapter_tensors(model, adapter)}
    different = [
        name
        for name, tensor in found.items()
        if name in expected
        and type(expected[name]).__name__ != "DTensor"
        and not torch.equal(tensor, expected[name].detach().cpu())
    ]
    if different:
        raise ModelError(
            f"{path}: {len(different)} of {len(found)} tensors differ from memory, {different[0]} the first"
        )


def _try_outside(source: Any, stored: dict[str, torch.Tensor], folder: Path) -> str | None:
    """Let PEFT load the files on skeletons of the classes that programs build from the base's config."""
    if source is None or source.config is None:
        return "the model was not loaded by oribi, so the class that other programs load is unknown"
    settings = read_adapter_config(Location("adapter", folder, str(folder)))
    key = json.dumps([settings.to_dict(), {name: list(t.shape) for name, t in stored.items()}], default=str)
    if key in source.tried:  # a checkpoint of the same adapter
        return None
    why = try_in_plain_peft(source.config, source.names, settings, stored, str(folder))
    if why is None:
        source.tried.add(key)
    return why
