"""The table: one row per family, with what the decoder reads and how the family is stored in a GGUF file.

A new family is a new row, and a new flag of `Family` only where it has a property that no other family has.
"""

from dataclasses import replace
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from oribi.families.expert_rules import ExpertRules
from oribi.families.family import Family
from oribi.families.in_gguf import InGGUF
from oribi.families.layer_fields import fields_by_layer

# model types of whose released weights activations grow beyond what float16 holds, and every logit to a nan
# Source: https://github.com/microsoft/onnxruntime-genai/pull/2444, 45,344 in the last layer but one of gpt-oss-120b
BEYOND_FLOAT16 = ("gpt_oss",)
_EXPERTS = "+experts"
# the deepest models have some hundreds; each layer costs host memory before a weight is read
MOST_LAYERS = 4096

# fmt: off
# what llama.cpp reads of the Llama lineage
_LLAMA_CPP = InGGUF("llama", interleaved_rope=True, biases="all", rope_factors=("llama3", "longrope"), layers_of_70b=80)
_QWEN2_VL = InGGUF("qwen2vl", derived_head_dim=True, rope_sections=True, layers_of_70b=80)

# router and an MLP beside the experts, whose output is gated
_QWEN_EXPERTS = {"router": "gate", "shared_experts": "shared_expert"}
_QWEN3_5_EXPERTS = ExpertRules(
    normalise=True, shared_columns="shared_expert_intermediate_size", shared_gate=True, stored="either"
)

_GEMMA4 = Family(
    "Gemma4ForCausalLM", kv_sharing=True, wide_mlp=True, keys_as_values=True, value_norm=True, layer_scalar=True,
    mixers={"sliding_attention": "shared_attention", "full_attention": "shared_attention"}, norms="sandwich", qk_norm="head",
    windows="layer_types", attention_scale=1.0, softcaps="final", embedding_scale=True, rope_by_layer_type=True,
    gguf=InGGUF("gemma4", rope_factors=("proportional",), lists_layers=True, pieces="gemma4"),
)

# by model type; with "+experts" behind it, the models of the type whose config has `enable_moe_block`
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", mlp_bias=True, gguf=_LLAMA_CPP),
    "mistral": Family("MistralForCausalLM", attention_bias=None, windows="all", gguf=_LLAMA_CPP),
    "ministral": Family("MinistralForCausalLM", attention_bias=None, windows="layer_types", gguf=_LLAMA_CPP),
    "ministral3": Family(
        "Ministral3ForCausalLM", attention_bias=None, windows="all", query_scale_by_position=True,
        gguf=InGGUF("mistral3", interleaved_rope=True, yarn_log_mul=True),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", attention_bias="qkv", windows="layer_types",
        gguf=InGGUF("qwen2", derived_head_dim=True, layers_of_70b=80),
    ),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", windows="layer_types", gguf=InGGUF("qwen3")),
    # decoders within image-text models; positions of a text alone are the same in all three directions
    "qwen2_vl_text": Family("Qwen2VLTextModel", attention_bias="qkv", windows="layer_types", gguf=_QWEN2_VL),
    "qwen2_5_vl_text": Family("Qwen2_5_VLTextModel", attention_bias="qkv", windows="layer_types", gguf=_QWEN2_VL),
    "qwen3_vl_text": Family("Qwen3VLTextModel", qk_norm="head", gguf=InGGUF("qwen3vl", rope_sections=True)),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", names={"router": "gate"}, qk_norm="head", windows="all",
        experts=ExpertRules(normalise="norm_topk_prob", layers="sparse_step"), gguf=InGGUF("qwen3moe"),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", names=_QWEN_EXPERTS, config_fields={"attention_bias": "qkv_bias"}, output_bias=None,
        windows="layer_types",
        experts=replace(_QWEN3_5_EXPERTS, normalise="norm_topk_prob", layers="sparse_step", stored="each"),
        gguf=InGGUF("qwen2moe", derived_head_dim=True, normalises=False),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", windows="layer_types", sinks=True, activation="swiglu_clamped",
        experts=ExpertRules(
            router="topk_softmax", count="num_local_experts", size="intermediate_size", stored="transposed", alternating=True,
            biases=True,
        ),
        gguf=InGGUF(
            "gpt-oss", names={"mlp_input_norm": "post_attention_norm"}, biases="all", window_period=2, truncates_yarn=True
        ),
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM", mixers={"linear_attention": "gated_delta"}, norm_offset=1.0, qk_norm="head",
        output_gate="q_proj",
        gguf=InGGUF("qwen35", names={"mlp_input_norm": "post_attention_norm"}, partial_rope=True, rope_sections=True),
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM", mixers={"linear_attention": "gated_delta"}, norm_offset=1.0, names=_QWEN_EXPERTS,
        qk_norm="head", output_gate="q_proj", experts=_QWEN3_5_EXPERTS,
        gguf=InGGUF("qwen35moe", names={"mlp_input_norm": "post_attention_norm"}, partial_rope=True, rope_sections=True),
    ),
    "gemma": Family(
        "GemmaForCausalLM", norm_offset=1.0, embedding_scale=True, gguf=InGGUF("gemma", head="tied")
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", norms="sandwich", norm_offset=1.0, windows="layer_types", softcaps=True, embedding_scale=True,
        attention_scale="query_pre_attn_scalar", attention_scale_power=-0.5,
        gguf=InGGUF("gemma2", head="tied", window_period=2, attention_softcap=True, layers_of_27b=46),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", norms="sandwich", norm_offset=1.0, qk_norm="head", windows="layer_types", softcaps=True,
        embedding_scale=True, attention_scale="query_pre_attn_scalar", attention_scale_power=-0.5, rope_by_layer_type=True,
        gguf=InGGUF("gemma3", window_period=6, layers_of_27b=62),
    ),
    "muse_glimmer_text": Family(
        "MuseGlimmerTextModel", norms="sandwich", norm_offset=1.0, last_norm_offset=0.0, output_norm_eps="post_norm_eps",
        names={"output_gate": "gate_proj"}, qk_norm="head", qk_norm_weights=False, query_factor="qk_scale_factor",
        output_gate="output_gate", windows="layer_types", without_rope="layer_rope_theta",
        softcaps="final", embedding_norm=True, logit_scale="output_multiplier",
        gguf=InGGUF("muse-glimmer", interleaved_rope=True, head="separate", window_period=4, output_norm_eps=1e-8),
    ),
    "cohere": Family(
        "CohereForCausalLM", norms="parallel", centred_norms=True, norm_eps="layer_norm_eps", interleaved_rope=True,
        logit_scale="logit_scale", gguf=InGGUF("command-r", interleaved_rope=True, head="tied", derived_head_dim=True),
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM", norms="parallel", centred_norms=True, norm_eps="layer_norm_eps", interleaved_rope=True,
        windows="layer_types", without_rope="full_attention", logit_scale="logit_scale",
        gguf=InGGUF("cohere2", interleaved_rope=True, head="tied", derived_head_dim=True, window_period=4),
    ),
    "gemma4_text": replace(_GEMMA4, per_layer_inputs=True),
    "gemma4_text+experts": replace(
        _GEMMA4, per_layer_inputs=True, names={"shared_experts": "mlp"},
        experts=ExpertRules(
            normalise=True, used="top_k_experts", shared_columns="intermediate_size", in_layer_itself=True, own_norms=True,
            router_part="proj", router_norm=True, expert_scale=True, stored="stacked",
        ),
        gguf=replace(_GEMMA4.gguf, joins_gate_up=True),
    ),
    "gemma4_unified_text": replace(_GEMMA4, architecture="Gemma4UnifiedForCausalLM"),
    "phi3": Family(
        "Phi3ForCausalLM", fused_projections=("qkv", "gate_up"), attention_bias=None, windows="all",
        gguf=InGGUF(
            "phi3", rope_factors=("longrope",), partial_rope=True, window_key_required=True, derived_head_dim=True,
            original_context_field=True, stripping_names=("phi-3", "phi3", "phi 3"),
        ),
    ),
    "granite": Family(
        "GraniteForCausalLM", mlp_bias=True, attention_scale="attention_multiplier", multipliers=True,
        gguf=replace(_LLAMA_CPP, architecture="granite", layers_of_70b=0),
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        names={"mlp": "shared_mlp", "gate_up_proj": "input_linear", "down_proj": "output_linear"},
        config_fields={"intermediate_size": "shared_intermediate_size"}, fused_projections=("gate_up",),
        attention_scale="attention_multiplier", multipliers=True, without_rope="position_embedding_type",
        gguf=replace(_LLAMA_CPP, architecture="granite", layers_of_70b=0, splits_gate_up=True),
    ),
    "glm4": Family(
        "Glm4ForCausalLM", norms="sandwich",
        names={
            "mixer_output_norm": "post_self_attn_layernorm", "mlp_input_norm": "post_attention_layernorm",
            "mlp_output_norm": "post_mlp_layernorm",
        },
        fused_projections=("gate_up",), output_bias=None, interleaved_rope=True,
        gguf=InGGUF("glm4", interleaved_rope=True, partial_rope=True),
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM", config_fields={"attention_bias": "use_bias", "mlp_bias": "use_bias"}, output_bias="use_bias",
        mlp_bias=True, interleaved_rope=True, gguf=InGGUF("ernie4_5", interleaved_rope=True),
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM", names={"router": "gate"}, attention_bias=None, interleaved_rope=True, unread=("use_bias",),
        experts=ExpertRules(
            normalise=True, least="moe_norm_min", correction="moe_statics", in_float32=True, layers="interval",
            shared="moe_num_shared_experts", renamed=((".mlp.gate.moe_statics.", ".mlp.moe_statics."),),
        ),
        gguf=InGGUF("ernie4_5-moe", interleaved_rope=True),
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM", names={"mlp": "block_sparse_moe"}, attention_scale="attention_multiplier", multipliers=True,
        experts=ExpertRules(
            router="topk_softmax", count="num_local_experts", size="intermediate_size", stored="stacked",
            renamed=(
                (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
                (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
                (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
            ),
        ),
        gguf=replace(_LLAMA_CPP, architecture="granitemoe", layers_of_70b=0),
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", names={"router": "gate"}, output_bias=None, qk_norm="head", qk_norm_field="use_qk_norm",
        experts=ExpertRules(
            router="sigmoid", normalise="norm_topk_prob", added=1e-20, scale="routed_scaling_factor", groups=True,
            correction="router", in_float32=True, count="n_routed_experts", layers="after_first", shared="n_shared_experts",
        ),
        gguf=InGGUF(
            "glm4moe", names={"mlp_input_norm": "post_attention_norm"}, partial_rope=True, normalises=None
        ),
    ),
    "helium": Family("HeliumForCausalLM", output_bias=None, mlp_bias=True, interleaved_rope=True),
    "seed_oss": Family(
        "SeedOssForCausalLM", output_bias="attention_out_bias", mlp_bias=True,
        gguf=InGGUF("seed_oss", names={"mlp_input_norm": "post_attention_norm"}),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM", norms="post", qk_norm="head", attention_bias=None, windows="layer_types",
        without_rope="full_attention",
        gguf=InGGUF(
            "exaone4", rope_factors=("llama3",), window_period=4, window_layers=64, window_tokens=4096, derived_head_dim=True
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", norms="post", qk_norm="projection", gguf=InGGUF("olmo2", head="separate", derived_head_dim=True)
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM", norms="post", qk_norm="projection", windows="layer_types", rope_by_layer_type=True,
        gguf=InGGUF("olmo2", head="separate", derived_head_dim=True, window_period=4, one_rope_base=True),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM", names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"}, qk_norm="head",
        qk_norm_after_rope=True, rope_alpha=True, gguf=InGGUF("hunyuan-dense"),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM", mixers={"conv": "short_conv"}, norm_eps="norm_eps", activation="silu", adjusts_mlp=True,
        names={
            "mixer_input_norm": "operator_norm", "mlp_input_norm": "ffn_norm", "norm": "embedding_norm",
            "q_norm": "q_layernorm", "k_norm": "k_layernorm", "o_proj": "out_proj",
            "mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
        },
        qk_norm="head", attention_bias=None,
        gguf=InGGUF("lfm2", derived_head_dim=True, heads_by_layer=True, last_norm="token_embd_norm"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", mlp_bias=True, windows="layer_types", without_rope="no_rope_layers",
        gguf=InGGUF("smollm3", interleaved_rope=True, no_rope_period=4),
    ),
}
# fmt: on


def row_name(config: PretrainedConfig) -> str:
    """The key that a config has in `FAMILIES`, whether or not there is such a row."""
    return config.model_type + _EXPERTS * bool(getattr(config, "enable_moe_block", False))


def row_of(config: PretrainedConfig) -> Family | None:
    """The row of a config's kind of models, whether or not oribi's decoder covers this one."""
    return FAMILIES.get(row_name(config))


def config_of_row(name: str, **fields: Any) -> PretrainedConfig:
    """A config with these fields that has the row of this name."""
    model_type = name.removesuffix(_EXPERTS)
    return AutoConfig.for_model(
        model_type, **({"enable_moe_block": True} if model_type != name else {}), **fields
    )


def family_of(config: PretrainedConfig) -> Family | None:
    """The family's row for a checkpoint's config, or None when oribi's decoder does not cover it.

    Args:
        config: a transformers config; `model_type`, `hidden_act` and a few refusing fields are read.
    """
    family = row_of(config)
    if family is None or activation_of(config) is None:
        return None
    kinds = {"linear_attention", "conv", "mamba"} & set(getattr(config, "layer_types", None) or ())
    refused = (
        family.experts is None and getattr(config, "num_local_experts", 0),
        getattr(config, "output_router_logits", False),  # asks for a loss that evens out the experts' use
        family.activation == "swiglu_clamped" and _clamped_otherwise(config),
        any(getattr(config, name) for name in family.unread),
        kinds - family.mixers.keys(),
        family.qk_norm is None and getattr(config, "use_qk_norm", False),
        getattr(config, "use_bidirectional_attention", None) in (True, "all"),  # "vision": pictures alone
        fields_by_layer(config) - _BY_LAYER,
    )  # fmt: skip
    return None if any(refused) else family


def _clamped_otherwise(config: PretrainedConfig) -> bool:
    """Whether a clamped gate has other constants than `kernels/gated_mlp.py`."""
    alpha, limit = 1.702, 7.0  # older releases of transformers have no field for them
    return getattr(config, "swiglu_alpha", alpha) != alpha or getattr(config, "swiglu_limit", limit) != limit


# what may differ from layer to layer
_BY_LAYER = {"head_dim", "num_key_value_heads"}


def activation_of(config: PretrainedConfig) -> Literal["silu", "gelu_tanh", "gelu", "swiglu_clamped"] | None:
    """The gated MLP's activation in the kernels' words, or None if no kernel computes it."""
    family = row_of(config)
    if family is not None and family.activation is not None:
        return family.activation
    # Gemma's first release wrote "gelu" in hidden_act and meant the tanh form, named by hidden_activation
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return {
        "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
    }.get(name)  # fmt: skip
