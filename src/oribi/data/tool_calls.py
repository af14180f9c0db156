"""Tools and the calls of them, in the forms of OpenAI, LangChain, Llama and of JSON text, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oribi.data.columns import decoded, listed, short
from oribi.errors import DataError

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")


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
