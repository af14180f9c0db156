"""What a call of `generate` asks for, as oribi's loop needs it; or why transformers' loop has to answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
)

from oribi.kernels.expert_linear import StackProjection
from oribi.kernels.lora import Projection
from oribi.models.decoding.sampling import Choice, read_choice
from oribi.models.experts import ExpertsMLP
from oribi.models.linear_layers import any_module_hooked, every_module, hooked, read
from oribi.models.outputs import WITHOUT_EFFECT

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

_CACHES = ("cache", "past_key_values")
_READ = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *_CACHES, *WITHOUT_EFFECT}


@dataclass(frozen=True)
class Outputs:
    """What is asked for beside the tokens, [B, V] float32 of each new token: scores are processed logits; None if not."""

    scores: list[torch.Tensor] | None
    logits: list[torch.Tensor] | None


@dataclass(frozen=True)
class Request:
    """Prompts, and how each is continued.

    Args:
        ids: [B, S] int64, as `generate` was given them.
        prompts: token ids of each row without padding.
        new_tokens: most of a row.
        choice: how tokens are chosen.
        ends: tokens that end a row. pad: what an ended row gets.
        criteria: others that end rows: stop strings, time, or the caller's own.
        streamer: gets the tokens as they come; None where nobody waits for them.
        projections: weights and LoRA pairs of all layers.
        outputs: gets what is asked for beside the tokens.
        first: place of the first row in the batch that `generate` was given.
    """

    ids: torch.Tensor
    prompts: list[tuple[int, ...]]
    new_tokens: int
    choice: Choice
    ends: tuple[int, ...]
    pad: int
    criteria: tuple[StoppingCriteria, ...]
    streamer: Any
    projections: list[Projection | StackProjection]
    outputs: Outputs | None = None
    first: int = 0

    def part(self, start: int, end: int) -> "Request":
        """Some of the rows."""
        return replace(
            self, ids=self.ids[start:end], prompts=self.prompts[start:end], first=self.first + start
        )

    def end_tokens(self) -> torch.Tensor | None:
        """[E] int64, or None without any."""
        return torch.tensor(self.ends, device=self.ids.device) if self.ends else None

    @property
    def together(self) -> bool:
        """Whether somebody sees all rows as they go on, so that none may be put off or left out."""
        return self.streamer is not None or bool(self.criteria) or self.choice.by_host

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        """Of the new tokens so far, as transformers shows them to criteria."""
        asked = self.outputs is not None and self.outputs.scores is not None
        return tuple(self.outputs.scores) if asked else None

    @property
    def longest(self) -> int:
        """Tokens of the longest row at its end."""
        return max(map(len, self.prompts)) + self.new_tokens

    def seen(self, vocab_size: int) -> torch.Tensor:
        """[B, V] bool, the tokens of the prompts that a penalty counts."""
        ids, ignored = self.ids, 0
        for processor in self.choice.processors:
            if (
                isinstance(processor, RepetitionPenaltyLogitsProcessor)
                and processor.prompt_ignore_length is not None
            ):
                ignored = torch.as_tensor(processor.prompt_ignore_length, device=ids.device).reshape(-1, 1)
                ignored = ignored[self.first : self.first + len(ids)] if len(ignored) > 1 else ignored
        places = torch.arange(ids.shape[1], device=ids.device)
        counted = ids.masked_fill(places < ignored, vocab_size).clamp(max=vocab_size)
        seen = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter_(1, counted, True)[:, :-1]


def read_request(
    decoder: "DecoderForCausalLM",
    ids: torch.Tensor,
    processors: Sequence[Any],
    criteria: Sequence[StoppingCriteria],
    config: GenerationConfig,
    synced_gpus: bool,
    streamer: Any,
    inputs: Mapping[str, Any],
) -> Request | str:
    """A call of `_sample`, or the reason why its work is left to transformers' loop.

    Args:
        decoder: the model. ids: [B, S] int64.
        processors, criteria, config, synced_gpus, streamer, inputs: as transformers' `_sample` gets them.
    """
    reason = _unusual_call(ids, config, synced_gpus, inputs) or _unusual_model(decoder, ids.device)
    if reason:
        return reason
    padding, projections = _padding(ids, inputs), _read_projections(decoder)
    for found in (padding, projections):
        if isinstance(found, str):
            return found
    new_tokens, ends, others = None, (), []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limit = criterion.max_length - ids.shape[1]
            new_tokens = limit if new_tokens is None else min(limit, new_tokens)
        elif type(criterion) is EosTokenCriteria:
            ends = (*ends, *criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    if new_tokens is None:
        return "no limit on the new tokens"
    pad = getattr(config, "_pad_token_tensor", None)
    if ends and pad is None:
        return "no padding token"
    outputs = None
    if config.return_dict_in_generate:
        wanted = (config.output_scores, config.output_logits)
        outputs = Outputs(*([] if asked else None for asked in wanted))
    choice = read_choice(bool(config.do_sample), processors, ids.shape[1], by_host=outputs is not None)
    prompts = [tuple(row[skipped:]) for row, skipped in zip(ids.tolist(), padding)]
    request = Request(
        ids, prompts, max(new_tokens, 1), choice, tuple(sorted(set(ends))), 0 if pad is None else int(pad),
        tuple(others), streamer, projections, outputs,
    )  # fmt: skip
    return _unusual_rope(decoder, request) or _no_memory(decoder, request) or request


def _no_memory(decoder: "DecoderForCausalLM", request: Request) -> str | None:
    fit = decoder.rows_that_fit(request.longest)
    if fit < 1:
        return f"the cache of a row of {request.longest} tokens does not fit in the free memory"
    if fit < len(request.prompts) and request.together:
        return f"the cache of {fit} of the {len(request.prompts)} rows fits in the free memory, and they end together"
    return None


def _unusual_call(
    ids: torch.Tensor, config: GenerationConfig, synced_gpus: bool, inputs: Mapping[str, Any]
) -> str | None:
    if synced_gpus:
        return "synced_gpus: processes generate in step"
    if getattr(config, "is_assistant", None):
        return "an assistant drafts tokens"
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, None):
                return f"{name} is set"
        if not (config.output_scores or config.output_logits):
            return "return_dict_in_generate without output_scores or output_logits asks for the cache"
    if not inputs.get("use_cache"):
        return "use_cache is off"
    for name in _CACHES:
        cache = inputs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
            return "the cache is the caller's"
        if type(cache).__name__ not in ("NoneType", "DynamicCache"):
            return f"the cache is a {type(cache).__name__}"
    for name, value in inputs.items():
        if name not in _READ and value is not None and value is not False:
            return f"the argument {name}"
    if ids.dim() != 2 or 0 in ids.shape:
        return "there are no prompts of token ids"
    return None


def _unusual_model(decoder: "DecoderForCausalLM", device: torch.device) -> str | None:
    model, found = decoder.model, every_module(decoder)
    # an embedding may lie in host memory
    elsewhere = set(map(id, every_module(model.embed_tokens)))
    devices = {
        p.device
        for module in found
        if id(module) not in elsewhere
        for p in module._parameters.values()
        if p is not None
    }
    if len(devices) > 1:
        return "the model lies on several devices"
    if devices != {device}:
        return f"the prompts lie on {device} and the model on {devices.pop()}"
    if decoder.config.num_hidden_layers != len(model.layers):
        return "an early exit leaves layers out"
    if model.shards is not None:
        return "processes share the weights"
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.last_norm.weight.dtype:
        return f"autocast computes in {torch.get_autocast_dtype(kind)}"
    if any_module_hooked():
        return "hooks are registered for all modules"
    if _other_forward(decoder) or decoder._forward_hooks or decoder._forward_pre_hooks:
        return "the model's forward is wrapped or has a hook"
    if any(hooked(module) for module in found[1:]):
        name = next(n for n, module in decoder.named_modules() if module is not decoder and hooked(module))
        return f"{name} is wrapped or has a hook"
    return None


def _read_projections(decoder: "DecoderForCausalLM") -> list[Projection | StackProjection] | str:
    """Weights and LoRA pairs of all layers, or which of them cannot be read."""
    projections = []
    for index, layer in enumerate(decoder.model.layers):
        for part, _, _ in layer.parts():
            projections += [read(module) for modules in part.groups().values() for module in modules]
            if isinstance(part, ExpertsMLP):
                projections += (part.stacks() or {"": None}).values()
        if None in projections:
            return f"layer {index} has a linear layer, or experts, with something else than at most one LoRA pair"
    return projections


def _other_forward(decoder: "DecoderForCausalLM") -> bool:
    """Whether the outermost forward was replaced by one that gives other logits in generation."""
    # accelerate keeps the forward that it wraps to cast its outputs; TRL's returns to the class's own unless it is asked
    # for log-probabilities
    forward = vars(decoder).get("_original_forward") or vars(decoder).get("forward")
    if forward is None:
        return False
    function, own = getattr(forward, "__func__", None), type(decoder).forward
    names = getattr(getattr(function, "__code__", None), "co_varnames", ())
    of_trl = "fused_lm_head" in names and getattr(function, "__wrapped__", None) is own
    return function is not own and not of_trl


def _padding(ids: torch.Tensor, inputs: Mapping[str, Any]) -> list[int] | str:
    """Padding tokens in front of each row."""
    rows, width = ids.shape
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None:
        padding = torch.zeros(rows, dtype=torch.int64, device=ids.device)
    else:
        if mask.shape != ids.shape:
            return f"attention_mask has shape {tuple(mask.shape)}"
        real = mask.bool()
        padding = width - real.sum(1)
        if not bool((real == (torch.arange(width, device=ids.device) >= padding[:, None])).all()):
            return "padding lies behind or between the tokens of a prompt"
        if bool((padding == width).any()):
            return "a prompt has no tokens"
    if positions is not None:
        usual = torch.arange(width, device=ids.device) - padding[:, None]
        inside = usual >= 0
        if positions.shape[-1] != width or not bool(((positions == usual) | ~inside).all()):
            return "position_ids do not count from 0"
    return padding.tolist()


def _unusual_rope(decoder: "DecoderForCausalLM", request: Request) -> str | None:
    for rotary in decoder.model.rotary.values():
        if rotary.kind == "dynamic":
            return "RoPE is dynamic: its frequencies change with the length"
        if rotary.kind == "longrope":
            original = rotary.parameters["original_max_position_embeddings"]
            if min(map(len, request.prompts)) <= original < request.longest:
                return f"the rows cross {original} tokens, where longrope changes its frequencies"
    return None
