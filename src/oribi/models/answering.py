"""Answers of a loaded model to conversations and texts, one at a time, and whether it stopped by itself."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from oribi.errors import ModelError


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: without special tokens.
        tokens: new tokens, the end token included.
        stopped: whether it ended by itself rather than at the limit.
        seconds: how long it took.
    """

    text: str
    tokens: int
    stopped: bool
    seconds: float


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict[str, Any]] | list[int],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    streamer: Any = None,
) -> Answer:
    """The model's answer to a conversation, or its continuation of a text.

    Args:
        model, tokenizer: as loaded.
        prompt: messages, rendered by the chat template with the start of an answer; or a text or token ids, taken as
            they are.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token always; None does what the model's generation settings say.
        top_p: sample from the likeliest tokens of this total probability.
        streamer: as for transformers' `generate`.

    Raises:
        ModelError: the prompt leaves no room below the model's positions.
    """
    ids = prompt_ids(tokenizer, prompt)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(ids) >= positions:
        raise ModelError(
            f"the conversation has {len(ids)} tokens and the model sees at most {positions}; start a new one"
        )
    settings: dict[str, Any] = {}
    if temperature is not None:
        settings = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
        )
    if top_p is not None:
        settings |= {"top_p": top_p}
    batch = torch.tensor([ids], device=model.device)
    started = time.monotonic()
    with torch.no_grad():
        out = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **settings,
        )
    new = out[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text, len(new), bool(new) and new[-1] in ends, time.monotonic() - started)


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]] | list[int]) -> list[int]:
    """Token ids of a prompt."""
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
