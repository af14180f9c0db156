"""Files to rows. Each reader yields (origin, row); the origin is `file:line`, so that every complaint can name its place.

A line that is broken by itself comes as the error that says so, in the place of its row; what ends the reading is raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from oribi.errors import DataError

MAX_ROW_CHARACTERS = 1 << 25  # a tokenizer takes gigabytes for a row beyond this
TEXT_BLOCK_CHARACTERS = 1 << 20  # plain text files are read in blocks, so memory does not grow with the file
JSON_CHUNK_CHARACTERS = 1 << 20

Rows = Iterator[tuple[str, dict[str, Any] | DataError]]


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix; a .gz after the suffix is unpacked while reading.

    Raises:
        DataError: unknown suffix, no such file, or content that cannot be read.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path}: cannot read {suffix_of(path) or 'a file without a suffix'}; known are {', '.join(READERS)}."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty. Check that it was written or downloaded fully.")
    return reader(path)


def suffix_of(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def read_json_lines(path: Path) -> Rows:
    empty = True
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            origin = f"{path.name}:{number}"
            if not line.strip():
                continue
            empty = False
            yield origin, _json_line(line)
    if empty:
        raise DataError(f"{path}: the file has only blank lines.")


def _json_line(line: str) -> dict[str, Any] | DataError:
    if len(line) > MAX_ROW_CHARACTERS:
        return DataError(_too_long(len(line)))
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return DataError(
            f"no valid JSON ({_reason(error)}); the line begins {_begin(line)}. Each line of a .jsonl file must be one complete "
            "object: correct or remove this line."
        )


def read_json(path: Path) -> Rows:
    """An array of objects, read piece by piece; or one object that holds such an array; or, misnamed, JSON lines."""
    with _open_text(path) as file:
        head = file.read(JSON_CHUNK_CHARACTERS)
        start = head.lstrip()[:1]
        if start == "[":
            yield from _read_array(path, file, head)
            return
        if start != "{":
            raise DataError(
                f"{path}: the file begins {_begin(head)}; a .json file must hold an array of objects, [{{...}}, ...]."
            )
        first = head.lstrip().split("\n", 1)
        if len(first) == 2 and first[1].strip() and _is_json(first[0]):
            file.close()
            yield from read_json_lines(path)
            return
        yield from _read_wrapped(path, head + file.read())


def _read_array(path: Path, file: TextIO, buffer: str) -> Rows:
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
                    f"{path.name}:{line}: the array is not closed; the file seems cut off. Download it again."
                )
        line += buffer.count("\n", gap, at)
        if buffer[at] == "]":
            return
        origin = f"{path.name}:{line}"
        while True:
            try:
                row, end = decoder.raw_decode(buffer, at)
                break
            except ValueError as error:
                more = file.read(JSON_CHUNK_CHARACTERS) if len(buffer) - at < MAX_ROW_CHARACTERS else ""
                if not more:
                    if len(buffer) - at >= MAX_ROW_CHARACTERS:
                        raise DataError(f"{origin}: {_too_long(len(buffer) - at)}") from error
                    bad = line + buffer.count("\n", at, getattr(error, "pos", at))
                    raise DataError(
                        f"{path.name}:{bad}: no valid JSON ({_reason(error)}) in the object that begins in line {line}. "
                        "Correct it; a JSON checker shows the place."
                    ) from error
                buffer, at = buffer[at:] + more, 0
        yield origin, _object(row)
        line += buffer.count("\n", at, end)
        at = end


def _read_wrapped(path: Path, text: str) -> Rows:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: no valid JSON ({_reason(error)}). Correct the file."
        ) from error
    arrays = {
        k: v for k, v in whole.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)
    }
    if "messages" in whole or "conversations" in whole or not arrays:
        yield f"{path.name}:1", whole
        return
    if len(arrays) > 1:
        raise DataError(
            f"{path}: the object holds several arrays of rows, {list(arrays)}; keep one, as [{{...}}, ...]."
        )
    name, rows = next(iter(arrays.items()))
    for number, row in enumerate(rows, 1):
        yield f"{path.name}:{name}[{number}]", row


def read_csv(path: Path) -> Rows:
    separator = "\t" if suffix_of(path) == ".tsv" else ","
    with _open_text(path, newline="") as file, _long_csv_fields():
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{path.name}:1: column names {names} are not unique.")
            line, empty = reader.line_num, True
            for row in reader:
                origin, line, empty = f"{path.name}:{line + 1}", reader.line_num, False
                if None in row or any(v is None for v in row.values()):
                    given = (
                        len(row)
                        - (None in row)
                        + len(row.get(None) or [])
                        - sum(v is None for v in row.values())
                    )
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
                f"{path.name}:{reader.line_num + 1}: no valid CSV ({error}). Quote text that holds quotes."
            ) from error
    if empty:
        raise DataError(f"{path}: the file has a header ({names}) but no rows.")


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    before = csv.field_size_limit(MAX_ROW_CHARACTERS)  # the limit is the csv module's own, 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: no valid Parquet file ({error}). Download or write it again.") from error
    if not number:
        raise DataError(f"{path}: the file has no rows.")


def read_text(path: Path) -> Rows:
    """A file is one document, read in blocks that end between paragraphs, lines or words; only the last one ends it."""
    with _open_text(path) as file:
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
            yield f"{path.name}:{line}", {"text": block[:cut], "begins": begins, "ends": ends}
            begins = False
            line += block.count("\n", 0, cut)
            rest, chunk = block[cut:], following


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open UTF-8 text, with or without a byte order mark; another encoding is an error that says where it shows."""
    try:
        with _open_bytes(path) as raw:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(
                    f"{path}: the file is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
                )
            with io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file:
                yield file
    except UnicodeDecodeError as error:
        line = _line_of_bad_byte(path)
        raise DataError(
            f"{path.name}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}). Convert the file: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name} (with its real encoding after -f)."
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: no valid gzip file ({error}). Download it again.") from error


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _line_of_bad_byte(path: Path) -> int:
    with _open_bytes(path) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _object(row: Any) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"{type(row).__name__} {_begin(str(row))}; each row must be a JSON object, {{...}}.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:]}, column {error.colno}"
    return str(error)


def _begin(text: str, limit: int = 50) -> str:
    text = text.strip()
    return repr(text[:limit]) + ("..." if len(text) > limit else "")


def _too_long(characters: int) -> str:
    return (
        f"the row has {characters:,} characters or more, over the limit of {MAX_ROW_CHARACTERS:,}. Split it into "
        "several rows, or put plain text into a .txt file, which is read in blocks."
    )
