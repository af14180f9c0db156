"""Nulls by what they mean: a value that a tool was called with, or a key that a columnar format filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MEANT_IN_SCHEMAS = ("default", "const", "example")


def without_nulls(value: Any) -> Any:
    """Drop the keys that columnar formats fill in with null where a row did not have them."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def without_nested_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose columns may be null, but not what lies within them."""
    return {name: without_nulls(value) for name, value in row.items()}


def holds_filled_keys(tools: Sequence[Any] | None) -> bool:
    """Whether schemas have a key that is null where null says nothing, as columnar formats write."""
    if isinstance(tools, Mapping):
        return any(
            (value is None and key not in MEANT_IN_SCHEMAS) or holds_filled_keys(value)
            for key, value in tools.items()
        )
    return isinstance(tools, list) and any(holds_filled_keys(item) for item in tools)


def keep_meant_nulls(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, filled: bool) -> int:
    """Drop nulls of tool calls' arguments that the tool's schema neither requires nor allows.

    Args:
        messages: their calls are changed in place.
        tools: schemas of the tools.
        filled: the row has keys that a columnar format filled in; nulls of a tool without a schema are such, then.

    Returns:
        How many nulls were dropped.
    """
    schemas = {}
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
            schemas[function.get("name")] = function["parameters"]
    dropped = 0
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call["function"]
            if isinstance(function.get("arguments"), Mapping):
                function["arguments"], count = _meant(
                    function["arguments"], schemas.get(function["name"]), filled
                )
                dropped += count
    return dropped


def _meant(value: Any, schema: Any, filled: bool) -> tuple[Any, int]:
    """The value without nulls that the schema neither requires nor allows, and how many they were."""
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, list):
        items = [_meant(item, schema.get("items"), filled) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if not isinstance(value, Mapping):
        return value, 0
    properties = schema.get("properties")
    kept, dropped = {}, 0
    for key, inner in value.items():
        own = properties.get(key) if isinstance(properties, Mapping) else None
        if inner is not None:
            kept[key], count = _meant(inner, own, filled)
            dropped += count
        elif _is_meant(key, own, schema, filled):
            kept[key] = None
        else:
            dropped += 1
    return kept, dropped


def _is_meant(key: str, own: Any, schema: Mapping[str, Any], filled: bool) -> bool:
    if not isinstance(schema.get("properties"), Mapping):
        return not filled
    return key in (schema.get("required") or []) or _allows_null(own)


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    if kinds == "null" or (isinstance(kinds, list) and "null" in kinds):
        return True
    if schema.get("nullable") is True or None in (schema.get("enum") or []):
        return True
    if "default" in schema and schema["default"] is None:
        return True
    return any(_allows_null(one) for word in ("anyOf", "oneOf") for one in schema.get(word) or [])
