"""The Modelfile by which Ollama runs a GGUF file: the chat template as a Go template, stop tokens, parameters.

Ollama cannot run Jinja. The Go template is not looked up by name but derived: the tokenizer's own template renders marked
messages, and the text around the marks becomes the Go template. What Ollama makes of it must then equal the
tokenizer's own text for every kind of conversation. A template that is not a sequence of turns (its text depends on dates,
or on where a message stands) fails this, and no Modelfile is written.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and docs/template.md.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oribi.chat.template import render, render_chat
from oribi.errors import ChatTemplateError, TemplateLimitError

_SYSTEM, _USER, _ANSWER = "Sÿstem-ç{}", "Üser-ñ{}", "Änswer-ø{}"
_PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
Messages = list[dict[str, str]]
Render = Callable[..., str]


class NoModelfile(Exception):
    """Why there is none."""


class Unwritable(ValueError):
    """A value that the format cannot hold as it is."""


def for_modelfile(text: str, *, block: bool = False) -> str:
    '''A value of an Ollama Modelfile, quoted; in """ where `block` says so or it must be.

    Ollama ends a value at the first line whose text so far ends with the quote that it began with, and drops every
    character that is not printable, spaces and line ends excepted. There is no escape character.

    Raises:
        Unwritable: the value holds """, or a character that Ollama would drop.

    Source: https://github.com/ollama/ollama/blob/main/parser/parser.go
    '''
    dropped = next((c for c in text if not c.isprintable() and c not in " \t\n\r"), None)
    if dropped is not None:
        raise Unwritable(f"it holds {dropped!r}, which Ollama drops")
    if '"""' in text:
        raise Unwritable('it holds """, which ends a value of a Modelfile')
    plain = not any(sign in text for sign in '"\n\r')
    return f'"{text}"' if plain and not block else f'"""{text}"""'


def for_go_template(text: str) -> str:
    """Text of a Go template: what would begin an action is written by one."""
    return re.sub(r"\{\Z", '{{ "{" }}', text.replace("{{", '{{ "{{" }}'))


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around each text.

    Args:
        system: before and after the system's text; None where the template takes no system message.
        system_in_question: the system's text stands inside the first question.
        always: the system's turn comes even without a text.
        question, answer: before and after each.
        ask: what asks for an answer.
        default: the system's text where a conversation has none.
        opening: what stands before every conversation.
    """

    system: tuple[str, str] | None
    system_in_question: bool
    always: bool
    question: tuple[str, str]
    answer: tuple[str, str]
    ask: str
    default: str = ""
    opening: str = ""

    def render(self, messages: Messages) -> str:
        """The prompt that Ollama makes of a conversation with `go_template`."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else self.default
        opening = ""
        if self.system is not None and (system or self.always):
            opening = self.system[0] + system + self.system[1]
        text = self.opening if self.system_in_question else self.opening + opening
        for message in messages:
            if message["role"] == "user":
                text += self.question[0]
                if self.system_in_question:
                    text, opening = text + opening, ""
                text += message["content"] + self.question[1]
            elif message["role"] == "assistant":
                text += self.answer[0] + message["content"] + self.answer[1]
        return text + self.ask

    def go_template(self) -> str:
        """The template in Go's words."""
        before, inside, first = for_go_template(self.opening), "", ""
        if self.system is not None:
            opening = f"{for_go_template(self.system[0])}{{{{ $.System }}}}{for_go_template(self.system[1])}"
            if self.system_in_question:
                first = "{{ $first := true }}"
                inside = f"{{{{ if and $first $.System }}}}{opening}{{{{ end }}}}{{{{ $first = false }}}}"
            else:
                before += opening if self.always else f"{{{{ if .System }}}}{opening}{{{{ end }}}}"
        around = [for_go_template(text) for text in (*self.question, *self.answer)]
        question = f"{around[0]}{inside}{{{{ .Content }}}}{around[1]}"
        answer = f"{around[2]}{{{{ .Content }}}}{around[3]}"
        return (
            f'{first}{before}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{question}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{for_go_template(self.ask)}'
        )


def read_turns(tokenizer: Any, *, adds_bos: bool) -> Turns:
    """The turns of a tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        adds_bos: whether llama.cpp puts BOS before every prompt, so that the template must not.

    Raises:
        NoModelfile: the template is not a sequence of turns.
    """
    bos = tokenizer.bos_token if adds_bos else None

    def render(messages: Messages, *, prompt: bool = True) -> str:
        text = render_chat(tokenizer, messages, add_generation_prompt=prompt)
        return text.removeprefix(bos) if bos else text

    if writes_the_date(tokenizer):
        raise NoModelfile("the chat template writes today's date, which a Modelfile cannot")
    conversation = _conversation(3, system=False)
    marks = [message["content"] for message in conversation]
    try:
        head, to_answer, to_question, _, _, ending = _split(render(conversation), marks)
        closed = _split(render(conversation[:1], prompt=False), marks[:1])[1]
        answered = _split(render(conversation[:2], prompt=False), marks[:2])[2]
    except (ChatTemplateError, TemplateLimitError) as error:
        raise NoModelfile(f"the chat template refuses a plain conversation: {error.__cause__}") from error
    before = to_question.removeprefix(answered)
    if not (before and head.endswith(before)):
        before = os.path.commonprefix([head[::-1], to_question[::-1]])[::-1]
    after = (
        closed
        if to_answer.startswith(closed) and ending.startswith(closed)
        else os.path.commonprefix([to_answer, ending])
    )
    answer = (to_answer.removeprefix(after), to_question.removesuffix(before))
    system, inside, always, default, opening = _read_system(render, before, head)
    turns = Turns(
        system, inside, always, (before, after), answer, ending.removeprefix(after), default, opening
    )
    kinds = [_conversation(count, system=False) for count in (1, 2, 3)]
    if system is not None:
        kinds += [_conversation(count, system=True) for count in (1, 3)]
    for kind in kinds:
        roles = ", ".join(message["role"] for message in kind)
        try:
            same = turns.render(kind) == render(kind)
        except (ChatTemplateError, TemplateLimitError) as error:
            raise NoModelfile(str(error)) from error
        if not same:
            raise NoModelfile(
                f"the chat template is not a sequence of turns ({roles} are rendered differently)"
            )
    return turns


def writes_the_date(tokenizer: Any) -> bool:
    """Whether a prompt has today's date in it, found by rendering it with another in its place."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return False
    other = "{%- macro oribi_date(form) %}oribi-date{% endmacro -%}" + template.replace(
        "strftime_now", "oribi_date"
    )
    conversation = _conversation(1, system=False)
    try:
        found = render(
            other,
            conversation,
            name="the chat template",
            add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )
    except (ChatTemplateError, TemplateLimitError):  # the template computes with the date
        return True
    return "oribi-date" in found


def _read_system(
    render: Render, before: str, head: str
) -> tuple[tuple[str, str] | None, bool, bool, str, str]:
    """system, system_in_question, always, default and opening of `Turns`."""
    messages, own = _conversation(1, system=True), head.removesuffix(before)
    try:
        start, middle, _ = _split(render(messages), [message["content"] for message in messages])
    except (ChatTemplateError, TemplateLimitError, NoModelfile):  # it takes no system message
        return None, False, False, "", own
    after = middle.removesuffix(before)
    if middle.endswith(before) and start != own + before:
        if start.startswith(own):
            return (start.removeprefix(own), after), False, False, "", own
        if own.startswith(start) and own.endswith(after):
            default = own[len(start) : len(own) - len(after)]
            return (start, after), False, not default, default, ""
    elif start.startswith(own + before):
        return (start.removeprefix(own + before), middle), True, False, "", own
    raise NoModelfile("the chat template begins with text of its own")


def _conversation(questions: int, *, system: bool) -> Messages:
    messages = [{"role": "system", "content": _SYSTEM.format(0)}] if system else []
    for i in range(questions):
        messages.append({"role": "user", "content": _USER.format(i)})
        if i + 1 < questions:
            messages.append({"role": "assistant", "content": _ANSWER.format(i)})
    return messages


def _split(text: str, marks: list[str]) -> list[str]:
    """What stands before, between and behind the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise NoModelfile("the chat template drops, repeats or changes a message")
        parts.append(before)
    return [*parts, text]


def modelfile(
    file: str,
    tokenizer: Any,
    stops: list[int],
    generation: Any,
    *,
    adds_bos: bool,
    notes: list[str] | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        tokenizer: with the chat template.
        stops: ids of the tokens that end an answer.
        generation: the model's generation config, or None.
        adds_bos: whether the GGUF file says that BOS is added.
        notes: gets a line for each end token or parameter that a Modelfile cannot hold.

    Raises:
        NoModelfile: no template, or one that Go or a Modelfile cannot express.
    """
    notes = [] if notes is None else notes
    if not tokenizer.chat_template:
        raise NoModelfile("the tokenizer has no chat template")
    turns = read_turns(tokenizer, adds_bos=adds_bos)
    try:
        lines = [f"FROM ./{file}", f"TEMPLATE {for_modelfile(turns.go_template(), block=True)}"]
        if turns.default:
            lines.append(f"SYSTEM {for_modelfile(turns.default, block=True)}")
    except Unwritable as why:
        raise NoModelfile(f"the chat template cannot be written there: {why}") from why
    # Ollama stops at the text: that of an ordinary token may stand in any answer
    ends = [tokenizer.convert_ids_to_tokens(id) for id in stops if id in tokenizer.added_tokens_decoder]
    for end in ends:
        try:
            lines.append(f"PARAMETER stop {for_modelfile(end)}")
        except Unwritable as why:
            notes.append(f"the Modelfile does not name the end token {end!r}: {why}")
    for ours, theirs in _PARAMETERS.items():
        value = getattr(generation, ours, None)
        if value is None or not getattr(generation, "do_sample", False):
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            lines.append(f"PARAMETER {theirs} {value:g}")
        else:
            notes.append(f"the Modelfile does not name {ours} = {value!r}: it is not a number")
    return "\n".join(lines) + "\n"
