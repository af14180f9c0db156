"""Finds which characters of a rendered conversation the assistant wrote, by rendering, never by searching for markers.

A trained span begins where the generation prompt ends and closes with the end-of-turn token. Spans come from the layout
of the conversation, which holds only if layout and texts put together give exactly the rendered text. Where the template
looks into the texts, so that no layout holds, every prefix of the conversation is rendered and must be a prefix of the
whole; then {% generation %} blocks, if the template has them; then it is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace

from oribi.chat.conversation import Conversation, Span, with_known_roles
from oribi.chat.layout import Layout, LayoutFinder, Skeleton, take_out_texts, thoughts_of
from oribi.chat.rendering import ChatTemplate
from oribi.chat.template import MAX_SLOTS
from oribi.errors import DataError

TRAIN_ON = ("responses", "last_response", "everything")
BARE = "thought of a turn, so the turn is not trained; turns: split trains each turn with its thought"
BARE_ROW = (
    "the chat template leaves out the thought of every answer; turns: split or another template may keep it"
)
KEPT_LAYOUTS = 10_000  # tool calls make every conversation its own layout


@dataclass(slots=True)
class Marked:
    """A text and its trained spans, in characters."""

    text: str
    spans: list[Span]
    closed: bool  # False: an EOS belongs behind the text
    begins: bool = True  # False: the text continues where another stopped, so no BOS belongs before it
    left_out: list[str] = field(default_factory=list)  # what the chat template does not write
    untrained: str = ""  # why no span is trained, where that is known
    notes: list[str] = field(default_factory=list)  # where the rendered text differs from the row


def takes_all(train_on: str, completion_only: bool | None) -> bool:
    """Whether all of a row is trained; completion_only decides for rows of prompt and completion, unless it is None."""
    return train_on == "everything" if completion_only is None else not completion_only


class Masker:
    """Finds the trained spans of conversations under one chat template.

    Args:
        template: the template that renders.
        train_on: "responses" (every assistant turn), "last_response" or "everything".
        completion_only: whether rows of prompt and completion train the completion alone; None leaves it to train_on.
    """

    def __init__(
        self, template: ChatTemplate, train_on: str = "responses", completion_only: bool | None = None
    ) -> None:
        self.template = template
        self.train_on, self.completion_only = train_on, completion_only
        self.ways: Counter[str] = Counter()  # how masks were found: layout, prefixes, generation blocks
        self._layouts: dict[str, Layout | None] = {}

    def mark(self, conversation: Conversation) -> Marked:
        """Render a conversation and find its trained spans.

        Raises:
            DataError: the template refuses it, or the assistant's part cannot be told exactly.
        """
        conversation, notes = with_known_roles(conversation, self.template.writes_role)
        marked = self._mark(conversation)
        marked.notes = notes
        return marked

    def _mark(self, conversation: Conversation) -> Marked:
        messages = self.template.adapt(conversation.messages, conversation.tools)
        conversation = replace(conversation, messages=messages)
        text = self.template.render(messages, conversation.tools, **conversation.template_kwargs)
        final = len(messages) - 1 if messages[-1]["role"] == "assistant" else None
        if self._takes_all(conversation):
            return Marked(text, [(0, len(text))], closed=final is None or bool(self.template.turn_ends[1]))
        wanted = self._wanted(conversation)
        if not wanted:
            return Marked(text, [], closed=True)
        skeleton = take_out_texts(messages)
        layout = self._layout(skeleton, conversation)
        starts = layout.fit(skeleton.texts, text) if layout else None
        if layout and starts:
            self.ways["layout"] += 1
            turns = {i: layout.turns[i] for i in wanted if i in layout.turns}
            bare = [i for i in wanted if i in layout.bare]
            spans = [(starts[t.start[0]] + t.start[1], starts[t.end[0]] + t.end[1]) for t in turns.values()]
            spans = _without_untrained_parts(text, spans, list(turns), conversation)
            return Marked(
                text,
                spans,
                closed=final not in turns or turns[final].closed,
                left_out=layout.left_out + [BARE] * len(bare),
                untrained=BARE_ROW if bare and not turns else "",
            )
        bare = [i for i in wanted if self._is_bare(conversation, text, i)]
        wanted = [i for i in wanted if i not in bare]
        spans = self._spans_from_prefixes(conversation, text, wanted)
        if spans is not None:
            self.ways["prefixes"] += 1
        else:
            spans = self._spans_from_blocks(conversation, text, wanted)
            self.ways["generation blocks"] += 1
        spans = _without_untrained_parts(text, spans, wanted, conversation)
        return Marked(
            text,
            spans,
            closed=final not in wanted or bool(self.template.turn_ends[1]),
            left_out=[BARE] * len(bare),
            untrained="" if wanted else BARE_ROW,
        )

    def split(self, conversation: Conversation) -> list[Conversation]:
        """One conversation per trained turn, which ends there: each is rendered as when the model generated that turn.

        Raises:
            DataError: a message that is no assistant's is marked for training.
        """
        if self._takes_all(conversation):
            return [conversation]
        parts = []
        for i in self._wanted(conversation):
            trained = [False if m["role"] == "assistant" else None for m in conversation.messages[:i]]
            own = conversation.trained[i]
            trained.append(own if isinstance(own, tuple) else True)
            parts.append(replace(conversation, messages=conversation.messages[: i + 1], trained=trained))
        return parts or [conversation]

    def _is_bare(self, conversation: Conversation, text: str, i: int) -> bool:
        """Whether the thought of turn `i` is missing in `text`, but written while that turn is the last."""
        thoughts = [thought.strip() for thought in thoughts_of(conversation.messages[i])]
        missing = [thought for thought in thoughts if thought and thought not in text]
        if not missing:
            return False
        try:
            upto = self.template.render(
                conversation.messages[: i + 1], conversation.tools, **conversation.template_kwargs
            )
        except DataError:
            return False
        return any(thought in upto for thought in missing)

    def _takes_all(self, conversation: Conversation) -> bool:
        return takes_all(self.train_on, self.completion_only if conversation.completes else None)

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The numbers of the messages to train on."""
        messages, flags = conversation.messages, conversation.trained
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for i, flag in enumerate(flags):
            if flag and messages[i]["role"] != "assistant":
                raise DataError(
                    f"message {i + 1} ({messages[i]['role']}) is marked for training; only assistant messages can be. "
                    "Remove the mark, or use train_on='everything'."
                )
        default = answers[-1:] if self.train_on == "last_response" else answers
        return [i for i in answers if (flags[i] if flags[i] is not None else i in default)]

    def _layout(self, skeleton: Skeleton, conversation: Conversation) -> Layout | None:
        if len(skeleton.texts) > MAX_SLOTS:
            return None
        parts = [skeleton.messages, conversation.tools, conversation.template_kwargs]
        key = json.dumps(parts, sort_keys=True, default=repr)
        if key not in self._layouts:
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = LayoutFinder(self.template, skeleton, conversation).find()
        return self._layouts[key]

    def _spans_from_prefixes(
        self, conversation: Conversation, text: str, wanted: list[int]
    ) -> list[Span] | None:
        """Spans between the generation prompt and the turn, where both are prefixes of the text; None otherwise."""
        messages, tools, kwargs = conversation.messages, conversation.tools, conversation.template_kwargs
        render, spans = self.template.render, []
        for i in wanted:
            try:
                upto = render(messages[: i + 1], tools, **kwargs)
                prompts = [
                    render(messages[:i], tools, add_generation_prompt=True, **{**kwargs, **state})
                    for state in self.template.thinking_states
                ]
            except DataError:
                return None
            prompts = [p for p in prompts if upto.startswith(p)]
            upto = upto.rstrip()
            if not prompts or not text.startswith(upto):
                return None
            start = len(max(prompts, key=len))
            ends = [at + len(e) for e in self.template.turn_ends if e and (at := upto.rfind(e, start)) >= 0]
            spans.append((start, max(ends, default=len(upto))))
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
            "has no {% generation %} blocks around it. Take another template (chat_template in a run file, get_chat_template in "
            "Python), add the blocks, leave such rows out (malformed: drop), or set train_on='everything'."
        )


def _without_untrained_parts(
    text: str, spans: list[Span], turns: list[int], conversation: Conversation
) -> list[Span]:
    """The spans of turns without those parts of their contents that the row marks as untrained.

    Raises:
        DataError: the content of such a turn is not written as it stands, or not only once.
    """
    trained: list[Span] = []
    for (start, end), turn in zip(spans, turns):
        untrained = conversation.trained[turn]
        if not isinstance(untrained, tuple):
            trained.append((start, end))
            continue
        content = conversation.messages[turn]["content"]
        if isinstance(content, list):  # a thought and a text
            content = next((part["text"] for part in content if part["type"] == "text"), "")
        stripped = content.strip()
        at = text.find(stripped, start, end)
        if at < 0 or text.find(stripped, at + 1, end) >= 0:
            raise DataError(
                f"message {turn + 1} has parts that are not trained, but the chat template does not write its text once and "
                "unchanged, so they cannot be told apart. Mark the whole message instead."
            )
        shift = at - content.index(stripped)
        for begin, stop in untrained:
            trained.append((start, max(start, begin + shift)))
            start = min(end, max(start, stop + shift))
        trained.append((start, end))
    return [(start, end) for start, end in trained if start < end]
