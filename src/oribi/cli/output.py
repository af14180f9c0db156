"""What verbs print: aligned lines for people, JSON lines for programs. Standard output holds results and nothing else."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated, Any

import typer

from oribi.text import LastingStream, printable

Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


class Output:
    """Where a verb's results go.

    Args:
        json_lines: print each `record` as one line of JSON, and no `text`.
    """

    def __init__(self, json_lines: bool) -> None:
        self.json_lines = json_lines

    def text(self, line: str = "") -> None:
        """A line for people."""
        if not self.json_lines:
            typer.echo(printable(line))

    def record(self, **values: Any) -> None:
        """One object for programs."""
        if self.json_lines:
            typer.echo(json.dumps(values, ensure_ascii=False, default=str))

    def fields(self, values: Mapping[str, Any], indent: int = 0) -> None:
        """Names and values in two columns; what is None or empty is left out."""
        shown = {name: str(value) for name, value in values.items() if value is not None and value != ""}
        width = max((len(name) for name in shown), default=0) + 2
        for name, value in shown.items():
            first, *more = value.splitlines() or [""]
            self.text(f"{'':<{indent}}{name:<{width}}{first}")
            for line in more:
                self.text(f"{'':<{indent + width}}{line}")

    def table(self, rows: Sequence[Mapping[str, Any]], right: Sequence[str] = ()) -> None:
        """Rows of the same keys under a heading; columns named in `right` are numbers."""
        if not rows:
            return
        names = list(rows[0])
        cells = [names, *([str(row[name]) for name in names] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        for row in cells:
            parts = [
                f"{cell:>{width}}" if name in right else f"{cell:<{width}}"
                for name, cell, width in zip(names, row, widths)
            ]
            self.text("  ".join(parts).rstrip())


@contextmanager
def chatter_aside() -> Iterator[None]:
    """Inside the block, whatever libraries print goes to standard error."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, output is dropped when its reader has gone, instead of ending the work."""
    out, err = sys.stdout, sys.stderr
    with redirect_stdout(LastingStream(lambda: out)), redirect_stderr(LastingStream(lambda: err)):
        yield


def complain(message: str, color: str = "red") -> None:
    """A message about what is wrong, on standard error; in colour on terminals, unless NO_COLOR is set."""
    typer.secho(printable(message), fg=color, err=True, color=False if os.environ.get("NO_COLOR") else None)
