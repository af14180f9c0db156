"""Readers of preference rows: a pair of answers, an answer with its label, a prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oribi.chat.conversation import Conversation, Remarks
from oribi.data import columns as known
from oribi.data.columns import Columns, is_label, short
from oribi.data.conversations import RowFormat
from oribi.data.converters import Document, refuse_without_place
from oribi.data.messages import MessageReader, Turn, is_messages
from oribi.data.preference_turns import (
    answer_turns,
    asked_prompt,
    is_transcript,
    prompt_turns,
    require_answer,
    said,
    shared_text,
    take_shared_turns,
    with_answer,
)
from oribi.errors import DataError

_GOOD_WORDS = {"true", "1", "desirable", "chosen", "good"}
# names under which TRL hands other things to functions that score answers
TAKEN_BY_TRL = (
    "prompts",
    "completions",
    "completion_ids",
    "prompt_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


@dataclass(slots=True)
class Preference(Remarks):
    """One prompt and the answers to it.

    Args:
        answers: the prompt with each answer: the better and the worse one, or the only one; of grpo the prompt alone.
        label: of kto, whether the answer is good.
        margin: of reward, by how much the better one is to win, where rows say so.
        kept: of grpo, the other columns.
    """

    answers: list[Conversation] | list[Document]
    label: bool | None = None
    margin: float | None = None
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What all rows of a source are read with.

    Args:
        stage: one of STAGES.
        roles: other name of a role -> role.
        is_rendered: whether a text holds tokens of a chat template already.
        has_template: whether the tokenizer has a chat template; without one, texts are joined as they are.
        text_field: column whose text is the prompt as it is, without a chat template.
    """

    stage: str
    roles: Mapping[str, str]
    is_rendered: Callable[[str], bool]
    has_template: bool
    text_field: str | None = None


def from_pair_of_answers(
    row: Columns, names: tuple[str, str], prompt: str | None, margin: bool, reading: Reading
) -> Preference:
    """A prompt with a better and a worse answer, in any of their shapes."""
    hidden = row.hide(known.LABELS)  # a label beside two answers says nothing more
    answers = _plain_pair(row, names, prompt, reading) or _pair_of_conversations(row, names, prompt, reading)
    found = Preference(answers, unused=hidden, message_keys=answers[0].message_keys)
    if margin:
        value = row.need("margin")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"'margin' is {short(value)}; it must be a number.")
        found.margin = float(value)
    if reading.stage == "kto":
        row.notes.append(
            "a pair became two rows: the chosen answer with label true, the rejected one with label false"
        )
    return found


def _plain_pair(
    row: Columns, names: tuple[str, str], prompt: str | None, reading: Reading
) -> list[Document] | None:
    """Texts that are joined without a chat template; None where they belong into one."""
    values = [row.peek(name) for name in names]
    if not all(
        isinstance(value, str) and not is_messages(value) and not is_transcript(value) for value in values
    ):
        return None
    if prompt is None:
        if not (reading.stage == "reward" or shared_text(*values).strip()):
            raise DataError(
                f"row has keys {list(row.row)}: no prompt, and {names[0]!r} and {names[1]!r} do not begin alike. Name the prompt's "
                "column in the run file: columns: {prompt: <your column>}."
            )
        return _documents(row, names, shared_text(*values), [row.text(name) for name in names])
    if not is_plain(row, prompt, reading):
        return None
    text = row.text(prompt)
    refuse_without_place(row, text)
    return _documents(row, names, text, [text + row.text(name) for name in names])


def _documents(row: Columns, names: Sequence[str], prompt: str, texts: list[str]) -> list[Document]:
    if len(set(texts)) < len(texts):
        raise DataError(f"{names[0]!r} and {names[1]!r} are equal, so nothing is preferred: remove the row.")
    return [Document(text, trained_from=len(prompt)) for text in texts]


def is_plain(row: Columns, prompt: str, reading: Reading) -> bool:
    """Whether a prompt is a text that no chat template is to be put around."""
    text = row.peek(prompt)
    if not isinstance(text, str) or is_messages(text) or is_transcript(text):
        return False
    if prompt == reading.text_field or reading.is_rendered(text):
        return True
    placed = row.first((*known.SYSTEM, *known.CONTEXT, *known.TOOLS, "input", "history"))
    return prompt == "prompt" and not reading.has_template and placed is None


def _pair_of_conversations(
    row: Columns, names: tuple[str, str], prompt: str | None, reading: Reading
) -> list[Conversation]:
    reader = MessageReader(reading.roles, row.notes)
    good, bad = names
    worse = answer_turns(row, bad, reader)
    if good:
        better = answer_turns(row, good, reader)
        before = take_shared_turns(row, prompt, better, worse, good, bad)
        if before is None:
            continued = prompt is not None and is_transcript(row.peek(prompt))
            before = prompt_turns(row, prompt, reader)
            better, worse = _stripped(better, continued), _stripped(worse, continued)
            if before and before[-1][0] == better[0][0]:
                before = before[:-1]  # messages that end with the better answer
    else:
        turns = prompt_turns(row, prompt, reader)
        good, before, better = prompt, turns[:-1], turns[-1:]
        require_answer(better, prompt)
    if [said(message) for message, _ in better] == [said(message) for message, _ in worse]:
        raise DataError(f"{good!r} and {bad!r} are equal, so nothing is preferred: remove the row.")
    asked = asked_prompt(row, before, prompt, reader)
    return [with_answer(asked, answer, row) for answer in (better, worse)]


def from_judged(row: Columns, label: str, answered: RowFormat, reading: Reading) -> Preference:
    """A prompt, an answer and whether it is good."""
    good = _label(row, label)
    judged = row.own((label,))
    hidden = [own for own in row.hide(known.LABELS) if own not in judged]
    apart = answered.columns == ("prompt", "completion")
    if apart and not (
        is_plain(row, "prompt", reading) and isinstance(row.peek("completion"), str | int | float)
    ):
        reader = MessageReader(reading.roles, row.notes)
        continued = is_transcript(row.peek("prompt"))
        asked = asked_prompt(row, prompt_turns(row, "prompt", reader), "prompt", reader)
        found: Any = with_answer(asked, _stripped(answer_turns(row, "completion", reader), continued), row)
    else:
        found = answered.read(row)
    if isinstance(found, Conversation):
        if found.messages[-1]["role"] != "assistant":
            raise DataError(
                f"the row ends with a message of the role {found.messages[-1]['role']!r}; the last one must be the assistant's, which "
                f"{label!r} judges."
            )
        if found.marked:
            row.notes.append("training marks of messages are not used: the last answer is judged")
        found.trained = [False] * (len(found.messages) - 1) + [True]
    elif not (isinstance(found, Document) and found.trained_from):
        raise DataError(f"row has keys {list(row.row)}: no prompt to the answer that {label!r} judges.")
    return Preference([found], good, unused=hidden, message_keys=found.message_keys)


def _stripped(answer: list[Turn], continued: bool) -> list[Turn]:
    """An answer without the blank behind "Assistant:", where it continues a dialogue as text."""
    (message, trained), *others = answer
    return [({**message, "content": message["content"].strip()}, trained), *others] if continued else answer


def _label(row: Columns, name: str) -> bool:
    value = row.need(name)
    if not is_label(value):
        raise DataError(f"{name!r} is {short(value)}; it must be true or false (or 1 or 0).")
    return value.strip().lower() in _GOOD_WORDS if isinstance(value, str) else bool(value)


def from_prompt_alone(row: Columns, prompt: str, reading: Reading) -> Preference:
    """A prompt, and all other columns as they are."""
    row.need(prompt)
    kept = {
        own: value for own, value in row.values().items() if own not in row.own(("prompt", *known.MESSAGES))
    }
    taken = [own for own in kept if own in TAKEN_BY_TRL]
    if taken:
        raise DataError(
            f"row has a column {taken[0]!r}, under which reward functions get something else: rename it in the file."
        )
    if "completion" in kept:
        row.notes.append(
            "reward functions do not get the column 'completion', whose name TRL uses; rename it to hand it out"
        )
    row.hide(known.LABELS)
    if is_plain(row, prompt, reading):
        text = row.text(prompt)
        refuse_without_place(row, text)
        example: Any = Document(text, trained_from=len(text))
    else:
        reader = MessageReader(reading.roles, row.notes)
        turns = prompt_turns(row, prompt, reader)
        if len(turns) > 1 and turns[-1][0]["role"] == "assistant":
            kept.setdefault("answer", turns.pop()[0]["content"])
            row.notes.append(
                "the last answer of the messages is no part of the prompt; reward functions get it as 'answer'"
            )
        example = asked_prompt(row, turns, prompt, reader)
        if example.tools or example.template_kwargs:
            what = "tools" if example.tools else "chat_template_kwargs"
            raise DataError(
                f"row has {what!r}, which stage grpo cannot give to the chat template row by row: write the prompt as text with the "
                f"template applied, or remove the column."
            )
    for own in kept:
        row.take(own)
    return Preference([example], kept=kept, message_keys=example.message_keys)
