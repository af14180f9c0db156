"""How a model's experts are chosen, in a GGUF file's metadata: written, read, and what llama.cpp takes otherwise."""

from typing import Any

import gguf
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.families.expert_rules import ExpertRules
from oribi.families.in_gguf import InGGUF
from oribi.gguf.file import GGUFFile

# what llama.cpp takes the sum of a token's weights for where it is smaller
_LEAST_SUM = 2.0**-14
# routers whose scores a file names
_SCORES = {"sigmoid": gguf.ExpertGatingFuncType.SIGMOID}


def add_experts(writer: gguf.GGUFWriter, config: PretrainedConfig, rules: ExpertRules, facts: InGGUF) -> None:
    """Write how many experts there are, which layers have them, and how they are chosen and weighed."""
    size = getattr(config, rules.size)
    writer.add_expert_count(getattr(config, rules.count))
    writer.add_expert_used_count(getattr(config, rules.used))
    writer.add_expert_feed_forward_length(size)
    if rules.shared:
        writer.add_expert_shared_count(rules.shared_size(config) // size)
    # an MLP beside experts in the layer itself is as wide as layers without experts have it
    if rules.has_shared and not rules.in_layer_itself:
        writer.add_expert_shared_feed_forward_length(rules.shared_size(config))
    if rules.layers in ("after_first", "interval"):
        writer.add_leading_dense_block_count(_first_with_experts(config, rules))
    if rules.layers == "interval":
        writer.add_interleave_moe_layer_step(1)
    if rules.router in _SCORES:
        writer.add_expert_gating_func(_SCORES[rules.router])
    if rules.scale:
        writer.add_expert_weights_scale(getattr(config, rules.scale))
    if rules.groups:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if facts.normalises is None:
        writer.add_expert_weights_norm(rules.normalises(config))


def _first_with_experts(config: PretrainedConfig, rules: ExpertRules) -> int:
    layers = range(config.num_hidden_layers)
    return next((index for index in layers if rules.in_layer(config, index)), len(layers))


def expert_refusals(config: PretrainedConfig, rules: ExpertRules, facts: InGGUF) -> list[str]:
    """What llama.cpp would compute differently, one clause each: what it does instead."""
    refused, layers = [], range(config.num_hidden_layers)
    first = _first_with_experts(config, rules) if rules.layers in ("after_first", "interval") else 0
    if not all(rules.in_layer(config, index) for index in layers[first:]):
        refused.append(f"every layer {'after the first dense ones ' if first else ''}has experts")
    if isinstance(rules.normalise, str) and facts.normalises not in (None, rules.normalises(config)):
        refused.append(
            f"the weights of a token's experts sum to {'1' if facts.normalises else 'less'} ({rules.normalise})"
        )
    if rules.least and getattr(config, rules.least) > _LEAST_SUM:
        refused.append(f"their sum is taken for at least {_LEAST_SUM:.2g} ({rules.least})")
    return refused


def read_expert_fields(file: GGUFFile, rules: ExpertRules, facts: InGGUF, layers: int) -> dict[str, Any]:
    """Fields of the config that say how many experts there are, which layers have them, and how they are chosen.

    Raises:
        ModelError: experts are chosen in a way that no config of the family can say.
    """
    settings: dict[str, Any] = {
        rules.count: file.number("expert_count"),
        rules.used: file.number("expert_used_count"),
        rules.size: file.value("{arch}.expert_feed_forward_length") or file.number("feed_forward_length"),
    }
    scores = file.value("{arch}.expert_gating_func") or None
    if rules.router in _SCORES and scores not in (None, _SCORES[rules.router]):
        raise ModelError(
            f"{file.path}: {file.architecture}.expert_gating_func = {scores}; models of this family that oribi reads make "
            f"scores by {rules.router} ({int(_SCORES[rules.router])})"
        )
    if isinstance(rules.normalise, str):
        said = bool(file.value("{arch}.expert_weights_norm", False))
        settings[rules.normalise] = said if facts.normalises is None else facts.normalises
    if rules.shared:
        settings[rules.shared] = file.value("{arch}.expert_shared_count", 0)
    if rules.shared_columns and not rules.in_layer_itself:
        settings[rules.shared_columns] = file.number("expert_shared_feed_forward_length")
    if rules.scale:
        settings[rules.scale] = file.value("{arch}.expert_weights_scale") or 1.0
    if rules.groups:
        settings["n_group"] = file.value("{arch}.expert_group_count") or 1
        settings["topk_group"] = file.value("{arch}.expert_group_used_count") or 1
    first = file.value("{arch}.leading_dense_block_count", 0)
    if rules.layers == "after_first":
        settings["first_k_dense_replace"] = first
    elif rules.layers == "interval":
        settings |= {
            "moe_layer_start_index": first,
            "moe_layer_end_index": layers - 1,
            "moe_layer_interval": file.value("{arch}.interleave_moe_layer_step") or 1,
        }
    return settings
