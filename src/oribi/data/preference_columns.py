"""Columns of prepared preferences: their kinds, and the values of rows that reward functions read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa

from oribi.data.columns import as_json_text, short
from oribi.errors import DataError

IDS = datasets.List(datasets.Value("int32"))
TEXT = datasets.Value("string")


def feature_of(values: list[Any]) -> Any:
    """The kind of a column: what its plain values or lists of them are, or JSON where these differ or hold objects."""
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, list) and all(map(_is_plain_message, value)) for value in given):
        return datasets.List({"role": TEXT, "content": TEXT})
    if len(set(map(type, given))) > 1 or len(set(map(type, _within(given)))) > 1:
        return datasets.Json()
    try:
        return datasets.features.features.generate_from_arrow_type(pa.array(given).type)
    except (pa.ArrowException, OverflowError):
        return datasets.Json()


def _within(values: list[Any]) -> Iterator[Any]:
    """What lists hold; objects count as two kinds of things, since their keys may differ."""
    for value in values:
        if isinstance(value, list):
            yield from _within(value) if value else ()
        elif isinstance(value, dict):
            yield from ({}, "")
        else:
            yield value


def _is_plain_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
    )


def array_of(values: list[Any], feature: Any, name: str) -> pa.Array:
    """A column in the form of its kind.

    Raises:
        DataError: a number is too large.
    """
    if not isinstance(feature, datasets.Json):
        return pa.array(values, type=datasets.Features({"": feature}).arrow_schema.field(0).type)
    written = [None if value is None else as_json_text(value) for value in values]
    for value, text in zip(values, written):
        try:
            feature.decode_example(text)
        except ValueError as error:
            raise DataError(
                f"the column {name!r} holds {short(value)}, which cannot be kept ({error}): write it as text."
            ) from error
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(written, type=pa.string()))
