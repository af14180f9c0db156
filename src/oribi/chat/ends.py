"""Which token ends an answer: what the chat template puts after one, and the tokenizer's own end token."""

from typing import Any

from oribi.chat.template import render_chat
from oribi.errors import ChatTemplateError, ConfigError

_ANSWER = "Ganz genau so."
_QUESTION = {"role": "user", "content": "So?"}


def rendered(tokenizer: Any, messages: list[dict[str, Any]], *, prompt: bool = False, **values: str) -> str:
    """The text of a conversation in the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        prompt: whether the start of an answer follows.
        values: what the template sees beside them.

    Raises:
        ConfigError: the template refuses the conversation.
    """
    try:
        return render_chat(tokenizer, messages, add_generation_prompt=prompt, **values)
    except ChatTemplateError as error:
        cause = error.__cause__
        raise ConfigError(
            f"the chat template fails on a conversation of {', '.join(str(m.get('role')) for m in messages)}: "
            f"{type(cause).__name__}: {cause}. Set another with get_chat_template"
        ) from cause


def renders(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template that takes a question and an answer."""
    if tokenizer is None or not tokenizer.chat_template:
        return False
    try:
        rendered(tokenizer, [_QUESTION], prompt=True)
        rendered(tokenizer, [_QUESTION, {"role": "assistant", "content": _ANSWER}])
    except ConfigError:
        return False
    return True


def turn_end_id(tokenizer: Any) -> int | None:
    """The control token that the chat template puts after an answer; None without a template or such a token."""
    if not renders(tokenizer):
        return None
    text = rendered(tokenizer, [_QUESTION, {"role": "assistant", "content": _ANSWER}])
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
    if tokenizer.bos_token_id is None or not renders(tokenizer):
        return None
    text = rendered(tokenizer, [_QUESTION])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
