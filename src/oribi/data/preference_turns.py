"""Prompts and answers of preference rows as turns, from whatever shape a column has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from oribi.chat.conversation import Conversation
from oribi.data import columns as known
from oribi.data.columns import Columns, decoded, listed, says
from oribi.data.converters import conversation_of, history_turns, question_text
from oribi.data.messages import CONTENT_KEYS, ROLE_KEYS, MessageReader, Turn, is_messages
from oribi.data.tool_calls import read_tools
from oribi.errors import DataError

PROMPTS = ("prompt", *known.QUESTIONS, "instruction", "input", "inputs", "human", "user")
# a dialogue as one text, as HH-RLHF has it
TRANSCRIPT_TURN = re.compile(r"(?:^|\r?\n\r?\n)(Human|Assistant):")


def answer_turns(row: Columns, name: str, reader: MessageReader) -> list[Turn]:
    """An answer as turns, the prompt's before it where the column holds them too.

    Raises:
        DataError: it is none, or not the assistant's.
    """
    try:
        turns = _read_answer(row, name, reader)
    except DataError as error:
        raise error if repr(name) in str(error) else DataError(f"{name!r}: {error}") from error
    require_answer(turns, name)
    return turns


def _read_answer(row: Columns, name: str, reader: MessageReader) -> list[Turn]:
    value = row.peek(name)
    if is_transcript(value):
        return reader.read(transcript(row.take(name)), name)
    value = _message_of_json(value)
    value = _as_list(value, "assistant")
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(isinstance(v, str) for v in value)
    ):
        if len(value) > 1:
            raise DataError(
                f"{name!r} holds {len(value)} texts; it must hold one answer, or a list of messages."
            )
        value = value[0]
        row.take(name)
        if not value.strip():
            raise DataError(f"{name!r} is empty: fill it in, or remove the row.")
        return [({"role": "assistant", "content": value}, None)]
    if (
        value is None
        or isinstance(value, bool | int | float | bytes)
        or (isinstance(value, str) and not is_messages(value))
    ):
        return [({"role": "assistant", "content": row.text(name)}, None)]
    row.take(name)
    return reader.read(value, name)


def _message_of_json(value: Any) -> Any:
    """A message, where a text is the JSON of one; other objects are answers in JSON, which stay texts."""
    if not isinstance(value, str) or value.lstrip()[:1] != "{":
        return value
    try:
        found = decoded(value, "")
    except DataError:
        return value
    is_message = isinstance(found, Mapping) and any(
        role in found and content in found for role in ROLE_KEYS for content in CONTENT_KEYS
    )
    return found if is_message else value


def _as_list(value: Any, role: str) -> Any:
    """The messages of a mapping: OpenAI's {"messages": ...}, a list that `datasets` made a mapping of, or one message alone."""
    if isinstance(value, Mapping) and "messages" in value:
        value = value["messages"]
    value = listed(value)
    if not isinstance(value, Mapping):
        return value
    # a message that stands alone may leave out whose it is
    return [value if any(str(key).lower() in ROLE_KEYS for key in value) else {"role": role, **value}]


def take_shared_turns(
    row: Columns, prompt: str | None, better: list[Turn], worse: list[Turn], good: str, bad: str
) -> list[Turn] | None:
    """Take the turns of the prompt off two conversations that begin with them; None where they are answers alone.

    Raises:
        DataError: they answer different prompts.
    """
    whole = [turns[0][0]["role"] not in ("assistant", "tool") for turns in (better, worse)]
    if not any(whole):
        return None
    if not all(whole):
        full = better if whole[0] else worse
        shared = len(full) - 1
        before = full[:shared]
        del full[:shared]
    else:
        most = min(len(better), len(worse)) - 1
        pairs = list(zip(better[:most], worse[:most]))
        shared = next((i for i, (a, b) in enumerate(pairs) if said(a[0]) != said(b[0])), most)
        before = better[:shared]
        del better[:shared], worse[:shared]
        differing = next((t[0][0]["role"] for t in (better, worse) if t[0][0]["role"] != "assistant"), None)
        if differing and said(better[0][0]) != said(worse[0][0]):
            raise DataError(
                f"{good!r} and {bad!r} differ in message {shared + 1} ({differing}), before the answer: both must answer the same "
                "prompt. Correct or remove the row."
            )
    _account_for_prompt(row, prompt, [message for message, _ in (*before, *better)])
    return before


def _account_for_prompt(row: Columns, prompt: str | None, before: list[dict[str, Any]]) -> None:
    """Count the columns of a prompt as read where the answers' own messages say the same."""
    contents = [message["content"] for message in before]
    for name in dict.fromkeys(filter(None, (prompt, *known.MESSAGES, *PROMPTS))):
        value = row.peek(name)
        texts = _texts(value)
        if texts and all(
            any(says(content, text) or says(text, content) for content in contents) for text in texts
        ):
            row.take(name)
        elif name == prompt and texts:
            row.notes.append(f"{prompt!r} is not what the messages of the answers ask; the messages are used")


def _texts(value: Any) -> list[str]:
    """What is said in a prompt, in whatever shape."""
    if isinstance(value, str):
        if not is_messages(value):
            return [turn["content"] for turn in transcript(value)] if is_transcript(value) else [value]
        value = decoded(value, "")
    value = _as_list(value, "user")
    if not isinstance(value, Sequence):
        return []
    found = [next((m[k] for k in CONTENT_KEYS if k in m), None) for m in value if isinstance(m, Mapping)]
    return [text for text in found if isinstance(text, str) and text.strip()]


def said(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two messages differ for a model."""
    others = {k: v for k, v in message.items() if k not in ("role", "content") and v}
    return message["role"], message["content"].strip(), repr(sorted(others.items()))


def require_answer(turns: list[Turn], name: str) -> None:
    role = turns[-1][0]["role"]
    if role != "assistant":
        raise DataError(
            f"{name!r} ends with a message of the role {role!r}; the last one must be the assistant's."
        )


def prompt_turns(row: Columns, column: str | None, reader: MessageReader) -> list[Turn]:
    """The turns of the column that holds the prompt, LLaMA-Factory's history before them.

    Raises:
        DataError: it holds neither text nor messages.
    """
    earlier = history_turns(row)
    turns = reader.read(earlier, "history") if earlier else []
    if column is None:
        return turns
    value = _as_list(row.peek(column), "user")
    if is_transcript(value):
        row.take(column)
        value = transcript(value)
        if value[-1]["role"] == "assistant" and not value[-1]["content"]:
            value = value[:-1]  # where the answer begins
    elif isinstance(value, str | bytes) and not is_messages(value) or not isinstance(value, Sequence):
        return [*turns, ({"role": "user", "content": question_text(row, column)}, None)]
    elif len(value) == 1 and isinstance(value[0], str) and not isinstance(value, str):
        row.take(column)
        value = [{"role": "user", "content": value[0]}]
    row.take(column)
    try:
        return [*turns, *reader.read(value, column, len(turns))]
    except DataError as error:
        raise error if repr(column) in str(error) else DataError(f"{column!r}: {error}") from error


def asked_prompt(row: Columns, turns: list[Turn], prompt: str | None, reader: MessageReader) -> Conversation:
    """The prompt with the row's system message and tools, and nothing trained."""
    if not turns:
        raise DataError(
            f"row has keys {list(row.row)}: no prompt. Name its column in the run file: columns: {{prompt: <your column>}}."
        )
    if turns[-1][0]["role"] == "assistant":
        raise DataError(
            f"{prompt!r} ends with a message of the assistant, so nothing is asked that an answer could follow. Remove it, or the row."
        )
    given = row.peek(prompt) if prompt else None
    asked = conversation_of(row, turns, reader, None)
    if (
        isinstance(given, Mapping) and given.get("tools") and not asked.tools
    ):  # OpenAI's {"messages": ..., "tools": ...}
        asked.tools = read_tools(given["tools"], "tools")
    asked.trained = [False] * len(asked.messages)
    return asked


def with_answer(asked: Conversation, answer: list[Turn], row: Columns) -> Conversation:
    messages = [message for message, _ in answer]
    if any(message["role"] != "assistant" for message in messages):
        row.notes.append("an answer holds turns of the user or of tools, which the loss counts too")
    trained = [message["role"] == "assistant" for message in messages]
    return replace(asked, messages=[*asked.messages, *messages], trained=[*asked.trained, *trained], notes=[])


def is_transcript(text: Any) -> bool:
    """Whether a value is a text that is a dialogue such as HH-RLHF's: turns that begin with "Human:" and "Assistant:"."""
    if not isinstance(text, str):
        return False
    found = TRANSCRIPT_TURN.findall(text)
    return "Assistant" in found and text.lstrip().startswith("Human:")


def transcript(text: str) -> list[dict[str, str]]:
    """The messages of such a text."""
    parts = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]


def shared_text(a: str, b: str) -> str:
    """What two texts begin with; a space before the first difference belongs to what follows, as in TRL."""
    end = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[: end - 1] if end and a[end - 1] == " " else a[:end]
