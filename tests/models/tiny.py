"""Tiny random models of every family of the table, with every parameter perturbed, beside transformers' own."""

import sys
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from oribi.families import FAMILIES, config_of_row
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.expert_names import expert_modules
from oribi.models.expert_tensors import loaded_stack

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"] * 2

VARIANTS: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    # Mistral and Phi-3 have no biases whatever a config says
    "mistral": {"sliding_window": 5, "head_dim": 32, "attention_bias": True},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    "qwen2_vl_text": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "qwen3_vl_text": {
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "qwen3_moe": {
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "attention_bias": True,
        # three value heads share a key head, and heads of keys and of values differ
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
        },
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "qwen2_moe": {
        "qkv_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 192,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": MIXED,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
            "truncate": False,
        },
    },
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": MIXED,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": MIXED,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 0.5, "attention_bias": True},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "olmo2": {"attention_bias": True},
    "hunyuan_v1_dense": {
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 100.0, "factor": 1.0, "rope_theta": 1e4},
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "intermediate_size": 256,  # 192 columns
        "block_multiple_of": 64,
        "attention_bias": True,  # there are none, whatever a config says
    },
    "olmo3": {
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": MIXED,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "ministral": {"attention_bias": True, "sliding_window": 5, "layer_types": MIXED, "head_dim": 32},
    "ministral3": {
        "attention_bias": True,
        "sliding_window": 5,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "granitemoehybrid": {
        "attention_bias": True,
        "num_local_experts": 0,
        "shared_intermediate_size": 192,
        "layer_types": ["full_attention"] * 4,
        "position_embedding_type": None,
        "mamba_n_heads": 8,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "glm4": {"head_dim": 32},
    "ernie4_5": {"head_dim": 32, "use_bias": True},
    "ernie4_5_moe": {
        "head_dim": 32,
        "attention_bias": True,  # there are none, whatever a config says
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 0.6,  # above what some tokens' weights sum to
    },
    "granitemoe": {
        "attention_bias": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    "glm4_moe": {
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
    },
    "helium": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "seed_oss": {
        "head_dim": 32,
        "attention_out_bias": False,
        "mlp_bias": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "muse_glimmer_text": {
        "head_dim": 32,
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": MIXED,
        "layer_rope_theta": [1e4, 0, 0, 1e4],
        "final_logit_softcapping": 3.0,
        "qk_scale_factor": 2.0,
        "output_multiplier": 0.5,
        "post_norm_eps": 0.1,
    },
    "cohere": {"attention_bias": True, "logit_scale": 0.5},
    "cohere2": {"attention_bias": True, "logit_scale": 0.5, "sliding_window": 5, "layer_types": MIXED},
    "exaone4": {"attention_bias": True, "sliding_window": 5, "layer_types": MIXED},
    "smollm3": {
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [1, 1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": MIXED,
    },
}

_GEMMA4 = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + [*MIXED, "full_attention"],
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "attention_bias": False,
    "sliding_window": 5,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 3.0,
}
VARIANTS |= {
    "qwen3_5_moe_text": {
        **VARIANTS["qwen3_5_text"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 192,
    },
    "qwen2_5_vl_text": VARIANTS["qwen2_vl_text"],
    "gemma4_text": {**_GEMMA4, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 128},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_text+experts": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 128,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 64,
    },
}

ROPES: dict[str, dict] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "long_factor": [1.0 + 0.3 * i for i in range(8)],
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
}


# where "all-linear" would reach the router, which PEFT adapts as transformers' older classes had it
_ATTENTION_AND_EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ADAPTED: dict[str, dict] = dict.fromkeys(
    ("qwen3_moe", "qwen2_moe", "gpt_oss", "ernie4_5_moe", "glm4_moe"), _ATTENTION_AND_EXPERTS
)
ADAPTED["qwen3_5_moe_text"] = {
    **_ATTENTION_AND_EXPERTS,
    "target_modules": [*_ATTENTION_AND_EXPERTS["target_modules"], "in_proj_qkv", "in_proj_z", "out_proj"]
    + [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    + ["shared_expert_gate"],
}
ADAPTED["gemma4_text+experts"] = {
    "target_modules": [
        *_ATTENTION_AND_EXPERTS["target_modules"],
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    + ["per_layer_input_gate", "per_layer_projection"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
ADAPTED["granitemoe"] = {
    **_ATTENTION_AND_EXPERTS,
    "target_parameters": ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
}


def tiny_config(model_type: str, **changes: object) -> PretrainedConfig:
    """Config of a family with every feature it has switched on."""
    settings = {**SIZES, **VARIANTS[model_type], **changes}
    return config_of_row(model_type, attn_implementation="eager", **settings)


# families that are another one's row with other names, sizes or a flag that tests of their own cover
_LIKE_ANOTHER = {
    "mistral", "gemma", "ministral", "granitemoehybrid", "glm4", "ernie4_5", "helium", "seed_oss", "exaone4", "olmo3",
    "hunyuan_v1_dense", "gemma4_unified_text", "cohere", "ernie4_5_moe", "glm4_moe", "granitemoe", "qwen2_moe", "qwen2_vl_text",
    "qwen2_5_vl_text", "qwen3_vl_text",
}  # fmt: skip
# for tests of what all families share: every kind of layer at once, and the other rows in `make test-all`
KINDS = [pytest.param(name, marks=pytest.mark.long) if name in _LIKE_ANOTHER else name for name in FAMILIES]


# families whose tiny models differ in float32 from themselves in float64 by more than 1e-5
ROUGH_IN_FLOAT32 = ("qwen3_5_text", "qwen2_moe", "qwen3_5_moe_text", "ministral3")


def precise(monkeypatch: Any, ours: DecoderForCausalLM, theirs: PreTrainedModel) -> None:
    """Makes both compute in float64 where rounding in float32 would hide what is compared."""
    if ours.config.model_type in ROUGH_IN_FLOAT32:
        in_float64(monkeypatch, ours, theirs)


def in_float64(monkeypatch: Any, ours: DecoderForCausalLM, theirs: PreTrainedModel) -> None:
    """Makes both compute in float64 throughout, transformers' also where it asks for float32."""

    class Wide:
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(sys.modules[type(theirs).__module__], "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    theirs.config._experts_implementation = "eager"  # the others have no float64
    ours.double(), theirs.double()


def reference_model(config: PretrainedConfig) -> PreTrainedModel:
    """transformers' model of a text decoder's config; where it has none, that of pictures with the decoder in place of all."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tower = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    if config.model_type.startswith("qwen"):
        tower = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    whole = AutoConfig.for_model(
        config.model_type.removesuffix("_text"), text_config=config.to_dict(), vision_config=tower,
        out_hidden_size=128, projector_hidden_size=32,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(whole, attn_implementation="eager")
    model.model = model.model.language_model
    kind = type(model.model)

    def forward(self: PreTrainedModel, **arguments: Any) -> Any:
        output = kind.forward(self, **{name: one for name, one in arguments.items() if one is not None})
        output.image_outputs = output.video_outputs = output.rope_deltas = None
        return output

    # a model of pictures asks its tower for positions
    model.prepare_inputs_for_generation = MethodType(GenerationMixin.prepare_inputs_for_generation, model)
    model.model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})
    return model


def as_ours(ours: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' class, or gradients of them, in the order in which oribi's model has their values."""
    stacks = {
        f"{prefix}.{stack}": (experts, stack)
        for prefix, experts in expert_modules(ours).items()
        for stack in experts.stacks
    }
    return {
        name: loaded_stack(*stacks[name], tensor) if name in stacks else tensor
        for name, tensor in tensors.items()
    }


def tiny_pair(config: PretrainedConfig, seed: int = 0) -> tuple[DecoderForCausalLM, PreTrainedModel]:
    """oribi's and transformers' model with the same weights, none of them at its initial value, float32, training."""
    torch.manual_seed(seed)
    theirs = reference_model(config)
    with torch.no_grad():
        kept = theirs.state_dict()
        buffers = [buffer for name, buffer in theirs.named_buffers() if name in kept]
        for tensor in (*theirs.parameters(), *buffers):
            tensor.add_(torch.randn_like(tensor) * 0.2)
        for name, parameter in theirs.named_parameters():
            # no scale makes the scores of Gemma 4 small: the norms' weights do
            if config.model_type.startswith("gemma4") and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(0.4)
            if name.endswith("gate_up_proj_bias"):  # of gates that are clamped: some have to be
                parameter.mul_(20)
    ours = build(config, device="cpu")
    missing = ours.load_state_dict(as_ours(ours, theirs.state_dict()), strict=True)
    assert not missing.missing_keys
    ours.tie_weights()
    return ours.train(), theirs.train()
