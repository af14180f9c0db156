"""A tokenizer's chat template: renders exactly as transformers does, and finds out which roles, fields and calls it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from oribi.chat import ends
from oribi.chat.conversation import INSTRUCTIONS, REASONING_FIELDS
from oribi.chat.template import name_of, render, render_with_generation_spans, slot
from oribi.errors import DataError

# Keywords by which known templates switch thinking: a generation prompt of any of these states is given, not generated.
THINKING_SWITCHES = ("enable_thinking", "thinking")

# a tool call that shows how a template writes calls, and what ties a result to it
_CALL = {
    "id": "oribi0001", "type": "function",
    "function": {"name": "oribi_probe", "arguments": {"k": "oribi_v"}},
}  # fmt: skip
_ANSWERED = {"name": "oribi_probe", "tool_call_id": "oribi0001"}
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations with one tokenizer's template, special tokens and keyword arguments.

    Args:
        tokenizer: any transformers tokenizer.
        template: Jinja source; None takes the tokenizer's own.
        kwargs: what goes into every rendering, e.g. {"enable_thinking": False}.

    Raises:
        DataError: there is no template at all.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be turned into text. Give it one: "
                'tokenizer = get_chat_template(tokenizer, "chatml") (names: oribi.chat.named_templates.NAMES).'
            )
        self.tokenizer = tokenizer
        self.name = name_of(tokenizer) if template is None else "the chat template"
        self._template = template
        self._context = {**tokenizer.special_tokens_map, **(kwargs or {})}
        self._sources: dict[bool, str] = {}
        self._call_forms: dict[bool, tuple[str | None, bool]] = {}
        self._several_calls: dict[bool, bool] = {}
        self._written_roles: dict[tuple[str, bool, str], bool] = {}

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The Jinja source; a tokenizer may have another one for conversations with tools."""
        key = bool(tools)
        if key not in self._sources:
            self._sources[key] = self._template or self.tokenizer.get_chat_template(None, tools or None)
        return self._sources[key]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation, equal to `tokenizer.apply_chat_template(..., tokenize=False)`.

        Raises:
            ChatTemplateError: the template refuses the conversation; the message is the template's.
            TemplateLimitError: the template takes too long or makes too much, as it may for every row.
        """
        variables = {**self._context, **kwargs, "add_generation_prompt": add_generation_prompt}
        return render(self.source(tools), messages, tools, name=self.name, **variables)

    def render_with_generation_spans(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **kwargs: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans of its {% generation %} blocks."""
        variables = {**self._context, **kwargs}
        return render_with_generation_spans(self.source(tools), messages, tools, name=self.name, **variables)

    def adapt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[dict[str, Any]]:
        """Messages in the form this template takes, where templates differ and most write nonsense instead of complaining.

        Thinking gets the name that the template reads, or becomes a part of the content; of tool calls, arguments are an object or
        JSON text, and a turn without text has the content "" or None.
        """
        adapted = []
        for message in messages:
            given = next((name for name in REASONING_FIELDS if name in message), None)
            if given and self._thinks_in_parts:
                parts = {"thinking": message[given], "text": message.get("content")}
                content = [{"type": kind, kind: text} for kind, text in parts.items() if text]
                message = {
                    **{name: value for name, value in message.items() if name != given},
                    "content": content,
                }
            elif given and self._reasoning_field not in (None, given):
                message = {**message, self._reasoning_field: message[given]}
                del message[given]
            if message.get("tool_calls"):
                empty, as_text = self._call_form(tools)
                if len(message["tool_calls"]) > 1 and not self._writes_several_calls(tools):
                    raise DataError(
                        f"a message has {len(message['tool_calls'])} tool_calls, and the chat template writes the first alone; give each "
                        "call a message of its own, with its result behind it"
                    )
                calls = [_with_arguments(call, as_text) for call in message["tool_calls"]]
                message = {**message, "tool_calls": calls, "content": message.get("content") or empty}
            adapted.append(message)
        return adapted

    def mentions(self, key: str, tools: Sequence[Any] | None = None) -> bool:
        """Whether the source has a word, such as the key of a message."""
        return bool(re.search(rf"\b{re.escape(key)}\b", self.source(tools)))

    def writes_role(self, role: str, tools: Sequence[Any] | None = None, after: str = "user") -> bool:
        """Whether the template writes the text of a message of a role.

        Args:
            role: of the message.
            tools: those of the conversation.
            after: "" where the message is the first one, "system" or "developer" where it follows the first one of that role,
                "user" where it stands later.
        """
        key = role, bool(tools), after
        if key not in self._written_roles:
            self._written_roles[key] = any(self._writes(probe, tools) for probe in _with_role(role, after))
        return self._written_roles[key]

    def _writes(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> bool:
        try:
            return slot(0) in self.render(self.adapt(messages, tools), tools)
        except DataError:
            return False

    @cached_property
    def _reasoning_field(self) -> str | None:
        """The name under which the template reads a message's thinking."""
        return next((n for n in REASONING_FIELDS if re.search(rf"""(\.|['"]){n}\b""", self.source())), None)

    @cached_property
    def _thinks_in_parts(self) -> bool:
        """Whether the template writes thinking only where it is a part of the content, as Mistral's do."""
        thought = {"type": "thinking", "thinking": slot(0)}
        answers = [{"content": [thought, {"type": "text", "text": slot(1)}]}]
        answers += [{"content": slot(1), name: slot(0)} for name in REASONING_FIELDS]
        written = []
        for answer in answers:
            try:
                rendered = self.render([{"role": "user", "content": "x"}, {"role": "assistant", **answer}])
            except DataError:
                rendered = ""
            written.append(slot(0) in rendered and slot(1) in rendered)
        return written[0] and not any(written[1:])

    def _call_form(self, tools: Sequence[Any] | None) -> tuple[str | None, bool]:
        """What a turn of only tool calls has as content, and whether arguments are JSON text: the first form that is written."""
        key = bool(tools)
        if key not in self._call_forms:
            forms = [("", False), (None, False), ("", True), (None, True)]
            self._call_forms[key] = next((f for f in forms if self._writes_calls(*f, tools)), forms[0])
        return self._call_forms[key]

    def _writes_several_calls(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template writes more than the first call of a message; one that refuses several says so itself."""
        if bool(tools) not in self._several_calls:
            empty, as_text = self._call_form(tools)
            other = {**_CALL, "function": {**_CALL["function"], "name": "oribi_second"}}
            calls = [_with_arguments(one, as_text) for one in (_CALL, other)]
            messages = [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": empty, "tool_calls": calls},
                {"role": "tool", "content": "x", **_ANSWERED},
            ]
            try:
                rendered = self.render(messages, tools)
                written = ["oribi_second" in rendered, "oribi_probe" in rendered]
            except DataError:
                written = None
            self._several_calls[bool(tools)] = written != [False, True]
        return self._several_calls[bool(tools)]

    def _writes_calls(self, empty: str | None, as_text: bool, tools: Sequence[Any] | None) -> bool:
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": empty, "tool_calls": [_with_arguments(_CALL, as_text)]},
            {"role": "tool", "content": "x", **_ANSWERED},
        ]
        try:
            rendered = self.render(messages, tools)
        except DataError:
            return False
        return "oribi_probe" in rendered and "oribi_v" in rendered and '\\"k' not in rendered

    @cached_property
    def has_generation_blocks(self) -> bool:
        return bool(GENERATION_BLOCK.search(self.source()))

    @cached_property
    def thinking_states(self) -> list[dict[str, bool]]:
        """The keyword arguments under which the generation prompt may differ; the plain one comes first."""
        switches = [name for name in THINKING_SWITCHES if re.search(rf"\b{name}\b", self.source())]
        return [{}, *({name: value} for name in switches for value in (True, False))]

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return ends.added_tokens(self.tokenizer)

    def closing_end(self, text: str, begin: int) -> int:
        """Where the first EOS after `begin`, or else the last added token of `text`, ends; 0 if it has none."""
        found = list(self._added.finditer(text, begin)) if self._added else []
        closing = next(
            (t for t in found if t.group() == self.tokenizer.eos_token), found[-1] if found else None
        )
        return closing.end() if closing else 0

    @cached_property
    def turn_ends(self) -> tuple[str, str]:
        """What closes an assistant's turn within a conversation, and at its end; see `ends.turn_ends`."""
        return ends.turn_ends(self.tokenizer, self.render)

    @property
    def ends(self) -> list[str]:
        """The different texts that close a turn; none where the template writes none."""
        return list(dict.fromkeys(end for end in self.turn_ends if end))


def _with_role(role: str, after: str) -> list[list[dict[str, Any]]]:
    """Short conversations with a message of a role, whose text is placeholder 0: with a tool call before it, and without."""
    message, user = {"role": role, "content": slot(0)}, {"role": "user", "content": "x"}
    if after != "user":
        return [[*([{"role": after, "content": "x"}] if after else []), message, user]]
    answer = {"role": "assistant", "content": "x"}
    if role in INSTRUCTIONS:
        return [[user, answer, message, user]]
    result = {**message, **_ANSWERED}
    return [[user, {**answer, "content": "", "tool_calls": [_CALL]}, result], [user, answer, result]]


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """A tool call whose arguments are JSON text, or an object."""
    nested = isinstance(call.get("function"), Mapping)
    function = dict(call["function"] if nested else call)
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except ValueError as error:
            raise DataError(
                f"a tool call of {function.get('name')!r} has arguments that are text but no JSON ({error}): {arguments[:60]!r}."
            ) from error
    return {**call, "function": function} if nested else function
