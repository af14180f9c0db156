"""Shows the data as the model will see it: which tokens are trained, context, cut or special, in the terminal or as HTML."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from oribi.data.encoding import UNTRAINED, Encoded
from oribi.data.preparation import Preparation
from oribi.data.prepare import make_preparation
from oribi.data.report import DataReport
from oribi.text import printable, write_whole

STYLES = {
    ("trained", False): "black on green", ("trained", True): "bold white on dark_green",
    ("context", False): "", ("context", True): "cyan", ("cut", False): "red strike",
    ("cut", True): "red strike",
}  # fmt: skip
SHOWN_TOKENS = 2000  # of one row
PANEL_BORDER = 4  # cells


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token as people read it, or the tokens that make one character together; `kind` is trained, context or cut."""

    ids: tuple[int, ...]
    text: str
    kind: str
    special: bool


@dataclass(frozen=True, slots=True)
class RowView:
    """The tokens of one row."""

    origin: str
    tokens: list[TokenView]
    length: int

    def heading(self) -> str:
        counts = {
            k: sum(len(t.ids) for t in self.tokens if t.kind == k) for k in ("trained", "context", "cut")
        }
        total = sum(counts.values())
        shown = f", {total:,} shown" if total < self.length else ""
        parts = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        return f"{self.origin}: {self.length:,} tokens{shown}: {parts}"


def inspect_data(
    source: Any,
    tokenizer: Any,
    *,
    max_seq_length: int,
    rows: int = 3,
    html_file: str | os.PathLike[str] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> DataReport:
    """Show the first rows token by token, then the statistics and warnings of the whole source.

    Args:
        source, tokenizer, max_seq_length: as for prepare_dataset.
        rows: how many rows are shown.
        html_file: write the rows as a page of its own, too.
        console: where it is shown; None is the terminal.
        settings: as for prepare_dataset: split, train_on, overlong, malformed, append_eos, text_field, columns, role_aliases,
            formatting_func, chat_template_kwargs, max_rows.

    Returns:
        The report.

    Raises:
        DataError: as prepare_dataset, after the rows before it have been shown.
    """
    console = console or Console()
    preparation = make_preparation(
        source,
        tokenizer,
        max_seq_length=max_seq_length,
        announce=lambda line: _print(console, line),
        **settings,
    )
    shown: list[RowView] = []
    for view in _views(preparation, rows):
        shown.append(view)
        _print(console, view.heading())
        text = _as_text(view, marked=not console.is_terminal)
        console.print(Panel(_folded(text, console.width - PANEL_BORDER)))
    preparation.finish()
    _print(console, _legend() if console.is_terminal else "legend: \u27e6trained\u27e7 context \u2702 cut")
    _print(console, str(preparation.report))
    if html_file is not None:
        write_html(Path(html_file), shown, preparation.report)
        _print(console, f"written: {html_file}")
    return preparation.report


def _print(console: Console, line: str | Text) -> None:
    """Print a line in full: the terminal wraps it, and nothing is cut off."""
    console.print(line if isinstance(line, Text) else Text(printable(line)), soft_wrap=True)


def _folded(text: Text, width: int) -> Text:
    """Break text into lines of at most `width` cells without losing a character, not even a space."""
    cuts, cells = [], 0
    for at, character in enumerate(text.plain):
        size = cell_len(character)
        if character == "\n":
            cells = 0
        elif cells + size > max(width, 2):
            cuts.append(at)
            cells = size
        else:
            cells += size
    return Text("\n").join(text.divide(cuts))


def _views(preparation: Preparation, rows: int) -> Iterator[RowView]:
    """Views of the first rows, while all rows are counted."""
    seen = 0
    for batch in preparation.encoded():
        for origin, encoded in batch:
            preparation.count(origin, encoded)
            if seen < rows:
                seen += 1
                yield view_row(preparation.tokenizer, origin, encoded, preparation.settings)


def view_row(tokenizer: Any, origin: str, encoded: Encoded, settings: Any) -> RowView:
    """The view of one encoded row under the run's limit."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    overlong = settings.overlong_of(encoded)
    limit = settings.max_seq_length if overlong != "split" else len(encoded.ids)
    if overlong == "drop" and len(encoded.ids) > limit:
        limit = 0
    tokens, part = [], []
    for place, (token, label) in enumerate(zip(encoded.ids[:SHOWN_TOKENS], encoded.labels)):
        kind = "cut" if place >= limit else "context" if label == UNTRAINED or place == 0 else "trained"
        part.append(token)
        text = _text_of(tokenizer, part)
        if "\ufffd" in text and len(part) < 4 and place + 1 < len(encoded.ids):
            continue  # a part of a character; the next tokens complete it
        tokens.append(TokenView(tuple(part), text, kind, token in special))
        part = []
    return RowView(origin, tokens, len(encoded.ids))


def _text_of(tokenizer: Any, ids: list[int]) -> str:
    """Tokens as they stand in the text, with the leading space that decoding alone would drop."""
    first = tokenizer.convert_ids_to_tokens(ids[0])
    if len(ids) == 1 and first.startswith("\u2581"):
        return first.replace("\u2581", " ")
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) or first


def _visible(text: str) -> str:
    """Text with visible blanks and control characters, which must not move the terminal's cursor."""
    shown = text.replace("\r", "\u240d").replace("\t", "\u2192   ").replace("\n", "\u23ce\n")
    return printable(shown)


def _as_text(view: RowView, marked: bool) -> Text:
    """Coloured text; `marked` for output without colours, where brackets show what is trained and scissors where it is cut."""
    text, before = Text(), "context"
    brackets = {
        ("context", "trained"): "\u27e6",
        ("trained", "context"): "\u27e7",
        ("trained", "cut"): "\u27e7\u2702",
    }
    brackets |= {("context", "cut"): "\u2702"}
    for token in view.tokens:
        if marked:
            text.append(brackets.get((before, token.kind), ""))
            before = token.kind
        text.append(_visible(token.text), style=STYLES[token.kind, token.special])
    if marked and before == "trained":
        text.append("\u27e7")
    return text


def _legend() -> Text:
    text = Text("legend: ")
    for kind, special, label in (
        ("trained", False, "trained"),
        ("trained", True, "trained special"),
        ("context", False, "context"),
        ("context", True, "context special"),
        ("cut", False, "cut"),
    ):
        text.append(label, style=STYLES[kind, special])
        text.append("  ")
    return text


def write_html(path: Path, rows: list[RowView], report: DataReport) -> None:
    """Write rows and report as one HTML page that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oribi.data"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("rows.html.jinja").render(rows=rows, report=report, visible=_visible)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page + "\n")
