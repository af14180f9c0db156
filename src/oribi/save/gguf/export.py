"""GGUF files of a trained model: one call, any number of quantisation methods."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from oribi.errors import ConfigError
from oribi.save.adapter import MergedModel
from oribi.save.folder import finished_folder, gigabytes
from oribi.save.gguf.layout import check_config
from oribi.save.gguf.mixes import METHODS, mix_of
from oribi.save.gguf.writer import plan_file, write_files
from oribi.save.merge import open_base


def save_gguf(
    model: nn.Module,
    directory: str | os.PathLike,
    tokenizer: object,
    quantization_method: str | Sequence[str] = "q8_0",
    *,
    base: str = "dequantized",
    name: str | None = None,
) -> dict[str, object]:
    """Write the trained model, adapters merged, as GGUF files that llama.cpp, Ollama and their kin run.

    Args:
        model: the trained model, PEFT's or plain.
        directory: where the files go; created.
        tokenizer: a fast tokenizer; its chat template goes into the files.
        quantization_method: one of `METHODS` in any case, or several.
        base: the weights under the adapter, as for `save_merged`.
        name: the model's name; None takes the last part of the name it was loaded by.

    Returns:
        gguf_directory, gguf_files (paths), modelfile_location (path or None), want_full_precision, is_vlm,
        fix_bos_token, notes.

    Raises:
        ConfigError: an unknown method, or no tokenizer.
        ExportError: llama.cpp cannot hold this model, or the disk is too small.
    """
    if tokenizer is None:
        raise ConfigError("GGUF files hold the tokenizer; give tokenizer=")
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    methods = list(dict.fromkeys(mix_of(method).name for method in asked))
    directory = Path(directory)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config
    notes = check_config(config)
    source = MergedModel(model, open_base(model, base))
    name = name or model_name(model)
    sizes = {m: sum(e.nbytes for e in plan_file(config, source.shapes(), m)) for m in methods}
    for method, size in sizes.items():
        print(f"oribi: {method}, {METHODS[method].words}: {gigabytes(size)} into {directory}", flush=True)
    device = next(inner.parameters()).device
    files = {method: f"{name}.{method.upper()}.gguf" for method in methods}
    with finished_folder(directory, sum(sizes.values()) + (16 << 20)) as partial:
        paths = {method: partial / file for method, file in files.items()}
        with torch.no_grad():
            write_files(paths, source, config, tokenizer, name=name, device=device)
    return {
        "gguf_directory": str(directory),
        "gguf_files": [str(directory / file) for file in files.values()],
        "modelfile_location": None,
        "want_full_precision": all(method in ("f32", "f16", "bf16") for method in methods),
        "is_vlm": False,
        "fix_bos_token": False,
        "notes": notes,
    }


def model_name(model: nn.Module) -> str:
    """A name for files: the last part of the name or path that the model was loaded by."""
    source = getattr(model, "oribi", None)
    name = source.name_or_path if source is not None else getattr(model.config, "_name_or_path", "")
    stem = re.sub(r"(\.(gguf|[QF]\w+|BF16))+$", "", os.path.basename(str(name).rstrip("/")))
    stem = re.sub(r"[^\w.-]+", "-", stem.removesuffix("-bnb-4bit"))
    return stem or "model"
