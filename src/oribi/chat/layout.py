"""What a chat template writes around the texts of a conversation, found by rendering placeholders.

A layout is literals with places for texts between them: literal 0, text, literal 1, text, ... It is the same for all
conversations of one sequence of roles and fields, unless the template looks into the texts; `fit` tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from oribi.chat.conversation import REASONING_FIELDS, Conversation
from oribi.chat.rendering import ChatTemplate
from oribi.chat.template import SLOT, shared_prefix, slot, slots_in
from oribi.errors import DataError

THINK = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)  # a prompt may have opened it


@dataclass(slots=True)
class Skeleton:
    """A conversation with its texts taken out: one placeholder character for each."""

    messages: list[dict[str, Any]]
    texts: list[str]
    owners: list[int]  # message of each text
    names: list[str]  # what each text is, for reports


@dataclass(slots=True)
class Turn:
    """An assistant's turn in a layout: its first and its past-the-end character, each as (literal, offset)."""

    start: tuple[int, int]
    end: tuple[int, int]
    closed: bool  # something that ends a turn is its last part
    empty: bool  # the template writes nothing of the message


@dataclass(slots=True)
class Layout:
    """literals[0] slots[0] literals[1] ... slots[-1] literals[-1] is the rendered text; slots are numbers of texts."""

    literals: list[str]
    slots: list[int]
    turns: dict[int, Turn]  # by message
    left_out: list[str]  # what the template does not write
    bare: set[int] = field(
        default_factory=set
    )  # turns without a text that generation would have written there

    def fit(self, texts: list[str], rendered: str) -> list[int] | None:
        """Where each literal starts if literals and texts together are exactly `rendered`; None if they are not."""
        starts, at = [], 0
        for number, literal in enumerate(self.literals):
            if not rendered.startswith(literal, at):
                return None
            starts.append(at)
            at += len(literal)
            if number == len(self.slots):
                break
            following = self.literals[number + 1]
            for form in _forms(texts[self.slots[number]]):
                if rendered.startswith(form, at) and rendered.startswith(following, at + len(form)):
                    at += len(form)
                    break
            else:
                return None
        return starts if at == len(rendered) else None


def _forms(text: str) -> Iterator[str]:
    """The forms in which templates write a text: as it is, trimmed, or as JSON."""
    yield text
    yield text.strip()
    yield text.lstrip()
    yield text.rstrip()
    yield text.strip("\n")
    yield text.lstrip("\n")
    yield json.dumps(text, ensure_ascii=False)[1:-1]


def take_out_texts(messages: list[dict[str, Any]]) -> Skeleton:
    """Replace every text of a conversation by a placeholder; a thought within the content gets its own placeholder."""
    skeleton = Skeleton([], [], [], [])

    def take(text: str, name: str) -> str:
        if not text.strip():
            return text
        skeleton.texts.append(text)
        skeleton.owners.append(len(skeleton.messages))
        skeleton.names.append(name)
        return slot(len(skeleton.texts) - 1)

    for message in messages:
        copy, role = dict(message), message["role"]
        for name in REASONING_FIELDS:
            if isinstance(copy.get(name), str):
                copy[name] = take(copy[name], "thinking")
        content = copy.get("content") or ""
        if isinstance(content, list):  # a thought and a text
            kinds = {"thinking": "thinking", "text": "assistant text"}
            copy["content"] = [
                {"type": part["type"], part["type"]: take(part[part["type"]], kinds[part["type"]])}
                for part in content
            ]
            skeleton.messages.append(copy)
            continue
        thought = THINK.fullmatch(content) if role == "assistant" and "</think>" in content else None
        if thought:
            opened, thinking, closed, rest = thought.groups()
            copy["content"] = opened + take(thinking, "thinking") + closed + take(rest, "assistant text")
        elif content:
            copy["content"] = take(content, f"{role} text")
        skeleton.messages.append(copy)
    return skeleton


def thoughts_of(message: dict[str, Any]) -> list[str]:
    """The thoughts of an assistant's message, in fields of their own or within the content."""
    skeleton = take_out_texts([message])
    return [text for text, name in zip(skeleton.texts, skeleton.names) if name == "thinking"]


class LayoutFinder:
    """Finds the layout of one skeleton.

    Args:
        template: the template that renders.
        skeleton: the conversation without its texts.
        conversation: gives tools and keyword arguments.
    """

    def __init__(self, template: ChatTemplate, skeleton: Skeleton, conversation: Conversation) -> None:
        self.template, self.skeleton, self.conversation = template, skeleton, conversation

    def find(self) -> Layout | None:
        """The layout; None if rendering does not show where every turn of the assistant begins and ends."""
        skeleton = self.skeleton
        try:
            rendered = self._render(skeleton.messages)
        except DataError:  # the template inspects message contents, so placeholders do not render
            return None
        self.literals, self.slots = SLOT.split(rendered), slots_in(rendered)
        missing = sorted(set(range(len(skeleton.texts))) - set(self.slots))
        layout = Layout(self.literals, self.slots, {}, [skeleton.names[i] for i in missing])
        for i, message in enumerate(skeleton.messages):
            if message["role"] != "assistant":
                continue
            if self._is_bare(i, missing):
                layout.bare.add(i)
                continue
            turn = self._turn(i, layout)
            if turn is None:
                return None
            if turn.empty or not self._writes_calls(i, turn):
                layout.left_out.append("tool calls, so the turn is not trained")
            else:
                layout.turns[i] = turn
        return layout

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        kwargs = {**self.conversation.template_kwargs, **kwargs}
        return self.template.render(messages, self.conversation.tools, **kwargs)

    def _is_bare(self, i: int, missing: list[int]) -> bool:
        """Whether turn `i` lacks a text that the template writes while the turn is the last, or a thought that the prompt opens."""
        owners, names = self.skeleton.owners, self.skeleton.names
        lost = {n for n in missing if owners[n] == i}
        if not lost:
            return False
        try:
            upto = self._render(self.skeleton.messages[: i + 1])
        except (
            DataError
        ):  # the template takes no conversation that ends here, so nothing is generated here either
            return False
        if lost & set(slots_in(upto)):
            return True
        before = next((n for n, s in enumerate(self.slots) if owners[s] >= i), len(self.slots))
        return any(names[n] == "thinking" for n in lost) and self._prompt_length(i, before) is None

    def _turn(self, i: int, layout: Layout) -> Turn | None:
        own = [n for n, s in enumerate(self.slots) if self.skeleton.owners[s] == i]
        earlier = [n for n, s in enumerate(self.slots) if self.skeleton.owners[s] < i]
        later = next((n for n, s in enumerate(self.slots) if self.skeleton.owners[s] > i), len(self.slots))
        if self.skeleton.messages[i].get("tool_calls") and own and own[-1] > later:
            layout.left_out.append("text beside a tool call where it belongs, so that text is not trained")
            own = [n for n in own if n < later]
        if own and (own != list(range(own[0], own[-1] + 1)) or (earlier and earlier[-1] > own[0])):
            return None  # written twice, or out of order
        before = own[0] if own else (earlier[-1] + 1 if earlier else 0)
        offset = self._prompt_length(i, before)
        if offset is None:
            offset = len(self.literals[before]) if own else self._header_length(i, before)
        if offset is None:
            return None
        last, begin = (own[-1] + 1, 0) if own else (before, offset)
        end, closed = self._end(i, last, begin)
        if end is None:
            return None
        written = "" if own else self.literals[before][offset:end]
        empty = not own and not written.replace(self.template.turn_ends[0], "").strip()
        return Turn((before, offset), (last, end), closed, empty)

    def _writes_calls(self, i: int, turn: Turn) -> bool:
        """Whether the tool calls of message `i`, if it has any, stand in its turn."""
        (first, start), (last, end) = turn.start, turn.end
        literals = [*self.literals[first:last], self.literals[last][:end]]
        written = "".join([literals[0][start:], *literals[1:]])
        calls = self.skeleton.messages[i].get("tool_calls") or []
        return all(str(call.get("function", call).get("name")) in written for call in calls)

    def _prompt_length(self, i: int, number: int) -> int | None:
        """How much of literal `number`, which precedes message `i`, a generation prompt gives; None if it gives another."""
        longest = None
        for state in self.template.thinking_states:
            try:
                prompt = self._render(self.skeleton.messages[:i], add_generation_prompt=True, **state)
            except DataError:
                continue
            tail = SLOT.split(prompt)[-1]
            if self._follows(prompt, number) and self.literals[number].startswith(tail):
                longest = max(longest or 0, len(tail))
        return longest

    def _header_length(self, i: int, number: int) -> int | None:
        """How much of literal `number` would stand before a plain answer in the place of message `i`."""
        count = len(self.skeleton.texts)
        answer = {"role": "assistant", "content": slot(count)}
        again = {"role": "user", "content": slot(count + 1)}
        try:
            rendered = self._render([*self.skeleton.messages[:i], answer, again])
        except DataError:
            return None
        before = rendered.partition(slot(count))[0]
        header = SLOT.split(before)[-1]
        if not self._follows(before, number) or not self.literals[number].startswith(header):
            return None
        return len(header)

    def _end(self, i: int, number: int, begin: int) -> tuple[int | None, bool]:
        """Past-the-end offset of the turn in literal `number`, and whether something closes it."""
        literal, ends = self.literals[number], self.template.turn_ends
        if self.skeleton.messages[i].get("tool_calls"):
            end = self._call_end(i, number, begin)
            if end > begin:
                return end, True
        found = [(at, -len(end)) for end in ends if end and (at := literal.find(end, begin)) >= 0]
        if found:
            at, length = min(found)
            return at - length, True
        final = i == len(self.skeleton.messages) - 1
        return (None if ends[final] else begin), False

    def _call_end(self, i: int, number: int, begin: int) -> int:
        """Where a turn with tool calls ends in literal `number`: at the last token that rendering up to it writes; 0 if unknown.

        Calls may end with a token of their own (<|call|>, <|eom_id|>).
        """
        upto = self._render(self.skeleton.messages[: i + 1])
        slots, before = slots_in(upto), self.slots[:number][-1:]
        if before and before[0] not in slots:
            return 0
        at = slots.index(before[0]) + 1 if before else 0
        written = "".join(SLOT.split(upto)[at:])  # without texts that move when the conversation continues
        return self.template.closing_end(shared_prefix(written, self.literals[number]), begin)

    def _follows(self, rendered: str, number: int) -> bool:
        """Whether the last text of `rendered` is the one before literal `number`."""
        return slots_in(rendered)[-1:] == self.slots[:number][-1:]
