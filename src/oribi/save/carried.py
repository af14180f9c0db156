"""What a checkpoint holds beside the text decoder that was trained, carried into a merge as it is: towers for images and
sound, their projectors, and layers that draft several tokens (`mtp.*`).

A merge that carries them has the checkpoint's own names, config.json and processor, so every program that reads the one
reads the other. Tensors pass one at a time.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.errors import ExportError, ModelError
from oribi.models.checkpoint_tensors import DRAFTS, is_draft
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.files import Location, open_weights, read_json
from oribi.models.unfused import beside_decoder
from oribi.models.unwrap import base_model, is_classifier, source_of, vocab_rows
from oribi.models.wrapper import WrapperNames, classes_of, renaming, skeleton, wrapper_names
from oribi.save.base import base_name, locate_here
from oribi.save.check import Check, Outcome
from oribi.save.nf4_checkpoint import Nf4Source
from oribi.tensors import SafetensorsSource, TensorSource

_CPU = torch.device("cpu")
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# how images, sound and videos are prepared, and code that comes with the model; the tokenizer's files are written anew
_BESIDE_WEIGHTS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
)
# the numbers of drafting layers in config.json, which programs look for in the files
DRAFT_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")


@dataclass
class Carried:
    """A checkpoint around the decoder that was trained.

    Args:
        location: of its files.
        settings: its config.json.
        source: all of its tensors, by the names in its files; packed ones are read dequantised.
        text: name in the files -> the trained model's, in the files' order, then the trained tensors that they lack.
        others: names of the tensors that are carried.
        names: of the text decoder in the checkpoint's class, where the trained model has others.
        beside: modules of its class that are not the text decoder's.
    """

    location: Location
    settings: dict[str, Any]
    source: TensorSource
    text: dict[str, str]
    others: list[str]
    names: WrapperNames | None
    beside: list[str] = field(default_factory=list)

    def read(self, name: str) -> torch.Tensor:
        """One of `others` in the dtype that the files have; quantised weights in float32."""
        return self.source.read(name, _CPU, None)

    def write_config(
        self, folder: Path, model: nn.Module, tied: bool, dtype: torch.dtype, packed: dict[str, Any] | None
    ) -> None:
        """Write the checkpoint's config.json with what training changed.

        Args:
            folder: of the merge.
            model: the trained model's base.
            tied: whether head and embeddings of the merge are one.
            dtype: of its tensors.
            packed: quantization_config of the merge; None where nothing is quantised.
        """
        settings, config = copy.deepcopy(self.settings), source_of(model).config
        settings.pop("quantization_config", None)
        text, theirs = settings.get("text_config"), config.get_text_config()
        parts = [part for part in (settings, text) if isinstance(part, dict)]
        for part in parts:
            part.pop("quantization_config", None)
            part |= {
                key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in part
            }
        if not any("dtype" in key for key in settings):
            settings["dtype"] = str(dtype).removeprefix("torch.")
        changes: dict[str, Any] = {}
        rows = vocab_rows(model)
        if rows != theirs.vocab_size:
            changes["vocab_size"] = rows
        if (positions := source_of(model).positions(model.config)) is not None:
            changes |= positions
            for part in parts:
                part.pop("rope_scaling", None)
                part.pop("rope_theta", None)
        if tied != bool(getattr(config, "tie_word_embeddings", False)):
            settings["tie_word_embeddings"] = changes["tie_word_embeddings"] = tied
        for name, value in changes.items():
            places = [part for part in parts if name in part] or parts[-1:]
            for part in places:
                part[name] = value
        if not self._has_drafts(theirs.num_hidden_layers):
            for part in parts:
                part |= dict.fromkeys((name for name in DRAFT_COUNTS if part.get(name)), 0)
        if packed is not None:
            settings["quantization_config"] = packed
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def _has_drafts(self, layers: int) -> bool:
        numbers = [int(found[1]) for name in self.others if (found := re.search(r"\blayers\.(\d+)\.", name))]
        return any(name.startswith(DRAFTS) for name in self.others) or max(numbers, default=0) >= layers

    def class_name(self, name: str) -> str:
        """What the checkpoint's class calls a module of the trained model."""
        return name if self.names is None else self.names.outer(name)

    def own_name(self, stored: str) -> str | None:
        """The trained model's name for a tensor of the merge, with the parts of a packed one; None for one that is carried."""
        weight, leaf, part = stored.partition(".weight.")
        if leaf and f"{weight}.weight" in self.text:
            return f"{self.text[f'{weight}.weight']}.{part}"
        return self.text.get(stored)

    def check(self, folder: Path) -> Check:
        """Compare every carried tensor with the one that the merge holds, bit by bit."""
        written = SafetensorsSource(sorted(folder.glob("model*.safetensors")), any_dtype=True)
        shapes, name = written.shapes(), "what was not trained"
        different = [
            one
            for one in self.others
            if one not in shapes or not _same_bits(self.read(one), written.read(one, _CPU, None))
        ]
        total, same = len(self.others), len(self.others) - len(different)
        says = f"{same} of {total} tensors beside the text model are the checkpoint's, bit by bit"
        if different:
            says += f"; not {different[0]}"
        outcome = Outcome.DIFFERENT if different else Outcome.EQUAL
        return Check(name, outcome, says, {"same": same, "of": total})


def _same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.dtype != found.dtype and not expected.is_floating_point():
        return False
    expected = expected.to(found.dtype)  # quantised weights are written in the merge's dtype
    return expected.shape == found.shape and torch.equal(
        expected.reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8)
    )


def copy_beside_weights(directory: Path, folder: Path) -> None:
    """Copy the files of a checkpoint's folder that say how images and sound are prepared."""
    for pattern in _BESIDE_WEIGHTS:
        for file in directory.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def has_other_parts(config: PretrainedConfig | None) -> bool:
    """Whether a checkpoint's config is that of a text decoder among other parts."""
    return config is not None and config.get_text_config() is not config


def find_carried(model: nn.Module, shapes: Mapping[str, Any], base: str, tied: bool) -> Carried | str | None:
    """What a merge carries.

    Args:
        model: the trained model, PEFT's or plain.
        shapes: of the trained tensors by their names in the model.
        base: as for `save_merged`; a checkpoint named here carries its own parts.
        tied: whether the trained model's head and embeddings are one.

    Returns:
        None where the checkpoint has nothing else; why it cannot be had where it has.
    """
    source = source_of(model)
    if source is None or source.config is None or source.kind == "gguf" or is_classifier(model):
        return None
    composite = has_other_parts(source.config)
    beside = tuple(f"{name}." for name in beside_decoder(base_model(model)))
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(beside)}
    why = "the base's files are not here"
    for name in dict.fromkeys([base, base_name(model)]):
        if name in ("dequantized", "original", "auto"):
            continue
        try:
            location, options = locate_here(model, name)
            if location.kind != "checkpoint":
                continue
            settings = read_json(location.directory / "config.json")
            pickles = not any(location.directory.glob("*.safetensors"))
            weights = Nf4Source(open_weights(location, options, allow_pickle=pickles, any_dtype=True))
        except (ExportError, ModelError) as error:
            why = str(error)
            continue
        if composite and settings.get("model_type") != source.config.model_type:
            continue  # the text model alone
        names = (source.names or wrapper_names(source.config)) if composite else None
        in_files = _is_decoder(model, names)
        text, others = _sorted_out(weights, renaming(names), shapes, None if in_files else names, tied)
        of_class = names if in_files else None
        if not composite:
            others = [name for name in others if is_draft(name, source.config)]
            if not others:
                return None
        missing = [name for name in shapes if name not in text.values() and name != _HEAD]
        if missing:
            why = f"the files hold no {missing[0]}"
            continue
        found = Carried(location, settings, weights, text, others, of_class)
        found.beside = (
            beside_decoder(skeleton(classes_of(source.config)[0], source.config)) if composite else []
        )
        _place_of_head(found, shapes)
        return found
    return why if composite else None


def _is_decoder(model: nn.Module, names: WrapperNames | None) -> bool:
    """Whether the trained model's names are those of a text decoder by itself."""
    inner = base_model(model)
    return names is None or isinstance(inner, DecoderForCausalLM) or source_of(model).names is not None


def _sorted_out(
    weights: TensorSource, rename: Any, shapes: Mapping[str, Any], names: WrapperNames | None, tied: bool
) -> tuple[dict[str, str], list[str]]:
    """Stored tensors that the trained model has, under its names, and those to carry."""
    text, others = {}, []
    modules = {name.rpartition(".")[0] for name in shapes}
    for stored in weights.shapes():
        inner = rename(stored)
        if inner is not None and names is not None:
            inner = names.outer(inner)
        if inner in shapes:
            text[stored] = inner
        elif inner is not None and tied and inner.endswith(_HEAD):
            continue  # a copy of the embeddings
        # a weight that is written anew leaves its scales behind
        elif (inner or stored).rpartition(".")[0] not in modules and not stored.endswith(
            "rotary_emb.inv_freq"
        ):
            others.append(stored)
    return text, others


def _place_of_head(found: Carried, shapes: Mapping[str, Any]) -> None:
    """Give a head that the files do not have the name that they would."""
    head = next((name for name in shapes if name.endswith(_HEAD)), None)
    if head is None or head in found.text.values():
        return
    table = next(
        (stored for stored, inner in found.text.items() if inner.endswith("embed_tokens.weight")), ""
    )
    prefix = table.removesuffix(_EMBEDDINGS) if table.endswith(f".{_EMBEDDINGS}") else ""
    found.text[f"{prefix}{_HEAD}"] = head
