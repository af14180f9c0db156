"""Answers of a loaded model to conversations and texts, one at a time, and whether it stopped by itself."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from oribi.chat.template import render_chat
from oribi.errors import ModelError
from oribi.text import printable


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
    started = time.monotonic()
    (new,) = _generate(model, tokenizer, [ids], max_new_tokens, {"streamer": streamer, **settings})
    return _answer(tokenizer, new, _ends(model, tokenizer), time.monotonic() - started)


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, max_new_tokens: int = 256
) -> list[Answer]:
    """Greedy answers to several prompts at once, given as token ids; each is timed as its share of the whole."""
    if not prompts:
        return []
    started = time.monotonic()
    rows = _generate(model, tokenizer, list(prompts), max_new_tokens, {"do_sample": False})
    seconds, ends = (time.monotonic() - started) / len(prompts), _ends(model, tokenizer)
    return [_answer(tokenizer, new, ends, seconds) for new in rows]


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, settings: dict[str, Any]
) -> list[list[int]]:
    """New tokens of each prompt, padding included."""
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        if model.generation_config.stop_strings:
            settings = {"tokenizer": tokenizer, **settings}
        out = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=max_new_tokens, **settings)
    return out[:, longest:].tolist()


def _ends(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}


def _answer(tokenizer: Any, new: list[int], ends: set[int], seconds: float) -> Answer:
    last = next((i for i, token in enumerate(new) if token in ends), None)
    kept = new if last is None else new[: last + 1]
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), last is not None, seconds)


class PrintableStreamer(TextStreamer):
    """Prints an answer while it is generated; its control characters are shown and not obeyed by the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end=stream_end)


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, Any]] | list[int]) -> list[int]:
    """Token ids of a prompt."""
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = render_chat(tokenizer, prompt, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
