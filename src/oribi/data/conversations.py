"""Rows of every common format become one of three examples: a Conversation, a Document or Tokens.

The format is recognised once, from the first row that shows it, and every later row must have it. What a row says beside the
columns of its format is used where it has a place, and named where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from oribi.chat.conversation import ROLES
from oribi.data import columns as known
from oribi.data.columns import Columns, decoded, short
from oribi.data.converters import (
    Example,
    from_calls,
    from_messages,
    from_pair,
    from_prompt_completion,
    from_text,
    from_tokens,
    refuse_label,
    refuse_messages,
)
from oribi.data.messages import ROLE_ALIASES, ROLE_KEYS, is_messages
from oribi.errors import ConfigError, DataError
from oribi.text import did_you_mean

Row = Mapping[str, Any]

EXPECTED = (
    "expected 'messages', 'prompt' + 'completion', 'instruction' + 'output', 'question' + 'answer', or 'text'"
)
REMEDY = (
    "Rename the columns in the file, or name them in the run file: columns: {instruction: <your column>, output: <your column>} "
    "(in Python columns={'instruction': ...}, or formatting_func)."
)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source are read.

    Args:
        name: for people.
        columns: the columns that make the format, by oribi's names.
        read: makes an example of a row.
        is_pair: a row is one question and its answer, which a template can be chosen for where the tokenizer has none.
        names: name of ours -> name in the rows.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Columns], Example]
    is_pair: bool = False
    names: Mapping[str, str] | None = None
    asked: str | None = None
    _others: dict[Any, RowFormat | None] = field(default_factory=dict, compare=False, repr=False)

    def convert(self, row: Row) -> Example:
        """The example of a row.

        Raises:
            DataError: the row cannot be read in this format, or holds another one.
        """
        columns = Columns(row, self.names)
        example = self.read(columns)
        other = self._other(columns)
        if other is not None:
            raise DataError(
                f"the row is {other.name} too, and the rows before it are {self.name}: one source holds one format. Put the rows "
                "into sources of their own, or remove the columns of one format."
            )
        example.unused, example.notes = columns.unused(), columns.notes
        return example

    def _other(self, columns: Columns) -> RowFormat | None:
        """The format that a row would be recognised as, if not as this one."""
        names = columns.names()
        key = (*names, *(_holds_messages(columns, name) for name in known.MESSAGES if name in columns))
        if key not in self._others:
            try:
                found = choose_format(columns, self.asked, ROLE_ALIASES)
            except DataError:
                found = None
            self._others[key] = found if found is not None and found.columns != self.columns else None
        return self._others[key]


def recognise_format(
    row: Row,
    *,
    text_field: str | None = None,
    columns: Mapping[str, str] | None = None,
    role_aliases: Mapping[str, str] | None = None,
) -> RowFormat:
    """The format of a source, from one of its first rows.

    Args:
        row: the row.
        text_field: column of plain text that is to be used even when the row has messages too.
        columns: name of ours -> name in the rows, e.g. {"instruction": "task", "output": "solution"}.
        role_aliases: further role names, e.g. {"coach": "assistant"}.

    Raises:
        DataError: no format fits.
        ConfigError: columns or role_aliases name what oribi does not know.
    """
    columns = own_names(row, columns or {}, text_field)
    roles = known_roles(role_aliases)
    given = Columns(row, columns)
    try:
        found = choose_format(given, text_field, roles)
    except DataError:
        _refuse_null(row, columns, text_field)
        raise
    # files of plain text and of tokens may stand beside; and trl's trainers pass "text" whether it is there or not
    alone = set(row) <= {"text", "begins", "ends"} or "input_ids" in row
    if text_field not in (None, "text") and text_field not in given and not alone:
        raise DataError(
            f"row has keys {list(row)}, and no {text_field!r}, the column of plain text that was asked for "
            "(dataset_text_field): correct its name, or leave it out."
        )
    return replace(found, names=columns, asked=text_field, _others={})


def known_roles(aliases: Mapping[str, str] | None) -> dict[str, str]:
    """Other name of a role, in lower case -> role: the usual ones and those of a run.

    Raises:
        ConfigError: an alias stands for no role.
    """
    roles = ROLE_ALIASES | {str(k).strip().lower(): v for k, v in (aliases or {}).items()}
    unknown = sorted({str(role) for role in roles.values() if role not in ROLES})
    if unknown:
        raise ConfigError(f"role_aliases: {', '.join(unknown)}: a role must be one of {', '.join(ROLES)}.")
    return roles


def own_names(row: Row, columns: Mapping[str, str], text_field: str | None) -> dict[str, str]:
    """A column map as the row spells it: oribi's names first, the row's second."""
    columns = {
        ours if ours == text_field else known.usual_name(ours): theirs for ours, theirs in columns.items()
    }
    turned = {theirs: ours for ours, theirs in columns.items()}
    unknown = [name for name in columns if name not in known.NAMES and name != text_field]
    if unknown:
        hint = did_you_mean(unknown[0], known.NAMES) or "."
        if set(unknown) <= set(row) and set(turned) & set(known.NAMES):
            hint = f"; did you mean columns = {turned}?"
        raise ConfigError(
            f"columns names {unknown}, which oribi does not know{hint} Its names come first, those of the rows second: "
            "{question: <your column>, answer: <your column>}; docs/data-formats.md has all."
        )
    spelled = {known.usual_name(own): own for own in row}
    found = {
        ours: theirs if theirs in row else spelled.get(known.usual_name(theirs))
        for ours, theirs in columns.items()
    }
    missing = [columns[ours] for ours, own in found.items() if own is None]
    if missing:
        raise DataError(f"row has keys {list(row)}, but columns names {missing}: correct the column map.")
    return found


def _refuse_null(row: Row, names: Mapping[str, str] | None, text_field: str | None) -> None:
    """Name the null that keeps a row from being recognised, if its columns alone would be."""
    filled = {
        own: value if value is not None else [] if known.usual_name(own) in known.MESSAGES else "-"
        for own, value in row.items()
    }
    try:
        found = choose_format(Columns(filled, names), text_field, ROLE_ALIASES)
    except DataError:
        return
    given = Columns(row, names)
    for name in found.columns:
        given.need(name)


def _format(name: str, columns: tuple[str, ...], read: Callable[..., Example], **bound: Any) -> RowFormat:
    return RowFormat(name, columns, partial(read, **bound), is_pair=read is from_pair)


def choose_format(row: Columns, text_field: str | None, roles: Mapping[str, str]) -> RowFormat:
    """The format that a row's columns make.

    Raises:
        DataError: none.
    """
    if "input_ids" in row:
        return _format("tokens (input_ids)", ("input_ids",), from_tokens)
    if text_field and text_field in row:
        return _format(
            f"text (column {text_field!r})", (text_field,), from_text, column=text_field, asked=True
        )
    for column in known.MESSAGES:
        if _holds_messages(row, column):
            if not _ends_with_answer(row.peek(column), roles):
                _refuse_preferences(row)
            name = f"{_style(row.peek(column))} (column {column!r})"
            return _format(name, (column,), from_messages, column=column, roles=roles)
    found = _choose_answered(row, roles)
    if found is not None:
        refuse_label(row)
        return found
    _refuse_preferences(row)
    return _choose_text(row)


def _refuse_preferences(row: Columns) -> None:
    """Two answers to compare are not for supervised fine-tuning.

    Raises:
        DataError: the row has such.
    """
    pair = next(((good, bad) for good, bad in known.PREFERENCES if good in row and bad in row), None)
    if pair is not None:
        good, bad = pair
        raise DataError(
            f"row has {good!r} and {bad!r}, answers to compare: write stage: dpo (or orpo, kto, reward) in the run file. To "
            f"fine-tune on one of them instead (stage: sft), name it: columns: {{messages: {good}}} or columns: {{completion: "
            f"{good}}} (in Python columns={{'messages': {good!r}}})."
        )


def _ends_with_answer(given: Any, roles: Mapping[str, str]) -> bool:
    """Whether the last of a list of messages seems to be the assistant's."""
    given = known.listed(decoded(given, "") if isinstance(given, str) else given)
    last = given[-1] if isinstance(given, Sequence) and given else {}
    role = (
        next((last[key] for key in ROLE_KEYS if key in last), "assistant")
        if isinstance(last, Mapping)
        else ""
    )
    return roles.get(str(role).lower(), str(role).lower()) == "assistant"


def _choose_answered(row: Columns, roles: Mapping[str, str]) -> RowFormat | None:
    """Formats of columns for a question and its answer."""
    if "prompt" in row and "completion" in row:
        return _format("prompt + completion", ("prompt", "completion"), from_prompt_completion, roles=roles)
    pair = next(((q, a) for q, a in known.PAIRS if q in row and a in row), None)
    output = row.first(known.ANSWERS_TO_INSTRUCTION)
    if "instruction" in row and output and not (pair and pair[0] in known.QUESTIONS):
        pair, name = ("instruction", output), f"instruction (Alpaca) + {output}"
    elif pair:
        name = f"{pair[0]} + {pair[1]}"
    elif "query" in row and "answers" in row and row.first(known.TOOLS):
        return _format("query + answers (tool calls)", ("query", "answers"), from_calls, roles=roles)
    else:
        return None
    return _format(name, pair, from_pair, question=pair[0], answer=pair[1], roles=roles)


def _choose_text(row: Columns) -> RowFormat:
    """Plain text, if a column is named so, or alone and named like nothing else."""
    names = [own for own in row.row if own in row]
    column = "text" if "text" in row else names[0] if len(row.row) == 1 and names else None
    is_text = column is not None and isinstance(row.peek(column), str)
    if is_text:
        _refuse_half(row, column)
    if is_text or column == "text":
        return _format(f"text (column {column!r})", (column,), from_text, column=column, asked=False)
    as_words = [c for c in known.MESSAGES if isinstance(row.peek(c), str)]
    if as_words:
        raise DataError(
            f"{as_words[0]!r} is {short(row.peek(as_words[0]))}; it must be a list of messages, or JSON text of one. {REMEDY}"
        )
    joined = next((name for name in row.row if any(mark in str(name) for mark in known.SEPARATORS)), None)
    hint = _separator_hint(joined) if joined else REMEDY
    raise DataError(f"row has keys {list(row.row)}; {EXPECTED} alone. {hint}")


def _refuse_half(row: Columns, column: str) -> None:
    """A sole column of text may be a table that was not split, half of a pair, or messages as JSON text."""
    if any(mark in column for mark in known.SEPARATORS):
        raise DataError(f"the only column is {column!r}. {_separator_hint(column)}")
    refuse_messages(row.peek(column), column)
    halves = {name for pair in known.PAIRS for name in pair} | {"instruction", "completion", *known.MESSAGES}
    if known.usual_name(column) in halves | {*known.TOOLS, *known.SYSTEM}:
        raise DataError(
            f"the only column is {column!r}, {short(row.peek(column))}; {EXPECTED}. {REMEDY} To train it as plain text: "
            f"dataset_text_field: {column}."
        )


def _separator_hint(name: str) -> str:
    mark = next(mark for mark in known.SEPARATORS if mark in name)
    return (
        f"The name {name!r} holds {mark!r}, so the file seems to separate its columns by that: write it with commas, or as .tsv "
        "with tabs."
    )


def _style(given: Any) -> str:
    given = known.listed(decoded(given, "") if isinstance(given, str) else given)
    first = given[0] if isinstance(given, Sequence) and given else {}
    return "ShareGPT" if isinstance(first, Mapping) and "from" in first else "messages"


def _holds_messages(row: Columns, column: str) -> bool:
    value = row.peek(column)
    return is_messages(value) if isinstance(value, str) else isinstance(value, Mapping | Sequence)
