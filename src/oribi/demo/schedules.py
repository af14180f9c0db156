"""Schedules made of two clauses, a time and a day, each with its cron fields and the ways to say it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from oribi.demo.clock import (
    MONTH_NAMES,
    WEEKDAY_NAMES,
    Wordings,
    hour_of_day,
    listing,
    number,
    ordinal,
    time_of_day,
)


@dataclass(frozen=True)
class Time:
    """Minute and hour of a schedule."""

    minute: str
    hour: str
    wordings: Wordings
    often: bool  # several times an hour or a day, so "every day" need not be said


@dataclass(frozen=True)
class Day:
    """Day of month, month and day of week of a schedule."""

    day: str
    month: str
    weekday: str
    wordings: Wordings


def pick(rng: Random, wordings: Wordings, unseen: bool) -> str:
    """One wording; an unseen one where asked for and there is one."""
    return rng.choice(wordings.unseen if unseen and wordings.unseen else wordings.seen)


def a_minute(rng: Random) -> int:
    return rng.choice((0, 0, 0, 0, 0, 30, 30, 30, 15, 45, rng.randrange(5, 60, 5), rng.randrange(60)))


def an_hour_range(rng: Random, unseen: bool) -> tuple[int, int, str, str]:
    """First and last hour, and their words in one style."""
    first = rng.randrange(5, 14)
    last = rng.randrange(first + 2, 24)
    words = [hour_of_day(first), hour_of_day(last)]
    style = rng.randrange(len(words[0].seen))
    start, end = (w.unseen[0] if unseen else w.seen[style] for w in words)
    return first, last, start, end


def at_a_time(rng: Random, unseen: bool) -> Time:
    hour, minute = rng.randrange(24), a_minute(rng)
    clock = pick(rng, time_of_day(hour, minute), unseen)
    said = Wordings(
        (f"at {clock}",) * 3 + (f"at exactly {clock}",), (f"at {clock} sharp", f"when it is {clock}")
    )
    return Time(str(minute), str(hour), said, often=False)


def at_several_times(rng: Random, unseen: bool) -> Time:
    hours = sorted(rng.sample(range(24), rng.choice((2, 2, 3))))
    minute = a_minute(rng)
    style = rng.randrange(2)
    clocks = [time_of_day(hour, minute).seen[style] for hour in hours]
    if minute == 0 and style:
        clocks = [hour_of_day(hour).seen[0] for hour in hours]
    both = "both " if len(hours) == 2 else ""
    said = Wordings(
        (f"at {listing(clocks)}", f"at {both}{listing(clocks)}"), (f"at {' and again at '.join(clocks)}",)
    )
    return Time(str(minute), ",".join(map(str, hours)), said, often=False)


def every_minutes(rng: Random, unseen: bool) -> Time:
    n = rng.choice((1, 2, 3, 4, 5, 5, 6, 10, 10, 12, 15, 15, 20, 20, 30, 30))
    if n == 1:
        said = Wordings(("every minute", "each minute", "once a minute"), ("every single minute",))
        return Time("*", "*", said, often=True)
    w = rng.choice(number(n))
    seen = [f"every {w} minutes", f"every {n} min", f"once every {w} minutes", f"at {w}-minute intervals"]
    kept = [f"with {w} minutes between runs", f"each {w} minutes"]
    if n == 30:
        seen.append("every half hour")
    if n == 15:
        kept.append("every quarter of an hour")
    return Time(f"*/{n}", "*", Wordings(seen, kept), often=True)


def every_minutes_in_hours(rng: Random, unseen: bool) -> Time:
    often = every_minutes(rng, unseen)
    first, last, start, end = an_hour_range(rng, unseen)
    base = pick(rng, often.wordings, unseen)
    said = Wordings(
        (f"{base} during the hours {start} through {end}", f"{base} from {start} through the {end} hour"),
        (f"{base} in each hour from {start} to {end}",),
    )
    return Time(often.minute, f"{first}-{last}", said, often=True)


def every_hour(rng: Random, unseen: bool) -> Time:
    minute = a_minute(rng)
    if minute == 0:
        seen = ["every hour", "hourly", "every hour on the hour", "once an hour", "at the top of every hour"]
        kept = ["each hour on the hour", "whenever a new hour begins"]
    else:
        m = rng.choice(number(minute))
        seen = [
            f"{m} minutes past every hour",
            f"every hour at :{minute:02d}",
            f"at minute {minute} of every hour",
        ]
        seen += [f"hourly at {m} minutes past", f"at {m} past each hour"]
        kept = [f"once an hour, {m} minutes in", f"each hour at minute {minute}"]
        if minute == 15:
            seen.append("every hour at quarter past")
        if minute == 30:
            seen += ["at half past every hour", "every hour at half past"]
        if minute == 45:
            seen.append("at quarter to every hour")
    return Time(str(minute), "*", Wordings(seen, kept), often=True)


def twice_an_hour(rng: Random, unseen: bool) -> Time:
    minutes = sorted(rng.sample(range(0, 60, 5), rng.choice((2, 2, 3))))
    text = listing([str(m) for m in minutes])
    short = listing([f":{m:02d}" for m in minutes])
    said = Wordings(
        (f"at {text} minutes past every hour", f"every hour at {short}", f"at minutes {text} of each hour"),
        (f"hourly at minutes {text}",),
    )
    return Time(",".join(map(str, minutes)), "*", said, often=True)


def every_hours(rng: Random, unseen: bool) -> Time:
    n, minute = rng.choice((2, 3, 4, 6, 8, 12)), a_minute(rng)
    w = rng.choice(number(n))
    bases = [f"every {w} hours", f"once every {w} hours", f"every {n} h"] + ["every other hour"] * (n == 2)
    if minute == 0:
        seen, kept = [*bases, f"every {w} hours on the hour"], [f"at {w}-hour intervals"]
    else:
        m = rng.choice(number(minute))
        seen = [f"{rng.choice(bases)} at {m} minutes past", f"{rng.choice(bases)} at :{minute:02d}"]
        seen.append(f"at minute {minute} of {bases[0].replace('hours', '').strip()} hours")
        kept = [f"at {w}-hour intervals, {m} minutes past the hour"]
    return Time(str(minute), f"*/{n}", Wordings(seen, kept), often=True)


def hourly_in_hours(rng: Random, unseen: bool) -> Time:
    first, last, start, end = an_hour_range(rng, unseen)
    minute, step = a_minute(rng), rng.choice((1, 1, 1, 2, 3))
    base = "every hour" if step == 1 else f"every {rng.choice(number(step))} hours"
    tail = "" if minute == 0 else f" at {rng.choice(number(minute))} minutes past"
    seen = [f"{base} from {start} through {end}{tail}", f"{base} between {start} and {end}{tail}"]
    if step == 1:
        seen.append(f"hourly from {start} to {end}{tail}")
    said = Wordings(tuple(seen), (f"{base}{tail}, starting at {start} and ending with {end}",))
    return Time(str(minute), f"{first}-{last}" + (f"/{step}" if step > 1 else ""), said, often=True)


def every_day(rng: Random, unseen: bool) -> Day:
    return Day(
        "*", "*", "*", Wordings(("every day", "daily", "each day", "once a day"), ("seven days a week",))
    )


def on_workdays(rng: Random, unseen: bool) -> Day:
    seen = (
        "on weekdays",
        "every weekday",
        "Monday through Friday",
        "on working days",
        "Mon-Fri",
        "each business day",
    )
    return Day("*", "*", "1-5", Wordings(seen, ("every workday", "from Monday to Friday")))


def on_weekends(rng: Random, unseen: bool) -> Day:
    seen = ("on weekends", "every Saturday and Sunday", "at the weekend", "on Saturdays and Sundays")
    return Day("*", "*", "0,6", Wordings(seen, ("every weekend day", "on Sat and Sun")))


def on_a_weekday(rng: Random, unseen: bool) -> Day:
    n = rng.randrange(7)
    name = WEEKDAY_NAMES[n]
    seen = (f"every {name}", f"on {name}s", f"each {name}", f"weekly on {name}", f"every week on {name}")
    return Day("*", "*", str(n), Wordings(seen, (f"once a week on {name}", f"on every {name[:3]}")))


def on_several_weekdays(rng: Random, unseen: bool) -> Day:
    days = sorted(rng.sample(range(7), rng.choice((2, 2, 3))))
    if days == [0, 6]:
        days = [1, 4]
    shown = [d for d in days if d] + [d for d in days if not d]  # a week starts on Monday
    names = [WEEKDAY_NAMES[d] for d in shown]
    said = Wordings(
        (
            f"every {listing(names)}",
            f"on {listing([n + 's' for n in names])}",
            f"on {listing([n[:3] for n in names])}",
        ),
        (f"each {listing(names)}", f"weekly on {listing(names)}"),
    )
    return Day("*", "*", ",".join(map(str, days)), said)


def on_a_weekday_range(rng: Random, unseen: bool) -> Day:
    first = rng.randrange(0, 5)
    last = rng.randrange(first + 2, 7)
    if (first, last) in ((1, 5), (0, 6)):
        last -= 1
    a, b = WEEKDAY_NAMES[first], WEEKDAY_NAMES[last]
    said = Wordings(
        (f"{a} through {b}", f"from {a} through {b}", f"every day from {a} to {b}", f"{a[:3]}-{b[:3]}"),
        (f"on each day from {a} until {b}",),
    )
    return Day("*", "*", f"{first}-{last}", said)


def on_a_date(rng: Random, unseen: bool) -> Day:
    n = rng.choice((1, 1, rng.randrange(1, 29), rng.randrange(1, 32)))
    o = rng.choice(ordinal(n))
    seen = [f"on the {o} of every month", f"on the {o} of each month", f"monthly on the {o}"]
    seen += [f"every month on the {o}", f"on day {n} of the month"]
    kept = [f"once a month on the {o}", f"on the {o} day of each month"]
    if n == 1:
        seen += ["on the first day of every month", "at the start of every month"]
    return Day(str(n), "*", "*", Wordings(seen, kept))


def on_several_dates(rng: Random, unseen: bool) -> Day:
    days = [1, 15] if rng.random() < 0.2 else sorted(rng.sample(range(1, 32), rng.choice((2, 2, 3))))
    text = listing([ordinal(d)[0] for d in days])
    said = Wordings(
        (f"on the {text} of every month", f"on the {text} of each month", f"monthly on the {text}"),
        (f"every month on the {text}", f"on days {listing([str(d) for d in days])} of the month"),
    )
    return Day(",".join(map(str, days)), "*", "*", said)


def on_a_date_range(rng: Random, unseen: bool) -> Day:
    first = rng.choice((1, 1, rng.randrange(1, 26)))
    last = rng.randrange(first + 2, 32)
    a, b = ordinal(first)[0], ordinal(last)[0]
    seen = [f"from the {a} through the {b} of every month", f"on days {first} through {last} of every month"]
    if first == 1:
        seen.append(f"on the first {last} days of every month")
    if (first, last) == (1, 7):
        seen.append("during the first week of every month")
    return Day(f"{first}-{last}", "*", "*", Wordings(tuple(seen), (f"on the {a} to the {b} of each month",)))


def on_odd_or_even_dates(rng: Random, unseen: bool) -> Day:
    kind, field = rng.choice((("odd", "1-31/2"), ("even", "2-30/2")))
    said = Wordings(
        (f"on {kind} days of the month", f"on {kind}-numbered days", f"on every {kind} date"),
        (f"on dates with an {kind} number",),
    )
    return Day(field, "*", "*", said)


def on_a_yearly_date(rng: Random, unseen: bool) -> Day:
    month = rng.randrange(1, 13)
    day = rng.randrange(1, 29)
    name, o = MONTH_NAMES[month - 1], ordinal(day)[0]
    seen = [
        f"every year on {name} {day}",
        f"on {day} {name}",
        f"on {name} {o}",
        f"annually on the {o} of {name}",
    ]
    kept = [f"once a year on {name} {day}", f"every {day} {name}"]
    feast = {(1, 1): "New Year's Day", (12, 25): "Christmas Day", (2, 14): "Valentine's Day"}.get(
        (month, day)
    )
    if feast:
        seen.append(f"every {feast}")
    return Day(str(day), str(month), "*", Wordings(seen, kept))


def on_a_quarterly_date(rng: Random, unseen: bool) -> Day:
    n = rng.choice((1, 1, rng.randrange(1, 29)))
    o = ordinal(n)[0]
    if n == 1:
        seen = ("on the first day of every quarter", "quarterly on the 1st", "at the start of each quarter")
    else:
        seen = (f"on the {o} of the first month of every quarter", f"quarterly on the {o} of the month")
    return Day(str(n), "1,4,7,10", "*", Wordings(seen, (f"every quarter on the {o}",)))


def on_a_date_every_other_month(rng: Random, unseen: bool) -> Day:
    n, step = rng.randrange(1, 29), rng.choice((2, 2, 6))
    o = ordinal(n)[0]
    each = "every other month" if step == 2 else "every six months"
    said = Wordings(
        (f"on the {o} of {each} from January", f"{each} on the {o}, starting in January"),
        (f"{each} from January on the {o}",),
    )
    return Day(str(n), "1-11/2" if step == 2 else "1,7", "*", said)


def in_months(rng: Random, unseen: bool) -> Day:
    """A day of the week, of the month or any day, kept to some months."""
    inner = rng.choice((every_day, every_day, on_workdays, on_a_weekday, on_weekends, on_a_date))(rng, unseen)
    first = rng.randrange(1, 13)
    style = rng.randrange(3)
    if style == 0:
        field, when = str(first), f"in {MONTH_NAMES[first - 1]}"
    elif style == 1:
        months = sorted(rng.sample(range(1, 13), 2))
        field, when = ",".join(map(str, months)), f"in {listing([MONTH_NAMES[m - 1] for m in months])}"
    else:
        first = rng.randrange(1, 10)
        last = rng.randrange(first + 2, 13)
        span = MONTH_NAMES[first - 1], MONTH_NAMES[last - 1]
        field, when = (
            f"{first}-{last}",
            rng.choice((f"from {span[0]} through {span[1]}", f"in {span[0]} to {span[1]}")),
        )
    words = pick(rng, inner.wordings, unseen)
    day = inner.day
    if day != "*":  # "of every month" would contradict the months that follow, and February is short
        day = str(min(int(day), 28))
        words = rng.choice((f"on the {ordinal(int(day))[0]}", f"on day {day} of the month"))
    return Day(day, field, inner.weekday, Wordings((f"{words} {when}",)))


def on_a_date_or_weekday(rng: Random, unseen: bool) -> Day:
    """Cron fires when either day field matches if both are given."""
    n, weekday = rng.randrange(1, 29), rng.randrange(7)
    o, name = ordinal(n)[0], WEEKDAY_NAMES[weekday]
    said = Wordings(
        (f"on the {o} of every month and also every {name}", f"every {name} and on the {o} of the month"),
        (f"on each {name} as well as on the {o} of the month",),
    )
    return Day(str(n), "*", str(weekday), said)


Maker = Callable[[Random, bool], Time | Day]
# how often each kind is asked for
TIMES: dict[Maker, int] = {
    at_a_time: 50, at_several_times: 9, every_minutes: 9, every_minutes_in_hours: 8, every_hour: 8,
    twice_an_hour: 3, every_hours: 7, hourly_in_hours: 6,
}  # fmt: skip
DAYS: dict[Maker, int] = {
    every_day: 16, on_workdays: 11, on_weekends: 7, on_a_weekday: 12, on_several_weekdays: 8, on_a_weekday_range: 6,
    on_a_date: 11, on_several_dates: 5, on_a_date_range: 3, on_odd_or_even_dates: 2, on_a_yearly_date: 6,
    on_a_quarterly_date: 4, on_a_date_every_other_month: 3, in_months: 8, on_a_date_or_weekday: 2,
}  # fmt: skip
# nobody runs something every ten minutes on the 5th of May
DAYS_OF_INTERVALS: dict[Maker, int] = {
    every_day: 36, on_workdays: 24, on_weekends: 12, on_a_weekday: 10, on_a_weekday_range: 6, in_months: 6, on_a_date: 6,
}  # fmt: skip


def weighted_choice(rng: Random, makers: dict[Maker, int]) -> Maker:
    return rng.choices(list(makers), weights=list(makers.values()))[0]
