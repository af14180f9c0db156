"""The weights under the adapter.

"dequantized"  the loaded weights themselves, NF4 read back: exactly the function that was trained, no download
"original"     the 16-bit checkpoint that was loaded: better weights, not those the adapter was trained on
"auto"         of these two the one with the lower loss on held-out rows; without such rows "dequantized"
a folder       another 16-bit checkpoint of the same model, or a GGUF file of it
"""

import json
import os
from pathlib import Path

from torch import nn

from oribi.errors import ConfigError, ExportError
from oribi.models.checkpoint import SafetensorsSource, TensorSource
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.gguf_source import GGUFSource
from oribi.save.adapter import MergedModel
from oribi.save.naming import base_name
from oribi.save.reference import Trained, loss_of


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
        ExportError: the original checkpoint is not on this machine, or is itself quantised.
    """
    if base == "dequantized":
        return None
    name = base_name(model) if base == "original" else base
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
