"""What an adapter's files say, without its base model: settings, sizes, and how far training moved each kind of layer."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from oribi.errors import ModelError
from oribi.models.adapter_config import read_adapter_config, read_adapter_settings
from oribi.models.adapter_files import read_record, read_tensors
from oribi.models.files import HubOptions, Location, adapter_weights, locate
from oribi.models.open import open_model
from oribi.models.plain_peft import try_in_plain_peft
from oribi.models.wrapper import wrapper_names

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$"
)


@dataclass
class Kind:
    """Layers of one name: how many, their trained parameters, and the mean norm of scale * B A."""

    count: int = 0
    parameters: int = 0
    norm: float = 0.0


@dataclass
class AdapterContents:
    """One adapter.

    Args:
        name: as asked for. path: its file of weights. settings: adapter_config.json.
        kinds: last part of the layers' names -> figures.
        other: parameters that are no LoRA factor, such as trained embeddings.
        problems: what looks wrong, one line each.
        trained_on: how the base's weights lay in memory; None where no record says it.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    kinds: dict[str, Kind] = field(default_factory=dict)
    other: int = 0
    problems: list[str] = field(default_factory=list)
    trained_on: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is worth knowing, by name."""
        s = self.settings
        variant = [name for name in ("use_rslora", "use_dora") if s.get(name)]
        return {
            "adapter": self.name,
            "file": str(self.path),
            "base model": s.get("base_model_name_or_path"),
            "trained on": self.trained_on or "not known (no oribi.json)",
            "kind": " ".join([str(s.get("peft_type", "LORA")), *variant]),
            "rank": _with_pattern(s.get("r"), s.get("rank_pattern")),
            "alpha": _with_pattern(s.get("lora_alpha"), s.get("alpha_pattern")),
            "dropout": s.get("lora_dropout"),
            "trained in full": ", ".join(s.get("modules_to_save") or []),
            "parameters": sum(kind.parameters for kind in self.kinds.values()) + self.other,
        }


def read_adapter(name: str) -> AdapterContents:
    """An adapter's contents.

    Args:
        name: folder of an adapter or a run, or hub name.

    Raises:
        ModelError: it is no adapter, or lacks tensors or has too many.
    """
    location = locate(name, HubOptions())
    if location.kind != "adapter":
        raise ModelError(
            f"{name} is not an adapter: it has no adapter_config.json; `oribi inspect model` shows models"
        )
    path = adapter_weights(location, HubOptions())
    found = AdapterContents(name, path, read_adapter_settings(location))
    record = read_record(location.directory)
    found.trained_on = None if record is None else f"{record.base.weights} weights"
    tensors = read_tensors(path)
    _require_whole(location, tensors, found.problems)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match is None:
            found.other += tensor.numel()
        else:
            pairs.setdefault(match["layer"], {})[match["factor"]] = tensor.float()
    unmoved = 0
    for layer, pair in pairs.items():
        kind = found.kinds.setdefault(layer.rpartition(".")[2], Kind())
        kind.count += 1
        kind.parameters += pair["A"].numel() + pair["B"].numel()
        norm = _scale(found.settings, layer, pair["A"]) * product_norm(pair["B"], pair["A"])
        unmoved += norm == 0
        kind.norm += norm
    for kind in found.kinds.values():
        kind.norm /= kind.count
    if pairs and unmoved:
        found.problems.append(
            f"{unmoved} of {len(pairs)} layers are as they were before training (B is zero)"
        )
    return found


def _require_whole(location: Location, tensors: dict[str, torch.Tensor], problems: list[str]) -> None:
    """Raise over tensors that the adapter lacks or has too many, by its base's config.json or else by themselves."""
    settings = read_adapter_config(location)
    try:
        config = open_model(location.name, HubOptions(local_files_only=True)).whole
    except ModelError as error:
        problems.append(f"not compared with its base, only with its own settings: {error}")
        _require_pairs(location, tensors, settings)
        return
    names = wrapper_names(config) if config.get_text_config() is not config else None
    if names is not None and not names.are_in(tensors):
        problems.append(
            f"its names are those of the text decoder alone: plain PEFT and vLLM build {names.class_name}, where it does "
            "nothing. oribi reads it; `oribi export --to adapter` writes it with that class's names"
        )
        config, names = config.get_text_config(), None
    why = try_in_plain_peft(config, names, settings, tensors, location.name)
    if why is not None:
        problems.append(f"not compared with its base, only with its own settings: {why}")
        _require_pairs(location, tensors, settings)


def _require_pairs(location: Location, tensors: dict[str, torch.Tensor], settings: Any) -> None:
    """Raise unless each layer has all the factors that an adapter with these settings has."""
    layers: dict[str, set[str]] = {}
    for key in tensors:
        if match := re.match(r"(.+)\.lora_(\w+?)(?:\.weight)?$", key):
            layers.setdefault(match[1], set()).add(match[2].removeprefix("embedding_"))
    wanted = {"A", "B"} | ({"magnitude_vector"} if getattr(settings, "use_dora", False) else set())
    lacking = [
        f"{layer} lacks {', '.join(sorted(wanted - has))}" for layer, has in layers.items() if wanted - has
    ]
    if not tensors or lacking:
        what = "it holds no tensors" if not tensors else f"{len(lacking)} layers are incomplete: {lacking[0]}"
        raise ModelError(f"{location.name}: {what}")


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Frobenius norm of b @ a, from the small products: |BA|^2 = trace(B^T B A A^T)."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def _with_pattern(usual: Any, pattern: dict[str, Any] | None) -> Any:
    """A value of all layers, with those of single layers behind it."""
    return f"{usual} ({', '.join(f'{k} {v}' for k, v in pattern.items())})" if pattern else usual


def _scale(settings: dict[str, Any], layer: str, a: torch.Tensor) -> float:
    pattern = settings.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), layer), settings.get("lora_alpha", len(a)))
    return alpha / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
