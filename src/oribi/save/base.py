"""The weights under the adapter.

"dequantized"  the loaded weights themselves, NF4 read back: exactly the function that was trained, no download
"original"     the 16-bit checkpoint that was loaded: better weights, not those the adapter was trained on
"auto"         whichever of the two has the lower loss on held-out rows; without such rows "dequantized"
a folder       another 16-bit checkpoint of the same model, or a GGUF file of it
"""

import os
from dataclasses import replace

from peft.tuners.lora import LoraLayer
from torch import nn

from oribi.errors import ConfigError, ExportError, ModelError
from oribi.models.adapter_files import base_tables
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.expert_tensors import unstacked
from oribi.models.files import HubOptions, Location, locate, open_weights, weight_files
from oribi.models.quantize import rounded_to_nf4
from oribi.models.unwrap import base_model, source_of
from oribi.models.wrapper import renaming
from oribi.save.nf4_checkpoint import Nf4Source
from oribi.save.reference import Trained, loss_of
from oribi.save.trained import MergedModel, Slot, plain_tensor, slots_of
from oribi.tensors import TensorSource

# of a tensor's norm, what merging and unmerging leaves: bfloat16 keeps 8 bits, NF4 is off by 9 % each time
_ROUNDING, _NF4_ROUNDING = 2**-8, 0.2


def base_name(model: nn.Module) -> str:
    """Name or path that the model was loaded by; "" if it was made from a config."""
    source = source_of(model)
    return str(
        source.name_or_path if source is not None else getattr(model.config, "_name_or_path", "") or ""
    )


def choose_base(model: nn.Module, base: str, trained: Trained | None) -> tuple[str, str]:
    """The base to merge into, and why.

    Args:
        model: the trained model.
        base: "dequantized", "original", a folder, or "auto".
        trained: the trained model's answers; needed by "auto", which adds the adapter to both and measures.

    Returns:
        The base, never "auto", and the measured reason, "" where none was asked for.

    Raises:
        ConfigError: "auto" for a model outside the family table.
    """
    if base != "auto":
        return base, ""
    if trained is None or not isinstance(trained.inner, DecoderForCausalLM):
        raise ConfigError(
            "base='auto' measures models of oribi's family table; give 'dequantized' or 'original'"
        )
    if not trained.rows.held_out:  # general texts do not tell how well a base serves what was trained
        return "dequantized", "base='auto' chose dequantized: no held-out rows were given to compare bases on"
    losses = {}
    for candidate in ("dequantized", "original"):
        try:
            source = open_base(model, candidate)
        except ExportError as error:
            return "dequantized", f"base='auto' chose dequantized: {error}"
        merged = MergedModel(model, source)
        logits, _ = trained.split(trained.streamed(merged))
        losses[candidate] = loss_of(logits.log_softmax(-1), trained.rows)
    best = min(losses, key=losses.get)
    figures = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return (
        best,
        f"base='auto' chose {best}: loss {figures}, as trained {trained.loss:.4f}, on {trained.rows.origin}",
    )


def open_base(model: nn.Module, base: str) -> TensorSource | None:
    """The weights under the adapter; None stands for the loaded ones.

    Raises:
        ExportError: the checkpoint is not on this machine, is damaged or quantised, or "original" is not what the loaded
            weights were made from.
    """
    if base == "dequantized":
        return None
    source = source_of(model)
    if base == "original":
        _require_unchanged(model)
    location, options = locate_here(model, base_name(model) if base == "original" else base)
    try:
        weights = open_weights(location, options, renaming(getattr(source, "names", None)))
        weights = unstacked(weights, base_model(model))
    except ModelError as error:
        raise ExportError(f"{base!r} cannot serve as base of a merge: {error}") from error
    if any(".quant_state." in name for name in weights.shapes()):
        raise ExportError(
            f"{location.directory} holds 4-bit weights; base='original' needs the 16-bit checkpoint. "
            "Give base='dequantized', or base= the folder or name of the 16-bit checkpoint"
        )
    return weights


def open_as_loaded(model: nn.Module) -> TensorSource:
    """The loaded base's files once more; 4-bit ones dequantised, 16-bit ones not quantised.

    Raises:
        ExportError: they are not on this machine.
        ModelError: they are damaged.
    """
    source = model.oribi
    location, options = locate_here(model, source.name_or_path)
    weights = open_weights(location, options, renaming(source.names))
    return Nf4Source(unstacked(weights, base_model(model)))


def locate_here(model: nn.Module, name: str) -> tuple[Location, HubOptions]:
    """A base's files on this machine, with the revision and cache folder that the model was loaded with.

    Raises:
        ExportError: there are none, or an adapter.
    """
    source = source_of(model)
    own = source is not None and name == source.name_or_path
    options = replace(source.hub if own else HubOptions(), local_files_only=True)
    gguf_file = None
    if own:
        gguf_file = next((file for file in source.identity.files if file.endswith(".gguf")), None)
    elif not os.path.exists(name):
        name = name.removesuffix("-bnb-4bit")
    try:
        location = locate(name, options, gguf_file)
        if location.kind == "checkpoint" and not os.path.exists(name):
            weight_files(location, options)
    except ModelError as error:
        if os.path.exists(name):
            raise ExportError(f"{name!r} cannot serve as base of a merge: {error}") from error
        raise ExportError(
            f"the 16-bit checkpoint {name!r} is not on this machine. Give base='dequantized', which needs no download, "
            f"or download it first: hf download {name}"
        ) from error
    if location.kind == "adapter":
        raise ExportError(f"{name!r} is an adapter, and cannot serve as base of a merge")
    return location, options


def _require_unchanged(model: nn.Module) -> None:
    """Raise if the loaded weights are not those of the checkpoint: "original" would drop the difference."""
    changed = changed_base(model, tables=True)
    if changed:
        raise ExportError(
            f"base='original' is not what was trained on: {len(changed)} tensors were changed after the model was loaded, "
            f"{changed[0]} the first (an adapter merged into them, or values set). Give base='dequantized'"
        )


def changed_base(model: nn.Module, *, tables: bool = False) -> list[str]:
    """Frozen tensors of the base that an adapter was trained on and no file of the base holds.

    Layers in which adapters are merged at this moment do not count, nor what `unmerge_adapter` leaves by rounding.

    Args:
        model: PEFT's model or a plain one.
        tables: whether the embeddings and the head count, whose rows can travel in an adapter's file.
    """
    source = source_of(model)
    if source is None or not source.sums:
        return []
    inner = base_model(model)
    changed = source.changed_weights(inner)
    if not changed:
        return []
    slots = slots_of(model)
    left_out = {} if tables else table_slots(model, slots)
    return [
        name
        for name in changed
        if name not in left_out
        and not any(getattr(wrapper, "merged", False) for wrapper in slots[name].wrappers)
        and not _merge_undone(model, name, slots[name])
    ]


def _merge_undone(model: nn.Module, name: str, slot: Slot) -> bool:
    """Whether a weight differs from the base's files by the rounding of an adapter merged and taken out again."""
    source, state = model.oribi, getattr(slot.tensor, "quant_state", None)
    if name in (source.changed_before_lora or ()) or not any(isinstance(w, LoraLayer) for w in slot.wrappers):
        return False
    rounding = _ROUNDING if state is None or source.changed_before_lora is None else _NF4_ROUNDING
    try:
        files = open_as_loaded(model)
    except (ExportError, ModelError):
        return False
    if name not in files.shapes():
        return False
    now = plain_tensor(name, slot.tensor).float()
    before = files.read(name, now.device, now.dtype)
    if state is not None and source.kind != "bnb-4bit":
        before = rounded_to_nf4(before, state.nested)
    return before.shape == now.shape and bool((before - now).norm() <= rounding * before.norm())


def table_slots(model: nn.Module, slots: dict[str, Slot]) -> dict[str, Slot]:
    """The embeddings and the head among a model's tensors; a tied head is left out."""
    names: dict[int, str] = {}
    wanted = {id(table) for table in base_tables(model).values()}
    for name, slot in slots.items():
        if id(slot.tensor) in wanted:
            names.setdefault(id(slot.tensor), name)
    return {name: slots[name] for name in names.values()}
