"""Generation in the middle of training, and answers to conversations and texts, one at a time or together."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TextStreamer

from oribi.chat.ends import stop_ids
from oribi.chat.template import render_chat
from oribi.errors import ModelError
from oribi.kernels.lora_linear import weights_kept
from oribi.kernels.packed_weight import is_packed, weight_shape
from oribi.models.linear_layers import every_module
from oribi.text import printable

# transformers' names of those, present and past
FIXED_CACHES = (
    "static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid",
    "offloaded_hybrid_chunked",
)  # fmt: skip


class GeneratesInAnyMode:
    """Before `GenerationMixin` among a model's bases: `generate` may be called on a model in training."""

    def generate(
        self, inputs: torch.Tensor | Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' `generate`, in inference mode (no dropout, cached) whatever mode the model is in.

        Args:
            inputs: [B, S] int64, or a tokenizer's whole output, also under the name input_ids.
            args, kwargs: as in transformers.
        """
        return generate_in_inference_mode(self, super().generate, inputs, *args, **kwargs)


def generate_in_inference_mode(
    model: nn.Module,
    generate: Callable[..., Any],
    inputs: torch.Tensor | Mapping[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls `generate` with the model in inference mode and its inputs unpacked."""
    ids = kwargs.get("input_ids")
    for packed in (inputs, ids):
        if isinstance(packed, Mapping):  # what apply_chat_template returns since transformers 5
            kwargs.pop("input_ids", None)
            kwargs = {**packed, **kwargs}
            inputs = None
    kwargs.pop("token_type_ids", None)  # some tokenizers add them, no decoder takes them
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    loaded = getattr(model, "loaded_tokenizer", None)
    if loaded is not None and (kwargs.get("stop_strings") or getattr(config, "stop_strings", None)):
        kwargs.setdefault("tokenizer", loaded)  # trainers that set stop strings hand none over
    if isinstance(model, GeneratesInAnyMode):
        _growing_cache(model, kwargs)
    with inference_mode_of(model), weights_kept() if _copy_fits(model) else nullcontext():
        return generate(inputs, *args, **kwargs)


def _growing_cache(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Replaces a cache of fixed size that the call, or else the model's generation config, asks for.

    oribi's own loop has one anyway, and in transformers' loop the decoder reads no masks that are prepared for one; the
    answers are the same.
    """
    given = kwargs.get("generation_config")
    configs = (given, None if given is not None else getattr(model, "generation_config", None))
    asked = kwargs.get("cache_implementation")
    for config in configs:
        asked = asked or getattr(config, "cache_implementation", None)
    if asked in FIXED_CACHES:
        kwargs["cache_implementation"] = "dynamic"


def _copy_fits(model: nn.Module) -> bool:
    """Whether a 16-bit copy of the packed weights, if there are any, fits in half of the free memory."""
    weights = (module._parameters.get("weight") for module in every_module(model))
    packed = [weight for weight in weights if weight is not None and is_packed(weight)]
    if not packed:
        return True
    needed = 2 * sum(math.prod(weight_shape(weight)) for weight in packed)
    if packed[0].is_cuda:
        free = torch.cuda.mem_get_info(packed[0].device)[0]
    else:
        free = psutil.virtual_memory().available
    return free > 2 * needed


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, each in its own mode again after it."""
    modes = [(module, True) for module in every_module(model) if module.training]
    if modes:  # `eval` visits about 1,000 modules
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, reading the prompt included."""
        return self.tokens / max(self.seconds, 1e-9)


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict[str, Any]] | list[int],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    streamer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Answer:
    """The model's answer to a conversation, or its continuation of a text.

    Args:
        model, tokenizer: as loaded.
        prompt: messages, rendered by the chat template with the start of an answer; or a text or token ids, used as they
            are.
        max_new_tokens: the longest answer.
        temperature: 0 always takes the most likely token; None uses the model's generation settings.
        top_p: samples from the most likely tokens with this total probability.
        streamer: as for transformers' `generate`.
        chat_template_kwargs: values that the chat template reads.

    Raises:
        ModelError: the prompt is as long as the model's context.
    """
    ids = prompt_ids(tokenizer, prompt, chat_template_kwargs)
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
    (new,) = generate_ids(model, tokenizer, [ids], max_new_tokens, {"streamer": streamer, **settings})
    return _answer(
        tokenizer,
        new,
        set(stop_ids(tokenizer, model.generation_config.eos_token_id)),
        time.monotonic() - started,
    )


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, max_new_tokens: int = 256
) -> list[Answer]:
    """Greedy answers to several prompts at once, given as token ids; each is timed as an equal share of the whole."""
    if not prompts:
        return []
    started = time.monotonic()
    rows = generate_ids(model, tokenizer, list(prompts), max_new_tokens, {"do_sample": False})
    seconds, ends = (
        (time.monotonic() - started) / len(prompts),
        set(stop_ids(tokenizer, model.generation_config.eos_token_id)),
    )
    return [_answer(tokenizer, new, ends, seconds) for new in rows]


def generate_ids(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, settings: dict[str, Any]
) -> list[list[int]]:
    """Continues prompts of different lengths together.

    Args:
        model, tokenizer: as loaded.
        prompts: token ids of each.
        max_new_tokens: the longest answer.
        settings: further ones of `generate`; with stop strings, the tokenizer is passed on.

    Returns:
        The new ids of each prompt, padding included.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        if settings.get("stop_strings") or model.generation_config.stop_strings:
            settings = {"tokenizer": tokenizer, **settings}
        out = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=max_new_tokens, **settings)
    return out[:, longest:].tolist()


def until_end(new: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """New ids up to their first end token, which is one of them; and whether there is one."""
    last = next((i for i, token in enumerate(new) if token in ends), None)
    return (new, False) if last is None else (new[: last + 1], True)


def _answer(tokenizer: Any, new: list[int], ends: set[int], seconds: float) -> Answer:
    kept, stopped = until_end(new, ends)
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), stopped, seconds)


class PrintableStreamer(TextStreamer):
    """Prints an answer while it is generated; control characters are shown instead of reaching the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end=stream_end)


def prompt_ids(
    tokenizer: Any,
    prompt: str | list[dict[str, Any]] | list[int],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt; messages are rendered by the chat template, with values that it reads."""
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = render_chat(tokenizer, prompt, add_generation_prompt=True, **(chat_template_kwargs or {}))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
