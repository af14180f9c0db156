"""One line of the self-test's table."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was compared and how far apart it was.

    Args:
        group: heading it stands under.
        name: what was compared.
        error: the measured error; nan where the comparison itself failed.
        limit: what is allowed; 0 asks for equality to the bit.
        note: what else is worth knowing, or why it failed.
    """

    group: str
    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        # nan is never at most anything
        return self.error <= self.limit


def broken(group: str, name: str, error: Exception) -> Check:
    """A comparison that ended in an exception."""
    lines = str(error).splitlines()
    return Check(group, name, math.nan, 0.0, f"{type(error).__name__}: {lines[0] if lines else ''}")
