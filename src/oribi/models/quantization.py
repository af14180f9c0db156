"""Which frozen layers of a model are stored in 4 bits."""

from dataclasses import dataclass

from torch import nn

from oribi.errors import ConfigError
from oribi.models.experts import Experts
from oribi.models.mixers.gated_delta import DECAY_PROJECTIONS
from oribi.text import nearest

_HEADS = ("lm_head", "score", "classifier")  # of language models and of classifiers


@dataclass(frozen=True)
class Quantization:
    """How frozen linear layers are stored.

    Args:
        enabled: 4-bit NF4; otherwise every weight stays in the compute dtype.
        as_in_file: linear layers keep the codes of the GGUF file that they are read from; experts are packed in NF4.
        double: the scales of blocks are quantised too.
        skip: module names, or parts of them, that stay in the compute dtype besides the head, of whichever kind.
        asked: those of `skip` that the user named, each of which has to be there.
    """

    enabled: bool = True
    double: bool = True
    skip: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    as_in_file: bool = False

    def covers(self, name: str) -> bool:
        """Whether the linear layer called `name` is to be quantised."""
        return self.enabled and not any(
            _is_within(part, name) for part in (*self.skip, *_HEADS, *DECAY_PROJECTIONS)
        )

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


def _is_within(part: str, name: str) -> bool:
    """Whether a module's name holds another name between its dots."""
    return f".{part}." in f".{name}."
