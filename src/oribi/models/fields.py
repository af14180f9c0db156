"""Values of the fields of a model's JSON files: what each may be, in words and as a check."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oribi.text import shown

MOST = 2**31 - 1  # of any whole number


@dataclass(frozen=True)
class Field:
    """What a field may hold: in words, behind "must be", and as a check."""

    allowed: str
    fits: Callable[[Any], bool]


def is_whole(value: Any, low: float = 0, high: float = MOST) -> bool:
    """Whether a value is an int, and no bool, from `low` to `high`."""
    return type(value) is int and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a finite int or float, and no bool, from `low` to `high`."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def are(values: Any, *kinds: type) -> bool:
    """Whether a value is a list of values of these types."""
    return isinstance(values, (list, tuple)) and all(type(value) in kinds for value in values)


def each(values: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is a list, each item of which fits."""
    return isinstance(values, list) and all(map(fits, values))


def whole_from(low: int = 0, high: int = MOST) -> Field:
    """A whole number."""
    return Field(f"a whole number from {low:,} to {high:,}", lambda value: is_whole(value, low, high))


def number_from(low: float, high: float) -> Field:
    """A number, whole or not."""
    bounds = f"from {low:g} to {high:g}".replace("e+0", "e").replace("e-0", "e-")
    return Field(f"a number {bounds}", lambda value: is_number(value, low, high))


def field_problems(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> list[str]:
    """A line for each field that is set to what it may not hold."""
    return [
        f"{name} = {shown(settings[name])}: must be {field.allowed}"
        for name, field in fields.items()
        if settings.get(name) is not None and not field.fits(settings[name])
    ]


BOOLEAN = Field("true or false", lambda value: isinstance(value, bool))
