"""The outcome of a check: what was compared, in one word, in figures, and in words that a user understands."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Outcome(str, Enum):
    """What a check found.

    `EQUAL` and `CLOSE` need evidence: where nothing could be compared, a check is `NOT_TESTED`, never equal.
    """

    EQUAL = "equal"  # what was written answers as the trained model does
    CLOSE = "close"  # it differs by no more than its format may; the figures say how much
    DIFFERENT = "different"  # it is not what was trained, and is refused
    NOT_TESTED = "not tested"  # the check ran and found nothing to compare
    NOT_RUN = "not run"  # the check itself could not run; `Check.says` gives the reason

    __str__ = str.__str__


# the worst outcome decides; checks that were not made count only where there are no others
_WORST_FIRST = (Outcome.DIFFERENT, Outcome.CLOSE, Outcome.EQUAL, Outcome.NOT_RUN, Outcome.NOT_TESTED)


class NotTested(Exception):
    """A comparison has nothing to compare with; the message says why."""


@dataclass
class Check:
    """One comparison.

    Args:
        name: what was compared.
        outcome: its result.
        says: the finding in words: percentages with their number of places, "n of m", or why nothing was compared.
        figures: the same for programs.
        advice: what to do where the outcome is different.
    """

    name: str
    outcome: Outcome
    says: str
    figures: dict[str, Any] = field(default_factory=dict)
    advice: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing different was found."""
        return self.outcome is not Outcome.DIFFERENT

    def line(self) -> str:
        """The check in one line."""
        advice = "" if self.passed or not self.advice else f". {self.advice}"
        return f"{self.outcome:<10} {self.name}: {self.says}{advice}"

    def to_json(self) -> dict[str, Any]:
        """The fields, with "passed"; `advice` only where it applies."""
        found = {**asdict(self), "outcome": str(self.outcome), "passed": self.passed}
        if self.passed or not self.advice:
            del found["advice"]
        return found


def overall(checks: Iterable[Check]) -> Outcome:
    """The outcome of several checks together: the worst that was found; `NOT_TESTED` where there are none."""
    found = {check.outcome for check in checks}
    return next((outcome for outcome in _WORST_FIRST if outcome in found), Outcome.NOT_TESTED)


def verdict(checks: Iterable[Check]) -> str:
    """`overall` in words, with what was not tested or not run: "equal (1 check not run)"."""
    checks = list(checks)
    if not checks:
        return "not checked"
    missing = [
        f"{count} {'check' if count == 1 else 'checks'} {outcome}"
        for outcome in (Outcome.NOT_RUN, Outcome.NOT_TESTED)
        if (count := sum(check.outcome is outcome for check in checks))
    ]
    found = overall(checks)
    if found in (Outcome.NOT_RUN, Outcome.NOT_TESTED):
        return str(found)
    return f"{found} ({', '.join(missing)})" if missing else str(found)


def percent(share: float) -> str:
    """A share in per cent, rounded so that only a whole is 100 %: 0.9996 -> "99.9 %"."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    if 0.01 <= share <= 0.99:
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"
