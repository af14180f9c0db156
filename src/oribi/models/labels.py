"""What a sequence classifier tells apart: its labels, as callers, config.json and an adapter's record name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from oribi.errors import ConfigError
from oribi.models.fields import is_whole
from oribi.text import shown

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
# what classes of transformers call the module that makes scores; PEFT trains and saves these whole
HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Labels:
    """What a classifier tells apart.

    Args:
        names: of the labels, by their number.
        problem: one of `PROBLEMS`; None: the first loss takes it from the dtype of its labels.
    """

    names: tuple[str, ...]
    problem: str | None = None

    def write(self, config: PretrainedConfig) -> None:
        """Puts the labels into a config, as transformers reads them."""
        config.num_labels = len(self.names)
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: number for number, name in enumerate(self.names)}
        if self.problem is not None:
            config.problem_type = self.problem


def read_labels(
    num_labels: int | None = None,
    id2label: Mapping[Any, str] | None = None,
    label2id: Mapping[str, Any] | None = None,
    problem_type: str | None = None,
) -> Labels | None:
    """The labels that a caller asks for; None where nothing is given.

    Args:
        num_labels: how many; 1 is a regression or a reward.
        id2label, label2id: their names by number, or their numbers by name. Without both they are LABEL_0, LABEL_1, ...
        problem_type: one of `PROBLEMS`.

    Raises:
        ConfigError: they contradict each other, or are no labels.
    """
    if num_labels is None and not id2label and not label2id:
        if problem_type is not None:
            raise ConfigError(f"problem_type = {problem_type!r} is a classifier's; give num_labels too")
        return None
    if problem_type not in (None, *PROBLEMS):
        raise ConfigError(f"problem_type = {problem_type!r}; allowed are {', '.join(PROBLEMS)}")
    try:
        by_number = {int(number): str(name) for number, name in (id2label or {}).items()}
        other = {int(number): str(name) for name, number in (label2id or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "id2label maps numbers to names and label2id names to numbers, such as id2label={0: 'no', 1: 'yes'}; "
            f"given are {shown(id2label)} and {shown(label2id)}"
        ) from error
    if by_number and other and by_number != other:
        raise ConfigError(f"id2label {by_number} and label2id {label2id} name different labels")
    names = by_number or other
    count = len(names) if num_labels is None else num_labels
    if not is_whole(count, 1):
        raise ConfigError(f"num_labels = {num_labels!r}: must be a whole number of at least 1")
    names = names or {number: f"LABEL_{number}" for number in range(count)}
    if sorted(names) != list(range(count)):
        raise ConfigError(
            f"num_labels = {count}, and id2label names {sorted(names)}; give a name for each number from 0"
        )
    return Labels(tuple(names[number] for number in range(count)), problem_type)


def stored_labels(config: PretrainedConfig) -> Labels | None:
    """The labels of a checkpoint that is a classifier; None for one of another kind."""
    architectures = config.architectures
    named = isinstance(architectures, list) and architectures and str(architectures[0])
    if not (named and named.endswith("ForSequenceClassification")):
        return None
    names = {int(number): str(name) for number, name in config.id2label.items()}
    return Labels(tuple(names[number] for number in sorted(names)), config.problem_type)
