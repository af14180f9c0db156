"""Words for numbers, days, months and times of day, as people write them."""

from collections.abc import Sequence
from dataclasses import dataclass

MONTH_NAMES = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAY_NAMES = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
ORDINAL_WORDS = (
    "", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth",
)  # fmt: skip


@dataclass(frozen=True)
class Wordings:
    """Ways to say one thing: those used in training texts, and those reserved for held-out texts."""

    seen: Sequence[str]
    unseen: Sequence[str] = ()


def number(value: int) -> tuple[str, ...]:
    """15 -> ("15", "fifteen")."""
    if value < len(NUMBER_WORDS):
        return str(value), NUMBER_WORDS[value]
    return (str(value),)


def ordinal(value: int) -> tuple[str, ...]:
    """3 -> ("3rd", "third")."""
    suffix = "th" if 10 <= value % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    short = f"{value}{suffix}"
    return (short, ORDINAL_WORDS[value]) if value < len(ORDINAL_WORDS) else (short,)


def listing(items: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def time_of_day(hour: int, minute: int) -> Wordings:
    """Ways to write a time, 12 and 24 hours, in figures and in words."""
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    seen = [f"{hour:02d}:{minute:02d}", f"{twelve}:{minute:02d} {half}", f"{twelve}:{minute:02d}{half}"]
    unseen = [f"{hour:02d}h{minute:02d}", f"{twelve}.{minute:02d} {half}"]
    if minute == 0:
        seen += [f"{twelve} {half}", f"{twelve}{half}", f"{twelve} {half.upper()}"]
        unseen += [f"{NUMBER_WORDS[twelve]} {half}"]
        if hour in (0, 12):
            seen += ["midnight"] * 2 if hour == 0 else ["noon", "midday"]
        elif hour >= 5:  # people do not call one to four o'clock morning
            seen.append(f"{twelve} o'clock {part}")
            unseen.append(f"{NUMBER_WORDS[twelve]} {part}")
    elif hour >= 5 and hour != 12:
        if minute == 15:
            seen.append(f"quarter past {NUMBER_WORDS[twelve]} {part}")
        if minute == 30:
            seen.append(f"half past {twelve} {part}")
            unseen.append(f"half past {NUMBER_WORDS[twelve]} {part}")
        if minute == 45 and hour not in (11, 17, 23):
            seen.append(f"quarter to {NUMBER_WORDS[twelve % 12 + 1]} {part}")
    return Wordings(seen, unseen)


def hour_of_day(hour: int) -> Wordings:
    """Ways to name a full hour as the end of a range."""
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    seen = (f"{twelve} {half}", f"{twelve}{half}", f"{hour:02d}:00", f"{twelve}:00 {half}")
    return Wordings(seen, (f"{NUMBER_WORDS[twelve]} {half}",))
