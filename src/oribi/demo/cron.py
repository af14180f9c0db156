"""Cron expressions and what they mean.

Two expressions mean the same if they fire at the same moments, so the score compares meanings, not text.
An expression is five fields: minute, hour, day of month, month, day of week (0 and 7 are Sunday).
Source: crontab(5) of Vixie cron, with its rule that a day matches either day field when both are restricted.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTH_LENGTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# first and last value of each field, and the names that stand for values
FIELDS = (
    (0, 59, {}),
    (0, 23, {}),
    (1, 31, {}),
    (1, 12, {name: number for number, name in enumerate(MONTHS, start=1)}),
    (0, 7, {name: number for number, name in enumerate(WEEKDAYS)}),
)
_ATOM = r"(?:\*|[0-9]{1,2}|[A-Za-z]{3})"
_ITEM = rf"{_ATOM}(?:-{_ATOM})?(?:/[0-9]{{1,2}})?"
_FIELD = rf"{_ITEM}(?:,{_ITEM})*"
_EXPRESSION = re.compile(rf"(?<![\w*/,-]){_FIELD}(?:[ \t]+{_FIELD}){{4}}(?![\w*/,-])")


@dataclass(frozen=True)
class Meaning:
    """When an expression fires: each of its days, at each of its hours, at each of its minutes."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[
        tuple[int, int, int]
    ]  # (month, day of month, day of week); every such day occurs in 400 years


def parse_cron(expression: str) -> Meaning | None:
    """The meaning of an expression, or None if cron would refuse it or it never fires.

    Args:
        expression: five fields of numbers, names, `*`, ranges, lists and steps.
    """
    fields = expression.split()
    if len(fields) != 5:
        return None
    values = [_values(field, *FIELDS[i]) for i, field in enumerate(fields)]
    if any(v is None for v in values):
        return None
    minutes, hours, days, months, weekdays = values
    weekdays = frozenset(day % 7 for day in weekdays)
    # Vixie cron asks whether the field begins with a star, so */2 does not count as restricted
    either = not fields[2].startswith("*") and not fields[4].startswith("*")
    fired = _days(days, months, weekdays, either)
    return Meaning(minutes, hours, fired) if fired else None


def same_meaning(left: str, right: str) -> bool:
    """Whether two expressions fire at exactly the same moments; an invalid one equals nothing."""
    found = parse_cron(left)
    return found is not None and found == parse_cron(right)


def first_expression(text: str) -> str | None:
    """The first cron expression in a model's answer, which may wrap it in words, quotes or backticks."""
    match = _EXPRESSION.search(text)
    while match is not None:
        if parse_cron(match.group()) is not None:
            return match.group()
        match = _EXPRESSION.search(text, match.start() + 1)  # a word before an expression looks like a field
    return None


@cache
def _days(
    days: frozenset[int], months: frozenset[int], weekdays: frozenset[int], either: bool
) -> frozenset[tuple[int, int, int]]:
    matches = (lambda d, w: d or w) if either else (lambda d, w: d and w)
    return frozenset(
        (month, day, weekday)
        for month, weekday in product(sorted(months), range(7))
        for day in range(1, MONTH_LENGTHS[month - 1] + 1)
        if matches(day in days, weekday in weekdays)
    )


def _values(field: str, low: int, high: int, names: dict[str, int]) -> frozenset[int] | None:
    found: set[int] = set()
    for item in field.split(","):
        span, slash, step = item.partition("/")
        first, dash, last = span.partition("-")
        if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
            return None
        if first == "*":
            if dash:
                return None
            start, end = low, high
        else:
            start = _value(first, names)
            end = _value(last, names) if dash else (high if slash else start)
        if start is None or end is None or not low <= start <= end <= high:
            return None
        found.update(range(start, end + 1, int(step) if slash else 1))
    return frozenset(found)


def _value(text: str, names: dict[str, int]) -> int | None:
    if text.isascii() and text.isdigit():
        return int(text)
    return names.get(text.lower())
