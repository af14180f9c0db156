"""formatting_func of rows and of batches, as callers write it."""

import pytest

from oribi.data.rows import formatted
from oribi.errors import DataError

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}, {"q": "three", "a": "3"}]
TEXTS = ["one=1", "two=2", "three=3"]


def apply(function, rows=ROWS):
    given = ((f"row {n}", row) for n, row in enumerate(rows, 1))
    results = list(formatted(given, function))
    for origin, result in results:
        if isinstance(result, DataError):  # as preparation tells it
            raise DataError(f"{origin}: {result}")
    return [result for _, result in results]


def by_row(row):
    return f"{row['q']}={row['a']}"


def by_row_in_a_list(row):
    return [row["q"] + "=" + row["a"]]


def by_batch(rows):
    return [f"{q}={a}" for q, a in zip(rows["q"], rows["a"])]


def by_batch_in_a_column(rows):
    return {"text": by_batch(rows)}


def by_row_in_a_column(row):
    return {"text": row["q"] + "=" + row["a"]}


@pytest.mark.parametrize(
    "function", [by_row, by_row_in_a_list, by_row_in_a_column, by_batch, by_batch_in_a_column]
)
def test_rows_and_batches_give_the_same_texts(function):
    assert apply(function) == [{"text": text} for text in TEXTS]


def test_a_function_may_give_messages():
    assert apply(lambda row: [{"role": "user", "content": row["q"]}], ROWS[:1]) == [
        {"messages": [{"role": "user", "content": "one"}]}
    ]


def test_nothing_comes_of_nothing():
    assert apply(by_row, []) == []


def test_other_results_and_failures_are_named():
    with pytest.raises(DataError, match="row 1: formatting_func gave int 3; it must give a text"):
        apply(lambda row: 3)
    with pytest.raises(DataError, match="row 1: formatting_func failed \\(KeyError: 'missing'\\)"):
        apply(lambda row: row["missing"])
    with pytest.raises(DataError, match="gave 2 texts for a batch of 3 rows"):
        apply(lambda rows: by_batch(rows)[:2])


@pytest.mark.parametrize("function", [by_row, by_batch])
def test_one_row_that_a_function_fails_on_does_not_take_the_others_with_it(function):
    rows = [
        ("row 1", ROWS[0]),
        ("row 2", {"q": None, "a": 1}),
        ("row 3", DataError("broken")),
        ("row 4", ROWS[2]),
    ]
    texts = (
        function
        if function is by_row
        else lambda batch: [q + "=" + a for q, a in zip(batch["q"], batch["a"])]
    )
    strict = (lambda row: row["q"] + "=" + row["a"]) if function is by_row else texts
    results = dict(formatted(iter(rows), strict))
    assert (results["row 1"], results["row 4"]) == ({"text": "one=1"}, {"text": "three=3"})
    assert "formatting_func failed (TypeError" in str(results["row 2"])
    assert str(results["row 3"]) == "broken"
