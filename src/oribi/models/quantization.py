"""Which frozen layers of a model are stored in 4 bits."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from oribi.errors import ConfigError
from oribi.gguf.names import family_in_gguf
from oribi.models.experts import SHARED_GATE, Experts
from oribi.models.mixers.gated_delta import DECAY_PROJECTIONS
from oribi.models.open import OpenedModel
from oribi.text import nearest

_HEADS = ("lm_head", "score", "classifier")  # of language models and of classifiers


@dataclass(frozen=True)
class Quantization:
    """How frozen linear layers are stored.

    Args:
        enabled: 4-bit NF4; otherwise every weight stays in the compute dtype.
        as_in_file: linear layers and experts keep the codes of the GGUF file that they are read from, or will be written to.
        double: the scales of blocks are quantised too.
        skip: module names, or parts of them, that stay in the compute dtype besides the head, of whichever kind.
        train_for: method of the GGUF file whose values every weight gets; None: a checkpoint's own.
        asked: those of `skip` that the user named, each of which has to be there.
    """

    enabled: bool = True
    double: bool = True
    skip: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    as_in_file: bool = False
    train_for: str | None = None

    def covers(self, name: str) -> bool:
        """Whether the linear layer called `name` is to be quantised."""
        return self.enabled and not any(
            _is_within(part, name) for part in (*self.skip, *_HEADS, *DECAY_PROJECTIONS, SHARED_GATE)
        )

    def kept_stacks(self, types: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Of the stacks of experts that a source has in codes, those that stay in them.

        Args:
            types: names of the stacks, each with the types of an expert's matrices. MXFP4 stays in any case, other types only
                where linear layers keep a file's codes too.
        """
        return {
            name: kinds
            for name, kinds in types.items()
            if self.covers(name.rpartition(".")[0]) and (self.as_in_file or "MXFP4" in kinds)
        }

    def packs_stack(self, name: str) -> bool:
        """Whether the stacks of the experts called `name` are packed in NF4 where their codes are not kept."""
        return self.train_for is None and self.covers(name)

    def kept(self, model: nn.Module) -> list[str]:
        """Names of a model's linear layers that the user keeps in the compute dtype.

        Raises:
            ConfigError: a name stands for none.
        """
        linear = [name for name, layer in model.named_modules() if type(layer) in (nn.Linear, Experts)]
        for part in self.asked:
            if not any(_is_within(part, name) for name in linear):
                leaves = sorted({name.rpartition(".")[2] for name in linear} - {*_HEADS})
                near = nearest(part, leaves)
                raise ConfigError(
                    f"keep_in_16bit: the model has no linear layer {part!r}"
                    + (f"; did you mean {near}?" if near else ".")
                    + f" It has {', '.join(leaves)}; a layer is named layers.0, a part of it layers.0.mlp"
                )
        return [name for name in linear if any(_is_within(part, name) for part in self.asked)]


def require_codable(opened: OpenedModel, full_finetuning: bool, classifies: bool) -> None:
    """Raise unless `train_for` can give a model's frozen weights the values of a GGUF file.

    Args:
        opened: the model, of which only the small files are read.
        full_finetuning, classifies: whether every weight is trained, and whether it is a sequence classifier.

    Raises:
        ConfigError: its weights are quantised already, none of its weights is frozen, or it classifies.
        ExportError: it has no GGUF files.
    """
    name, stored = opened.location.name, opened.stored()
    if full_finetuning:
        raise ConfigError("train_for: full_finetuning has no frozen weights; leave one of them out")
    if classifies:
        raise ConfigError(
            "train_for: llama.cpp reads no classifier's scores, so a classifier has no GGUF file"
        )
    if opened.gguf is not None:
        raise ConfigError(
            f"train_for: {name} is a GGUF file, whose own codes are trained on and served; leave train_for out"
        )
    if isinstance(stored, dict) or opened.keeps_mxfp4:
        how = "NF4" if isinstance(stored, dict) else "MXFP4"
        raise ConfigError(f"train_for: {name} is quantised already, to {how}; give the 16-bit checkpoint")
    family_in_gguf(opened.config)


def _is_within(part: str, name: str) -> bool:
    """Whether a module's name holds another name between its dots."""
    return f".{part}." in f".{name}."
