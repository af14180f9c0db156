"""EVA: pairs that begin with the directions in which their layers' inputs vary most, over the rows that are trained.

PEFT computes it, and gives layers whose inputs vary in more directions a higher rank. Source: Paischer et al., arXiv 2410.07170.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from oribi.errors import ConfigError
from oribi.models.load_adapter import train_in_float32
from oribi.models.unwrap import base_model, is_classifier

PENDING = (
    "EVA: the pairs begin with the inputs of their layers when SFTTrainer trains; before another trainer, call "
    "peft.initialize_lora_eva_weights"
)


def eva_settings(start: bool | str, given: EvaConfig | None) -> dict[str, Any]:
    """LoRA's settings for EVA: PEFT's own where none are given.

    Raises:
        ConfigError: they are given for another start.
    """
    if start != "eva":
        if given is not None:
            raise ConfigError(
                f"eva_config is given but init_lora_weights is {start!r}; eva_config needs 'eva'"
            )
        return {}
    return {"eva_config": EvaConfig() if given is None else given}


def waits_for_rows(model: Any) -> bool:
    """Whether a model has pairs that are to begin with rows and have not yet."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return getattr(config, "init_lora_weights", None) == "eva" and config.eva_config is not None


def directions_wanted(model: PeftModel) -> int:
    """The most directions that a layer's inputs may be asked for: a batch needs as many trained tokens."""
    config = model.peft_config[model.active_adapter]
    ranks = [config.r, *config.rank_pattern.values()]
    return round(max(ranks) * config.eva_config.rho)


def start_from_rows(model: PeftModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Give pairs their first values, and their layers the ranks that follow; the base stays as it is.

    Args:
        model: with LoRA as PEFT makes it for `init_lora_weights="eva"`.
        batches: input_ids, attention_mask and labels [B, S]; each has at least `directions_wanted` trained tokens.

    Returns:
        A sentence on how they begin.

    Raises:
        ConfigError: a layer has too few inputs, or its inputs cannot be seen.
    """
    adapter = model.active_adapter
    config, decoder = model.peft_config[adapter], base_model(model).get_decoder()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if is_classifier(model) or any(name.endswith("lm_head") for name in layers):
        raise ConfigError(
            "init_lora_weights='eva' begins with what the decoder's layers get, and there is a pair on the head; leave lm_head out of "
            "target_modules, or train it whole by modules_to_save"
        )
    most = directions_wanted(model)
    narrow = {name: layer.in_features for name, layer in layers.items() if layer.in_features < most}
    if narrow:
        name, width = min(narrow.items(), key=lambda one: one[1])
        raise ConfigError(
            f"init_lora_weights='eva': {name.removeprefix('base_model.model.')} has {width} inputs, and rank {config.r} at rho = "
            f"{config.eva_config.rho:g} may ask for {most} directions of them; lower lora_r"
        )

    def forward(_: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    try:
        initialize_lora_eva_weights(
            model, list(batches), forward_fn=forward, adapter_name=adapter, gather_distributed_inputs=False, show_progress_bar=False,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"init_lora_weights='eva': {error}") from error
    _settle(model)
    ranks = [layer.r[adapter] for layer in model.modules() if isinstance(layer, LoraLayer)]
    without = len(layers) - len(ranks)
    return (
        f"EVA: the pairs of {len(ranks)} layers begin with the directions in which their inputs vary most, and have ranks of "
        f"{min(ranks)} to {max(ranks)}"
        + (f"; {without} further layers would have rank 0 and are not trained" if without else "")
    )


def take_ranks(model: PeftModel, stored: Mapping[str, Any]) -> None:
    """Give pairs the ranks of an adapter that EVA began, whose values are loaded afterwards.

    Args:
        model: as for `start_from_rows`. stored: the adapter's config, as adapter_config.json has it.
    """
    adapter = model.active_adapter
    config, kept = model.peft_config[adapter], set(stored["target_modules"])
    config.rank_pattern, config.alpha_pattern = stored["rank_pattern"], stored["alpha_pattern"]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    began = copy(config)
    began.init_lora_weights = True
    for name, layer in layers:
        full = name.removeprefix("base_model.model.")
        if not any(f".{full}".endswith(f".{one}") for one in kept):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
            continue
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), full), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), full), config.lora_alpha)
        layer.update_layer(adapter, r=rank, lora_alpha=alpha, config=began)
    config.target_modules = kept
    _settle(model)


def _settle(model: PeftModel) -> None:
    """The pairs are ordinary ones from here on, in the file that is saved as well."""
    config = model.peft_config[model.active_adapter]
    config.init_lora_weights, config.eva_config = True, None
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(model.active_adapter)
    train_in_float32(model)
