"""Text files, plain or packed: opening them, and reading their lines within limits."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from oribi.errors import DataError

MAX_ROW_CHARACTERS = 1 << 25  # a tokenizer takes gigabytes for a row beyond this
MAX_UNPACKED_CHARACTERS = 1 << 27  # of a packed file that is one JSON object
MAX_SKIPPED_CHARACTERS = 1 << 30  # of one line
PEEKED_BYTES = 4096


class UnreadableText(DataError):
    """A file whose bytes are no UTF-8 text, or cannot be unpacked or read; no setting changes that."""


def suffix_of(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open UTF-8 text, with or without a byte order mark; another encoding is an error that says where it shows."""
    try:
        with _open_bytes(path) as raw:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UnreadableText(
                    f"{path}: the file is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
                )
            if b"\0" in raw.peek(PEEKED_BYTES)[:PEEKED_BYTES]:
                raise UnreadableText(
                    f"{path}: the file has zero bytes: it is UTF-16 without a mark, or no text. Convert it: iconv -f UTF-16LE "
                    f"-t UTF-8 {path.name} > utf8-{path.name}"
                )
            with io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file:
                yield file
    except UnicodeDecodeError as error:
        number, line = _line_of_bad_byte(path)
        excel = (
            'In Excel, save it as "CSV UTF-8". Or convert it'
            if path.suffix.lower() == ".csv"
            else "Convert it"
        )
        raise UnreadableText(
            f"{path}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}). {excel}: iconv -f WINDOWS-1252 -t UTF-8 "
            f"{path.name} > utf8-{path.name}. Read as WINDOWS-1252, the text there is {_excerpt(line)!r}; if that looks wrong, give "
            "iconv the real encoding."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableText(f"{path}: no valid gzip file ({error}). Download it again.") from error
    except OSError as error:
        raise UnreadableText(f"{path}: the file cannot be read ({error.strerror or error}).") from error


def _open_bytes(path: Path) -> Any:
    return gzip.open(path) if _is_packed(path) else open(path, "rb")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def lines_of(file: TextIO) -> Iterator[str]:
    """Lines, each no longer than the longest row and one character; what is left of a longer one is passed over."""
    while line := file.readline(MAX_ROW_CHARACTERS + 1):
        yield line
        skipped = 0
        while len(line) > MAX_ROW_CHARACTERS and not line.endswith("\n"):
            line = file.readline(MAX_ROW_CHARACTERS + 1)
            skipped += len(line)
            if skipped > MAX_SKIPPED_CHARACTERS:
                raise DataError(
                    f"{file.name}: a line of more than {MAX_SKIPPED_CHARACTERS:,} characters. Write one row per line."
                )


def rest_of(path: Path, file: TextIO) -> str:
    """What is left of a file that is read as a whole; what a small packed file may become is limited."""
    if not _is_packed(path):
        return file.read()
    rest = file.read(MAX_UNPACKED_CHARACTERS + 1)
    if len(rest) > MAX_UNPACKED_CHARACTERS:
        raise DataError(
            f"{path}: unpacked, the file has more than {MAX_UNPACKED_CHARACTERS:,} characters in one object. Write its rows as "
            "JSON lines (.jsonl.gz), which are read one by one."
        )
    return rest


def _line_of_bad_byte(path: Path) -> tuple[int, bytes]:
    with _open_bytes(path) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number, line
    return 1, b""


def _excerpt(line: bytes) -> str:
    """What is around a line's first byte above ASCII, as Windows programs of Western Europe and America mean it."""
    at = next((i for i, byte in enumerate(line) if byte > 127), 0)
    return line[max(at - 30, 0) : at + 30].decode("cp1252", errors="replace").strip()


def too_long(characters: int) -> str:
    return (
        f"the row has {characters:,} characters or more, over the limit of {MAX_ROW_CHARACTERS:,}. Split it into "
        "several rows, or put plain text into a .txt file, which is read in blocks."
    )
