"""How the layers of a model differ from each other, in a GGUF file's metadata: written, read, and what llama.cpp takes otherwise.

Their mixers, key/value heads, head sizes, windows, MLP widths, and whose keys and values they read.
"""

from collections.abc import Sequence
from typing import Any

import gguf
import torch
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.families import Family
from oribi.families.in_gguf import InGGUF
from oribi.families.layer_fields import config_of_layer
from oribi.families.sizes import head_dim_of, mlp_size
from oribi.gguf.experts import add_experts, expert_refusals, read_expert_fields
from oribi.gguf.file import GGUFFile
from oribi.gguf.names import NORMS_OF_HEADS
from oribi.gguf.rope import rotary_dim

_KINDS = ("sliding_attention", "full_attention")
# fields of the config -> keys of the gated delta rule that hold them as they are
_GATED_DELTA = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}


def every(period: int, layers: int) -> list[bool]:
    """For each layer whether it is the last of its period."""
    return [(i + 1) % period == 0 for i in range(layers)]


def _has_gated_delta(family: Family) -> bool:
    return "gated_delta" in family.mixers.values()


def _first_shared(config: PretrainedConfig) -> int:
    """The first layer without keys and values of its own."""
    return config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)


def add_layers(writer: gguf.GGUFWriter, config: PretrainedConfig, family: Family, facts: InGGUF) -> None:
    """Write the MLPs' widths, the numbers of heads, and the keys that only some families have."""
    layers = range(config.num_hidden_layers)
    wide = _first_shared(config) if family.wide_mlp and config.use_double_wide_mlp else len(layers)
    if hasattr(config, family.config_fields.get("intermediate_size", "intermediate_size")):
        widths = [mlp_size(config) * (2 if i >= wide else 1) for i in layers]
        writer.add_feed_forward_length(_one_if_equal(widths))
    if family.experts is not None:
        add_experts(writer, config, family.experts, facts)
    writer.add_head_count(config.num_attention_heads)
    heads = [family.value(config_of_layer(config, i), "num_key_value_heads") for i in layers]
    if facts.heads_by_layer:
        heads = [n * (family.mixer(config, i) == "attention") for i, n in zip(layers, heads)]
    writer.add_head_count_kv(heads if facts.heads_by_layer else _one_if_equal(heads))
    if facts.lists_layers:
        writer.add_sliding_window_pattern([kind == _KINDS[0] for kind in config.layer_types])
        sliding = head_dim_of(config, _KINDS[0])
        writer.add_key_length_swa(sliding)
        writer.add_value_length_swa(sliding)
        writer.add_rope_dimension_count_swa(sliding)
        writer.add_shared_kv_layers(config.num_kv_shared_layers or 0)
        writer.add_embedding_length_per_layer_input(_per_layer_size(config, family))
    if _has_gated_delta(family):
        for field, key in _GATED_DELTA.items():
            writer.add_uint32(f"{facts.architecture}.{key}", getattr(config, field))
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(_interval(config))
    if facts.rope_sections:
        writer.add_rope_dimension_sections([*_sections(config), 0])


def constant_norms(config: PretrainedConfig, family: Family) -> dict[str, torch.Tensor]:
    """Weights of norms of q and k that the checkpoint has not, by their names in the file; that of q holds the factor of queries."""
    if family.qk_norm_weights:
        return {}
    head_dim, factors = head_dim_of(config), (getattr(config, family.query_factor), 1.0)
    return {
        f"blk.{i}.{name}": torch.full((head_dim,), factor, dtype=torch.float32)
        for i in range(config.num_hidden_layers)
        for name, factor in zip(NORMS_OF_HEADS, factors)
    }


def _one_if_equal(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _per_layer_size(config: PretrainedConfig, family: Family) -> int:
    return (family.per_layer_inputs and config.hidden_size_per_layer_input) or 0


def _interval(config: PretrainedConfig) -> int:
    """After how many layers the first comes that is attention."""
    kinds = config.layer_types
    return kinds.index(_KINDS[1]) + 1 if _KINDS[1] in kinds else len(kinds) + 1


def _sections(config: PretrainedConfig) -> Sequence[int]:
    """How many pairs of a head turn by the time, the height and the width of a token of a picture; a text's are one."""
    pairs = rotary_dim(config.rope_parameters, head_dim_of(config)) // 2
    third = -(-pairs // 3)
    return config.rope_parameters.get("mrope_section") or (third, third, pairs - 2 * third)


def layer_refusals(config: PretrainedConfig, family: Family, facts: InGGUF) -> list[str]:
    """What llama.cpp would compute differently, one clause each: what it does instead."""
    refused, kinds, layers = [], getattr(config, "layer_types", None), config.num_hidden_layers
    if _has_gated_delta(family):
        if config.linear_key_head_dim != config.linear_value_head_dim:
            refused.append(
                "heads of values have as many dimensions as those of keys in linear_attention layers"
            )
        if (period := _interval(config)) and every(period, layers) != [kind == _KINDS[1] for kind in kinds]:
            refused.append(f"every {period}th layer, and no other, is full_attention")
    if facts.rope_sections and sum(_sections(config)) * 2 != rotary_dim(
        config.rope_parameters, head_dim_of(config)
    ):
        refused.append(f"mrope_section {list(_sections(config))} covers all rotated pairs of a head")
    if family.experts is not None:
        refused += expert_refusals(config, family.experts, facts)
    if facts.lists_layers:
        for kind in _KINDS:
            sizes = {config_of_layer(config, i).head_dim for i in range(layers) if kinds[i] == kind}
            if len(sizes) > 1:
                refused.append(f"all {kind} layers have one head_dim, not {sorted(sizes)}")
        shared = _first_shared(config)
        if shared < layers and tuple(kinds[max(shared - 2, 0) : shared]) != _KINDS:
            refused.append(
                "layers without keys and values read those of the last two layers that have them, a sliding_attention "
                "and then a full_attention"
            )
        if _per_layer_size(config, family) and config.vocab_size_per_layer_input != config.vocab_size:
            refused.append(
                f"layers have inputs for all {config.vocab_size} tokens, not for "
                f"{config.vocab_size_per_layer_input} (vocab_size_per_layer_input)"
            )
    return refused


def read_layers(file: GGUFFile, family: Family, layers: int) -> dict[str, Any]:
    """Fields of the config that say how layers differ; "num_key_value_heads" always, "intermediate_size" where a layer has an MLP.

    Args:
        file: of the model. family: its row. layers: how many there are.

    Raises:
        ModelError: the file describes layers that no config of the family can.
    """
    facts = family.gguf
    heads = _listed(file, "attention.head_count_kv", layers, file.number("attention.head_count"))
    if facts.lists_layers:
        own = {} if family.experts is None else read_expert_fields(file, family.experts, facts, layers)
        return _read_lists(file, layers, heads) | own
    settings: dict[str, Any] = {"num_key_value_heads": max(heads)}
    if family.experts is None or file.value("{arch}.feed_forward_length"):
        settings["intermediate_size"] = file.number("feed_forward_length")
    if family.experts is not None:
        settings |= read_expert_fields(file, family.experts, facts, layers)
    if facts.heads_by_layer:
        other = next(iter(family.mixers))
        settings["layer_types"] = [_KINDS[1] if number else other for number in heads]
    elif len(set(heads)) > 1:
        file.number("attention.head_count_kv")  # which says so
    if _has_gated_delta(family):
        settings |= {field: file.number(key) for field, key in _GATED_DELTA.items()}
        settings["linear_value_head_dim"] = (
            file.number("ssm.inner_size") // settings["linear_num_value_heads"]
        )
        recurrent = file.value("{arch}.attention.recurrent_layers")
        if not isinstance(recurrent, list):
            recurrent = [not full for full in every(file.value("{arch}.full_attention_interval", 4), layers)]
        settings["layer_types"] = ["linear_attention" if one else _KINDS[1] for one in recurrent[:layers]]
    return settings


def _listed(file: GGUFFile, key: str, layers: int, default: int) -> list[int]:
    """A number of each layer, from a key that holds one or a list."""
    value = file.value(f"{{arch}}.{key}") or default
    if not isinstance(value, list):
        return [value] * layers
    if len(value) < layers:
        raise ModelError(f"{file.path}: {file.architecture}.{key} lists {len(value)} of {layers} layers")
    return value[:layers]


def kinds_of_layers(file: GGUFFile, layers: int, period: int | None = None) -> list[str]:
    """config.layer_types of a file that says which layers slide, by a list or by a period, or not at all (`period`)."""
    slides = file.value("{arch}.attention.sliding_window_pattern", period)
    slides = slides[:layers] if isinstance(slides, list) else [not full for full in every(slides, layers)]
    return [_KINDS[0] if one else _KINDS[1] for one in slides]


def _read_lists(file: GGUFFile, layers: int, heads: list[int]) -> dict[str, Any]:
    """As `read_layers`, of a family whose files list their layers."""
    slides = [kind == _KINDS[0] for kind in kinds_of_layers(file, layers)]
    widths = _listed(file, "feed_forward_length", layers, 0)
    shared = file.value("{arch}.attention.shared_kv_layers", 0)
    own = range(layers - shared)
    of_kind = {kind: {n for n, one in zip(heads, slides) if one is (kind == _KINDS[0])} for kind in _KINDS}
    if any(len(numbers) > 1 for numbers in of_kind.values()):
        raise ModelError(
            f"{file.path}: {file.architecture}.attention.head_count_kv = {heads}: layers of one kind have different "
            "numbers, which oribi does not read"
        )
    sliding, full = (next(iter(of_kind[kind] or {max(heads)})) for kind in _KINDS)
    wide = [widths[0] * (1 if i in own else 2) for i in range(layers)]
    if widths not in ([widths[0]] * layers, wide):
        raise ModelError(
            f"{file.path}: {file.architecture}.feed_forward_length = {widths}: MLPs are as wide as the first, or twice "
            "in layers that share keys and values"
        )
    without_values = [i for i in own if not slides[i] and f"blk.{i}.attn_v.weight" not in file.tensors]
    if full != sliding and not without_values:
        raise ModelError(
            f"{file.path}: full_attention layers have {full} key/value heads and sliding ones {sliding}, and values of "
            "their own, which no config describes"
        )
    per_layer = file.tensors.get("per_layer_token_embd.weight")
    return {
        "num_key_value_heads": sliding,
        "num_global_key_value_heads": full,
        "head_dim": file.number("attention.key_length_swa"),
        "global_head_dim": file.number("attention.key_length"),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": shared > 0 and widths == wide,
        "layer_types": [_KINDS[0] if one else _KINDS[1] for one in slides],
        "attention_k_eq_v": bool(without_values),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": file.value("{arch}.embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": per_layer.shape[0]
        if per_layer
        else file.tensors["token_embd.weight"].shape[0],
    }
