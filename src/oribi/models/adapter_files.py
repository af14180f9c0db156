"""An adapter's files: the record of what it was trained on, and the check that every reader of its tensors makes.

PEFT only warns of tensors that an adapter lacks and says nothing of those that it has too many. Here both are errors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import oribi
from oribi.errors import ConfigError, ModelError
from oribi.models.files import read_json
from oribi.models.identity import BaseIdentity
from oribi.models.labels import Labels, read_labels
from oribi.models.unwrap import bare_module, base_model
from oribi.tensors import problems_in_words, read_header
from oribi.text import write_whole

RECORD_FILE = "oribi.json"
_SCHEMA = 1
# what PEFT turns settings into that it cannot work with
PEFT_REFUSALS = (
    ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError, ArithmeticError, ImportError, re.error,
)  # fmt: skip


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter was trained on; oribi.json beside adapter_config.json.

    Args:
        base: the model under it.
        max_seq_length: longest training example in tokens.
        chat_template: the tokenizer's while training: a text, several by name, or None where it is not known.
        changed: tensors of the base that had other values than its files, or () if none had.
        positions: rope_parameters and max_position_embeddings of the config, where they were not the checkpoint's.
        labels: of a sequence classifier.
        kept_in_16bit: names of linear layers of the base that were not packed.
        merges_codes: whether it was trained on the sum of base and adapter, quantised as the merged GGUF file is.
    """

    base: BaseIdentity
    max_seq_length: int
    chat_template: Any = None
    changed: tuple[str, ...] = ()
    positions: dict[str, Any] | None = None
    labels: Labels | None = None
    kept_in_16bit: tuple[str, ...] = ()
    merges_codes: bool = False

    def write(self, folder: Path) -> None:
        """Write it into an adapter's folder."""
        values = {
            "schema": _SCHEMA,
            "oribi": oribi.__version__,
            "base": self.base.to_dict(),
            "max_seq_length": self.max_seq_length,
            "chat_template": self.chat_template,
            "base_tensors_changed": list(self.changed),
            "positions": self.positions,
        }
        if self.labels is not None:
            values["labels"] = {"names": list(self.labels.names), "problem_type": self.labels.problem}
        if self.kept_in_16bit:
            values["kept_in_16bit"] = list(self.kept_in_16bit)
        if self.merges_codes:
            values["merges_codes"] = True
        write_whole(folder / RECORD_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> AdapterRecord | None:
    """An adapter's record; None for one that was written by another program.

    Raises:
        ModelError: the record is damaged, or of a later oribi.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    if values.get("schema") != _SCHEMA:
        raise ModelError(
            f"{path}: schema {values.get('schema')!r}, written by oribi {values.get('oribi')}; this oribi reads schema "
            f"{_SCHEMA}. Update oribi"
        )
    try:
        return AdapterRecord(
            BaseIdentity.from_dict(values["base"]),
            int(values["max_seq_length"]),
            values.get("chat_template"),
            tuple(values.get("base_tensors_changed", ())),
            values.get("positions"),
            _labels_of(values.get("labels")),
            tuple(map(str, values.get("kept_in_16bit", ()))),
            bool(values.get("merges_codes", False)),
        )
    except (KeyError, TypeError, ValueError, ModelError, ConfigError) as error:
        raise ModelError(
            f"{path} is damaged: {error}. Without this file the adapter loads, but nothing says what it was trained on"
        ) from error


def _labels_of(stored: Any) -> Labels | None:
    return (
        None
        if stored is None
        else read_labels(None, dict(enumerate(stored["names"])), None, stored["problem_type"])
    )


def adapter_tensors(model: PeftModel, adapter: str, *, tables: bool = False) -> dict[str, torch.Tensor]:
    """An adapter's tensors as they lie in memory, under the names that PEFT gives them in a file.

    Args:
        model: has the adapter.
        adapter: its name.
        tables: whether the whole embeddings and head are among them.
    """
    state = None  # of prompt tuning and its kin PEFT computes them
    if not model.peft_config[adapter].is_prompt_learning:
        # state_dict() would unpack the states of every 4-bit weight
        state = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
    return get_peft_model_state_dict(model, state, adapter, save_embedding_layers=tables)


def base_tables(model: Any) -> dict[str, torch.Tensor]:
    """The base's embeddings and head by their names in an adapter's file; one that is tied has two names."""
    inner = base_model(model)
    tables = {
        id(bare_module(m).weight) for m in (inner.get_input_embeddings(), inner.get_output_embeddings()) if m
    }
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in tables}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter's file, on the CPU.

    Raises:
        ModelError: the file is damaged, or holds values that are not finite.
    """
    if path.suffix == ".safetensors":
        read_header(path)
        tensors = load_file(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            raise ModelError(f"{path} holds no tensors that can be read: {error}") from error
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ModelError(
            f"{path}: {len(bad)} of {len(tensors)} tensors have values that are not finite, {bad[0]} the first. "
            "Its training diverged; use an earlier checkpoint"
        )
    return tensors


def require_exact_tensors(
    path: Path,
    found: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    optional: Mapping[str, torch.Size],
) -> None:
    """Raise unless an adapter's file has exactly the tensors that its settings ask of the model.

    Args:
        path: the file.
        found: the shapes in it.
        expected: the shapes of the adapter's tensors.
        optional: tables that it may hold besides.

    Raises:
        ModelError: a tensor is missing, has another shape, or belongs to nothing.
    """
    known = {**optional, **expected}
    problems = problems_in_words({
        "missing": [name for name in expected if name not in found],
        "belonging to no layer that the adapter's settings name": [n for n in found if n not in known],
        "of another shape": [
            f"{name} {list(found[name])}, expected {list(known[name])}"
            for name in found
            if name in known and tuple(found[name]) != tuple(known[name])
        ],
    }, most=3)  # fmt: skip
    if problems:
        raise ModelError(
            f"{path}: its tensors are not those of the adapter that adapter_config.json describes, so nothing is loaded; "
            f"{problems}"
        )


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
