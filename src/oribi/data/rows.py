"""The rows of a source one by one: whatever goes wrong with one of them is that row's problem, and one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oribi.chat.masking import Marked
from oribi.data.conversations import RowFormat
from oribi.data.converters import Example
from oribi.data.encoding import Encoded, Encoder, without_lone_surrogates
from oribi.data.sources import Part
from oribi.errors import DataError, OribiError

UNRECOGNISED_ROWS = 1000  # so many rows may be null or broken before the first that shows the format

Row = Mapping[str, Any]


def examples_of(
    rows: Iterator[tuple[str, Row | DataError]], recognise: Callable[[Row], RowFormat]
) -> Iterator[tuple[str, Example | DataError]]:
    """Rows as examples; rows that cannot be read come as the error that says so.

    Args:
        rows: origins and rows, or what a reader found wrong in the place of a row.
        recognise: the format by a row; it is asked until a row shows it.

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
    """All texts in one call of the tokenizer; one by one where that fails, to find the row.

    Args:
        encoder, marks, plain: as for `Encoder.encode`.

    Returns:
        For each text its tokens, or what the tokenizer cannot do with it.
    """
    counted = encoder.bos_added
    try:
        return list(encoder.encode(marks, plain))
    except Exception:  # of whatever kind: each row is tried again, and says its own
        encoder.bos_added = counted
    found: list[Encoded | DataError] = []
    for mark, is_plain in zip(marks, plain):
        try:
            found += safely("tokenising the row", encoder.encode, [mark], [is_plain])
        except DataError as error:
            found.append(error)
    return found


def safely(what: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call on one row; whatever goes wrong in it is the row's problem, and one sentence.

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
    """The rows of a part; a failure of the data set itself names the last row that was read."""
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
