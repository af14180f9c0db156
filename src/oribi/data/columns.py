"""The meaning of a row's columns by their names, and which of them were read."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from oribi.errors import DataError

MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
PAIRS = (
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("question", "response"),
    ("problem", "solution"), ("prompt", "response"), ("prompt", "answer"), ("input", "output"),
    ("question", "solution"), ("question", "output"), ("question", "completion"), ("query", "output"),
    ("query", "completion"), ("problem", "answer"), ("problem", "response"), ("problem", "output"),
    ("prompt", "output"), ("prompt", "solution"), ("input", "response"), ("input", "answer"),
    ("input", "completion"), ("input", "target"), ("inputs", "targets"), ("human", "assistant"),
    ("human", "bot"), ("user", "assistant"), ("user", "bot"),
)  # fmt: skip
ANSWERS_TO_INSTRUCTION = ("output", "response", "completion", "answer", "solution")
QUESTIONS = ("question", "query", "problem")  # beside these an instruction is meant for the whole task
SYSTEM = (
    "system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt",
)  # fmt: skip
CONTEXT = (
    "context", "contexts", "knowledge", "passage", "passages", "document", "documents", "background",
    "schema", "db_schema", "database_schema", "table_schema", "sql_context", "paragraph", "paragraphs",
    "article", "evidence", "facts", "table",
)  # fmt: skip
CHOICES = ("choices", "options")
THOUGHTS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "cot", "complex_cot",
    "chain_of_thought", "thought_process", "reasoning_trace", "thinking_trace", "thinking_content",
    "rationale",
)  # fmt: skip
TOOLS = (
    "tools", "functions", "tool_defs", "tool_definitions", "tool_schemas", "available_tools",
    "available_functions", "function_definitions",
)  # fmt: skip
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# the better answer and the worse one
PREFERENCES = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("preferred", "dispreferred"), ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"), ("preferred_response", "rejected_response"),
    ("chosen_answer", "rejected_answer"), ("answer_chosen", "answer_rejected"), ("chosen_messages", "rejected_messages"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("winner", "loser"), ("better", "worse"), ("win", "lose"),
)  # fmt: skip
LABELS = ("label", "labels", "kto_tag", "desirable", "is_desirable")
LABEL_WORDS = {"true", "false", "0", "1", "desirable", "undesirable", "chosen", "rejected", "good", "bad"}
# all names that a column map may give
NAMES = (
    *MESSAGES,
    *("text", "prompt", "completion", "instruction", "input", "output", "history", "answers", "chat_template_kwargs"),
    *(name for pair in (*PAIRS, *PREFERENCES) for name in pair), "label", "margin", *(*SYSTEM, *CONTEXT, *CHOICES, *THOUGHTS, *TOOLS),
    *("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "loss_mask"),
)  # fmt: skip
SEPARATORS = (";", "\t", "|")
# cells that mean "nothing" where a program wrote its own empty value as text
NULL_WORDS = {"none", "nan", "null", "<na>", "n/a", "<noinput>"}


class Columns:
    """One row under oribi's names for its columns; remembers which columns were read.

    Names are compared without case, outer spaces, and the difference of space, dash and underscore. A value that is null, or
    the not-a-number that pandas writes for it, counts as absent.

    Args:
        row: the row.
        names: name of ours -> name in the row, before all others.
    """

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        names = names or {}
        self.row = row
        self.notes: list[str] = []
        self._values = {own: value for own, given in row.items() if (value := _plain(given)) is not None}
        taken = set(names.values())
        self._own: dict[str, str] = {own: own for own in row if own not in taken}
        if any(usual_name(own) not in self._own for own in self._own):
            # of several spellings of one name, the one with a value
            for own in sorted(self._own, key=lambda own: own not in self._values):
                self._own.setdefault(usual_name(own), own)
        self._own |= {ours: theirs for ours, theirs in names.items() if theirs in row}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._own.get(name) in self._values

    def first(self, names: Iterable[str]) -> str | None:
        """The first of several names that the row has a value for."""
        return next((name for name in names if name in self), None)

    def peek(self, name: str) -> Any:
        """A value without counting its column as used; None if there is none."""
        return self._values.get(self._own.get(name))

    def take(self, name: str) -> Any:
        """A value; its column counts as used."""
        if name in self:
            self._read.add(self._own[name])
        return self.peek(name)

    def need(self, name: str) -> Any:
        """A value that must be there.

        Raises:
            DataError: it is null or missing.
        """
        if name not in self:
            null = "an empty (null)" if name in self._own else "no"
            raise DataError(f"row has {null} {name!r}; its keys are {list(self.row)}.")
        return self.take(name)

    def hide(self, names: Iterable[str]) -> list[str]:
        """Make columns absent to what reads the row from here on; returns the row's own names of those that had a value."""
        hidden = [self._own[name] for name in names if name in self]
        for own in hidden:
            del self._values[own]
        return hidden

    def own(self, names: Iterable[str]) -> set[str]:
        """The row's own names of columns."""
        return {self._own[name] for name in names if name in self._own}

    def values(self) -> dict[str, Any]:
        """All columns under the row's own names; None where there is no value."""
        return {own: self._values.get(own) for own in self.row}

    def names(self) -> list[str]:
        """Oribi's names of all columns with a value."""
        return [name for name in self._own if name in self]

    def unused(self) -> list[str]:
        """The row's own names of the columns that hold something and were not read; an empty cell holds nothing."""
        return [own for own, value in self._values.items() if own not in self._read and value != ""]

    def text(self, name: str) -> str:
        """A question or an answer: text that is not empty; numbers and dates are written out, with a note.

        Raises:
            DataError: the value is null, empty or no text.
        """
        value = self.need(name)
        if not isinstance(value, str):
            if isinstance(value, bytes | Mapping) or _is_list(value):
                raise DataError(f"{name!r} is {short(value)}; it must be text.")
            self.notes.append(f"{name!r} holds {type(value).__name__} values, which are written as text")
            value = as_text(value, name)
        if not value.strip():
            raise DataError(f"{name!r} is empty: fill it in, or remove the row.")
        if value.strip().lower() in NULL_WORDS:
            self.notes.append(f"{name!r} is just the word {value.strip()!r}")
        return value

    def optional_text(self, name: str) -> str:
        """Text of a column that may be missing; "" where it is missing, empty, or holds only a word for "nothing"."""
        if name not in self:
            return ""
        value = self.take(name)
        if _is_list(value) and name in CONTEXT and all(isinstance(item, str) for item in value):
            return "\n\n".join(item for item in value if item.strip())
        written = as_text(value, name)
        if written.strip().lower() in NULL_WORDS:
            self.notes.append(f"{name!r} is just the word {written.strip()!r}, which is left out")
            return ""
        return written if written.strip() and value != [] and value != {} else ""


@lru_cache(maxsize=4096)
def usual_name(name: str) -> str:
    """A column's name without case, outer spaces, and with underscores for spaces and dashes."""
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


def says(text: str, more: str) -> bool:
    """Whether a text holds another one already; a few letters may stand in it by chance."""
    more = more.strip()
    return more == text.strip() or (len(more) >= 20 and more in text)


def as_text(value: Any, name: str) -> str:
    """A value as people write it: text as it is, dates in ISO form, everything else as JSON.

    Raises:
        DataError: bytes that are no UTF-8, or an object that has no text form.
    """
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, date | time | Decimal | UUID | bytes):
            return _as_json(value)
        return as_json_text(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name!r} is {short(value)}; it must be text ({error}).") from error


def as_json_text(value: Any) -> str:
    """A value as JSON, those of columnar files that JSON has no form for as text."""
    return json.dumps(value, ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> str:
    """Values of columnar files that JSON has no form for."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form as text")


def decoded(text: str, name: str) -> Any:
    """The value behind JSON text, or behind Python's own notation, which pandas writes into CSV files.

    Raises:
        DataError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DataError(f"{name!r} is text but no JSON ({error}): {short(text)}.") from error


def listed(value: Any) -> Any:
    """A list of mappings, where `datasets` made a mapping of lists of it."""
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        return [dict(zip(value, values)) for values in zip(*value.values())]
    return value


def is_label(value: Any) -> bool:
    """Whether a value says of an answer that it is good or bad."""
    if isinstance(value, bool | int | float):
        return value in (0, 1)
    return isinstance(value, str) and value.strip().lower() in LABEL_WORDS


def short(value: Any, limit: int = 60) -> str:
    """The type and the beginning of a value, for messages."""
    shown = repr(value)
    return f"{type(value).__name__} {shown[:limit]}{'...' if len(shown) > limit else ''}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _plain(value: Any) -> Any:
    """The value in Python's own types; None for what stands for a missing value."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list | dict):
        return _plain_within(value) if _holds_arrays(value) else value
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas
        return None
    if hasattr(value, "tolist"):  # numpy, torch
        return _plain(value.tolist())
    return value


def _holds_arrays(value: Any, depth: int = 4) -> bool:
    """Whether arrays stand within a value; pandas makes them of the lists in Parquet files."""
    if isinstance(value, dict):
        return depth > 0 and any(_holds_arrays(inner, depth - 1) for inner in value.values())
    if isinstance(value, list):
        return depth > 0 and any(_holds_arrays(inner, depth - 1) for inner in value[:8])
    return hasattr(value, "tolist")


def _plain_within(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_within(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_within(inner) for inner in value]
    return _plain(value)
