"""Which token ends an answer: what the chat template puts after one, and the tokenizer's own end token."""

from typing import Any

from jinja2.exceptions import TemplateError

_ANSWER = "Ganz genau so."


def turn_end_id(tokenizer: Any) -> int | None:
    """The control token that the chat template puts after an answer; None without a template or such a token."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return None
    _, found, tail = text.rpartition(_ANSWER)
    if not found:
        return None
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((id for id in tokenizer(tail, add_special_tokens=False)["input_ids"] if id in special), None)


def stop_ids(tokenizer: Any, configured: int | list[int] | None) -> list[int]:
    """Every token that must end a generation, each once: as configured, the tokenizer's, the template's."""
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer is not None:
        ids += [tokenizer.eos_token_id, turn_end_id(tokenizer)]
    return list(dict.fromkeys(id for id in ids if id is not None))


def template_starts_with_bos(tokenizer: Any) -> bool | None:
    """Whether a rendered conversation begins with BOS; None where that cannot be told."""
    if not tokenizer.chat_template or tokenizer.bos_token_id is None:
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "So?"}], tokenize=False)
    except TemplateError:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
