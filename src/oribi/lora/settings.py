"""Settings of `peft.LoraConfig` that are refused before training, each with the reason."""

from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from oribi.errors import ConfigError

# what oribi could not write to a file, or what its decoder would compute differently from PEFT
_REFUSED = {
    "alora_invocation_tokens": "Activated LoRA depends on the tokens before, which no merged model or GGUF file can hold",
    "arrow_config": "Arrow routes between adapters by the input, which no merged model or GGUF file can hold",
    "monteclora_config": "MonteCLoRA draws weights at random, which no file can hold",
    "kasa_config": "KaSA takes a part out of the base weights, which no adapter file says",
    "layer_replication": "the layers of a cache and of every export are those of the checkpoint",
    "megatron_config": "oribi has no Megatron layers",
    "use_qalora": "PEFT has it for GPTQ weights only, which oribi does not load",
    "eva_config": "EVA reads activations of your data before training, which get_peft_model does not have",
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
    if given.get("lora_bias") and (bare := _without_bias(model, targets)):
        problems.append(
            f"lora_bias=True: {len(bare)} target layers have no bias, {bare[0]} the first, and a merged model has no place "
            "for one"
        )
    if problems:
        raise ConfigError("get_peft_model: " + "; ".join(problems))


def _without_bias(model: nn.Module, targets: Iterable[str] | str) -> list[str]:
    every = targets == "all-linear"
    config = LoraConfig(target_modules=None if every else targets)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.bias is None
        and (name.rpartition(".")[2] != "lm_head" if every else check_target_module_exists(config, name))
    ]
