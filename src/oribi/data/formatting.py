"""formatting_func, as callers of TRL and Unsloth write it: a row to a text, or a batch of columns to a list of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from oribi.errors import DataError

FORMATTED_ROWS = 256


def apply_formatting_func(
    rows: Iterator[tuple[str, Mapping[str, Any]]], function: Callable[[Any], Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as `function` writes them: {"text": ...}, or {"messages": ...} if it gives messages.

    A function that answers two copies of a row, given as columns, with two texts takes batches; any other takes rows.

    Raises:
        DataError: the function fails, or gives neither texts nor messages.
    """
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    batched = _takes_batches(function, first[1])
    while batch := list(islice(rows, FORMATTED_ROWS)):
        if batched:
            results = _texts(_call(function, _columns([row for _, row in batch]), batch[0][0]))
            if results is None or len(results) != len(batch):
                raise DataError(
                    f"{batch[0][0]}: formatting_func gave {'no list' if results is None else f'{len(results)} texts'} for a batch "
                    f"of {len(batch)} rows; it must give one text for each row."
                )
        else:
            results = [_only(_call(function, dict(row), origin), origin) for origin, row in batch]
        for (origin, _), result in zip(batch, results):
            yield origin, {"text" if isinstance(result, str) else "messages": result}


def _takes_batches(function: Callable[[Any], Any], row: Mapping[str, Any]) -> bool:
    try:
        results = _texts(function(_columns([row, row])))
    except Exception:  # a function of single rows may fail in any way when given columns; then it takes rows
        return False
    return results is not None and len(results) == 2 and all(isinstance(r, str) for r in results)


def _columns(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _call(function: Callable[[Any], Any], argument: Any, origin: str) -> Any:
    try:
        return function(argument)
    except Exception as error:
        raise DataError(f"{origin}: formatting_func failed: {type(error).__name__}: {error}") from error


def _texts(result: Any) -> list[Any] | None:
    """The list of texts of a result: itself, or the column "text" of a mapping."""
    if isinstance(result, Mapping) and isinstance(result.get("text"), list):
        result = result["text"]
    return result if isinstance(result, list) else None


def _only(result: Any, origin: str) -> Any:
    if isinstance(result, Mapping) and "text" in result:
        result = result["text"]
    if isinstance(result, list) and len(result) == 1 and isinstance(result[0], str):
        result = result[0]
    if isinstance(result, str) or (isinstance(result, list) and result and isinstance(result[0], Mapping)):
        return result
    raise DataError(
        f"{origin}: formatting_func gave {type(result).__name__} {repr(result)[:60]}; it must give a text, a list of messages, or, for a "
        "batch, a list of texts."
    )
