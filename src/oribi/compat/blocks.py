"""The Python of a script or a notebook: where it stands in the file, and how edits go back without touching another byte.

Lines are counted as Python counts them: a form feed or a Unicode line separator ends none.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from json.decoder import scanstring
from json.scanner import py_make_scanner
from pathlib import Path

from oribi.errors import ConfigError

# cells that hold Python although they begin with a magic of the whole cell
_PYTHON_CELL = re.compile(r"%%(capture|time|timeit|prun|debug|python3?|writefile\s+\S+\.py)\b")
_SHELL_CELL = re.compile(r"%%(bash|sh|shell|script\s+\S*sh|!)")
# a line for IPython: a magic, the shell, a question; also where its result is assigned
_IPYTHON = re.compile(r"\s*([!%?]|[\w.%]+\?\??\s*$|[\w.,\s\[\]'\"]*[^=!<>%+\-*/\s]\s*=\s*[!%])")


@dataclass
class ConvertedScript:
    """A script for oribi. `changed`, `ignored` and `refused` are sentences that begin with their place."""

    text: str
    encoding: str = "utf-8"
    changed: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A piece of a file: a whole script, or a cell of a notebook.

    Args:
        place: how its lines are named, "line {}" or "cell 3, line {}".
        text: its source.
        strings: of a cell, its strings in the notebook's text, each with the position of its first character and its end there.
        kind: "python", "shell", or "other" for a cell in a language that is left alone.
    """

    place: str
    text: str
    strings: list[tuple[str, int, int]] | None = None
    kind: str = "python"
    tree: ast.Module | None = None
    problem: str | None = None
    # numbers of the lines that IPython runs rather than Python
    commands: set[int] = field(default_factory=set)
    edits: list[tuple[int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = list(io.StringIO(self.text, newline=""))
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        if self.strings is not None:
            self._parse_cell()
        else:
            self._parse(self.lines)

    def at(self, line: int) -> str:
        """How a message names a line; `line` counts from 1."""
        return self.place.format(line)

    def position(self, line: int, offset: int) -> int:
        """The character of `text` at which a syntax tree's line and offset, which counts bytes, stand."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:offset].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The characters of `text` that a node covers."""
        return self.position(node.lineno, node.col_offset), self.position(
            node.end_lineno, node.end_col_offset
        )

    def holds(self, node: ast.expr) -> bool:
        """Whether an expression stands where its tree says; within the f-strings of Python 3.11 it may not."""
        try:
            start, end = self.span(node)
            found = ast.parse(f"({self.text[start:end]}\n)", mode="eval").body
        except (SyntaxError, ValueError, IndexError, UnicodeDecodeError):
            return False
        return ast.dump(found) == ast.dump(node)

    def edit(self, start: int, end: int, new: str) -> None:
        """Replace characters of `text`."""
        self.edits.append((start, end, new))

    def edited(self, start: int, end: int) -> str:
        """A part of `text` with the edits that begin in it, less what earlier ones take away of it."""
        pieces, at = [], start
        for first, last, new in sorted(self.edits):
            begins_here = start <= first < end or first == end == len(self.text)
            if begins_here or first < start < last:
                pieces += [self.text[at : max(first, at)], new if begins_here else ""]
                at = max(at, min(last, end))
        return "".join([*pieces, self.text[at:end]])

    def _parse_cell(self) -> None:
        first = next((line.strip() for line in self.lines if line.strip()), "")
        if first.startswith("%%") and not _PYTHON_CELL.match(first):
            self.kind = "shell" if _SHELL_CELL.match(first) else "other"
            return
        self._parse(self.lines)
        while self.tree is None and self._pass_over_commands():
            kept = [self._as_python(number, line) for number, line in enumerate(self.lines, start=1)]
            self._parse(kept)

    def _parse(self, lines: list[str]) -> None:
        try:
            self.tree, self.problem = ast.parse("".join(lines)), None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            said = getattr(error, "msg", None) or error
            self.problem = f"{self.at(getattr(error, 'lineno', None) or 1)}: no Python: {said}"
            self._wrong = getattr(error, "lineno", None) or 1

    def _pass_over_commands(self) -> bool:
        """Mark the first line for IPython at or before the place where Python stops; whether there is one."""
        found = [
            n for n, line in enumerate(self.lines, start=1) if n not in self.commands and _IPYTHON.match(line)
        ]
        number = next((n for n in reversed(found) if n <= self._wrong), next(iter(found), None))
        if number is None:
            return False
        self.commands.add(number)
        while self.lines[number - 1].rstrip().endswith("\\") and number < len(self.lines):
            number += 1
            self.commands.add(number)
        return True

    def _as_python(self, number: int, line: str) -> str:
        """A line for the parser: a line for IPython becomes one without effect, as deep as it stands."""
        if number not in self.commands:
            return line
        while number - 1 in self.commands and self.lines[number - 2].rstrip().endswith("\\"):
            number -= 1
        first = self.lines[number - 1]
        return first[: len(first) - len(first.lstrip())].rstrip("\r\n") + "pass\n"


def read_blocks(path: Path) -> tuple[str, str, list[Block]]:
    """A file's text, its encoding, and the blocks of it that hold code.

    Args:
        path: a .py or .ipynb file.

    Raises:
        ConfigError: it cannot be read, or is no Python or no notebook.
    """
    is_notebook = path.suffix == ".ipynb"
    try:
        raw = path.read_bytes()
        encoding = "utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8"
        if not is_notebook:
            encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        text = raw.decode(encoding)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if is_notebook:
        return text, encoding, _cells(path, text)
    script = Block("line {}", text)
    if script.problem is not None:
        raise ConfigError(f"{path}, {script.problem}")
    return text, encoding, [script]


def joined(text: str, blocks: list[Block]) -> str:
    """The file with the edits of its blocks, and every other character as it was."""
    if blocks and blocks[0].strings is None:
        return blocks[0].edited(0, len(text))
    pieces, end = [], 0
    for block in blocks:
        at = 0
        for string, first, last in block.strings if block.edits else ():
            new = block.edited(at, at + len(string))
            at += len(string)
            if new != string:
                pieces += [text[end:first], json.dumps(new, ensure_ascii=text[first:last].isascii())]
                end = last
    return "".join([*pieces, text[end:]])


class _Spotted(str):
    """A string of a JSON file that knows where it stands there."""

    span: tuple[int, int]


class _SpottingDecoder(json.JSONDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.parse_string = self._spot
        self.scan_once = py_make_scanner(self)

    @staticmethod
    def _spot(text: str, start: int, strict: bool = True) -> tuple[_Spotted, int]:
        value, end = scanstring(text, start, strict)
        spotted = _Spotted(value)
        spotted.span = (start - 1, end)
        return spotted, end


def _cells(path: Path, text: str) -> list[Block]:
    """The code cells of a notebook, of version 4 or 3 of its format."""
    try:
        notebook = _SpottingDecoder().decode(text)
        return list(_code_cells(notebook))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: no notebook: {type(error).__name__}: {error}") from error


def _code_cells(notebook: dict) -> Iterator[Block]:
    sheets = notebook["worksheets"] if "cells" not in notebook and "worksheets" in notebook else [notebook]
    for number, cell in enumerate((cell for sheet in sheets for cell in sheet["cells"]), start=1):
        if cell["cell_type"] == "code":
            source = cell["source"] if "source" in cell else cell["input"]
            strings = [source] if isinstance(source, str) else source
            yield Block(f"cell {number}, line {{}}", "".join(strings), [(str(s), *s.span) for s in strings])
