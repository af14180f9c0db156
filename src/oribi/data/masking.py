"""Which characters of a rendered conversation the assistant wrote: found by rendering, never by searching for markers.

A conversation's layout is what the template writes around the texts. It is found once for each sequence of roles and
fields, by rendering placeholders, and holds for a conversation only if layout and texts put together give exactly the
rendered text. A trained span begins where the generation prompt ends and closes with the end-of-turn token.

Where the template looks into the texts, so that no layout holds, the text of every prefix of the conversation is
rendered and must be a prefix of the whole; then {% generation %} blocks, if the template has them; then it is an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from oribi.data.conversations import REASONING_FIELDS, Conversation
from oribi.data.encoding import Marked, Span
from oribi.data.rendering import MAX_SLOTS, SLOT, SLOT_BASE, ChatTemplate, shared_prefix, slot
from oribi.errors import DataError

TRAIN_ON = ("responses", "last_response", "everything")
THINK = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass(slots=True)
class _Turn:
    """An assistant turn in a layout: its first and its past-the-end character, each as (literal number, offset)."""

    start: tuple[int, int]
    end: tuple[int, int]
    closed: bool
    empty: bool  # the template writes nothing of the message


@dataclass(slots=True)
class _Layout:
    """literals[0] slots[0] literals[1] ... slots[-1] literals[-1] is the rendered text; turns by message number."""

    literals: list[str]
    slots: list[int]
    turns: dict[int, _Turn]
    left_out: list[str]


@dataclass(slots=True)
class _Skeleton:
    """A conversation with its texts taken out: one placeholder character for each."""

    messages: list[dict[str, Any]]
    texts: list[str]
    owners: list[int]  # message of each text
    names: list[str]  # what each text is, for reports


class Masker:
    """Finds the trained spans of conversations under one chat template.

    Args:
        template: the template that renders.
        train_on: "responses" (every assistant turn), "last_response" or "everything".
    """

    def __init__(self, template: ChatTemplate, train_on: str = "responses") -> None:
        self.template = template
        self.train_on = train_on
        self._layouts: dict[str, _Layout | None] = {}
        self.ways: Counter[str] = Counter()  # how masks were found: layout, prefixes, generation blocks

    def mark(self, conversation: Conversation) -> Marked:
        """Render a conversation and find its trained spans.

        Raises:
            DataError: the template refuses it, or the assistant's part cannot be told exactly.
        """
        conversation = replace(conversation, messages=self.template.adapt(conversation.messages))
        text = self.template.render(conversation.messages, conversation.tools, **conversation.template_kwargs)
        if self.train_on == "everything":
            return Marked(text, [(0, len(text))], closed=True)
        wanted = self._wanted(conversation)
        if not wanted:
            return Marked(text, [], closed=True)
        skeleton = take_out_texts(conversation.messages)
        layout = self._layout(skeleton, conversation)
        starts = layout and _fit(layout, skeleton.texts, text)
        if layout and starts:
            self.ways["layout"] += 1
            turns = [layout.turns[i] for i in wanted if i in layout.turns]
            if not turns:
                return Marked(text, [], closed=True, left_out=layout.left_out)
            spans = [(starts[t.start[0]] + t.start[1], starts[t.end[0]] + t.end[1]) for t in turns]
            return Marked(text, spans, turns[-1].closed, layout.left_out)
        spans = self._spans_from_prefixes(conversation, text, wanted)
        if spans:
            self.ways["prefixes"] += 1
        else:
            spans = self._spans_from_blocks(conversation, text, wanted)
            self.ways["generation blocks"] += 1
        end = self.template.turn_ends[wanted[-1] == len(conversation.messages) - 1]
        return Marked(text, spans, bool(end) and text[: spans[-1][1]].rstrip().endswith(end))

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The numbers of the messages to train on."""
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        for i, flag in enumerate(conversation.trained):
            if flag and conversation.messages[i]["role"] != "assistant":
                raise DataError(
                    f"message {i + 1} ({conversation.messages[i]['role']}) is marked for training; only assistant messages "
                    "can be. Remove the mark, or use train_on='everything'."
                )
        default = answers[-1:] if self.train_on == "last_response" else answers
        flags = conversation.trained
        return [i for i in answers if (flags[i] if flags[i] is not None else i in default)]

    def _layout(self, skeleton: _Skeleton, conversation: Conversation) -> _Layout | None:
        if len(skeleton.texts) > MAX_SLOTS:
            return None
        key = json.dumps(
            [skeleton.messages, conversation.tools, conversation.template_kwargs],
            sort_keys=True,
            default=repr,
        )
        if key not in self._layouts:
            if len(self._layouts) >= 10_000:  # tool calls make every conversation its own layout
                self._layouts.clear()
            self._layouts[key] = self._find_layout(skeleton, conversation)
        return self._layouts[key]

    def _find_layout(self, skeleton: _Skeleton, conversation: Conversation) -> _Layout | None:
        try:
            rendered = self.template.render(
                skeleton.messages, conversation.tools, **conversation.template_kwargs
            )
        except DataError:  # the template wants more of the texts than that they are texts
            return None
        literals, slots = SLOT.split(rendered), [ord(c) - SLOT_BASE for c in SLOT.findall(rendered)]
        missing = sorted(set(range(len(skeleton.texts))) - set(slots))
        layout = _Layout(literals, slots, {}, [skeleton.names[i] for i in missing])
        for i, message in enumerate(skeleton.messages):
            if message["role"] == "assistant":
                turn = self._find_turn(i, skeleton, conversation, layout)
                if turn is None:
                    return None
                if turn.empty:
                    layout.left_out.append("tool calls, so the turn is not trained")
                else:
                    layout.turns[i] = turn
        return layout

    def _find_turn(
        self, i: int, skeleton: _Skeleton, conversation: Conversation, layout: _Layout
    ) -> _Turn | None:
        """Where message `i` begins and ends; None if the layout does not show it."""
        own = [n for n, s in enumerate(layout.slots) if skeleton.owners[s] == i]
        earlier = [n for n, s in enumerate(layout.slots) if skeleton.owners[s] < i]
        if own and (own != list(range(own[0], own[-1] + 1)) or (earlier and earlier[-1] > own[0])):
            return None  # written twice, or out of order
        before = own[0] if own else (earlier[-1] + 1 if earlier else 0)
        offset = self._prompt_length(i, skeleton, conversation, layout, before)
        if offset is None and not own:
            offset = self._plain_header(i, skeleton, conversation, layout, before)
            if offset is None:
                return None
        start = (before, len(layout.literals[before]) if offset is None else offset)
        last = own[-1] + 1 if own else before
        begin = 0 if own else start[1]
        end, closed = self._turn_end(i, skeleton, conversation, layout, last, begin)
        if end is None:
            return None
        written = layout.literals[before][start[1] : end]
        empty = not own and not written.replace(self.template.turn_ends[0], "").strip()
        return _Turn(start, (last, end), closed, empty)

    def _prompt_length(
        self, i: int, skeleton: _Skeleton, conversation: Conversation, layout: _Layout, number: int
    ) -> int | None:
        """How much of literal `number`, which precedes message `i`, a generation prompt gives; None if it gives another."""
        longest = None
        for state in self.template.thinking_states:
            kwargs = {**conversation.template_kwargs, **state}
            try:
                prompt = self.template.render(
                    skeleton.messages[:i], conversation.tools, add_generation_prompt=True, **kwargs
                )
            except DataError:
                continue
            slots = SLOT.findall(prompt)
            if [ord(c) - SLOT_BASE for c in slots[-1:]] != layout.slots[:number][-1:]:
                continue
            tail = SLOT.split(prompt)[-1]
            if layout.literals[number].startswith(tail):
                longest = max(longest or 0, len(tail))
        return longest

    def _plain_header(
        self, i: int, skeleton: _Skeleton, conversation: Conversation, layout: _Layout, number: int
    ) -> int | None:
        """How much of literal `number` would stand before a plain answer in the place of message `i`."""
        count = len(skeleton.texts)
        answer = {"role": "assistant", "content": slot(count)}
        messages = [*skeleton.messages[:i], answer, {"role": "user", "content": slot(count + 1)}]
        try:
            rendered = self.template.render(messages, conversation.tools, **conversation.template_kwargs)
        except DataError:
            return None
        before = rendered.partition(slot(count))[0]
        header = SLOT.split(before)[-1]
        same = [ord(c) - SLOT_BASE for c in SLOT.findall(before)[-1:]] == layout.slots[:number][-1:]
        return len(header) if same and layout.literals[number].startswith(header) else None

    def _turn_end(
        self,
        i: int,
        skeleton: _Skeleton,
        conversation: Conversation,
        layout: _Layout,
        number: int,
        begin: int,
    ) -> tuple[int | None, bool]:
        """Past-the-end offset of the turn in literal `number`, and whether something closes it."""
        literal, ends = layout.literals[number], self.template.turn_ends
        if skeleton.messages[i].get("tool_calls"):
            end = self._call_end(i, skeleton, conversation, layout, number, begin)
            if end > begin:
                return end, True
        found = [(at, -len(end)) for end in ends if end and (at := literal.find(end, begin)) >= 0]
        if found:
            at, length = min(found)
            return at - length, True
        final = i == len(skeleton.messages) - 1
        return (None if ends[final] else begin), False

    def _call_end(
        self,
        i: int,
        skeleton: _Skeleton,
        conversation: Conversation,
        layout: _Layout,
        number: int,
        begin: int,
    ) -> int:
        """Where a turn with tool calls ends in literal `number`: at the last token that rendering up to it writes; 0 if unknown.

        Calls may end with a token of their own (<|call|>, <|eom_id|>).
        """
        upto = self.template.render(
            skeleton.messages[: i + 1], conversation.tools, **conversation.template_kwargs
        )
        slots = [ord(c) - SLOT_BASE for c in SLOT.findall(upto)]
        if slots[-1:] != layout.slots[:number][-1:]:
            return 0  # thinking that is left out once the conversation goes on
        return self.template.closing_end(shared_prefix(SLOT.split(upto)[-1], layout.literals[number]), begin)

    def _spans_from_prefixes(
        self, conversation: Conversation, text: str, wanted: list[int]
    ) -> list[Span] | None:
        """Spans between the generation prompt and the turn, where both are prefixes of the text; None otherwise."""
        spans = []
        for i in wanted:
            render, kwargs = self.template.render, conversation.template_kwargs
            try:
                upto = render(conversation.messages[: i + 1], conversation.tools, **kwargs)
                prompts = [
                    render(
                        conversation.messages[:i],
                        conversation.tools,
                        add_generation_prompt=True,
                        **{**kwargs, **s},
                    )
                    for s in self.template.thinking_states
                ]
            except DataError:
                return None
            prompts = [p for p in prompts if upto.startswith(p)]
            upto = upto.rstrip()
            if not prompts or not text.startswith(upto):
                return None
            start = len(max(prompts, key=len))
            end = max(
                (text.rfind(e, start, len(upto)) + len(e) for e in self.template.turn_ends if e), default=0
            )
            spans.append((start, end if end > start else len(upto)))
        return spans

    def _spans_from_blocks(self, conversation: Conversation, text: str, wanted: list[int]) -> list[Span]:
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if self.template.has_generation_blocks:
            marked, blocks = self.template.render_with_generation_spans(
                conversation.messages, conversation.tools, **conversation.template_kwargs
            )
            if marked == text and len(blocks) == len(answers):
                return [blocks[answers.index(i)] for i in wanted]
        raise DataError(
            "cannot tell exactly which text of this conversation is the assistant's: the chat template rewrites it, and "
            "has no {% generation %} blocks around it. Use a template of get_chat_template, add the blocks, or set "
            "train_on='everything'."
        )


def take_out_texts(messages: list[dict[str, Any]]) -> _Skeleton:
    """Replace every text of a conversation by a placeholder; thinking within the content is a text of its own."""
    skeleton = _Skeleton([], [], [], [])

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
        thought = THINK.fullmatch(content) if role == "assistant" and "</think>" in content else None
        if thought:
            opened, thinking, closed, rest = thought.groups()
            copy["content"] = opened + take(thinking, "thinking") + closed + take(rest, "assistant text")
        else:
            copy["content"] = take(content, f"{role} text")
        skeleton.messages.append(copy)
    return skeleton


def _fit(layout: _Layout, texts: list[str], rendered: str) -> list[int] | None:
    """Where each literal starts if literals and texts together are exactly `rendered`; None if they are not."""
    starts, at = [], 0
    for number, literal in enumerate(layout.literals):
        if not rendered.startswith(literal, at):
            return None
        starts.append(at)
        at += len(literal)
        if number == len(layout.slots):
            break
        following = layout.literals[number + 1]
        for form in _forms(texts[layout.slots[number]]):
            if rendered.startswith(form, at) and rendered.startswith(following, at + len(form)):
                at += len(form)
                break
        else:
            return None
    return starts if at == len(rendered) else None


def _forms(text: str) -> Iterator[str]:
    """How templates write a text: as it is, trimmed, or as JSON."""
    yield text
    yield text.strip()
    yield text.lstrip()
    yield text.rstrip()
    yield text.strip("\n")
    yield text.lstrip("\n")
    yield json.dumps(text, ensure_ascii=False)[1:-1]
