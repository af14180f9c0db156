"""The metadata of a GGUF file: sizes, norms, RoPE, windows and scales, under llama.cpp's keys."""

import math

import gguf
from transformers import PretrainedConfig

from oribi.gguf.names import head_dim_of, layout_of, rope_of

_SCALING = {
    "linear": gguf.RopeScalingType.LINEAR,
    "yarn": gguf.RopeScalingType.YARN,
    "longrope": gguf.RopeScalingType.LONGROPE,
}


def add_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str, vocab_size: int) -> None:
    """Write every key that llama.cpp reads for the config's family, except the tokenizer's.

    Args:
        writer: of a file that is not yet opened.
        config: the model's config.
        name: the model's name, for people.
        vocab_size: rows of the embeddings.
    """
    head_dim = head_dim_of(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocab_size)
    _add_rope(writer, config, head_dim)
    _add_attention(writer, config)


def _add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig, head_dim: int) -> None:
    rope = rope_of(config)
    kind = rope["rope_type"]
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    local = config.rope_parameters.get("sliding_attention")
    if isinstance(local, dict):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind in _SCALING:
        writer.add_rope_scaling_type(_SCALING[kind])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        _add_attention_factor(writer, config, rope, original)
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _add_attention_factor(
    writer: gguf.GGUFWriter, config: PretrainedConfig, rope: dict, original: int
) -> None:
    """What cos and sin are multiplied by; llama.cpp itself multiplies by YaRN's default."""
    factor = rope.get("attention_factor")
    if rope["rope_type"] == "yarn":
        default = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        if factor is not None and factor != default:
            writer.add_rope_scaling_attn_factors(factor / default)
        return
    if factor is None:
        stretch = rope.get("factor") or config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    writer.add_rope_scaling_attn_factors(factor)


def _add_attention(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    if layout_of(config).window_period and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "phi3":
        # llama.cpp asks for the key and then ignores phi3's window
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2" and config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.model_type in ("gemma2", "gemma3_text") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
