"""Reads messages into the form that chat templates take: roles, contents, thoughts, tool calls, and what is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from oribi.chat.conversation import REASONING_FIELDS, ROLES, Trained
from oribi.data.columns import PAIRS, THOUGHTS, decoded, listed, short
from oribi.data.tool_calls import read_calls
from oribi.errors import DataError

Marks = list[tuple[int, int, bool | None]]  # spans of a content, and whether each is trained
Turn = tuple[dict[str, Any], Trained]

ROLE_ALIASES = {
    "human": "user", "input": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "ai": "assistant", "model": "assistant", "output": "assistant", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "tool_result": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # the content is the call, as JSON text
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
TEXT_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
KNOWN_KEYS = {*TEXT_KEYS, *REASONING_FIELDS}
TEXT_PARTS = (None, "text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning", "thought")
# marks of a message or of a part -> whether true means that it is trained
MARKS = {
    "train": True, "training": True, "trainable": True, "loss": True, "weight": True, "loss_mask": True,
    "loss_scale": True, "mask": False, "masked": False,
}  # fmt: skip
USUAL_KEYS = {*KNOWN_KEYS, *ROLE_KEYS, *CONTENT_KEYS, *MARKS, *THOUGHTS}
MESSAGE_PAIRS = (
    *PAIRS, ("instruction", "output"), ("instruction", "response"), ("prompt", "completion")
)  # fmt: skip


class MessageReader:
    """Reads the messages of one row.

    Args:
        roles: other name of a role, in lower case -> role.
        notes: what is worth a line in the report is put there.

    Attributes:
        other_keys: keys of messages that only some chat templates read.
        filled: a key was null, as columnar formats write where a message did not have it.
        marked: a message or a part says whether it is trained.
    """

    def __init__(self, roles: Mapping[str, str], notes: list[str]) -> None:
        self.roles, self.notes = roles, notes
        self.other_keys: dict[str, None] = {}
        self.filled = self.marked = False

    def read(self, given: Any, column: str, first: int = 0) -> list[Turn]:
        """Messages, each with what the row says about training on it: True, False, None, or trained spans of its content.

        Args:
            given: the value of the column: a list, JSON text of one, or pairs of question and answer.
            column: its name, for messages.
            first: number of the first one.

        Raises:
            DataError: it is no list of messages.
        """
        if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
            given = decoded(given, column)
        given = listed(given)
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise DataError(f"{column!r} is {short(given)}; it must be a list of messages.")
        if not given:
            raise DataError(f"{column!r} is an empty list: remove the row.")
        turns: list[Turn] = []
        for item in _without_pairs(given):
            message, trained = self.message(item, first + len(turns))
            before, trained_before = turns[-1] if turns else ({}, None)
            if (
                message.pop("_call", False)
                and before.get("role") == "assistant"
                and trained == trained_before
            ):
                before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
            else:
                turns.append((message, trained))
        return turns

    def message(self, given: Any, index: int) -> Turn:
        """One message with the keys that templates know, and what the row says about training on it."""
        where = f"message {index + 1}"
        if not isinstance(given, Mapping):
            raise DataError(f"{where} is {short(given)}; it must be an object with 'role' and 'content'.")
        message = {k if k in USUAL_KEYS else _usual_key(k): v for k, v in given.items() if v is not None}
        if len(message) < len(given):
            self.filled |= any(v is None and k not in CONTENT_KEYS for k, v in given.items())
        for name, keys in (("role", ROLE_KEYS), ("content", CONTENT_KEYS)):
            key = next((k for k in keys if k in message), name)
            if key in message:
                message[name] = message.pop(key)
        if "role" not in message:
            raise DataError(
                f"{where} has keys {list(given)}; it needs 'role' and 'content' (or 'from' and 'value')."
            )
        role = self._role(message["role"], where)
        trained = _mark(message, where)
        detail = message.pop("train_detail", None)
        if role in CALL_ROLES:
            message = {
                "role": "assistant",
                "content": "",
                "tool_calls": message.get("content"),
                "_call": True,
            }
            role = "assistant"
        message["role"] = role
        legacy = message.pop("function_call", None) if role == "assistant" else None
        calls, filled = read_calls(message.pop("tool_calls", legacy), where)
        message |= {"tool_calls": calls} if calls else {}
        self.filled |= filled
        thoughts, spans = self._content(message, role, where, given)
        self._thoughts(message, thoughts, where)
        says_more = any(name in message for name in ("tool_calls", *REASONING_FIELDS))
        if not message["content"].strip() and role in ("user", "assistant") and not says_more:
            raise DataError(f"{where} ({role}) has empty content. Give it text, or remove the message.")
        if detail is not None:
            spans = _detailed(detail, len(message["content"]), where)
        if not message.keys() <= KNOWN_KEYS:
            self.other_keys |= dict.fromkeys(k for k in message if k not in KNOWN_KEYS and k != "_call")
        self.marked |= trained is not None or bool(spans)
        return message, _combined(trained, spans, len(message["content"]))

    def _role(self, given: Any, where: str) -> str:
        if not isinstance(given, str):
            raise DataError(f"{where} has role {given!r}; it must be text, such as 'user' or 'assistant'.")
        name = given.strip().lower()
        role = self.roles.get(name, name)
        if role not in ROLES and role not in CALL_ROLES:
            raise DataError(
                f"{where} has role {given!r}; known are {', '.join(ROLES)} and {', '.join(sorted(self.roles))}. Correct it, or "
                f"name it in the run file: role_aliases: {{{name}: assistant}} (in Python role_aliases={{{name!r}: 'assistant'}})."
            )
        return role

    def _content(
        self, message: dict[str, Any], role: str, where: str, given: Mapping[str, Any]
    ) -> tuple[list[str], Marks]:
        """Make the content one text; returns thoughts among its parts, and the spans of parts with their marks."""
        if "content" not in message:
            if not any(k in message for k in ("tool_calls", "reasoning_details", *THOUGHTS)):
                raise DataError(
                    f"{where} ({role}) has no content: {short(given)}. Give it text, or remove the message."
                )
            message["content"] = ""
        content = message["content"]
        if isinstance(content, str):
            return [], []
        parts = [content] if _is_text_part(content) else content
        if isinstance(parts, Sequence) and not isinstance(parts, bytes):
            kinds = {p.get("type") for p in parts if isinstance(p, Mapping)} - {*TEXT_PARTS, *THOUGHT_PARTS}
            if kinds:
                raise DataError(
                    f"{where} has parts of type {sorted(map(str, kinds))}; oribi trains on text only."
                )
            if all(_is_text_part(part) for part in parts):
                message["content"], thoughts, spans = self._join(parts, where)
                return thoughts, spans
        if role not in ("tool", "function", "ipython"):
            if isinstance(content, Sequence):
                raise DataError(
                    f"{where} has content {short(content)}; each part must be text, or an object with 'text'."
                )
            raise DataError(f"{where} has content {short(content)}; it must be text.")
        message["content"] = json.dumps(content, ensure_ascii=False, default=str)
        self.notes.append(f"the content of a {role} message is no text; it is written as JSON")
        return [], []

    def _join(self, parts: Sequence[Any], where: str) -> tuple[str, list[str], Marks]:
        text, thoughts, spans = "", [], []
        for part in parts:
            if isinstance(part, str):
                part = {"text": part}
            self.filled |= any(v is None and k != "text" for k, v in part.items())
            part = {k: v for k, v in part.items() if v is not None}
            trained = _mark(part, f"a part of {where}")
            if part.get("type") in THOUGHT_PARTS:
                thoughts.append(str(part.get(part["type"]) or part.get("text") or ""))
                continue
            written = part.get("text") or ""
            spans.append((len(text), len(text) + len(written), trained))
            text += written
            self.other_keys |= dict.fromkeys(k for k in part if k not in ("type", "text"))
        return text, thoughts, spans if any(trained is not None for *_, trained in spans) else []

    def _thoughts(self, message: dict[str, Any], parts: list[str], where: str) -> None:
        """Put the thoughts of a message under one name that templates know."""
        if not parts and message.keys() <= TEXT_KEYS:
            return
        details = message.get("reasoning_details")
        if isinstance(details, Sequence) and all(isinstance(one, Mapping) for one in details):
            texts = [str(one.get("text") or one.get("summary") or "") for one in details]
            if any(texts):
                parts = parts or texts
                del message["reasoning_details"]
        for name in [name for name in message if name in THOUGHTS]:
            value = message.pop(name)
            if not isinstance(value, str):
                if not isinstance(value, Sequence) or not all(_is_text_part(part) for part in value):
                    raise DataError(f"{where} has {name} {short(value)}; it must be text.")
                value, more, marks = self._join(value, where)
                value += "".join(more)
                if marks:
                    raise DataError(
                        f"{where} has training marks within {name}; they are read within 'content' only."
                    )
            if value.strip():
                # the names that templates read stay: a template may read several
                message[name if name in REASONING_FIELDS else "reasoning_content"] = value
        if any(part.strip() for part in parts) and not any(name in message for name in REASONING_FIELDS):
            message["reasoning_content"] = "\n".join(filter(None, parts))


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or JSON text of one."""
    if isinstance(value, str):
        if value.lstrip()[:1] != "[":
            return False
        try:
            value = decoded(value, "")
        except DataError:
            return False
    value = listed(value)
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and bool(value)
        and isinstance(value[0], Mapping)
        and (any(key in map(_usual_key, value[0]) for key in ROLE_KEYS) or _pair_of(value[0]) is not None)
    )


def _usual_key(key: Any) -> Any:
    """A key of a message as it is usually written."""
    lower = key.strip().lower() if isinstance(key, str) else key
    return lower if lower in USUAL_KEYS else key


def _without_pairs(given: Sequence[Any]) -> list[Any]:
    """Messages, where a list holds objects of a question and its answer."""
    messages: list[Any] = []
    for item in given:
        pair = _pair_of(item)
        if pair is None:
            messages.append(item)
            continue
        question, answer = pair
        outer = {key: value for key, value in item.items() if key not in pair}
        system = outer.pop("system", None)
        messages += [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "user", "content": item[question]},
            {"role": "assistant", "content": item[answer], **outer},
        ]
    return messages


def _pair_of(item: Any) -> tuple[str, str] | None:
    """The keys of a question and its answer, if an object of a list of messages holds both."""
    if not isinstance(item, Mapping) or "role" in item or "from" in item or "content" in item:
        return None
    return next((pair for pair in MESSAGE_PAIRS if pair[0] in item and pair[1] in item), None)


def _is_text_part(part: Any) -> bool:
    """Whether a part of a content is text and nothing else."""
    if isinstance(part, str):
        return True
    if not isinstance(part, Mapping):
        return False
    kind, text = part.get("type"), part.get("text")
    if kind in THOUGHT_PARTS:
        return isinstance(part.get(kind, text), str)
    if kind is not None:
        return text is None or isinstance(text, str)
    others = {key for key, value in part.items() if value is not None and key != "text"}
    return isinstance(text, str) and others <= set(MARKS)


def _mark(fields: dict[str, Any], where: str) -> bool | None:
    """Take the training marks off a message or a part; they do not reach the template."""
    found: dict[str, bool | None] = {}
    for name in [name for name in fields if name in MARKS]:
        value, means_trained = fields.pop(name), MARKS[name]
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            allowed = "0 (context) or 1 (trained)" if name == "weight" else "true or false"
            raise DataError(f"{where} has {name} = {value!r}; it must be {allowed}.")
        # what is not masked is trained where its role is
        found[name] = bool(value) if means_trained else (False if value else None)
    marks = {mark for mark in found.values() if mark is not None}
    if len(marks) > 1:
        raise DataError(f"{where} has marks that contradict each other: {found}. Keep one.")
    return next(iter(marks), None)


def _detailed(detail: Any, length: int, where: str) -> Marks:
    """Axolotl's train_detail: offsets of characters, the last one included."""
    spans = []
    for one in detail if isinstance(detail, Sequence) and not isinstance(detail, str) else [detail]:
        begin, end, train = (
            (one.get(key) for key in ("begin_offset", "end_offset", "train"))
            if isinstance(one, Mapping)
            else (None,) * 3
        )
        if not (
            type(begin) is int and type(end) is int and isinstance(train, bool) and 0 <= begin <= end < length
        ):
            raise DataError(
                f"{where} has train_detail {short(one)}; each entry needs begin_offset and end_offset within its {length} "
                "characters, and train, true or false."
            )
        spans.append((begin, end + 1, train))
    spans.sort()
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:])):
        raise DataError(f"{where} has a train_detail whose entries overlap: {short(detail)}.")
    return spans


def _combined(whole: bool | None, parts: Marks, length: int) -> Trained:
    """The mark of a message and those of its parts; a part without a mark is as the message."""
    if not parts or whole is False:
        return whole
    untrained = tuple((begin, end) for begin, end, trained in parts if trained is False and begin < end)
    if sum(end - begin for begin, end in untrained) == length:
        return False
    return untrained or True
