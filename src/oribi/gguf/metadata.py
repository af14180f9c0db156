"""The config of a model in a GGUF file's metadata, written and read, and what llama.cpp would compute differently."""

import re
from typing import Any

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from oribi.errors import ExportError, ModelError
from oribi.families import FAMILIES, MOST_LAYERS, Family, config_of_row, family_of
from oribi.families.in_gguf import DEEPSTACK_LAYERS, InGGUF
from oribi.families.sizes import head_dim_of, rope_base
from oribi.gguf.file import GGUFFile
from oribi.gguf.layers import add_layers, every, kinds_of_layers, layer_refusals, read_layers
from oribi.gguf.names import MODEL_TYPES, NORMS_OF_HEADS, family_in_gguf
from oribi.gguf.rope import add_rope, global_rope, read_rope, rope_refusals

# multimodal model types of whose towers llama.cpp's convert_hf_to_gguf.py makes a projector file
WITH_PROJECTOR = (
    "gemma3", "gemma4", "gemma4_unified", "idefics3", "internvl", "lfm2_vl", "llama4", "mistral3", "muse_glimmer", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
# a config's sizes -> keys, in the order in which they are written
_SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
}
# what metadata of wrong types or sizes turns into
_DAMAGED = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, StrictDataclassError,
)  # fmt: skip


def _own_keys(family: Family, facts: InGGUF) -> dict[str, str]:
    """Fields of the config that only some families have -> keys, in the order in which they are written."""
    keys = {}
    if facts.window_period or facts.window_key_required or facts.lists_layers:
        keys["sliding_window"] = "attention.sliding_window"
    if family.softcaps:
        keys["attn_logit_softcapping"] = "attn_logit_softcapping"
        keys["final_logit_softcapping"] = "final_logit_softcapping"
    if family.multipliers:
        keys |= {
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        }
    if family.logit_scale:
        keys[family.logit_scale] = "logit_scale"
    if "short_conv" in family.mixers.values():
        keys["conv_L_cache"] = "shortconv.l_cache"
    if facts.rope_sections:  # of models that see pictures
        keys[DEEPSTACK_LAYERS] = "n_deepstack_layers"
    return keys


def _eps_key(family: Family) -> str:
    return f"attention.layer_norm_{'' if family.centred_norms else 'rms_'}epsilon"


def add_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str, vocab_size: int) -> None:
    """Write every key that llama.cpp reads for the config's family, except the tokenizer's.

    Args:
        writer: of a file that is not yet opened.
        config: the model's config.
        name: the model's name, for people.
        vocab_size: rows of the embeddings.
    """
    family, facts = family_in_gguf(config)
    head_dim = head_dim_of(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    for field, key in _SIZES.items():
        writer.add_uint32(f"{facts.architecture}.{key}", family.value(config, field))
    add_layers(writer, config, family, facts)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_float32(f"{facts.architecture}.{_eps_key(family)}", getattr(config, family.norm_eps))
    writer.add_vocab_size(vocab_size)
    add_rope(writer, config, facts, head_dim)
    for field, key in _own_keys(family, facts).items():
        value = getattr(config, field, None)
        if field == "sliding_window":
            if value or facts.window_key_required:
                writer.add_sliding_window(value or 0)
        elif isinstance(value, int) and field in ("conv_L_cache", DEEPSTACK_LAYERS):
            writer.add_uint32(f"{facts.architecture}.{key}", value)
        elif value:
            writer.add_float32(f"{facts.architecture}.{key}", value)


def config_of_file(file: GGUFFile) -> PretrainedConfig:
    """The config of the model in a file.

    Raises:
        ModelError: it is of no family that oribi reads from GGUF, or its metadata make no such model.
    """
    readings = MODEL_TYPES.get(file.architecture)
    if readings is None:
        raise ModelError(
            f"{file.path} holds architecture {file.architecture!r}; oribi reads {', '.join(MODEL_TYPES)} from GGUF"
        )
    has_experts = bool(file.value("{arch}.expert_count", 0))
    readings = [name for name in readings if (FAMILIES[name].experts is not None) == has_experts] or readings
    row = readings[0]
    if file.value("{arch}.attention.sliding_window"):
        row = next((name for name in readings if FAMILIES[name].gguf.window_period), row)
    try:
        config = config_of_row(row, **_settings(file, FAMILIES[row]))
    except ModelError:
        raise
    except _DAMAGED as error:
        raise ModelError(
            f"{file.path}: its metadata or tensors do not make a {file.architecture} model: {error}"
        ) from error
    config.architectures = [FAMILIES[row].architecture]
    if family_of(config) is None:
        raise ModelError(
            f"{file.path}: this {file.architecture} model uses a feature outside oribi's family table"
        )
    return config


def _settings(file: GGUFFile, family: Family) -> dict[str, Any]:
    """The fields of the config."""
    facts = family.gguf
    if family.experts is None and file.value("{arch}.expert_count", 0):
        raise ModelError(
            f"{file.path} is a mixture of experts, which oribi does not read from GGUF as {file.architecture}"
        )
    if not file.value("{arch}.attention.causal", True):
        raise ModelError(
            f"{file.path}: {file.architecture}.attention.causal is false: every token sees those behind it, so the model continues "
            "no text and oribi does not read it"
        )
    blocks, heads = file.number("block_count"), file.number("attention.head_count")
    if blocks > MOST_LAYERS:
        raise ModelError(f"{file.path}: block_count = {blocks}; at most {MOST_LAYERS:,} is possible")
    behind = next((name for name in file.tensors if _layer_of(name) >= blocks), None)
    if behind is not None:
        raise ModelError(
            f"{file.path}: {file.architecture}.block_count = {blocks}, and the file holds {behind}"
        )
    layers = blocks - file.value("{arch}.nextn_predict_layers", 0)  # the others predict further tokens
    vocab_size, hidden_size = file.tensors["token_embd.weight"].shape
    head_dim = file.value("{arch}.attention.key_length") or hidden_size // heads
    settings = {field: file.number(key) for field, key in _SIZES.items()} | {
        "num_hidden_layers": layers,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        family.norm_eps: file.number(_eps_key(family)),
        "attention_bias": any(name.endswith(".attn_q.bias") for name in file.tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
        "rope_parameters": read_rope(file, head_dim, facts),
    }
    if not facts.derived_head_dim:
        settings["head_dim"] = head_dim
    for field, key in _own_keys(family, facts).items():
        if (value := file.value(f"{{arch}}.{key}")) is not None:
            settings[field] = value or None
    settings |= read_layers(file, family, layers)
    if family.adjusts_mlp:
        settings["block_auto_adjust_ff_dim"] = False  # the file holds the adjusted size
    if facts.window_layers and layers != facts.window_layers:
        settings |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    elif facts.window_period:
        settings["layer_types"] = kinds_of_layers(file, layers, facts.window_period)
    if family.without_rope == "layer_rope_theta":
        theta = settings["rope_parameters"]["rope_theta"]
        settings["layer_rope_theta"] = [theta * (k != "full_attention") for k in settings["layer_types"]]
    if facts.output_norm_eps:
        settings[family.output_norm_eps] = facts.output_norm_eps
    if family.qk_norm_field:
        settings[family.qk_norm_field] = f"blk.0.{NORMS_OF_HEADS[0]}" in file.tensors
    if not family.qk_norm_weights:
        settings[family.query_factor] = float(file.read(f"blk.0.{NORMS_OF_HEADS[0]}", torch.float32)[0])
    if facts.layers_of_27b:
        settings["query_pre_attn_scalar"] = _query_scalar(facts, layers, hidden_size / heads, head_dim)
    if family.rope_by_layer_type:
        usual = settings["rope_parameters"]["rope_theta"] if facts.one_rope_base else 10000.0
        theta = float(file.value("{arch}.rope.freq_base_swa", usual))
        settings["rope_parameters"] = {
            "full_attention": settings["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        }
    if facts.original_context_field:
        original = file.value("{arch}.rope.scaling.original_context_length")
        settings["original_max_position_embeddings"] = original or settings["max_position_embeddings"]
    if facts.partial_rope:  # a config's own default may be another
        settings["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    named: dict[str, Any] = {}
    for field, value in settings.items():  # one field may stand for several
        field = family.config_fields.get(field, field)
        named[field] = named.get(field) or value
    return named


def _layer_of(name: str) -> int:
    """The number in a tensor's name; -1 of one outside the layers."""
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


def _query_scalar(facts: InGGUF, layers: int, hidden_per_head: float, head_dim: int) -> float:
    """query_pre_attn_scalar as llama.cpp assumes it: no key holds it, and one model is told apart by its number of layers."""
    return hidden_per_head if layers == facts.layers_of_27b else head_dim


def check_config(config: PretrainedConfig) -> list[str]:
    """What llama.cpp computes differently in special cases only, one sentence each.

    Raises:
        ExportError: llama.cpp would load the file and compute something else.
    """
    family, facts = family_in_gguf(config)
    refused = rope_refusals(config, facts) + _attention_refusals(config, family, facts)
    refused += layer_refusals(config, family, facts)
    if refused:
        raise ExportError(
            f"llama.cpp would compute this {config.model_type} model differently from its config: "
            + "; ".join(refused)
            + ". Save merged_16bit instead"
        )
    notes = []
    window = getattr(config, "sliding_window", None)
    slides = family.windows == "all" or "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if window and slides and not (facts.window_period or facts.lists_layers):
        notes.append(
            f"llama.cpp ignores this model's window: answers differ beyond {window} tokens of context"
        )
    rope = global_rope(config)
    if rope["rope_type"] == "yarn" and facts.truncates_yarn and not rope.get("truncate", True):
        notes.append(
            "llama.cpp rounds the range of YaRN's dimensions, which this model does not: log-probabilities differ by about 0.01"
        )
    if rope_base(config, rope)[0] == "dynamic":
        notes.append(
            f"GGUF has no dynamic RoPE: answers differ beyond {config.max_position_embeddings} tokens of context"
        )
    return notes


def _attention_refusals(config: PretrainedConfig, family: Family, facts: InGGUF) -> list[str]:
    """What llama.cpp would compute differently, one clause each: what it does instead."""
    refused = []
    layers, head_dim = config.num_hidden_layers, head_dim_of(config)
    if facts.derived_head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        refused.append("head_dim is hidden_size / num_attention_heads")
    if facts.layers_of_27b:
        hidden_per_head = config.hidden_size // config.num_attention_heads
        expected = _query_scalar(facts, layers, hidden_per_head, head_dim)
        if config.query_pre_attn_scalar != expected:
            refused.append(f"query_pre_attn_scalar is {expected}, not {config.query_pre_attn_scalar}")
    if family.softcaps and not facts.attention_softcap and getattr(config, "attn_logit_softcapping", None):
        refused.append("no attn_logit_softcapping")
    if facts.no_rope_period and [not rotated for rotated in config.no_rope_layers] != every(
        facts.no_rope_period, layers
    ):
        refused.append(f"every {facts.no_rope_period}th layer, and no other, is without RoPE")
    if family.without_rope == "position_embedding_type" and not family.rotates(config, 0):
        refused.append("every layer is rotated, whatever position_embedding_type says")
    kinds = getattr(config, "layer_types", None) or []
    if family.without_rope == "layer_rope_theta" and any(
        family.rotates(config, i) != (kind == "sliding_attention") for i, kind in enumerate(kinds)
    ):
        refused.append("sliding layers, and no others, are rotated")
    if facts.output_norm_eps and getattr(config, family.output_norm_eps) != facts.output_norm_eps:
        refused.append(f"{family.output_norm_eps} is {facts.output_norm_eps:g}")
    windowed = getattr(config, "sliding_window", None) is not None
    if facts.window_layers and windowed != (layers == facts.window_layers):
        refused.append(f"models of {facts.window_layers} layers have windows, and no others")
    elif facts.window_tokens and config.sliding_window not in (None, facts.window_tokens):
        refused.append(f"windows are of {facts.window_tokens} tokens, not {config.sliding_window}")
    elif (
        facts.window_period
        and kinds
        and (windowed or not facts.window_layers)
        and every(facts.window_period, len(kinds)) != [kind != "sliding_attention" for kind in kinds]
    ):
        refused.append(f"every {facts.window_period}th layer, and no other, sees everything")
    return refused
