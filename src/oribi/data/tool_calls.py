"""Tools and the calls of them, in the forms of OpenAI, LangChain, Llama and of JSON text, as chat templates take them.

A null among them is a value that a tool was called with, or a key that a columnar format filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oribi.data.columns import decoded, listed, short
from oribi.errors import DataError

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
MEANT_IN_SCHEMAS = ("default", "const", "example")  # keys whose null says something


def read_tools(given: Any, column: str) -> list[Any] | None:
    """A row's tools; JSON text, of all or of each, is decoded, and bare functions are wrapped as templates expect them.

    Raises:
        DataError: they are no list of JSON schemas.
    """
    if isinstance(given, str):
        given = decoded(given, column) if given.strip() else None
    if isinstance(given, Mapping) and isinstance(given.get("name", given.get("type")), list):
        given = listed(given)
    if given is not None and not isinstance(given, list):
        raise DataError(f"{column!r} is {short(given)}; it must be a list of JSON schemas.")
    tools = [decoded(tool, column) if isinstance(tool, str) else tool for tool in given or []]
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise DataError(f"{column!r} holds {short(tool)}; each tool must be a JSON schema.")
    bare = [isinstance(tool.get("name"), str) and "function" not in tool for tool in tools]
    return [
        {"type": "function", "function": tool} if alone and tool.get("type") in (None, "function") else tool
        for tool, alone in zip(tools, bare)
    ] or None


def read_calls(given: Any, where: str) -> tuple[list[dict[str, Any]], bool]:
    """A message's tool calls as {"type": "function", "function": {"name", "arguments"}}.

    Args:
        given: a list, one call, JSON text of either, or None.
        where: the message, for errors.

    Returns:
        The calls, and whether a key of one was null, as columnar formats write where a call did not have it.

    Raises:
        DataError: they are no calls.
    """
    if isinstance(given, str):
        given = decoded(given, f"tool_calls of {where}") if given.strip() else None
    if isinstance(given, Mapping):
        given = [given] if "name" in given or "function" in given else listed(given)
    if not given:
        return [], False
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"{where} has tool_calls {short(given)}; they must be a list of calls.")
    calls = [decoded(call, f"a tool call of {where}") if isinstance(call, str) else call for call in given]
    filled = any(value is None for call in calls if isinstance(call, Mapping) for value in call.values())
    return [_call(call, where) for call in calls], filled


def _call(given: Any, where: str) -> dict[str, Any]:
    call = (
        {key: value for key, value in given.items() if value is not None}
        if isinstance(given, Mapping)
        else {}
    )
    if isinstance(call.get("function"), str) and "name" not in call:
        nested = call["function"].strip()
        call["function"] = decoded(nested, "function") if nested[:1] == "{" else {"name": nested}
    if "function" not in call and "name" in call:
        moved = ("name", *ARGUMENT_KEYS)
        outer = {key: value for key, value in call.items() if key not in moved and key != "type"}
        call = {**outer, "type": "function", "function": {key: call[key] for key in moved if key in call}}
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where} has the tool call {short(given)}; it needs a function with 'name' and 'arguments'."
        )
    function = {key: value for key, value in function.items() if value is not None}
    other = next((key for key in ARGUMENT_KEYS if key in function), "arguments")
    if other != "arguments":
        function["arguments"] = function.pop(other)
    return {**call, "function": function}


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
