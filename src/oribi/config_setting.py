"""One setting of a run config: what it may be, what it is by default, and which stages of training use it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oribi.config_yaml import parse_word
from oribi.text import one_of, shown

MOST = 2**31 - 1  # of whole numbers without a limit of their own
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
# what is trained: sft on examples; the others on preferences, judged answers or rewards, with TRL's trainers
STAGES = ("sft", "dpo", "orpo", "kto", "reward", "grpo")
SFT_ONLY = STAGES[:1]
# methods of GGUF files all of whose types are kept in memory as codes, and other names of them
KEPT_CODES = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0")
OTHER_CODES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}
# keys of a data set that is written as a mapping
SOURCE_KEYS = (
    "path", "name", "split", "revision", "weight", "columns", "role_aliases", "text_field", "max_rows",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One field of `RunConfig`.

    Args:
        kind: bool, int, float or str, of one item, or Any. container: list or dict where it holds several, else None.
        optional: whether it may be left open (None).
        default: in a config file. python: of the Python calls that take it, where TRL's or Unsloth's value is kept.
        help: what it means, on one line.
        low, high: the least and the most that it may be. below: what it must stay below.
        sources: whether an item may be a data set with settings of its own, as a mapping with `SOURCE_KEYS`.
        joined: whether one text may hold several pairs, or names of modules, joined by commas.
        choices: the words that it may be. same: other words -> the choice that they mean. pattern: of further words.
        instead: words of other settings -> what to write.
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
    instead: Mapping[str, str] = field(default_factory=dict)
    pattern: str = ""
    sources: bool = False
    joined: bool = False
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

    def allowed(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return ", ".join(self.choices)
        kind = {bool: "true, false", int: "whole number", float: "number", str: "name"}.get(
            self.kind, "value"
        )
        if self.container is list:
            kind = f"a {kind} or a list of {kind}s" + ", or mappings with a path" * self.sources
        elif self.container is dict:
            kind = "pairs of names" if self.kind is str else f"pairs of a name and a {kind}"
        limits = [
            f"from {self.low:,g}" if self.low is not None else "",
            f"below {self.below:g}" if self.below is not None else "",
            f"up to {self.high:,}" if self.high is not None else "",
        ]
        return " ".join([kind, *filter(None, limits)])

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
            return self._pairs(value)
        if self.container is list:
            items = value if isinstance(value, list) else [value]
            if self.joined:
                items = [part for item in items for part in _names_of(item)]
            found = [self._item(item) for item in items]
            problem = next((problem for _, problem in found if problem), None)
            return [item for item, _ in found], problem and problem.replace(
                "one name", "a name or a list of names"
            )
        return self._item(value)

    def _item(self, value: Any) -> tuple[Any, str | None]:
        if self.kind is bool:
            return (value, None) if isinstance(value, bool) else (None, "must be true or false")
        if self.kind is Any:
            return value, None
        if self.sources and isinstance(value, dict):
            return _source(value)
        return self._word(value) if self.kind is str else self._number(value)

    def _pairs(self, value: Any) -> tuple[dict[str, Any] | None, str | None]:
        """A mapping of names, which flags may write as name=value."""
        words = self.kind is str
        example = "{ours: yours}, or ours=yours" if words else "{name: value}, or name=value"
        found: dict[Any, Any] = {}
        items = value if isinstance(value, list) else [value]
        if self.joined:
            items = [
                part for item in items for part in (item.split(",") if isinstance(item, str) else [item])
            ]
        for item in items:
            if isinstance(item, str) and "=" in item:
                name, _, text = (part.strip() for part in item.partition("="))
                item = {name: text if words else parse_word(text)}
            found |= item if isinstance(item, dict) else {None: None}
        if not all(isinstance(name, str) and name for name in found):
            return None, f"must be pairs of {'names' if words else 'a name and a value'}, {example} as a flag"
        for name, one in found.items():
            converted, expected = self._item(one)
            if expected is not None or (words and not isinstance(one, str)):
                return (
                    None,
                    f"must be pairs of names, {example} as a flag" if words else f"{name}: {expected}",
                )
            found[name] = converted
        return found or None, None

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
        several = value.values() if isinstance(value, dict) else value
        items = [value] if self.container is None or value is None else list(several)
        if self.choices and value is not None:
            wrong = [
                item
                for item in items
                if item not in self.choices and not re.fullmatch(self.pattern, str(item))
            ]
            if wrong:
                return self.instead.get(str(wrong[0])) or one_of(wrong[0], self.choices)
        problems = (self._outside_limits(item) for item in items)
        return next((problem for problem in problems if problem), None)

    def _outside_limits(self, value: Any) -> str | None:
        if self.kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
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
            item: dict[str, Any] = {"enum": choices} if choices else {"type": _JSON_TYPES[self.kind]}
            if self.sources:
                source = {
                    "type": "object",
                    "properties": dict.fromkeys(SOURCE_KEYS, True),
                    "required": ["path"],
                }
                item = {"anyOf": [item, {**source, "additionalProperties": False}]}
            shape: dict[str, Any] = {
                "anyOf": [{"type": "array", "items": item}, item]
            }  # one name may stand alone
        elif self.container is dict:
            values = {"type": _JSON_TYPES[self.kind]} if self.kind in _JSON_TYPES else True
            shape = {"type": "object", "additionalProperties": values}
        elif choices:
            booleans = {"true": True, "false": False}
            shape = {"enum": [*choices, *(booleans[choice] for choice in choices if choice in booleans)]}
            if self.pattern:
                shape = {"anyOf": [shape, {"type": "string", "pattern": f"^{self.pattern}$"}]}
        else:
            limits = {name: bound for name, bound in bounds.items() if bound is not None}
            shape = {"type": _JSON_TYPES[self.kind], **limits}
        return {"anyOf": [shape, {"type": "null"}]} if self.optional else shape


def _names_of(item: Any) -> list[Any]:
    """Names that one text joins by commas, as flags of other tools have them; an expression with a comma stays one."""
    joined = isinstance(item, str) and "," in item and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", item.strip())
    return [part.strip() for part in item.split(",")] if joined else [item]


def _source(given: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """A data set with settings of its own."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = {"dataset_text_field": "text_field", "source": "path"}.get(key, key)
        if name not in SOURCE_KEYS:
            return None, f"a data set has no {key!r}; {one_of(str(key), SOURCE_KEYS)}"
        if value is None:
            continue
        value = parse_word(value) if name in ("weight", "max_rows") and isinstance(value, str) else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "weight":
            right = number and value > 0 and math.isfinite(value)
        elif name == "max_rows":
            right = isinstance(value, int) and number and value > 0
        elif name in ("columns", "role_aliases"):
            right = isinstance(value, Mapping) and all(isinstance(x, str) for x in [*value, *value.values()])
        else:
            right = isinstance(value, str) and bool(value.strip())
        if not right:
            kinds = {"weight": "a number above 0", "max_rows": "a whole number above 0"}
            pairs = "pairs of names, {ours: yours}" if name in ("columns", "role_aliases") else "one name"
            return None, f"{key} = {shown(value)}: must be {kinds.get(name, pairs)}"
        found[name] = value
    return found, None if "path" in found else "a data set needs a path: a file, a folder or a hub name"
