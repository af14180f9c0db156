"""Text for people and files: nearest names, values, sizes and times in messages, output that outlives its reader, and files
that are written whole."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

_SHOWN = 80  # characters of a value in a message


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`; it takes the place of `path` when the block ends, and is removed if the block fails.

    Readers see the old file or the new one, whatever other processes write and wherever the machine stops.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # process ids repeat among machines
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a small file, text in UTF-8, that is there whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def nearest(word: Any, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant; case, dashes, dots and underscores do not count."""
    meant, names = _bare(str(word)[:_SHOWN]), {}
    for name in allowed:
        names.setdefault(_bare(name), name)
    begun = [bare for bare in names if len(meant) > 2 and bare.startswith(meant)]
    found = begun or difflib.get_close_matches(meant, names, n=1)
    return names[found[0]] if found else None


def did_you_mean(word: Any, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean X?", or nothing where no name is near."""
    near = nearest(word, allowed)
    return "" if near is None else f"; did you mean {near}?"


def one_of(word: Any, allowed: Iterable[str]) -> str:
    """What may be written instead of a word: the nearest name; all of them where they are few or none is near."""
    names = list(allowed)
    near = nearest(word, names)
    if near is not None and len(names) > 5:
        return f"did you mean {near}?"
    listed = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    return f"must be {listed}" + did_you_mean(word, names)


def shown(value: Any) -> str:
    """A value as a message quotes it: Python's repr, except true, false and null, cut off where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, dict)):
        text = "a list" if isinstance(value, list) else "keys with values"
        # a list may hold itself many times over, so its repr may have any length
        parts = [shown(item) for item in value[:4]] if isinstance(value, list) else []
        text = f"[{', '.join(parts)}{', ...' if len(value) > 4 else ''}]" if parts else text
    else:
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a huge number"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def gibibytes(size: float) -> str:
    """Bytes in words: 1.23 GiB, or 45.6 MiB below a tenth of a GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def gigabytes(size: float) -> str:
    """Bytes as disks count them: 1.23 GB, or 45.6 MB below a tenth of a GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def short_count(number: float) -> str:
    """8030261248 -> "8.03 B"."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:  # what three digits round up to it
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters and marks of direction are written as escapes.

    Line feeds and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: _escaped(found.group()), text)


def say(text: str) -> None:
    """Print a line to standard output, if somebody reads it."""
    print(printable(text), file=LastingStream(lambda: sys.stdout), flush=True)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say_notes(notes: Iterable[str]) -> None:
    """Print notes of oribi, a line each; of several processes only the first does."""
    if is_first_process():
        for note in notes:
            say(f"oribi: {note}")


class LastingStream:
    """A text stream that drops what can no longer be written, so that work continues when the reader is gone (`| head -1`).

    Args:
        stream: gives the stream to write to, at each time; None counts as closed.
    """

    def __init__(self, stream: Callable[[], Any]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def write(self, text: str) -> int:
        try:
            self._stream().write(text)
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream().flush()
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)

    def isatty(self) -> bool:
        try:
            return self._stream().isatty()
        except (ValueError, AttributeError):
            return False

    def _drop(self, error: Exception) -> None:
        """Send what is still buffered nowhere; Python would complain about it at its end."""
        if isinstance(error, BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream().fileno())
            os.close(nowhere)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _bare(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.casefold())
