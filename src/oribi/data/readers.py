"""Reads files into rows. Each reader yields (origin, row); the origin is `file:line`, so that every error names its place.

A broken line yields its error in place of a row; an error that ends the reading is raised.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from oribi.data import text_files
from oribi.data.text_files import lines_of, open_text, rest_of, suffix_of, too_long
from oribi.errors import DataError

TEXT_BLOCK_CHARACTERS = 1 << 20  # plain text files are read in blocks, so memory does not grow with the file
JSON_CHUNK_CHARACTERS = 1 << 20
SNIFFED_CHARACTERS = 1 << 16
DELIMITERS = ",;\t|"
TEXTS = (".txt", ".md")

Rows = Iterator[tuple[str, dict[str, Any] | DataError]]


def read_file(path: Path, name: str | None = None) -> Rows:
    """The rows of one file, by its suffix; a .gz after the suffix is unpacked while reading.

    Args:
        path: the file.
        name: what it is called in origins; None is its base name.

    Raises:
        DataError: unknown suffix, no such file, or content that cannot be read.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path}: cannot read {suffix_of(path) or 'a file without a suffix'}; known are {', '.join(READERS)}."
        )
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'a folder, no file' if path.is_dir() else 'no such file'}.")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty. Check that it was written or downloaded fully.")
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
    return reader(path, name or path.name)


def _read_json_lines(path: Path, name: str) -> Rows:
    empty = True
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file), 1):
            origin = f"{name}:{number}"
            if not line.strip():
                continue
            empty = False
            yield origin, _json_line(line)
    if empty:
        raise DataError(f"{path}: the file has only blank lines.")


def _json_line(line: str) -> dict[str, Any] | DataError:
    if len(line) > text_files.MAX_ROW_CHARACTERS:
        return DataError(too_long(len(line)))
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return DataError(
            f"no valid JSON ({_reason(error, 'line')}); the line begins {_begin(line)}. Each line of a .jsonl file must be one complete "
            "object: correct or remove this line."
        )


def _read_json(path: Path, name: str) -> Rows:
    """An array of objects, read piece by piece; or one object that holds such an array; or, misnamed, JSON lines."""
    with open_text(path) as file:
        head = file.read(JSON_CHUNK_CHARACTERS)
        start = head.lstrip()[:1]
        if start == "[":
            yield from _read_array(name, file, head)
            return
        if start != "{":
            raise DataError(
                f"{path}: the file begins {_begin(head)}; a .json file must hold an array of objects, [{{...}}, ...]."
            )
        first = head.lstrip().split("\n", 1)
        if len(first) == 2 and first[1].strip() and _is_json(first[0]):
            file.close()
            yield from _read_json_lines(path, name)
            return
        yield from _read_wrapped(path, name, head + rest_of(path, file))


def _read_array(name: str, file: TextIO, buffer: str) -> Rows:
    decoder, at, line = json.JSONDecoder(), buffer.index("[") + 1, 1
    line += buffer.count("\n", 0, at)
    while True:
        gap = at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at < len(buffer):
                break
            line += buffer.count("\n", gap, at)
            buffer, at, gap = file.read(JSON_CHUNK_CHARACTERS), 0, 0
            if not buffer:
                raise DataError(
                    f"{name}:{line}: the array is not closed; the file seems cut off. Download it again."
                )
        line += buffer.count("\n", gap, at)
        if buffer[at] == "]":
            return
        origin = f"{name}:{line}"
        while True:
            try:
                row, end = decoder.raw_decode(buffer, at)
                break
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                whole = deep or len(buffer) - at >= text_files.MAX_ROW_CHARACTERS
                more = "" if whole else file.read(JSON_CHUNK_CHARACTERS)
                if not more:
                    if whole and not deep:
                        raise DataError(f"{origin}: {too_long(len(buffer) - at)}") from error
                    bad = line + buffer.count("\n", at, getattr(error, "pos", at))
                    raise DataError(
                        f"{name}:{bad}: no valid JSON ({_reason(error, 'file')}) in the object that begins in line {line}. "
                        "Correct it; a JSON checker shows the place."
                    ) from error
                buffer, at = buffer[at:] + more, 0
        yield origin, _object(row)
        line += buffer.count("\n", at, end)
        at = end


def _read_wrapped(path: Path, name: str, text: str) -> Rows:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"{name}:{line}: no valid JSON ({_reason(error, 'file')}). Correct the file."
        ) from error
    arrays = {
        k: v for k, v in whole.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)
    }
    if "messages" in whole or "conversations" in whole or not arrays:
        yield f"{name}:1", whole
        return
    if len(arrays) > 1:
        raise DataError(
            f"{path}: the object holds several arrays of rows, {list(arrays)}; keep one, as [{{...}}, ...]."
        )
    key, rows = next(iter(arrays.items()))
    for number, row in enumerate(rows, 1):
        yield f"{name}:{key}[{number}]", row


def _read_csv(path: Path, name: str) -> Rows:
    with open_text(path, newline="") as file, _long_csv_fields():
        head = file.read(SNIFFED_CHARACTERS)
        while head.endswith("\r") and (more := file.read(1)):  # a line feed may belong to it
            head += more
        told = re.match(r"sep=(.)\r?\n", head)  # a line of Excel's, which is no header
        start, line = (told.end(), 1) if told else (0, 0)
        usual = "\t" if suffix_of(path) == ".tsv" else ","
        delimiter = told.group(1) if told else _delimiter(head[start:], usual)
        reader = csv.DictReader(_csv_lines(head[start:], file), delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{name}:{line + 1}: column names {names} are not unique.")
            if len(names) == 1 and any(mark in names[0] for mark in DELIMITERS):
                raise DataError(
                    f"{name}:{line + 1}: the only column is {names[0]!r}, whose name holds a delimiter. Save the file with commas "
                    "between its columns, or rename that column."
                )
            before, empty = line, True
            line += reader.line_num
            for row in reader:
                origin, line, empty = f"{name}:{line + 1}", before + reader.line_num, False
                if None in row or any(v is None for v in row.values()):
                    missing = sum(v is None for v in row.values())
                    given = len(row) - (None in row) + len(row.get(None) or []) - missing
                    yield (
                        origin,
                        DataError(
                            f"{given} fields, but the header has {len(names)}: {names}. Quote text that holds a separator or a line "
                            "break."
                        ),
                    )
                else:
                    yield origin, dict(row)
        except csv.Error as error:
            raise DataError(
                f"{name}:{line + 1}: no valid CSV ({error}). Quote text that holds quotes."
            ) from error
    if empty:
        raise DataError(f"{path}: the file has a header ({names}) but no rows.")


def _delimiter(text: str, usual: str) -> str:
    """What stands between columns: of the delimiters that part the header, the one that parts most rows as often."""
    lines = list(io.StringIO(text, newline=""))
    if len(text) >= SNIFFED_CHARACTERS:
        lines.pop()  # it may be cut off
    fitting = []
    for order, mark in enumerate((usual, *DELIMITERS.replace(usual, ""))):
        try:
            columns = [len(row) for row in csv.reader(lines, delimiter=mark) if row]
        except csv.Error:
            continue
        if columns and columns[0] > 1:
            alike = sum(count == columns[0] for count in columns) / len(columns)
            fitting.append((alike, -order, mark))
    return max(fitting)[2] if fitting else usual


def _csv_lines(head: str, file: TextIO) -> Iterator[str]:
    """The lines of a file whose beginning has been read."""
    lines = list(io.StringIO(head, newline=""))
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += file.readline(text_files.MAX_ROW_CHARACTERS + 1)
    yield from lines
    yield from lines_of(file)


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    before = csv.field_size_limit(text_files.MAX_ROW_CHARACTERS)  # the limit is the csv module's own, 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", row
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # whatever a damaged file causes
        raise DataError(f"{path}: no valid Parquet file ({error}). Download or write it again.") from error
    if not number:
        raise DataError(f"{path}: the file has no rows.")


def _read_text(path: Path, name: str) -> Rows:
    """A file is one document, read in blocks that end between paragraphs, lines or words; only the last one ends it."""
    with open_text(path) as file:
        rest, line, begins, chunk = "", 1, True, file.read(TEXT_BLOCK_CHARACTERS)
        if not chunk.strip():
            raise DataError(f"{path}: the file has only blank lines.")
        while chunk:
            following = file.read(TEXT_BLOCK_CHARACTERS)
            block, ends = rest + chunk, not following.strip()
            cut = len(block)
            if not ends:
                cut = next(
                    (c for mark in ("\n\n", "\n", " ") if (c := block.rfind(mark) + 1) > cut // 2), cut
                )
            yield f"{name}:{line}", {"text": block[:cut], "begins": begins, "ends": ends}
            begins = False
            line += block.count("\n", 0, cut)
            rest, chunk = block[cut:], following


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".json": _read_json, ".csv": _read_csv,
    ".tsv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text, ".md": _read_text,
}  # fmt: skip


def _object(row: Any) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"{type(row).__name__} {_begin(str(row))}; each row must be a JSON object, {{...}}.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _reason(error: Exception, whole: str) -> str:
    """What is wrong with JSON text, which is a whole line or file."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    cause = "the line holds an unescaped line break" if whole == "line" else "a closing quote is missing"
    at_end = error.pos >= len(error.doc.rstrip())
    if error.msg.startswith("Unterminated string") or (at_end and error.msg.startswith("Invalid control")):
        return f"the {whole} ends inside a string: the file was cut off, or {cause}"
    if at_end:
        return f"the {whole} ends inside an object: the file was cut off" + (
            ", or the object continues in the next line" if whole == "line" else ""
        )
    return f"{error.msg[0].lower()}{error.msg[1:]}, column {error.colno}"


def _begin(text: str, limit: int = 50) -> str:
    text = text.strip()
    return repr(text[:limit]) + ("..." if len(text) > limit else "")
