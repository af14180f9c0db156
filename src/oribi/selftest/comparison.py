"""One line of the self-test's table."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """What was compared and how far apart it was.

    Args:
        group: heading of the line.
        name: what was compared.
        error: the measured error; nan if the comparison itself failed.
        limit: the largest error allowed; 0 requires bit-equality.
        note: what else is worth knowing, or why the comparison failed.
    """

    group: str
    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for nan


def failed(group: str, name: str, error: Exception) -> Comparison:
    """A comparison that ended in an exception, so that the other lines can still be measured."""
    lines = str(error).splitlines()
    return Comparison(group, name, math.nan, 0.0, f"{type(error).__name__}: {lines[0] if lines else ''}")
