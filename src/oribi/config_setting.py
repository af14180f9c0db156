"""One setting of a run config: what it may be, what it is by default, and which stages of training use it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oribi.config_yaml import parse_word
from oribi.text import one_of

MOST = 2**31 - 1  # of whole numbers without a limit of their own
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
# what is trained: sft on examples; the others on preferences, judged answers or rewards, with TRL's trainers
STAGES = ("sft", "dpo", "orpo", "kto", "reward", "grpo")
SFT_ONLY = STAGES[:1]


@dataclass(frozen=True)
class Setting:
    """One field of `RunConfig`.

    Args:
        kind: bool, int, float or str, of one item. container: list or dict where it holds several, else None.
        optional: whether it may be left open (None).
        default: in a config file. python: of the Python calls that take it, where TRL's or Unsloth's value is kept.
        help: what it means, on one line.
        low, high: the least and the most that it may be. below: what it must stay below.
        choices: the words that it may be. same: other words -> the choice that they mean.
        stages: stage -> default there, where it is another one. used_by: the stages that use it.
    """

    name: str
    kind: type
    container: type | None
    optional: bool
    default: Any
    python: Any
    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, Any] = field(default_factory=dict)
    used_by: tuple[str, ...] = STAGES

    def default_of(self, stage: str) -> Any:
        """The default in a config file of a stage."""
        default = self.stages.get(stage, self.default)
        return list(default) if isinstance(default, list) else default

    @property
    def is_words(self) -> bool:
        """Whether it is a name or names, read as written; one that may be true or false as well is read as YAML."""
        return self.kind is str and "true" not in self.choices

    def check(self, value: Any) -> tuple[Any, str | None]:
        """A value as the setting's type, and what is allowed if the setting may not be this."""
        converted, expected = self._convert(value)
        expected = expected or self._outside(converted)
        if expected is not None and isinstance(value, str) and not self.is_words:
            unquoted = parse_word(value)
            if not isinstance(unquoted, str) and self.check(unquoted)[1] is None:
                expected += "; write it without the quotes"
        return converted, expected

    def _convert(self, value: Any) -> tuple[Any, str | None]:
        if self.container is dict:
            return _pairs(value)
        if self.container is list:
            one = self._word if self.kind is str else self._number
            found = [one(item) for item in (value if isinstance(value, list) else [value])]
            problem = next((problem for _, problem in found if problem), None)
            return [item for item, _ in found], problem and problem.replace(
                "one name", "a name or a list of names"
            )
        if self.kind is bool:
            return (value, None) if isinstance(value, bool) else (None, "must be true or false")
        return self._word(value) if self.kind is str else self._number(value)

    def _number(self, value: Any) -> tuple[float | int | None, str | None]:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # a whole number of hundreds of digits is no float
        finite = number and (isinstance(value, float) or value.bit_length() < 1000) and math.isfinite(value)
        if self.kind is float:
            return (float(value), None) if finite else (None, "must be a number")
        whole = number and (isinstance(value, int) or (finite and value == int(value)))
        return (int(value), None) if whole else (None, "must be a whole number")

    def _word(self, value: Any) -> tuple[str | None, str | None]:
        if isinstance(value, bool) and "true" in (*self.choices, *self.same):
            value = str(value).lower()
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return None, "must be one name"
        text = str(value)
        if not text.strip():
            return None, "is empty; write one name, or leave the line out"
        if not text.isprintable():  # names of files with a NUL, say
            return None, "must be one name without control characters"
        return self.same.get(text.lower(), text), None

    def _outside(self, value: Any) -> str | None:
        if self.choices and value is not None:
            items = value if isinstance(value, list) else [value]
            wrong = [item for item in items if item not in self.choices]
            if wrong:
                return one_of(wrong[0], self.choices)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            high = MOST if self.high is None and isinstance(value, int) else self.high
            if self.low is not None and not value >= self.low:
                return f"must be at least {self.low:g}"
            if self.below is not None and not value < self.below:
                return f"must be below {self.below:g}"
            if high is not None and not value <= high:
                return f"must be at most {high:,}"
        return None

    def schema(self) -> dict[str, Any]:
        """What a value may be, as JSON schema."""
        bounds = {"minimum": self.low, "maximum": self.high, "exclusiveMaximum": self.below}
        choices: list[Any] = [*self.choices, *self.same]
        if self.container is list:
            item = {"enum": choices} if choices else {"type": _JSON_TYPES[self.kind]}
            shape: dict[str, Any] = {
                "anyOf": [{"type": "array", "items": item}, item]
            }  # one name may stand alone
        elif self.container is dict:
            shape = {"type": "object", "additionalProperties": {"type": "string"}}
        elif choices:
            booleans = {"true": True, "false": False}
            shape = {"enum": [*choices, *(booleans[choice] for choice in choices if choice in booleans)]}
        else:
            limits = {name: bound for name, bound in bounds.items() if bound is not None}
            shape = {"type": _JSON_TYPES[self.kind], **limits}
        return {"anyOf": [shape, {"type": "null"}]} if self.optional else shape


def _pairs(value: Any) -> tuple[dict[str, str] | None, str | None]:
    """A mapping of names, which flags may write as name=name."""
    found: dict[Any, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and "=" in item:
            item = dict([item.split("=", 1)])
        found |= item if isinstance(item, dict) else {None: None}
    if not all(isinstance(name, str) and name for pair in found.items() for name in pair):
        return None, "must be pairs of names, {ours: yours}, or ours=yours as a flag"
    return found or None, None
