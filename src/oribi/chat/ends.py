"""Which tokens end an answer. Masks, reports, generation, exports and Modelfiles ask here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from oribi.chat.template import SLOT, Messages, render_chat, shared_prefix, slot
from oribi.errors import ChatTemplateError, TemplateLimitError

_QUESTION = {"role": "user", "content": slot(0)}
_ANSWER = {"role": "assistant", "content": slot(1)}
_NEXT_QUESTION = {"role": "user", "content": slot(2)}


def added_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that finds every token that the tokenizer cuts out of text before splitting it, special or not."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()}
    contents |= {t for t in (tokenizer.eos_token, tokenizer.bos_token) if t}
    longest_first = sorted((c for c in contents if c.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def turn_ends(tokenizer: Any, render: Callable[[Messages], str]) -> tuple[str, str]:
    """What a chat template writes to close an assistant's turn, found by rendering.

    That is the tokens that follow the assistant's text both within a conversation and at its end; where the two differ, the first
    token of each; where there are no tokens, the text that both share.

    Args:
        tokenizer: gives the tokens.
        render: renders messages.

    Returns:
        The text that closes a turn within a conversation, and the one at its end; "" where the template writes nothing.

    Raises:
        ChatTemplateError: the template does not write the assistant's message, or refuses it.
    """
    pattern = added_tokens(tokenizer)
    final = _after_answer(render([_QUESTION, _ANSWER]))
    try:
        within = _after_answer(render([_QUESTION, _ANSWER, _NEXT_QUESTION]))
    except ChatTemplateError:  # a template for a single question
        within = final
    shared = shared_prefix(within, final)
    tokens = list(pattern.finditer(shared)) if pattern else []
    if tokens:
        closing = next((t for t in tokens if t.group() == tokenizer.eos_token), tokens[-1])
        return (shared[tokens[0].start() : closing.end()],) * 2
    first = [pattern.search(text) if pattern else None for text in (within, final)]
    ends = tuple(found.group() if found else "" for found in first)
    if not any(ends):
        return (shared.rstrip(),) * 2
    if not ends[1] and ends[0] != tokenizer.eos_token:
        return "", ""  # that token opens the next turn
    return ends


def _after_answer(rendered: str) -> str:
    if slot(1) not in rendered:
        raise ChatTemplateError(
            "the chat template does not write the assistant's message: expected messages with 'role' and 'content', "
            "roles 'user' and 'assistant'. Use get_chat_template to set another one."
        )
    return SLOT.split(rendered.split(slot(1))[-1])[0]


def end_id(tokenizer: Any, end: str) -> int | None:
    """The token at which generation can stop where the text `end` closes an answer; None if there is none.

    That is its first special token, or else its first added one.
    """
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids}
    special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    added = [id for id in ids if id in special or id in tokenizer.added_tokens_decoder]
    return next((id for id in added if id in special), added[0] if added else None)


def turn_end_id(tokenizer: Any) -> int | None:
    """The token that the chat template puts after an answer; None without a template or such a token.

    Raises:
        TemplateLimitError: the template takes too long or makes too much.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return end_id(tokenizer, turn_ends(tokenizer, partial(render_chat, tokenizer))[1])
    except ChatTemplateError:  # a template that takes no such conversation says nothing
        return None


def stop_ids(tokenizer: Any, configured: int | Sequence[int | None] | None) -> list[int]:
    """Every token that must end a generation, each once: as configured, the tokenizer's EOS, the template's."""
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer is not None:
        ids += [tokenizer.eos_token_id, turn_end_id(tokenizer) if renders(tokenizer) else None]
    return list(dict.fromkeys(id for id in ids if id is not None))


def renders(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template that takes a question and an answer."""
    if tokenizer is None or not tokenizer.chat_template:
        return False
    question = {"role": "user", "content": "So?"}
    try:
        render_chat(tokenizer, [question], add_generation_prompt=True)
        render_chat(tokenizer, [question, {"role": "assistant", "content": "Ganz genau so."}])
    except (ChatTemplateError, TemplateLimitError):
        return False
    return True


def template_starts_with_bos(tokenizer: Any) -> bool | None:
    """Whether a rendered conversation begins with BOS; None where that cannot be told."""
    if tokenizer.bos_token_id is None or not renders(tokenizer):
        return None
    text = render_chat(tokenizer, [{"role": "user", "content": "So?"}])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
