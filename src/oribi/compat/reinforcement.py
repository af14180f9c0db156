"""Names that scripts for reinforcement learning call beside TRL's trainers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from oribi.chat.ends import stop_ids
from oribi.errors import ConfigError
from oribi.models.generate import GeneratesInAnyMode, generate_ids, until_end
from oribi.models.unwrap import base_model

# prompts that are answered together: by oribi's loop, which divides them further where memory is short, and by others
_BATCH, _OTHERS_BATCH = 256, 16


@dataclass
class SamplingParams:
    """How answers are drawn, under the names of vLLM's class; other keywords of that class are kept and not read.

    Args:
        temperature: 0 is greedy.
        top_p, min_p: bounds of probability. top_k: candidates; -1 and 0 are all.
        max_tokens: most new tokens of an answer.
        repetition_penalty: 1 is none.
        stop: a text, or several, that ends an answer.
        n: answers to each prompt.
        seed: of the draw; None goes on from torch's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 16
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    n: int = 1
    seed: int | None = None

    def __init__(self, **keywords: Any) -> None:
        for name, value in keywords.items():
            setattr(self, name, value)


vLLMSamplingParams = SamplingParams


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` ends with the end token where `finish_reason` is "stop" rather than "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    prompt: str
    outputs: list[Completion]


@dataclass(frozen=True)
class LoraRequest:
    """An adapter's folder, to answer with."""

    path: str


def fast_generate(
    model: Any,
    prompts: str | Sequence[Any],
    sampling_params: SamplingParams | None = None,
    lora_request: LoraRequest | None = None,
    use_tqdm: bool = True,
    *,
    tokenizer: Any = None,
) -> list[RequestOutput]:
    """Answers to texts, as scripts ask vLLM for them; the model's own `generate` gives them.

    Args:
        model: as loaded, with or without LoRA.
        prompts: a text or several, also as {"prompt": text}.
        sampling_params: how answers are drawn; None is `SamplingParams()`.
        lora_request: from `load_lora`: the adapter to answer with. None answers without any adapter, as vLLM does.
        use_tqdm: accepted and not needed.
        tokenizer: None takes the one that was loaded with the model.

    Returns:
        One per prompt, with `n` answers each.

    Raises:
        ConfigError: there is no tokenizer, or a prompt is no text.
    """
    tokenizer = tokenizer or getattr(base_model(model), "loaded_tokenizer", None)
    if tokenizer is None:
        raise ConfigError("fast_generate: give tokenizer=; this model was not loaded by from_pretrained")
    wanted = sampling_params or SamplingParams()
    texts = [_text(p) for p in ([prompts] if isinstance(prompts, (str, Mapping)) else prompts)]
    seeded = nullcontext() if wanted.seed is None else torch.random.fork_rng()
    completions: list[Completion] = []
    repeated = [text for text in texts for _ in range(wanted.n)]
    with seeded, _adapter_of(model, lora_request):
        if wanted.seed is not None:
            torch.manual_seed(wanted.seed)
        count = _BATCH if isinstance(base_model(model), GeneratesInAnyMode) else _OTHERS_BATCH
        for start in range(0, len(repeated), count):
            completions += _complete(model, tokenizer, repeated[start : start + count], wanted)
    return [
        RequestOutput(text, completions[i * wanted.n : (i + 1) * wanted.n]) for i, text in enumerate(texts)
    ]


def save_lora(model: PeftModel, path: str) -> None:
    """The adapter alone, as `save_pretrained` writes it."""
    model.save_pretrained(path)


def load_lora(model: PeftModel, path: str, load_tensors: bool = True) -> LoraRequest:
    """An adapter's folder for `fast_generate(..., lora_request=)`; the adapter in training stays as it is."""
    return LoraRequest(str(path))


def _text(prompt: Any) -> str:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if not isinstance(text, str):
        raise ConfigError(
            f"fast_generate: a prompt is {prompt!r}; give texts, e.g. of apply_chat_template(tokenize=False)"
        )
    return text


def _complete(model: Any, tokenizer: Any, texts: list[str], wanted: SamplingParams) -> list[Completion]:
    """Answers to a batch of texts; a text that begins with the BOS token gets no second one."""
    prompts = [
        tokenizer(t, add_special_tokens=not (tokenizer.bos_token and t.startswith(tokenizer.bos_token)))
        for t in texts
    ]
    settings: dict[str, Any] = {"do_sample": wanted.temperature > 0}
    if settings["do_sample"]:
        settings |= {
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": max(wanted.top_k, 0),
            "min_p": wanted.min_p or None,
        }
    if wanted.repetition_penalty != 1:
        settings["repetition_penalty"] = wanted.repetition_penalty
    stops = [wanted.stop] if isinstance(wanted.stop, str) else list(wanted.stop or ())
    if stops:
        settings["stop_strings"] = stops
    rows = generate_ids(model, tokenizer, [p["input_ids"] for p in prompts], wanted.max_tokens, settings)
    ends = set(stop_ids(tokenizer, model.generation_config.eos_token_id))
    return [_completion(tokenizer, new, ends, stops) for new in rows]


def _completion(tokenizer: Any, ids: list[int], ends: set[int], stops: list[str]) -> Completion:
    """An answer up to its end token or stop text; the stop text is not part of it, as in vLLM."""
    ids, ended = until_end(ids, ends)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cuts = [text.index(stop) for stop in stops if stop in text]
    return Completion(text[: min(cuts)] if cuts else text, ids, "stop" if ended or cuts else "length")


@contextmanager
def _adapter_of(model: Any, request: LoraRequest | None) -> Iterator[None]:
    """The adapter that a request names, or none, for the duration of the block."""
    if not isinstance(model, PeftModel):
        if request is not None:
            raise ConfigError(
                "fast_generate: lora_request needs a model with LoRA; call get_peft_model first"
            )
        yield
    elif request is None:
        with model.disable_adapter():
            yield
    else:
        name, before = "lora_request", model.active_adapter
        model.load_adapter(request.path, adapter_name=name)
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(before)
            model.delete_adapter(name)


def is_vLLM_available() -> bool:
    """False: answers come from the model's own `generate`."""
    return False


def PatchDPOTrainer() -> None:
    """Nothing to do: TRL's DPOTrainer runs on oribi's models as it is."""


def PatchKTOTrainer() -> None:
    """Nothing to do: TRL's KTOTrainer runs on oribi's models as it is."""


def PatchFastRL(*args: Any, **keywords: Any) -> None:
    """Nothing to do: TRL's trainers run on oribi's models as they are."""
