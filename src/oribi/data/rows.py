"""Reads the rows of a source one by one. An error in a row concerns that row alone and is reported in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from oribi.chat.masking import Marked
from oribi.data.columns import short
from oribi.data.conversations import RowFormat
from oribi.data.converters import Example
from oribi.data.encoding import Encoded, Encoder, without_lone_surrogates
from oribi.data.sources import Part
from oribi.errors import DataError, OribiError

FORMATTED_ROWS = 256  # given to a formatting_func at a time
UNRECOGNISED_ROWS = 1000  # rows that may be null or broken before the first that shows the format

Row = Mapping[str, Any]


def examples_of(
    rows: Iterator[tuple[str, Row | DataError]], recognise: Callable[[Row], RowFormat]
) -> Iterator[tuple[str, Example | DataError]]:
    """Turn rows into examples; a row that cannot be read is replaced by its error.

    Args:
        rows: origins and rows, or the reader's error in place of a row.
        recognise: finds the format from a row; called until a row shows it.

    Raises:
        DataError: the first rows show no format.
    """
    row_format: RowFormat | None = None
    waiting: list[tuple[str, Row | DataError]] = []
    problem: DataError | None = None
    for origin, row in rows:
        if row_format is not None:
            yield origin, _converted(row_format, row)
            continue
        waiting.append((origin, row))
        try:
            if isinstance(row, DataError):
                raise row
            row_format = safely("recognising the row", recognise, row)
        except DataError as error:
            problem = problem or DataError(f"{origin}: {error}")
            if len(waiting) >= UNRECOGNISED_ROWS:
                raise problem from error
            continue
        for earlier_origin, earlier in waiting:
            yield earlier_origin, _converted(row_format, earlier)
        waiting.clear()
    if row_format is None and problem is not None:
        raise problem


def tokenised(encoder: Encoder, marks: Sequence[Marked], plain: Sequence[bool]) -> list[Encoded | DataError]:
    """Encode all texts in one call of the tokenizer, or one by one if that fails, to find the row.

    Args:
        encoder, marks, plain: as for `Encoder.encode`.

    Returns:
        For each text its tokens, or the error.
    """
    counted = encoder.bos_added
    try:
        return list(encoder.encode(marks, plain))
    except Exception:  # any exception: each row is tried again and reports its own
        encoder.bos_added = counted
    found: list[Encoded | DataError] = []
    for mark, is_plain in zip(marks, plain):
        try:
            found += safely("tokenising the row", encoder.encode, [mark], [is_plain])
        except DataError as error:
            found.append(error)
    return found


def safely(what: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function on one row; any exception becomes a DataError of one sentence.

    Raises:
        DataError: the call failed.
    """
    try:
        return make(*arguments, **options)
    except (OribiError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{what} failed ({type(error).__name__}: {error}). Correct or remove the row; malformed: drop leaves such rows out."
        ) from error


def _converted(row_format: RowFormat, row: Mapping[str, Any] | DataError) -> Example | DataError:
    """The example of a row, or what is wrong with it."""
    if isinstance(row, DataError):
        return row
    try:
        return safely("reading the row", row_format.convert, row)
    except DataError as error:
        return error


def readable_rows(part: Part) -> Iterator[tuple[str, Any]]:
    """The rows of a part; if the data set itself fails, the error names the last row that was read."""
    last = "the first row"
    rows = iter(part.rows())
    while True:
        try:
            origin, row = next(rows)
        except StopIteration:
            return
        except (OribiError, MemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"{part.name}: reading stopped at {last} ({type(error).__name__}: {error})."
            ) from error
        last = f"the row after {origin}"
        yield without_lone_surrogates(origin)[0], row


def formatted(
    rows: Iterator[tuple[str, Row | DataError]], function: Callable[[Any], Any]
) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Rows as a formatting_func of TRL and Unsloth writes them: {"text": ...} or {"messages": ...}, or what went wrong with a row.

    A function that answers two copies of a row, given as columns, with two texts takes batches; any other takes rows.

    Raises:
        DataError: the function gives another number of texts than it got rows.
    """
    batched: bool | None = None
    while batch := list(islice(rows, FORMATTED_ROWS)):
        good = [(origin, row) for origin, row in batch if not isinstance(row, DataError)]
        if good and batched is None:
            batched = _takes_batches(function, good[0][1])
        results = iter(_in_batch(function, good) if batched else [_alone(function, row) for _, row in good])
        for origin, row in batch:
            result = row if isinstance(row, DataError) else next(results)
            if not isinstance(result, DataError):
                result = {"text" if isinstance(result, str) else "messages": result}
            yield origin, result


def _alone(function: Callable[[Any], Any], row: Row) -> str | list[Any] | DataError:
    """A text or messages for a row, or what went wrong with it."""
    try:
        result = safely("formatting_func", function, dict(row))
    except DataError as error:
        return error
    if isinstance(result, Mapping) and "text" in result:
        result = result["text"]
    if isinstance(result, list) and len(result) == 1 and isinstance(result[0], str):
        result = result[0]
    if isinstance(result, str) or (isinstance(result, list) and result and isinstance(result[0], Mapping)):
        return result
    return _no_text(result)


def _in_batch(function: Callable[[Any], Any], batch: list[tuple[str, Row]]) -> list[str | DataError]:
    """A text for each row of a batch; where the function fails, each row is tried alone, to find the one.

    Raises:
        DataError: it gives another number of texts.
    """
    if not batch:
        return []
    try:
        results = _texts(safely("formatting_func", function, _columns([row for _, row in batch])))
    except DataError as error:
        return [error] if len(batch) == 1 else [_in_batch(function, [one])[0] for one in batch]
    if results is None or len(results) != len(batch):
        raise DataError(
            f"{batch[0][0]}: formatting_func gave {'no list' if results is None else f'{len(results)} texts'} for a batch "
            f"of {len(batch)} rows; it must give one text for each row."
        )
    return [result if isinstance(result, str) else _no_text(result) for result in results]


def _takes_batches(function: Callable[[Any], Any], row: Row) -> bool:
    try:
        results = _texts(function(_columns([row, row])))
    except Exception:  # a function of single rows may fail in any way when given columns; then it takes rows
        return False
    return results is not None and len(results) == 2 and all(isinstance(r, str) for r in results)


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _texts(result: Any) -> list[Any] | None:
    """The list of texts of a result: itself, or the column "text" of a mapping."""
    if isinstance(result, Mapping) and isinstance(result.get("text"), list):
        result = result["text"]
    return result if isinstance(result, list) else None


def _no_text(result: Any) -> DataError:
    return DataError(
        f"formatting_func gave {short(result)}; it must give a text, a list of messages, or, for a batch, a list of texts."
    )
