"""Shows the data as the model will see it: which tokens are trained, context, cut or special, in the terminal or as HTML."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from oribi.data.encoding import UNTRAINED, Encoded
from oribi.data.preference_figures import Ranked
from oribi.data.preparation import Preparation
from oribi.data.prepare import make_preparation
from oribi.data.report import DataReport
from oribi.text import printable, write_whole

STYLES = {
    ("trained", False): "black on green", ("trained", True): "bold white on dark_green",
    ("context", False): "", ("context", True): "cyan", ("cut", False): "red strike",
    ("cut", True): "red strike",
    ("prompt", False): "dim", ("prompt", True): "dim cyan",
    ("good", False): "black on green", ("good", True): "bold white on dark_green",
    ("bad", False): "black on red", ("bad", True): "bold white on dark_red",
}  # fmt: skip
KINDS = {
    "sft": ("trained", "context", "cut"),
    "grpo": ("prompt", "cut"),
}  # of the stages; the others compare answers
COMPARED = ("prompt", "good", "bad", "cut")
KIND_NAMES = {"good": "chosen", "bad": "rejected"}
SHOWN_TOKENS = 2000  # of one row
SHOWN_CHARACTERS = 500  # of a column for reward functions
PANEL_BORDER = 4  # cells


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token as people read it, or the tokens that make one character together; `kind` is a key of STYLES."""

    ids: tuple[int, ...]
    text: str
    kind: str
    special: bool


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of a row that are shown together, and their name where a row has several such passages."""

    tokens: list[TokenView]
    name: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class RowView:
    """The tokens of one row; `facts` are what else its trainer gets."""

    origin: str
    passages: list[Passage]
    length: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> list[TokenView]:
        return [token for passage in self.passages for token in passage.tokens]

    def heading(self) -> str:
        counts: Counter[str] = Counter()
        for passage in self.passages:
            for token in passage.tokens:
                counts[token.kind if token.kind == "cut" else passage.name or token.kind] += len(token.ids)
        total = counts.total()
        shown = f", {total:,} shown" if total < self.length else ""
        order = ("trained", "context", *(passage.name for passage in self.passages), "cut")
        parts = ", ".join(f"{counts[kind]:,} {kind}" for kind in dict.fromkeys(order) if counts[kind])
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
            formatting_func, chat_template_kwargs, max_rows; and stage, as for prepare_preferences.

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
        for passage in view.passages:
            text = _as_text(passage.tokens, marked=not console.is_terminal)
            title = {"title": passage.name, "title_align": "left"} if passage.name else {}
            border = {"good": "green", "bad": "red"}.get(passage.kind, "none")
            if text.plain.endswith("\n"):  # its mark ⏎ stands there, and needs no empty line
                text.right_crop(1)
            console.print(Panel(_folded(text, console.width - PANEL_BORDER), border_style=border, **title))
        for name, value in view.facts.items():
            _print(console, f"{name}: {_shortened(value)}")
    preparation.finish()
    kinds = KINDS.get(preparation.settings.stage, COMPARED)
    plain = "\u27e6trained\u27e7 context \u2702 cut" if "trained" in kinds else "\u2702 cut"
    _print(console, _legend(kinds) if console.is_terminal else f"legend: {plain}")
    _print(console, str(preparation.report))
    if html_file is not None:
        write_html(Path(html_file), shown, preparation.report)
        _print(console, f"written: {html_file}")
    return preparation.report


def _shortened(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= SHOWN_CHARACTERS else written[:SHOWN_CHARACTERS] + "..."


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
            if seen < rows:
                seen += 1
                yield view_of(preparation, origin, encoded)
            preparation.count(origin, encoded)


def view_of(preparation: Preparation, origin: str, encoded: Encoded | Ranked) -> RowView:
    """The view of a row that a preparation encoded."""
    view = view_answers if isinstance(encoded, Ranked) else view_row
    return view(preparation.tokenizer, origin, encoded, preparation.settings)


def view_row(tokenizer: Any, origin: str, encoded: Encoded, settings: Any) -> RowView:
    """The view of one encoded row under the run's limit."""
    overlong = settings.overlong_of(encoded)
    limit = settings.max_seq_length if overlong != "split" else len(encoded.ids)
    if overlong == "drop" and len(encoded.ids) > limit:
        limit = 0
    kinds = [
        "cut" if place >= limit else "context" if label == UNTRAINED or place == 0 else "trained"
        for place, label in enumerate(encoded.labels)
    ]
    return RowView(origin, [Passage(_token_views(tokenizer, encoded.ids, kinds))], len(encoded.ids))


def view_answers(tokenizer: Any, origin: str, row: Ranked, settings: Any) -> RowView:
    """The view of a prompt and its answers under the run's limit."""
    limit, length = settings.max_seq_length, row.length
    if length > limit and (
        settings.overlong != "truncate" or len(row.prompt_ids) >= limit or not row.answers
    ):
        limit = 0  # the row is left out
    names = {0: (), 1: ("good" if row.label else "bad",), 2: ("good", "bad")}[len(row.answers)]
    passages = []
    for kind, ids in zip(("prompt", *names), (row.prompt_ids, *row.answers)):
        space = limit if kind == "prompt" else limit - len(row.prompt_ids)
        name = f"completion, label {row.label}" if row.label is not None else KIND_NAMES.get(kind, kind)
        kinds = [kind if place < space else "cut" for place in range(len(ids))]
        passages.append(
            Passage(_token_views(tokenizer, ids, kinds), "prompt" if kind == "prompt" else name, kind)
        )
    facts = {"margin": row.margin} if row.margin is not None else row.kept
    return RowView(origin, passages, len(row.prompt_ids) + sum(map(len, row.answers)), facts)


def _token_views(tokenizer: Any, ids: list[int], kinds: list[str]) -> list[TokenView]:
    """Views of the first tokens; tokens that make one character together are one."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens, part = [], []
    for place, (token, kind) in enumerate(zip(ids[:SHOWN_TOKENS], kinds)):
        part.append(token)
        text = _text_of(tokenizer, part)
        if "\ufffd" in text and len(part) < 4 and place + 1 < len(ids):
            continue  # a part of a character; the next tokens complete it
        tokens.append(TokenView(tuple(part), text, kind, token in special))
        part = []
    return tokens


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


def _as_text(tokens: list[TokenView], marked: bool) -> Text:
    """Coloured text; `marked` for output without colours, where brackets show what is trained and scissors where it is cut."""
    text, before = Text(), "context"
    brackets = {
        ("context", "trained"): "\u27e6",
        ("trained", "context"): "\u27e7",
        ("trained", "cut"): "\u27e7\u2702",
    }
    for token in tokens:
        if marked:
            starts_cut = token.kind == "cut" != before
            text.append(brackets.get((before, token.kind), "\u2702" if starts_cut else ""))
            before = token.kind
        text.append(_visible(token.text), style=STYLES[token.kind, token.special])
    if marked and before == "trained":
        text.append("\u27e7")
    return text


def _legend(kinds: Sequence[str]) -> Text:
    text = Text("legend: ")
    for kind in kinds:
        for special in (False, True) if kind != "cut" else (False,):
            name = KIND_NAMES.get(kind, kind)
            text.append(f"{name} special" if special else name, style=STYLES[kind, special])
            text.append("  ")
    return text


def write_html(path: Path, rows: list[RowView], report: DataReport) -> None:
    """Write rows and report as one HTML page that needs nothing else."""
    page = _template("rows.html.jinja").render(rows=rows, report=report, kinds=shown_kinds(report.stage))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page + "\n")


def rows_as_html(rows: Sequence[RowView], stage: str, losses: Mapping[str, str]) -> str:
    """Rows and the legend of their tokens as a part of a page.

    Args:
        rows: to show. stage: of their run. losses: origin of a row -> what is known of its loss, in words.
    """
    return _template("tokens.html.jinja").module.rows(rows, shown_kinds(stage), losses)


def shown_kinds(stage: str) -> tuple[str, ...]:
    """Kinds of tokens in rows of a stage, for a legend."""
    return (*KINDS.get(stage, COMPARED), "special")


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oribi.data"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"visible": _visible, "shortened": _shortened, "kind_names": KIND_NAMES}
    return environment.get_template(name)
