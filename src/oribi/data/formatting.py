"""formatting_func, as callers of TRL and Unsloth write it: a row to a text, or a batch of columns to a list of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from oribi.errors import DataError

FORMATTED_ROWS = 256


def apply_formatting_func(
    rows: Iterator[tuple[str, Mapping[str, Any] | DataError]], function: Callable[[Any], Any]
) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Rows as `function` writes them: {"text": ...}, or {"messages": ...} if it gives messages; or what went wrong with a row.

    A function that answers two copies of a row, given as columns, with two texts takes batches; any other takes rows.

    Raises:
        DataError: the function gives another number of texts than it got rows.
    """
    batched: bool | None = None
    while batch := list(islice(rows, FORMATTED_ROWS)):
        good = [(origin, row) for origin, row in batch if not isinstance(row, DataError)]
        if good and batched is None:
            batched = _takes_batches(function, good[0][1])
        results = iter(_in_batch(function, good) if batched else _one_by_one(function, good))
        for origin, row in batch:
            result = row if isinstance(row, DataError) else next(results)
            if not isinstance(result, DataError):
                result = {"text" if isinstance(result, str) else "messages": result}
            yield origin, result


def _one_by_one(function: Callable[[Any], Any], batch: list[tuple[str, Mapping[str, Any]]]) -> list[Any]:
    """A text or messages for each row, or what went wrong with it."""
    results: list[Any] = []
    for _, row in batch:
        try:
            results.append(_only(_call(function, dict(row))))
        except DataError as error:
            results.append(error)
    return results


def _in_batch(function: Callable[[Any], Any], batch: list[tuple[str, Mapping[str, Any]]]) -> list[Any]:
    """A text for each row of a batch; where the function fails, each row is tried alone, to find the one.

    Raises:
        DataError: it gives another number of texts.
    """
    if not batch:
        return []
    try:
        results = _texts(_call(function, _columns([row for _, row in batch])))
    except DataError as error:
        if len(batch) == 1:
            return [error]
        return [_in_batch(function, [one])[0] for one in batch]
    if results is None or len(results) != len(batch):
        raise DataError(
            f"{batch[0][0]}: formatting_func gave {'no list' if results is None else f'{len(results)} texts'} for a batch "
            f"of {len(batch)} rows; it must give one text for each row."
        )
    return [result if isinstance(result, str) else DataError(_wanted(result)) for result in results]


def _takes_batches(function: Callable[[Any], Any], row: Mapping[str, Any]) -> bool:
    try:
        results = _texts(function(_columns([row, row])))
    except Exception:  # a function of single rows may fail in any way when given columns; then it takes rows
        return False
    return results is not None and len(results) == 2 and all(isinstance(r, str) for r in results)


def _columns(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _call(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:
        raise DataError(f"formatting_func failed: {type(error).__name__}: {error}") from error


def _texts(result: Any) -> list[Any] | None:
    """The list of texts of a result: itself, or the column "text" of a mapping."""
    if isinstance(result, Mapping) and isinstance(result.get("text"), list):
        result = result["text"]
    return result if isinstance(result, list) else None


def _only(result: Any) -> Any:
    if isinstance(result, Mapping) and "text" in result:
        result = result["text"]
    if isinstance(result, list) and len(result) == 1 and isinstance(result[0], str):
        result = result[0]
    if isinstance(result, str) or (isinstance(result, list) and result and isinstance(result[0], Mapping)):
        return result
    raise DataError(_wanted(result))


def _wanted(result: Any) -> str:
    return (
        f"formatting_func gave {type(result).__name__} {repr(result)[:60]}; it must give a text, a list of messages, or, for a "
        "batch, a list of texts."
    )
