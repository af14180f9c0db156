"""Texts: the nearest of the allowed names, values as messages show them, and files that are written whole."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

_SHOWN = 80  # characters of a value in a message


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or not there, whoever else writes it at the same time."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def nearest(word: Any, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant; case, dashes, dots and underscores do not count."""
    meant, names = _bare(str(word)[:_SHOWN]), {}
    for name in allowed:
        names.setdefault(_bare(name), name)
    begun = [bare for bare in names if len(meant) > 2 and bare.startswith(meant)]
    found = begun or difflib.get_close_matches(meant, names, n=1)
    return names[found[0]] if found else None


def one_of(word: Any, allowed: Iterable[str]) -> str:
    """What may be written instead of a word: the nearest name; all of them where they are few or none is near."""
    names = list(allowed)
    near = nearest(word, names)
    if near is not None and len(names) > 5:
        return f"did you mean {near}?"
    listed = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    return f"must be {listed}" + (f"; did you mean {near}?" if near is not None else "")


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


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters and marks of direction are written as escapes.

    Line feeds and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: _escaped(found.group()), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _bare(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.casefold())
