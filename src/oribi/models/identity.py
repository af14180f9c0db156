"""What a loaded base model is: enough to tell later whether an adapter meets the weights that it was trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels.expert_stack import PackedStack
from oribi.kernels.packed_weight import PackedWeight, ShiftedCodes

if TYPE_CHECKING:
    from oribi.models.quantization import Quantization

AS_IN_FILE = "gguf"  # weights that lie in memory in the codes of their GGUF file
_WHOLE_BYTES = 4 << 20  # files up to this size are hashed whole
_HEAD_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_WORDS = {
    "name": "base model",
    "revision": "revision of the base",
    "weights": "the base's weights in memory",
    "train_for": "the GGUF quantisation of the base's weights",
    "chat_template_sha256": "the base's chat template (SHA-256)",
}


@dataclass(frozen=True)
class BaseIdentity:
    """A base model as it was loaded.

    Args:
        name: as the user called it.
        revision: the revision asked for, or the commit of the hub's snapshot; None for a local model.
        files: file name -> {"bytes": size, "sample_sha256": hash}, of the weights and config.json; see `fingerprint`.
        weights: how the frozen weights lay in memory: "nf4" (its scales quantised, too), "nf4, single" (they are not),
            "gguf" (the file's own codes), "float16", "bfloat16" or "float32".
        chat_template_sha256: of the tokenizer's chat template; None if it has none.
        train_for: method of the GGUF file of this base whose values the frozen weights had; None: the base's own.
    """

    name: str
    revision: str | None
    files: dict[str, dict[str, Any]]
    weights: str
    chat_template_sha256: str | None
    train_for: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaseIdentity":
        """The identity that `to_dict` wrote; fields of a later version are ignored.

        Raises:
            ModelError: a field is missing or of another type.
        """
        try:
            values = {"train_for": None, **values}  # which earlier versions did not have
            found = cls(**{field.name: values[field.name] for field in fields(cls)})
            valid = isinstance(found.name, str) and isinstance(found.weights, str)
            valid = valid and all(isinstance(entry, dict) for entry in found.files.values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"the record of a base model is damaged: {error!r}") from error
        if not valid:
            raise ModelError(f"the record of a base model is damaged: {values!r:.200}")
        return found

    @property
    def in_nf4(self) -> bool:
        """Whether linear layers were quantised to NF4."""
        return self.weights.startswith("nf4")

    @property
    def rounding(self) -> str | None:
        """What the frozen weights were rounded to after they were read; None: nothing but a dtype."""
        if self.train_for is not None:
            return f"{self.train_for} (train_for)"
        return self.weights if self.in_nf4 else None

    def differences(self, other: "BaseIdentity") -> list[str]:
        """What differs, one line per field with both values, this model's first; empty if nothing does.

        A name or revision alone makes no other model: they are told only where a file differs.
        """
        lines = self.changed_files(other)
        names = ["weights", "train_for", "chat_template_sha256"]
        if lines:
            names = ["name", "revision", *names]
        told = [(name, getattr(self, name), getattr(other, name)) for name in names]
        told = [f"{_WORDS[name]}: {ours!r}, not {theirs!r}" for name, ours, theirs in told if ours != theirs]
        return told + lines

    def changed_files(self, other: "BaseIdentity") -> list[str]:
        """A line for each file that is missing in one of the two, or differs."""
        return [
            f"{name}: {_described(self.files.get(name))}, not {_described(other.files.get(name))}"
            for name in dict.fromkeys([*self.files, *other.files])
            if self.files.get(name) != other.files.get(name)
        ]


def _described(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "no such file"
    return f"{entry.get('bytes')} bytes (SHA-256 of samples {str(entry.get('sample_sha256'))[:12]})"


def identify(
    name: str, files: Sequence[Path], model: nn.Module, revision: str | None, chat_template: Any,
    quantization: "Quantization",
) -> BaseIdentity:  # fmt: skip
    """The identity of a model that was just loaded.

    Args:
        name: as the user called it.
        files: config.json and the files of weights; those of a hub snapshot lie in a folder named by the commit.
        model: loaded from them, without adapter.
        revision: the revision asked for.
        chat_template: the tokenizer's: a text, several by name, or None.
        quantization: how it was loaded.
    """
    if revision is None:
        folders = (folder for folder in files[-1].parents if folder.parent.name == "snapshots")
        revision = next((folder.name for folder in folders), None)
    template = None if chat_template is None else hashlib.sha256(str(chat_template).encode()).hexdigest()
    entries = {path.name: fingerprint(path) for path in files}
    weights = _in_memory(model, quantization.as_in_file)
    return BaseIdentity(name, revision, entries, weights, template, quantization.train_for)


def _in_memory(model: nn.Module, as_in_file: bool) -> str:
    if as_in_file and any(isinstance(parameter, PackedWeight) for parameter in model.parameters()):
        return AS_IN_FILE
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of a part, too, which is no Params4bit
        packed = getattr(parameter, "packed", None)
        state = packed if isinstance(packed, PackedStack) else state
        if state is not None:
            return "nf4" if state.nested else "nf4, single"
    return str(model.dtype).removeprefix("torch.")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file, in milliseconds whatever its size.

    A small file is hashed whole. Of a large one the first MiB, which holds the header of tensors, and samples spread
    evenly over the rest: models of one shape have equal headers.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_HEAD_BYTES))
            for index in range(1, _SAMPLES + 1):
                file.seek(_HEAD_BYTES + (size - _HEAD_BYTES - _SAMPLE_BYTES) * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return {"bytes": size, "sample_sha256": digest.hexdigest()}


@dataclass(frozen=True)
class WeightSums:
    """What tells whether a weight in memory was changed: the sum of each row's bits, in milliseconds on a GPU.

    Args:
        dtype: of the weight.
        rows: [N] int64, one sum per row; a 4-bit weight and a vector count as one row.
    """

    dtype: torch.dtype
    rows: torch.Tensor

    def changed_rows(self, weight: torch.Tensor) -> list[int] | None:
        """Rows, of those that were summed, which have other values now; None where that cannot be told."""
        now = weight_sums(weight)
        if now is None or now.dtype != self.dtype:
            return None
        count = min(len(now.rows), len(self.rows))
        return (now.rows[:count] != self.rows[:count]).nonzero().flatten().tolist()


def weight_sums(weight: torch.Tensor) -> WeightSums | None:
    """The sums of a weight's bits; None of one that is sharded, has no storage, or follows its adapter."""
    if type(weight).__name__ == "DTensor" or weight.is_meta or getattr(weight, "is_sharded", False):
        return None
    packed = getattr(weight, "packed", None)
    if isinstance(packed, ShiftedCodes):
        return None
    if packed is not None:
        total = torch.zeros((), dtype=torch.int64, device=weight.device)
        for tensor in [*packed.tensors()][:2]:  # codes and their scales
            total = total * 31 + _row_sums(tensor).sum()
        return WeightSums(weight.dtype, total[None].cpu())
    rows = _row_sums(weight.detach())
    state = getattr(weight, "quant_state", None)
    if state is not None:
        rows = (rows.sum() * 31 + _row_sums(state.absmax).sum())[None]
    return WeightSums(weight.dtype, rows.cpu())


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.contiguous().view(torch.uint8) if weight.dim() else weight[None].view(torch.uint8)
    flat = flat.reshape(len(weight), -1) if weight.dim() > 1 and weight.shape[1] > 1 else flat.reshape(1, -1)
    for wide in (torch.int64, torch.int32, torch.int16):
        if flat.shape[1] % wide.itemsize == 0:
            flat = flat.view(wide)
            break
    return flat.sum(1, dtype=torch.int64)
