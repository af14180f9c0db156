"""Converts one row to one example, for each format that conversations.py recognises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oribi.chat.conversation import REASONING_FIELDS, ROLES, Conversation, Remarks
from oribi.data import columns as known
from oribi.data.columns import Columns, as_text, decoded, is_label, says, short
from oribi.data.messages import MessageReader, Turn, is_messages
from oribi.data.tool_calls import holds_filled_keys, keep_meant_nulls, read_tools, without_nulls
from oribi.errors import DataError


@dataclass(slots=True)
class Document(Remarks):
    """Plain text, or a block of one that began in an earlier row or continues in the next; trained from a character on."""

    text: str
    trained_from: int = 0
    begins: bool = True
    ends: bool = True
    from_text_file: bool = field(default=False, compare=False)


@dataclass(slots=True)
class Tokens(Remarks):
    """A row that was tokenised before; labels are not shifted, -100 is untrained."""

    ids: list[int]
    labels: list[int]


Example = Conversation | Document | Tokens


def from_tokens(row: Columns) -> Tokens:
    """Token ids, their labels, and masks of them."""
    ids = _whole_numbers(row.need("input_ids"), "input_ids")
    if not ids:
        raise DataError("'input_ids' is empty: remove the row.")
    labels = list(ids)
    if "labels" in row:
        labels = _whole_numbers(row.take("labels"), "labels")
        if len(labels) != len(ids):
            raise DataError(
                f"'labels' has {len(labels)} entries, 'input_ids' {len(ids)}: they must be equally long."
            )
    for name in ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask"):
        if name in row:
            mask = _mask(row, name, len(ids))
            labels = [label if m else -100 for label, m in zip(labels, mask)]
    lengths = _whole_numbers(row.take("seq_lengths") or [len(ids)], "seq_lengths")
    positions = _whole_numbers(row.take("position_ids") or range(len(ids)), "position_ids")
    if lengths != [len(ids)] or positions != list(range(positions[0], positions[0] + len(ids))):
        raise DataError(
            "the row holds several packed examples (seq_lengths or position_ids): give one example per row; packing: true packs them."
        )
    if "attention_mask" in row:
        seen = [i for i, m in enumerate(_mask(row, "attention_mask", len(ids))) if m]
        if not seen or seen[-1] - seen[0] + 1 != len(seen):
            raise DataError(
                "'attention_mask' hides tokens in the middle of the row; it may only mark padding at its ends."
            )
        if len(seen) < len(ids):
            row.notes.append("padding (attention_mask 0) is taken off")
        ids, labels = ids[seen[0] : seen[-1] + 1], labels[seen[0] : seen[-1] + 1]
    return Tokens(ids, labels)


def _mask(row: Columns, name: str, length: int) -> list[int]:
    mask = _whole_numbers(row.take(name), name)
    if len(mask) != length or not set(mask) <= {0, 1}:
        raise DataError(
            f"{name!r} has {len(mask)} entries, 'input_ids' {length}: they must be equally long, and each 0 or 1."
        )
    return mask


def _whole_numbers(value: Any, name: str) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{name!r} is {short(value)}; it must be a list of whole numbers.")
    for item in value:
        if type(item) is not int and not (isinstance(item, bool | float) and item == int(item)):
            raise DataError(f"{name!r} holds {short(item)}; it must be a list of whole numbers.")
    return [int(item) for item in value]


def from_text(row: Columns, column: str, asked: bool) -> Document:
    """Plain text; messages as JSON text only where the column was asked for."""
    value = row.need(column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {short(value)}; it must be text.")
    if not asked:
        refuse_messages(value, column)
    from_text_file = isinstance(row.peek("begins"), bool)
    return Document(
        row.text(column),
        begins=_flag(row, "begins"),
        ends=_flag(row, "ends"),
        from_text_file=from_text_file,
    )


def refuse_messages(value: str, column: str) -> None:
    """Messages as JSON text are no plain text.

    Raises:
        DataError: the value is such.
    """
    if is_messages(value):
        raise DataError(
            f"{column!r} holds messages as JSON text. Name the column in the run file: columns: {{messages: {column}}} (in Python "
            f"columns={{'messages': {column!r}}}); dataset_text_field: {column} trains it as it is."
        )


def _flag(row: Columns, name: str) -> bool:
    """Whether a block of text begins or ends its document; readers of text files say so."""
    value = row.peek(name)
    return row.take(name) if isinstance(value, bool) else True


def from_prompt_completion(row: Columns, roles: Mapping[str, str]) -> Example:
    """A prompt, which is context, and its completion: both texts, joined as they are, or messages."""
    plain = [
        not isinstance(row.peek(name), Mapping | Sequence)
        or (isinstance(row.peek(name), str) and not is_messages(row.peek(name)))
        for name in ("prompt", "completion")
    ]
    if all(plain):
        refuse_label(row)
        prompt, completion = as_text(row.take("prompt"), "prompt"), row.text("completion")
        refuse_without_place(row, prompt)
        return Document(prompt + completion, trained_from=len(prompt))
    reader = MessageReader(roles, row.notes)
    turns: list[Turn] = []
    for name, role, is_plain in zip(("prompt", "completion"), ("user", "assistant"), plain):
        value = row.take(name)
        if is_plain:
            read = [({"role": role, "content": row.text(name)}, None)]
        elif not value:
            raise DataError(f"{name!r} is {short(value)}; it must be text or a list of messages.")
        else:
            read = reader.read(value, name, len(turns))
        if name == "prompt":
            read, before = [(message, trained or False) for message, trained in read], len(read)
        turns += read
    answers = [i for i, (message, _) in enumerate(turns) if i >= before and message["role"] == "assistant"]
    conversation = conversation_of(row, turns, reader, answers[0] if len(answers) == 1 else None)
    conversation.completes = True
    return conversation


def refuse_without_place(row: Columns, prompt: str) -> None:
    """Plain prompt and completion are joined as they are, so nothing else can stand between them."""
    left = []
    for name in (*known.SYSTEM, *known.CONTEXT, *known.CHOICES, *known.TOOLS, *known.THOUGHTS, "history"):
        value = row.peek(name)
        if isinstance(value, str) and (not value.strip() or says(prompt, value)):
            row.take(name)  # empty, or written into the prompt already
        elif name in row and value not in ([], {}):
            left.append(name)
    if left:
        raise DataError(
            f"row has {left} beside a plain prompt and completion, which are joined without a chat template, so it has no place. "
            "Write it into the prompt, or train the rows as chat, where it has one: columns: {instruction: prompt, output: "
            "completion} in the run file (in Python columns={'instruction': 'prompt', 'output': 'completion'})."
        )


def from_pair(row: Columns, question: str, answer: str, roles: Mapping[str, str]) -> Conversation:
    """A question, or Alpaca's instruction, with what it is about below it, and the answer; LLaMA-Factory's history before."""
    reader = MessageReader(roles, row.notes)
    turns: list[Turn] = []
    if history := history_turns(row):
        turns += reader.read(history, "history")
    if is_messages(row.peek(question)):
        asked = reader.read(row.take(question), question, len(turns))
        turns += [(message, trained or False) for message, trained in asked]
    else:
        turns.append(({"role": "user", "content": question_text(row, question)}, None))
    if row.first(known.CHOICES) and isinstance(row.peek(answer), int | float):
        raise DataError(
            f"{answer!r} is {short(row.peek(answer))}, the number of a choice: write the text of the answer."
        )
    turns.append(({"role": "assistant", "content": row.text(answer)}, None))
    return conversation_of(row, turns, reader, len(turns) - 1)


def from_calls(row: Columns, roles: Mapping[str, str]) -> Conversation:
    """A query, and the tool calls that answer it."""
    reader = MessageReader(roles, row.notes)
    call = {"role": "assistant", "tool_calls": row.need("answers")}
    turns = [({"role": "user", "content": question_text(row, "query")}, None), reader.message(call, 1)]
    return conversation_of(row, turns, reader, 1)


def from_messages(row: Columns, column: str, roles: Mapping[str, str]) -> Conversation:
    """Messages as the row has them."""
    reader = MessageReader(roles, row.notes)
    turns = reader.read(row.need(column), column)
    answers = [i for i, (message, _) in enumerate(turns) if message["role"] == "assistant"]
    return conversation_of(row, turns, reader, answers[0] if len(answers) == 1 else None)


def conversation_of(
    row: Columns, turns: list[Turn], reader: MessageReader, answer: int | None
) -> Conversation:
    """The conversation with what else the row says of it; `answer` is the message that a thought belongs to."""
    media = next((name for name in known.MEDIA if row.peek(name) not in (None, "", [], {})), None)
    if media is not None:
        raise DataError(f"row has {media!r}; oribi trains on text only. Remove the row, or the column.")
    refuse_label(row)
    if answer is not None:
        _add_thoughts(row, turns[answer][0])
    turns = _masked_role(row, _with_system(row, turns), reader)
    messages = [message for message, _ in turns]
    name = row.first(known.TOOLS)
    tools = read_tools(row.take(name), name) if name else None
    kwargs = row.take("chat_template_kwargs") or {}
    kwargs = decoded(kwargs, "chat_template_kwargs") if isinstance(kwargs, str) else kwargs
    if not isinstance(kwargs, Mapping):
        raise DataError(f"'chat_template_kwargs' is {short(kwargs)}; it must be an object.")
    effort = row.take("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise DataError(f"'reasoning_effort' is {short(effort)}; it must be a text: low, medium or high.")
    if effort:
        kwargs = {"reasoning_effort": effort, **kwargs}
    filled = reader.filled or holds_filled_keys(tools)
    dropped = keep_meant_nulls(messages, tools, filled)
    if dropped:
        row.notes += [
            "a null that the tool's schema neither requires nor allows is left out of a call"
        ] * dropped
    return Conversation(
        messages,
        [trained for _, trained in turns],
        without_nulls(tools) if filled else tools,
        {key: value for key, value in kwargs.items() if value is not None},
        marked=reader.marked,
        notes=row.notes,
        message_keys=list(reader.other_keys),
    )


def refuse_label(row: Columns) -> None:
    """A label of good and bad answers cannot be ignored: bad ones would be trained.

    Raises:
        DataError: the row has one.
    """
    name = next((name for name in known.LABELS if is_label(row.peek(name))), None)
    if name is not None:
        raise DataError(
            f"row has {name!r} = {row.peek(name)!r} beside an answer, which says whether it is good: write stage: kto in the run file. "
            "For stage: sft keep the rows with good answers and remove the column; if it says something else, rename it."
        )


def _with_system(row: Columns, turns: list[Turn]) -> list[Turn]:
    """The turns with the row's system message before them, unless they begin with one."""
    name = row.first(known.SYSTEM)
    given = row.peek(name) if name else None
    first = turns[0][0]
    if first["role"] in ("system", "developer"):
        if name and says(first["content"], as_text(given, name)):
            row.take(name)
        return turns
    texts = [row.optional_text(name)] if name else []
    if row.first(known.QUESTIONS) and not row.first(known.MESSAGES) and "instruction" in row.unused():
        texts.append(row.optional_text("instruction"))
    system = "\n\n".join(filter(None, texts))
    return [({"role": "system", "content": system}, None), *turns] if system else turns


def _masked_role(row: Columns, turns: list[Turn], reader: MessageReader) -> list[Turn]:
    """The turns with those of one role untrained, where a column `mask` names it (NeMo)."""
    masked = row.peek("mask")
    if not isinstance(masked, str) or masked.strip().lower() not in {*ROLES, *reader.roles}:
        return turns
    role = reader.roles.get(row.take("mask").strip().lower(), masked.strip().lower())
    return [(message, False if message["role"] == role else trained) for message, trained in turns]


def _add_thoughts(row: Columns, message: dict[str, Any]) -> None:
    """The row's thoughts, as those of its answer; a switch such as "on" is none."""
    for name in known.THOUGHTS:
        value = row.peek(name)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            value = "\n".join(value)
        if not isinstance(value, str) or len(value.split()) < 2:
            continue
        if says(message["content"], value):
            row.take(name)
        elif not any(field in message for field in REASONING_FIELDS):
            row.take(name)
            message["reasoning_content"] = value


def question_text(row: Columns, column: str) -> str:
    """The question with what it is about below it."""
    text = row.text(column)
    instruction = row.peek("instruction")
    if column in known.QUESTIONS and isinstance(instruction, str) and says(instruction, text):
        text = row.text("instruction")
    for name in ("input", *known.CONTEXT):
        if name != column and name in row:
            more = row.optional_text(name)
            if more and not (name in known.CONTEXT and says(text, more)):
                text = f"{text}\n\n{more}"
    for name in known.CHOICES:
        if name in row:
            choices = _choices(row.take(name), name)
            text = text if says(text, choices) else f"{text}\n\n{choices}"
    return text


def _choices(given: Any, name: str) -> str:
    """The answers to choose from, one per line, each with its letter."""
    given = decoded(given, name) if isinstance(given, str) and given.lstrip()[:1] in ("[", "{") else given
    given = known.listed(given)
    if isinstance(given, Mapping):
        given = [{"label": label, "text": text} for label, text in given.items()]
    if isinstance(given, str):
        return given
    lines = []
    for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", given):
        if isinstance(choice, Mapping):
            letter, choice = choice.get("label", letter), choice.get("text")
        lines.append(f"{letter}. {as_text(choice, name)}")
    return "\n".join(lines)


def history_turns(row: Columns) -> list[Any]:
    """Earlier turns as messages: pairs of texts, or messages already.

    Raises:
        DataError: they are neither.
    """
    given = row.take("history")
    given = decoded(given, "history") if isinstance(given, str) and given.strip() else given
    if not given:
        return []
    messages: list[Any] = []
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, Mapping):
            messages.append(item)
        elif (
            isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item)
        ):
            messages += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        else:
            raise DataError(f"'history' holds {short(item)}; each entry must be a question and its answer.")
    return messages
