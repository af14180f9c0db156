"""Columns of prepared preferences: their kinds, and the values of rows that reward functions read."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa

from oribi.data.columns import as_json_text

IDS = datasets.List(datasets.Value("int32"))
TEXT = datasets.Value("string")


def feature_of(values: list[Any]) -> Any:
    """The kind of a column: what its plain values are, or JSON where rows differ or hold lists and objects."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, list) and all(map(_is_plain_message, value)) for value in given) and given:
        return datasets.List({"role": TEXT, "content": TEXT})
    if len(set(map(type, given))) > 1 or any(isinstance(value, list | dict) for value in given):
        return datasets.Json()
    try:
        return datasets.features.features.generate_from_arrow_type(pa.array(given).type)
    except (pa.ArrowException, OverflowError):
        return datasets.Json()


def _is_plain_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
    )


def array_of(values: list[Any], feature: Any) -> pa.Array:
    if not isinstance(feature, datasets.Json):
        return pa.array(values, type=datasets.Features({"": feature}).arrow_schema.field(0).type)
    written = [None if value is None else as_json_text(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(written, type=pa.string()))
