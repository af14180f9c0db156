"""Rendering a chat template: the text that transformers gives, within limits of size and time.

A template comes with a model and is a program. In jinja's sandbox it reads no file and calls nothing of Python's, but it may
loop for hours or double a text until memory ends. So it is compiled here, in transformers' own environment, with a check
where its work or its texts can grow: at loops, calls, products, formats, joins and outputs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils import chat_template_utils as upstream
from transformers.utils import get_json_schema

from oribi.chat.limits import LimitedEnvironment, TooMuch, limited, require_characters
from oribi.errors import ChatTemplateError, TemplateLimitError

MAX_SOURCE_CHARACTERS = 1 << 20
SHOWN_CHARACTERS = 300  # of a template's own message

# Placeholders show what a template writes around texts: one character per text, from a private plane. No data holds it, no
# trim removes it, JSON leaves it alone.
SLOT_BASE = 0x10F000
MAX_SLOTS = 4000
SLOT = re.compile(
    f"[{chr(SLOT_BASE)}-{chr(SLOT_BASE + MAX_SLOTS + 1)}]"
)  # two more than texts, for probes beside them

Messages = Sequence[Mapping[str, Any]]


def slot(index: int) -> str:
    """The placeholder character number `index`."""
    return chr(SLOT_BASE + index)


def slots_in(rendered: str) -> list[int]:
    """The numbers of the placeholders in a text, in order."""
    return [ord(character) - SLOT_BASE for character in SLOT.findall(rendered)]


def shared_prefix(a: str, b: str) -> str:
    """The longest text that both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:length]


def render_chat(
    tokenizer: Any,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> str:
    """The text of a conversation, equal to `tokenizer.apply_chat_template(..., tokenize=False)`.

    Args:
        tokenizer: gives the template and its special tokens.
        messages: with role and content.
        tools: JSON schemas, or functions that have one.
        add_generation_prompt: end with what asks for an answer.
        kwargs: further variables of the template.

    Raises:
        ChatTemplateError: the template refuses the conversation or fails on it.
        TemplateLimitError: it takes too long, or makes too much.
    """
    return render(
        tokenizer.get_chat_template(None, tools or None),
        messages,
        tools,
        name=name_of(tokenizer),
        add_generation_prompt=add_generation_prompt,
        **{**tokenizer.special_tokens_map, **kwargs},
    )


def name_of(tokenizer: Any) -> str:
    """How a tokenizer's template is named in errors."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"the chat template of {name!r}" if name else "the chat template"


def render(
    source: str, messages: Messages, tools: Sequence[Any] | None = None, *, name: str, **kwargs: Any
) -> str:
    """The text that a template gives; arguments and errors as for `render_chat`.

    Args:
        source: the template's Jinja text.
        name: what the template is called in errors.
    """

    def whole() -> str:
        return _compiled(source).render(**_variables(messages, tools, kwargs))

    return _guarded(whole, messages, name)


def render_with_generation_spans(
    source: str, messages: Messages, tools: Sequence[Any] | None = None, *, name: str, **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the character spans of its {% generation %} blocks; arguments and errors as for `render`."""

    def whole() -> tuple[str, list[tuple[int, int]]]:
        template, blocks, spans = _compiled(source), [], []
        # the tracker reads in `blocks` how much has been written
        with template.environment.activate_tracker(blocks, spans):
            size = 0
            for block in template.generate(**_variables(messages, tools, kwargs)):
                size += len(block)
                require_characters(size)
                blocks.append(block)
        return "".join(blocks), spans

    return _guarded(whole, messages, name)


def _guarded(whole: Any, messages: Messages, name: str) -> Any:
    try:
        with limited():
            return whole()
    except (TooMuch, RecursionError, MemoryError, OverflowError) as error:
        what = str(error) if isinstance(error, TooMuch) else f"{type(error).__name__}: {_short(error)}"
        raise TemplateLimitError(
            f"{name} goes beyond the limits of rendering ({what}). It is faulty, or made to do harm: give another with "
            "chat_template or get_chat_template."
        ) from error
    except upstream.jinja2.exceptions.TemplateSyntaxError as error:
        raise ChatTemplateError(f"{name} is no valid Jinja, line {error.lineno}: {_short(error)}.") from error
    except upstream.jinja2.exceptions.TemplateError as error:
        roles = [message.get("role") for message in messages]
        raise ChatTemplateError(
            f"the chat template refuses this conversation ({_short(error)}); its roles are {roles}. Correct the row, or "
            "choose another template with get_chat_template."
        ) from error
    except Exception as error:  # of whatever kind: a template may do anything with a value
        raise ChatTemplateError(
            f"the chat template failed on this conversation ({type(error).__name__}: {_short(error)}). Correct the row, or "
            "choose another template with get_chat_template."
        ) from error


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _variables(messages: Messages, tools: Sequence[Any] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a template sees, as transformers prepares it: plain data, and thoughts under every name that templates read."""
    plain = getattr(upstream, "_plain_template_data", lambda value: value)
    alias = getattr(upstream, "_alias_reasoning_fields", lambda chat: chat)
    schemas = [
        get_json_schema(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool
        for tool in tools or ()
    ]
    return {
        "documents": None,
        "add_generation_prompt": False,
        **plain(kwargs),
        "messages": alias(plain(list(messages))),
        "tools": plain(schemas) or None,
    }


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise TooMuch(f"its source has {len(source):,} characters, at most {MAX_SOURCE_CHARACTERS:,}")
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> LimitedEnvironment:
    """transformers' environment of templates, with limits."""
    return LimitedEnvironment.like(upstream._compile_jinja_template("").environment)
