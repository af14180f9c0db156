"""The demo's data: every request means its expression, and nothing held out is trained on."""

from collections import Counter

import pytest

from oribi.demo.cron import parse_cron
from oribi.demo.requests import UNSEEN_ACTIONS, UNSEEN_FRAMES, make_split, messages
from oribi.demo.schedules import DAYS, TIMES


@pytest.fixture(scope="module")
def split():
    return make_split(4000, 200)


def test_no_held_out_meaning_is_trained_on_or_comes_twice(split):
    train, held_out = split
    kept = [parse_cron(request.expression) for request in held_out]
    assert None not in kept
    assert len(set(kept)) == 200
    assert not set(kept) & {parse_cron(request.expression) for request in train}


def test_training_texts_are_many_distinct_and_valid(split):
    train, _ = split
    assert len({request.text for request in train}) == len(train) == 4000
    assert None not in [parse_cron(request.expression) for request in train]
    assert len({parse_cron(request.expression) for request in train}) > 3000


def test_every_kind_of_schedule_is_trained_and_most_are_asked_for(split):
    train, held_out = split
    kinds = {maker.__name__ for maker in (*TIMES, *DAYS)}
    assert {r.time_kind for r in train} | {r.day_kind for r in train} == kinds
    assert len({r.time_kind for r in held_out} | {r.day_kind for r in held_out}) >= len(kinds) - 2
    assert max(Counter((r.time_kind, r.day_kind) for r in held_out).values()) < 40


def test_half_of_the_held_out_texts_use_wordings_that_training_never_does(split):
    train, held_out = split
    unseen = [request for request in held_out if request.unseen_wording]
    assert len(unseen) == 100
    frames = [frame.partition("{")[0].lower() for frame in UNSEEN_FRAMES]
    assert all(any(r.text.lower().startswith(frame) for frame in frames) for r in unseen)
    text = "\n".join(request.text for request in train).lower()
    words = [
        *UNSEEN_ACTIONS,
        "when it is",
        "seven days a week",
        " sharp",
        "-hour intervals",
        "minutes between runs",
    ]
    assert not [word for word in words if word in text]
    assert [word for word in words if any(word in r.text.lower() for r in unseen)] == words


def test_the_same_seed_gives_the_same_requests():
    assert make_split(20, 5) == make_split(20, 5)
    assert make_split(20, 5)[0] != make_split(20, 5, seed=8)[0]


@pytest.mark.parametrize(
    ("expression", "texts"),
    [
        ("*/15 9-17 * * 1-5", ("15",)),
        ("0 12 * * *", ("noon", "midday", "12", "twelve")),
        ("0 0 1 * *", ("midnight", "12", "00:00", "twelve")),
    ],
)
def test_texts_name_what_their_expression_says(split, expression, texts):
    for request in (*split[0], *split[1]):
        if request.expression == expression:
            assert any(
                text in request.text.lower() for text in (*texts, "fifteen", "quarter", "00h00", "12h00")
            )


def test_a_request_becomes_a_conversation(split):
    roles = [message["role"] for message in messages(split[0][0])]
    assert roles == ["system", "user", "assistant"]
    assert messages(split[0][0])[2]["content"] == split[0][0].expression
