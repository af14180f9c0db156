"""Settings of `peft.LoraConfig` that are refused before training, each with the reason."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from oribi.errors import ConfigError
from oribi.models.experts import STACKS, Experts
from oribi.text import did_you_mean

# what oribi could not write to a file, or what its decoder would compute differently from PEFT
_REFUSED = {
    "alora_invocation_tokens": "Activated LoRA depends on the tokens before, which no merged model or GGUF file can hold",
    "arrow_config": "Arrow routes between adapters by the input, which no merged model or GGUF file can hold",
    "monteclora_config": "MonteCLoRA draws weights at random, which no file can hold",
    "kasa_config": "KaSA takes a part out of the base weights, which no adapter file says",
    "layer_replication": "the layers of a cache and of every export are those of the checkpoint",
    "megatron_config": "oribi has no Megatron layers",
    "inference_mode": "pairs that are attached are trained; FastLanguageModel.for_inference(model) switches to answers",
    "fan_in_fan_out": "oribi's layers are linear ones, for which PEFT passes over it",
    "use_qalora": "PEFT has it for GPTQ weights only, which oribi does not load",
    "corda_config": "CorDA reads activations of your data before training, which get_peft_model does not have",
    "lora_ga_config": "LoRA-GA reads gradients of your data before training, which get_peft_model does not have",
}


def refuse_settings(model: nn.Module, targets: Iterable[str] | str, given: dict[str, Any]) -> None:
    """Raise over settings of LoRA that cannot be trained and exported rightly.

    Args:
        model: the base, without LoRA.
        targets: the target modules.
        given: further fields of `peft.LoraConfig`.

    Raises:
        ConfigError: one of them is set; the message says why it is refused.
    """
    problems = [f"{name}={given[name]!r}: {why}" for name, why in _REFUSED.items() if given.get(name)]
    problems += _patterns_of_nothing(model, targets, given)
    problems += _no_parameters(model, given.get("target_parameters") or ())
    problems += _excluded_nothing(model, targets, given.get("exclude_modules") or ())
    if given.get("lora_bias") and (bare := _without_bias(model, targets)):
        problems.append(
            f"lora_bias=True: {len(bare)} target layers have no bias, {bare[0]} the first, and a merged model has no place "
            "for one"
        )
    if problems:
        raise ConfigError("get_peft_model: " + "; ".join(problems))


def _patterns_of_nothing(
    model: nn.Module, targets: Iterable[str] | str, given: dict[str, Any]
) -> Iterator[str]:
    """Ranks and alphas of layers that get no adapter, which PEFT passes over in silence."""
    patterns = {name: given.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if not any(patterns.values()):
        return
    names = list(_targeted(model, targets)) + list(given.get("target_parameters") or ())
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for setting, values in patterns.items():
        for pattern, value in values.items():
            least = 1 if setting == "rank_pattern" else 0
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                yield f"{setting}: {pattern} = {value!r}: must be {'a whole number of at least 1' if least else 'a number'}"
            try:
                found = any(get_pattern_key([pattern], name) == pattern for name in names)
            except re.error as error:
                yield f"{setting}: {pattern!r} is not a regular expression: {error}"
                continue
            if not found:
                yield (
                    f"{setting}: no layer with an adapter is named {pattern!r}{did_you_mean(pattern, leaves)} They are "
                    f"{', '.join(leaves)}"
                )


def _no_parameters(model: nn.Module, wanted: Iterable[str]) -> Iterator[str]:
    """Parameters that the model does not have, which PEFT passes over with a warning, or that belong to a layer."""
    if not (wanted := [wanted] if isinstance(wanted, str) else list(wanted)):
        return
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    owners = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    # as of experts in one tensor: [experts, out, in]
    free = dict.fromkeys(
        re.sub(r"^.*\.\d+\.", "", name)
        for name, parameter in model.named_parameters()
        if owners[name] not in layers and parameter.ndim > 1
    )
    for one in wanted:
        found = [name for name in owners if f".{name}".endswith(f".{one}")]
        if not found:
            has = (
                f"It has {', '.join(free)}"
                if free
                else "Every matrix of it is a layer: name layers in target_modules"
            )
            yield f"target_parameters: the model has no parameter {one!r}{did_you_mean(one, free)} {has}"
        elif all(owners[name] in layers for name in found):
            yield f"target_parameters: {one!r} is a layer's weight; name the layer in target_modules"


def _excluded_nothing(
    model: nn.Module, targets: Iterable[str] | str, excluded: Iterable[str] | str
) -> Iterator[str]:
    """Names of layers without an adapter that no target has, which PEFT passes over in silence."""
    if isinstance(excluded, str):  # an expression over full names
        return
    names = list(_targeted(model, targets))
    stacks = [name for name, one in model.named_modules() if isinstance(one, Experts)]
    stacks += [f"{name}.{stack}" for name in stacks for stack in STACKS]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for one in excluded:
        if not any(f".{name}".endswith(f".{one}") for name in (*names, *stacks)):
            yield (
                f"exclude_modules: no target is named {one!r}{did_you_mean(one, leaves)} They are {', '.join(leaves)}"
            )


def _targeted(model: nn.Module, targets: Iterable[str] | str) -> dict[str, nn.Linear]:
    """The linear layers that targets mean, by their names."""
    every = targets == "all-linear"
    config = LoraConfig(target_modules=None if every else targets)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.rpartition(".")[2] != "lm_head" if every else check_target_module_exists(config, name))
    }


def _without_bias(model: nn.Module, targets: Iterable[str] | str) -> list[str]:
    return [name for name, module in _targeted(model, targets).items() if module.bias is None]
