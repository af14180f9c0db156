"""The words of a check: what was found, and that nothing untested is called equal."""

import pytest

from oribi.save.check import Check, Outcome, overall, percent, verdict


def checks(*outcomes: Outcome) -> list[Check]:
    return [Check(f"c{i}", outcome, "x") for i, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((), "not checked"),
        ((Outcome.EQUAL, Outcome.EQUAL), "equal"),
        ((Outcome.EQUAL, Outcome.CLOSE), "close"),
        ((Outcome.EQUAL, Outcome.DIFFERENT, Outcome.NOT_RUN), "different (1 check not run)"),
        ((Outcome.EQUAL, Outcome.NOT_RUN, Outcome.NOT_TESTED), "equal (1 check not run, 1 check not tested)"),
        ((Outcome.NOT_TESTED,), "not tested"),
        ((Outcome.NOT_TESTED, Outcome.NOT_RUN), "not run"),
    ],
)
def test_a_verdict_is_the_worst_that_was_found_and_names_what_was_not(outcomes, expected):
    assert verdict(checks(*outcomes)) == expected


def test_only_what_differs_does_not_pass():
    assert [check.outcome for check in checks(*Outcome) if not check.passed] == [Outcome.DIFFERENT]
    assert overall([]) is Outcome.NOT_TESTED


def test_advice_is_given_only_where_something_differs():
    close = Check("answers", Outcome.CLOSE, "18 of 20 are the same", advice="use q8_0")
    different = Check("answers", Outcome.DIFFERENT, "0 of 20 are the same", {"of": 20}, "use q8_0")
    assert close.line() == "close      answers: 18 of 20 are the same"
    assert different.line() == "different  answers: 0 of 20 are the same. use q8_0"
    assert "advice" not in close.to_json()
    assert different.to_json() == {
        "name": "answers", "outcome": "different", "passed": False, "says": "0 of 20 are the same",
        "figures": {"of": 20}, "advice": "use q8_0",
    }  # fmt: skip


def test_only_a_whole_is_100_per_cent():
    shares = (0.0, 0.0004, 0.5, 0.974, 0.996, 0.99999, 1.0)
    assert [percent(share) for share in shares] == [
        "0 %", "0.1 %", "50 %", "97 %", "99.6 %", "99.9 %", "100 %"
    ]  # fmt: skip
