"""A LoRA adapter as a GGUF file, applied by llama.cpp to a GGUF file of the base.

llama.cpp adds alpha / r * B A to a weight, with one alpha for the file. Where PEFT's scale is another (rsLoRA, alphas by
layer), B carries the ratio.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from oribi.errors import ConfigError, ExportError
from oribi.gguf.file import GGUFFile, Type, write_header
from oribi.gguf.names import family_in_gguf, tensors_to_write
from oribi.gguf.quantize import quantize
from oribi.models.unwrap import base_model, source_of
from oribi.save.adapter_files import changed_tables
from oribi.save.base import changed_base
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome
from oribi.save.finish import Verify, checked, compares, file_sizes, finish_export, sort_out
from oribi.save.folder import announce, finished_folder
from oribi.save.naming import base_name, model_name
from oribi.save.report import ExportReport
from oribi.save.trained import LoadedModel, changes_of

_TYPES = {"auto": Type.F16, "f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
# of the norm of a factor; float16 passes it only where a factor's values are too small for it
_TOLERANCE = {Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 4e-3, Type.Q8_0: 1e-2}


def save_gguf_adapter(
    model: nn.Module,
    directory: str | Path,
    quantization_method: str | Sequence[str] = "f16",
    *,
    verify: Verify = True,
) -> dict[str, Any]:
    """Write the active LoRA adapter as GGUF and check that the file holds it.

    Args:
        model: PEFT's model with one active adapter, LoRA or rsLoRA alone.
        directory: where the file goes; created.
        quantization_method: f32, f16, bf16 or q8_0 (where rows allow it, f16 elsewhere), or several.
        verify: as for `save_merged`.

    Returns:
        gguf_directory, gguf_files (paths) and report (`ExportReport`).

    Raises:
        ConfigError: an unknown type.
        ExportError: the adapter has parts that llama.cpp cannot apply, or a file differs from it.
    """
    names = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    unknown = [name for name in names if name.lower() not in _TYPES]
    if unknown:
        raise ConfigError(f"an adapter as GGUF is written as {', '.join(_TYPES)}; got {unknown[0]!r}")
    compared = compares(verify)
    config = base_model(model).config
    _require_own_base(model)
    alpha, pairs = _pairs(model, config)
    size = sum(pair.numel() * 4 for pair in pairs.values()) * len(names)
    announce(directory, {"adapter as GGUF, at most": size})
    files = {name.lower(): f"{model_name(model)}-lora.{name.upper()}.gguf" for name in names}
    report = ExportReport(str(directory), "gguf-adapter", "", {}, checked_on="every factor of the adapter")
    report.notes += _belongs_to(model)
    with finished_folder(directory, size + (1 << 20)) as partial:
        found = {}
        for name, file in files.items():
            _write(partial / file, config, alpha, pairs, _TYPES[name], base_name(model))
            if compared:
                found[name] = checked(name, _check, name, partial / file, alpha, pairs, _TYPES[name])
        sorted_out = sort_out(report, partial, files, found, verify)
        first = next(iter(sorted_out.kept.values()))
        usage = fenced(f"llama-cli -m BASE.gguf --lora {shlex.quote(first)}")
        report.files = file_sizes(partial, "*.gguf")
        finish_export(report, partial, model, usage, verify)
    sorted_out.require()
    return {
        "report": report,
        "gguf_directory": str(directory),
        "gguf_files": [str(Path(directory) / file) for file in files.values()],
    }


def _require_own_base(model: nn.Module) -> None:
    """Raise if the base in memory is none that a file of the base could be."""
    changed = changed_base(model)
    adapters = model.active_adapters if hasattr(model, "peft_config") else []
    rows = [name for adapter in adapters for name in changed_tables(model, adapter)]
    if changed or rows:
        raise ExportError(
            f"the base's weights were changed after it was loaded ({(changed + rows)[0]} the first), and a GGUF adapter "
            "holds LoRA updates alone; save merged GGUF files instead"
        )


def _belongs_to(model: nn.Module) -> list[str]:
    """What is to be known of the base that the adapter goes with."""
    identity = getattr(source_of(model), "identity", None)
    if identity is None or not identity.in_nf4:
        return []
    return [
        "the adapter was trained on NF4 weights; on a GGUF file of the 16-bit model it computes something else than was "
        "trained (measured: 74 % instead of 85 % of answers right, SmolLM2-135M). Merged GGUF files hold the trained model"
    ]


def _pairs(model: nn.Module, config: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """alpha, and a [r, K] and b [N, r] of every adapted weight by their names in the file."""
    changes = changes_of(model)
    if not changes:
        raise ExportError("the model has no active adapter to write")
    places = {tensor.source: tensor for tensor in tensors_to_write(config, list(LoadedModel(model).shapes()))}
    alpha, pairs = None, {}
    for name, change in changes.items():
        plain = len(change.updates) == 1 and not (change.replacement or change.rows or change.offsets)
        if (
            not plain
            or change.updates[0].magnitude is not None
            or change.updates[0].columns
            or name not in places
        ):
            raise ExportError(
                f"{name}: llama.cpp applies one LoRA update of a linear layer that the file holds, and no DoRA, bias, "
                "new token or fully trained module; save merged GGUF files instead"
            )
        update, place = change.updates[0], places[name]
        rank = len(update.a)
        alpha = update.scale * rank if alpha is None else alpha
        pairs[f"{place.name}.lora_a"] = update.a
        pairs[f"{place.name}.lora_b"] = place.to_gguf(update.b) * (update.scale * rank / alpha)
    return alpha, pairs


def _write(
    path: Path, config: Any, alpha: float, pairs: dict[str, torch.Tensor], type: Type, base: str
) -> None:
    writer = gguf.GGUFWriter(path, family_in_gguf(config)[1].architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"LoRA of {base}" if base else "LoRA")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    types = {
        name: Type.F16 if pair.shape[-1] % gguf.GGML_QUANT_SIZES[type][0] else type
        for name, pair in pairs.items()
    }
    write_header(writer, [(name, tuple(pair.shape), types[name]) for name, pair in pairs.items()])
    for name, pair in pairs.items():
        writer.write_tensor_data(quantize(pair.contiguous(), types[name]))
    writer.close()


def _check(name: str, path: Path, alpha: float, pairs: dict[str, torch.Tensor], type: Type) -> Check:
    """Compare a written file's factors with the adapter's."""
    file = GGUFFile(path)
    found = file.tensors
    lacking = [key for key in pairs if key not in found]
    if lacking:
        raise ExportError(f"{path} lacks {len(lacking)} of {len(pairs)} factors, {lacking[0]} the first")
    same_alpha = file.metadata.get(gguf.Keys.Adapter.LORA_ALPHA) == np.float32(alpha)
    worst = 0.0 if same_alpha else np.inf
    for key, pair in pairs.items():
        difference = file.read(key, torch.float32) - pair
        worst = max(worst, (difference.norm() / pair.norm().clamp_min(1e-30)).item())
    tolerance = _TOLERANCE[type]
    figures = {"factors": len(found), "of": len(pairs), "largest error": worst, "at most": tolerance}
    outcome = Outcome.DIFFERENT
    if worst <= tolerance and len(found) == len(pairs):
        outcome = Outcome.EQUAL if not worst else Outcome.CLOSE
    says = f"{len(found)} of {len(pairs)} factors, largest error {worst:.2g} of a factor's norm (at most {tolerance})"
    advice = "the adapter's values do not fit this type; take f32"
    return Check(f"{name}: adapter read back", outcome, says, figures, advice)
