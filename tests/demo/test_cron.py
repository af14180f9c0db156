"""Cron meanings, judged by cronsim, which steps through time."""

from datetime import datetime, timedelta
from itertools import islice

import pytest
from cronsim import CronSim, CronSimError
from hypothesis import given, settings
from hypothesis import strategies as st

from oribi.demo.cron import FIELDS, Meaning, first_expression, parse_cron, same_meaning


def items(low: int, high: int) -> st.SearchStrategy[str]:
    value = st.integers(low, high)
    # cronsim reads 3-3/2 as 3/2
    pair = st.tuples(value, value).filter(lambda two: two[0] < two[1])
    span = pair.map(lambda two: f"{two[0]}-{two[1]}")
    stepped = st.tuples(st.just("*") | span, st.integers(1, high)).map(lambda two: f"{two[0]}/{two[1]}")
    return st.one_of(st.just("*"), value.map(str), span, stepped)


def fields(low: int, high: int) -> st.SearchStrategy[str]:
    return st.lists(items(low, high), min_size=1, max_size=3).map(",".join)


expressions = st.tuples(*(fields(low, min(high, 6) if high == 7 else high) for low, high, _ in FIELDS)).map(
    " ".join
)


def fires(found: Meaning, moment: datetime) -> bool:
    day = (moment.month, moment.day, moment.isoweekday() % 7)
    return moment.minute in found.minutes and moment.hour in found.hours and day in found.days


@settings(max_examples=100, deadline=None)
@given(expressions, st.datetimes(datetime(2023, 1, 1), datetime(2025, 1, 1)))
def test_meanings_fire_when_cronsim_does(expression, start):
    found = parse_cron(expression)
    try:
        moments = list(islice(CronSim(expression, start), 3))
    except CronSimError:
        assert found is None
        return
    if not moments:
        return  # cronsim looks 50 years ahead
    assert found is not None
    assert all(fires(found, moment) for moment in moments)
    # and at no moment between them
    start, checked = start.replace(second=0, microsecond=0), 0
    while checked < 3000 and start < moments[0] - timedelta(minutes=1):
        start, checked = start + timedelta(minutes=1), checked + 1
        assert not fires(found, start)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("*/15 * * * *", "0,15,30,45 * * * *"),
        ("0 9 * * 1-5", "0 9 * * MON-FRI"),
        ("0 0 * * 0", "0 0 * * 7"),
        ("0 6 1 */3 *", "0 6 1 1,4,7,10 *"),
        ("0 6 1-31/2 * *", "0 6 */2 * *"),
        ("0 9 13,14 * *", "0  9 13-14 1-12 *"),
        ("0 9 * * 0-6", "0 9 * * *"),
        ("0 9 31 2,3 *", "0 9 31 3 *"),
    ],
)
def test_equal_meanings_in_different_words(left, right):
    assert same_meaning(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0 9 * * 1", "0 9 * * 2"),
        ("0 9 13 * 5", "0 9 13 * *"),  # with both day fields, either matches
        ("0 9 13 * 5", "0 9 * * 5"),
        ("*/7 * * * *", "0 9 * * *"),
        ("nonsense", "nonsense"),
    ],
)
def test_different_meanings(left, right):
    assert not same_meaning(left, right)


@pytest.mark.parametrize(
    "expression",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "5-1 * * * *",
     "*/0 * * * *", "1, * * * *", "*-5 * * * *", "0 0 30 2 *", "0 0 * * mond", "a b c d e", "-1 * * * *", "*/x * * * *"],
)  # fmt: skip
def test_what_cron_refuses_or_never_fires_has_no_meaning(expression):
    assert parse_cron(expression) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0 9 * * 1-5", "0 9 * * 1-5"),
        ("The expression is `*/5 * * * *`.", "*/5 * * * *"),
        ('"0 0 1 1 *" runs once a year', "0 0 1 1 *"),
        ("Cron:\n30 6 * * 1,3", "30 6 * * 1,3"),
        ("99 9 * * * but 5 9 * * * works", "5 9 * * *"),
        ("every day at nine", None),
        ("1 2 3", None),
    ],
)
def test_an_expression_is_found_in_an_answer(text, found):
    assert first_expression(text) == found
