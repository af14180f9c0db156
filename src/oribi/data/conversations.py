"""Rows of every common format become one of three examples: a Conversation, a Document or Tokens.

The format is recognised once, from the first row, and every later row is held to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from oribi.errors import DataError

Row = Mapping[str, Any]

ROLE_ALIASES = {
    "human": "user",
    "input": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "output": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue")
PAIR_COLUMNS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
)
EXPECTED = (
    "expected 'messages', 'prompt' + 'completion', 'instruction' + 'output', 'question' + 'answer', or 'text'"
)


@dataclass(slots=True)
class Conversation:
    """Messages as a chat template takes them.

    `trained` has one entry a message: True or False where the row says so, None where the run's `train_on` decides.
    """

    messages: list[dict[str, Any]]
    trained: list[bool | None]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Document:
    """Plain text, or a block of one that began in an earlier row or goes on in the next; trained from a character on."""

    text: str
    trained_from: int = 0
    begins: bool = True
    ends: bool = True


@dataclass(slots=True)
class Tokens:
    """A row that was tokenised before; labels are not shifted, -100 is untrained."""

    ids: list[int]
    labels: list[int]


Example = Conversation | Document | Tokens


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one source are read: a name for people, and the function that converts a row.

    `is_pair` says that a row is one question and its answer, which a template can be chosen for where the tokenizer has none.
    """

    name: str
    convert: Callable[[Row], Example]
    is_pair: bool = False


def recognise(
    row: Row,
    *,
    text_field: str | None = None,
    columns: Mapping[str, str] | None = None,
    role_aliases: Mapping[str, str] | None = None,
) -> RowFormat:
    """The format of a source, from its first row.

    Args:
        row: the first row.
        text_field: column of plain text that is to be used even when the row has messages too.
        columns: name of ours -> name in the rows, e.g. {"instruction": "task", "output": "solution"}.
        role_aliases: further role names, e.g. {"coach": "assistant"}.

    Raises:
        DataError: no format fits.
    """
    renamed = _rename(row, columns)
    roles = {**ROLE_ALIASES, **(role_aliases or {})}
    name, convert = _choose(renamed, text_field, roles)
    # files of plain text and of tokens may stand beside; and trl's trainers pass "text" whether it is there or not
    alone = set(row) <= {"text", "begins", "ends"} or "input_ids" in row
    if text_field not in (None, "text") and text_field not in row and not alone:
        raise DataError(
            f"row has keys {list(row)}, and no {text_field!r}, the column of plain text that was asked for "
            "(dataset_text_field): correct its name, or leave it out."
        )
    is_pair = isinstance(convert, partial) and convert.func in (_from_instruction, _from_pair)
    if not columns:
        return RowFormat(name, convert, is_pair)
    return RowFormat(name, lambda each: convert(_rename(each, columns)), is_pair)


def _choose(
    row: Row, text_field: str | None, roles: Mapping[str, str]
) -> tuple[str, Callable[[Row], Example]]:
    if "input_ids" in row:
        return "tokens (input_ids)", _from_tokens
    if text_field and text_field in row:
        return f"text (column {text_field!r})", partial(_from_text, column=text_field)
    for column in MESSAGE_COLUMNS:
        if isinstance(row.get(column), Mapping | Sequence) and not isinstance(row[column], str):
            messages = _message_list(row[column])
            first = messages[0] if messages else {}
            style = "ShareGPT" if isinstance(first, Mapping) and "from" in first else "messages"
            return f"{style} (column {column!r})", partial(_from_messages, column=column, roles=roles)
    if "prompt" in row and "completion" in row:
        return "prompt + completion", partial(_from_prompt_completion, roles=roles)
    for output in ("output", "response", "completion", "answer"):
        if "instruction" in row and output in row:
            return f"instruction (Alpaca) + {output}", partial(_from_instruction, output=output)
    for question, answer in PAIR_COLUMNS:
        if question in row and answer in row:
            return f"{question} + {answer}", partial(_from_pair, question=question, answer=answer)
    if "chosen" in row and "rejected" in row:
        raise DataError(
            "row has 'chosen' and 'rejected': a preference data set. oribi does supervised fine-tuning; "
            "rename the column to train on in the file; in Python with columns={'messages': 'chosen'} or "
            "columns={'completion': 'chosen'}."
        )
    if "text" in row or (len(row) == 1 and isinstance(next(iter(row.values())), str)):
        column = "text" if "text" in row else next(iter(row))
        return f"text (column {column!r})", partial(_from_text, column=column)
    raise DataError(
        f"row has keys {list(row)}; {EXPECTED} alone. Rename the columns in the file; in Python name them with "
        "columns={'instruction': '<your column>', ...}, or pass formatting_func."
    )


def _rename(row: Row, columns: Mapping[str, str] | None) -> Row:
    if not columns:
        return row
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise DataError(f"row has keys {list(row)}, but columns names {missing}: correct the column map.")
    used = set(columns.values())
    return {k: v for k, v in row.items() if k not in used} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }


def _from_tokens(row: Row) -> Tokens:
    ids = [int(i) for i in _need(row, "input_ids")]
    if not ids:
        raise DataError("'input_ids' is empty: remove the row.")
    labels = row.get("labels")
    for mask_name in ("completion_mask", "assistant_masks"):
        if labels is None and row.get(mask_name) is not None:
            labels = [i if m else -100 for i, m in zip(ids, row[mask_name])]
    labels = list(ids) if labels is None else [int(i) for i in labels]
    if len(labels) != len(ids):
        raise DataError(
            f"'labels' has {len(labels)} entries, 'input_ids' {len(ids)}: they must be equally long."
        )
    return Tokens(ids, labels)


def _from_text(row: Row, column: str) -> Document:
    return Document(_text(row, column), begins=row.get("begins", True), ends=row.get("ends", True))


def _from_prompt_completion(row: Row, roles: Mapping[str, str]) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        _text(row, "completion")
        return Document(prompt + completion, trained_from=len(prompt))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, Sequence) or not value:
            raise DataError(f"{name!r} is {_short(row.get(name))}; it must be text or a list of messages.")
    before = [_message(m, i, roles)[0] for i, m in enumerate(prompt)]
    after = [_message(m, i, roles) for i, m in enumerate(completion, len(before))]
    return Conversation(
        before + [m for m, _ in after],
        [False] * len(before) + [t for _, t in after],
        _tools(row),
        dict(row.get("chat_template_kwargs") or {}),
    )


def _from_instruction(row: Row, output: str) -> Conversation:
    """Alpaca rows: instruction, an optional input below it, the output; LLaMA-Factory's system and history too."""
    question = _text(row, "instruction")
    if isinstance(row.get("input"), str) and row["input"].strip():
        question = f"{question}\n\n{row['input']}"
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    for pair in row.get("history") or []:
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, output)}]
    return Conversation(messages, [None] * len(messages))


def _from_pair(row: Row, question: str, answer: str) -> Conversation:
    messages = [
        {"role": "user", "content": _text(row, question)},
        {"role": "assistant", "content": _text(row, answer)},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return Conversation(messages, [None] * len(messages))


def _from_messages(row: Row, column: str, roles: Mapping[str, str]) -> Conversation:
    given = _message_list(_need(row, column))
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"{column!r} is {_short(given)}; it must be a list of messages.")
    if not given:
        raise DataError(f"{column!r} is an empty list: remove the row.")
    pairs = [_message(m, i, roles) for i, m in enumerate(given)]
    messages, trained = [m for m, _ in pairs], [t for _, t in pairs]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages, trained = [{"role": "system", "content": row["system"]}, *messages], [None, *trained]
    return Conversation(messages, trained, _tools(row), dict(row.get("chat_template_kwargs") or {}))


def _message_list(given: Any) -> Any:
    """Messages row by row; `datasets` turns lists of structures into structures of lists."""
    if isinstance(given, Mapping) and all(isinstance(v, list) for v in given.values()):
        return [dict(zip(given, values)) for values in zip(*given.values())]
    return given


def from_messages(messages: Sequence[Row], tools: list[Any] | None = None) -> Conversation:
    """A conversation from a list of messages ({"role", "content"} or {"from", "value"})."""
    return _from_messages({"messages": messages, "tools": tools}, "messages", ROLE_ALIASES)


def _message(given: Any, index: int, roles: Mapping[str, str]) -> tuple[dict[str, Any], bool | None]:
    """One message with the keys that templates know, and whether the row says to train on it."""
    where = f"message {index + 1}"
    if not isinstance(given, Mapping):
        raise DataError(f"{where} is {_short(given)}; it must be an object with 'role' and 'content'.")
    message = {k: v for k, v in given.items() if v is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "role" not in message:
        raise DataError(
            f"{where} has keys {list(given)}; it needs 'role' and 'content' (or 'from' and 'value')."
        )
    role = roles.get(message["role"], message["role"])
    if role not in ROLES:
        raise DataError(
            f"{where} has role {message['role']!r}; known are {', '.join(ROLES)} and {', '.join(sorted(roles))}. "
            "Correct it, or map it with role_aliases={'<yours>': 'assistant'}."
        )
    message["role"] = role
    trained = _train_flag(message, where)
    if isinstance(message.get("tool_calls"), Sequence) and not message["tool_calls"]:
        del message["tool_calls"]
    if "content" in message:
        message["content"] = _flatten(message["content"], where)
    elif "tool_calls" in message or any(name in message for name in REASONING_FIELDS):
        message["content"] = ""
    else:
        raise DataError(
            f"{where} ({role}) has no content: {_short(given)}. Give it text, or remove the message."
        )
    if role in ("user", "assistant") and not message["content"].strip() and len(message) == 2:
        raise DataError(f"{where} ({role}) has empty content. Give it text, or remove the message.")
    return message, trained


def _train_flag(message: dict[str, Any], where: str) -> bool | None:
    """`train: bool` (Axolotl) or `weight: 0|1` (OpenAI); neither reaches the template."""
    train, weight = message.pop("train", None), message.pop("weight", None)
    if train is not None:
        if not isinstance(train, bool):
            raise DataError(f"{where} has train = {train!r}; it must be true or false.")
        return train
    if weight is not None:
        if weight not in (0, 1):
            raise DataError(f"{where} has weight = {weight!r}; it must be 0 (context) or 1 (trained).")
        return bool(weight)
    return None


def _flatten(content: Any, where: str) -> str:
    """Content as one string; a list of text parts is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        kinds = {part.get("type", "text") if isinstance(part, Mapping) else "text" for part in content}
        if kinds <= {"text"}:
            return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
        raise DataError(f"{where} has parts of type {sorted(kinds - {'text'})}; oribi trains on text only.")
    raise DataError(f"{where} has content {_short(content)}; it must be text.")


def _tools(row: Row) -> list[Any] | None:
    """The row's tools; a JSON string (as many data sets store them) is decoded."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"'tools' is text but no JSON ({error}): {_short(tools)}.") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"'tools' is {_short(tools)}; it must be a list of JSON schemas.")
    return tools or None


def _need(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise DataError(
            f"row has {'an empty (null)' if column in row else 'no'} {column!r}; its keys are {list(row)}."
        )
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _need(row, column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {_short(value)}; it must be text.")
    if not value.strip():
        raise DataError(f"{column!r} is empty: fill it in, or remove the row.")
    return value


def _short(value: Any, limit: int = 60) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:limit]}{'...' if len(shown) > limit else ''}"
