"""config.json of small models, modelled on those of models that people tune: their fields, in the form that they have there.

Each entry is what AutoConfig reads from disk; fields that a repository leaves out are left out here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from oribi.models.wrapper import class_named
from tests.save.tiny_export import byte_level_tokenizer

_TOKENS = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_COMMON = {**_SIZES, "num_hidden_layers": 4, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5,
           "attention_dropout": 0.0, "torch_dtype": "bfloat16", "use_cache": True}  # fmt: skip
_PIXTRAL = {
    "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "gelu", "hidden_size": 64, "image_size": 28, "intermediate_size": 64,
    "model_type": "pixtral", "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 1, "patch_size": 14,
    "rope_theta": 10000.0,
}  # fmt: skip
_MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2, "torch_dtype": "bfloat16",
    "vision_config": _PIXTRAL, "vision_feature_layer": -1,
}  # fmt: skip
_GEMMA4_VISION = {
    "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "patch_size": 8, "pooling_kernel_size": 1,
    "position_embedding_size": 16,
}  # fmt: skip
_GEMMA4_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}


def _llama(**more: Any) -> dict[str, Any]:
    return {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "max_position_embeddings": 131072, "pretraining_tp": 1, "rope_theta": 500000.0, "eos_token_id": [2, 3, 4],
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}, **more,
    }  # fmt: skip


def _ministral3(
    tied: bool, original: int, factor: float, beta: float = 0.1, all_dim: float = 1.0
) -> dict[str, Any]:
    rope = {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": factor, "llama_4_scaling_beta": beta, "mscale": 1.0,
        "mscale_all_dim": all_dim, "original_max_position_embeddings": original, "rope_theta": 1000000.0,
        "rope_type": "yarn", "type": "yarn",
    }  # fmt: skip
    return {
        **_SIZES, "attention_dropout": 0.0, "head_dim": 32, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 262144, "model_type": "ministral3", "num_hidden_layers": 4, "rms_norm_eps": 1e-5,
        "rope_parameters": rope, "sliding_window": None, "tie_word_embeddings": tied, "use_cache": True,
    }  # fmt: skip


def _qwen3_5(tied: bool, key_heads: int, value_heads: int, **more: Any) -> dict[str, Any]:
    text = {
        **_SIZES, "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
        "full_attention_interval": 4, "head_dim": 32, "hidden_act": "silu", "initializer_range": 0.02,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16, "linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 16, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "num_hidden_layers": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "use_cache": True,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25,
                            "rope_theta": 10000000, "rope_type": "default"}, **more,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 300, "model_type": "qwen3_5",
        "text_config": text, "tie_word_embeddings": tied, "video_token_id": 301, "vision_end_token_id": 302,
        "vision_start_token_id": 303,
        "vision_config": {"deepstack_visual_indexes": [], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
                          "in_channels": 3, "intermediate_size": 64, "model_type": "qwen3_5", "num_heads": 2,
                          "num_position_embeddings": 16, "out_hidden_size": 64, "patch_size": 8, "spatial_merge_size": 2,
                          "temporal_patch_size": 2},
    }  # fmt: skip


def _qwen3_5_moe() -> dict[str, Any]:
    whole = _qwen3_5(False, 2, 4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
                     shared_expert_intermediate_size=64, router_aux_loss_coef=0.001, model_type="qwen3_5_moe_text")  # fmt: skip
    del whole["text_config"]["intermediate_size"]
    whole["vision_config"] |= {"model_type": "qwen3_5_moe"}
    return {**whole, "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}


def _gemma4(**more: Any) -> dict[str, Any]:
    text = {
        **_SIZES, "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16", "enable_moe_block": False,
        "eos_token_id": 1, "bos_token_id": 2, "final_logit_softcapping": 30.0, "global_head_dim": 64, "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 0, "initializer_range": 0.02,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "max_position_embeddings": 131072,
        "model_type": "gemma4_text", "num_experts": None, "num_global_key_value_heads": None, "num_hidden_layers": 4,
        "num_kv_shared_layers": 0, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_parameters": _GEMMA4_ROPE,
        "sliding_window": 16, "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
        "use_cache": True, "use_double_wide_mlp": False, "vocab_size_per_layer_input": 384, **more,
    }  # fmt: skip
    return {
        "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "audio_token_id": 381,
        "dtype": "bfloat16", "eos_token_id": [1, 106], "image_token_id": 380, "model_type": "gemma4", "text_config": text,
        "tie_word_embeddings": True, "vision_config": _GEMMA4_VISION,
    }  # fmt: skip


_SHARED = ["sliding_attention", "full_attention"] * 2 + [
    "sliding_attention",
    "sliding_attention",
    "full_attention",
]
_GRANITE4 = {
    **_COMMON, "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_multiplier": 0.25,
    "embedding_multiplier": 12, "init_method": "mup", "layer_types": ["attention"] * 4, "logits_scaling": 10,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 256,
    "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 2, "mamba_proj_bias": False, "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid", "normalization_function": "rmsnorm", "num_experts_per_tok": 0, "num_local_experts": 0,
    "output_router_logits": False, "pad_token_id": 0, "position_embedding_type": "rope", "residual_multiplier": 0.22,
    "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.01, "shared_intermediate_size": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
_LFM2 = {
    **_TOKENS, "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 64, "block_ff_dim": 192,
    "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 64, "block_norm_eps": 1e-5,
    "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True, "conv_L_cache": 3,
    "conv_bias": False, "conv_dim": 64, "conv_dim_out": 64, "conv_use_xavier_init": True, "eos_token_id": 7,
    "full_attn_idxs": [2], "hidden_size": 64, "initializer_range": 0.02, "max_position_embeddings": 128000,
    "model_type": "lfm2", "norm_eps": 1e-5, "num_attention_heads": 4, "num_heads": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "use_cache": True,
    "use_pos_enc": True,
}  # fmt: skip
_PHI3 = {
    **_COMMON, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "model_type": "phi3",
    "original_max_position_embeddings": 16, "pad_token_id": 0, "resid_pdrop": 0.0,
}  # fmt: skip
_OLMO3 = {
    **_COMMON, "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "max_position_embeddings": 65536,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "model_type": "olmo3", "rope_theta": 500000,
    "pad_token_id": 0, "sliding_window": 16, "tie_word_embeddings": False, "num_key_value_heads": 4,
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                     "original_max_position_embeddings": 8192, "rope_type": "yarn"},
}  # fmt: skip
_EXAONE4 = {
    **_COMMON, "architectures": ["Exaone4ForCausalLM"], "max_position_embeddings": 65536, "model_type": "exaone4",
    "pad_token_id": 0, "rope_theta": 1000000,
    "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip

# name -> config.json
PUBLIC: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _llama(head_dim=16, tie_word_embeddings=True),
    "Llama-3.3-70B": _llama(tie_word_embeddings=False),
    "Mistral-Small-3.2-24B": {
        **_MISTRAL3,
        "text_config": {**_SIZES, "attention_dropout": 0.0, "head_dim": 32, "hidden_act": "silu", "initializer_range": 0.02,
                        "max_position_embeddings": 131072, "model_type": "mistral", "num_hidden_layers": 4,
                        "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True},
    },
    "Devstral-Small-2505": {
        **_COMMON, "architectures": ["MistralForCausalLM"], "head_dim": 32, "max_position_embeddings": 131072,
        "model_type": "mistral", "rope_theta": 1000000000.0, "sliding_window": None, "tie_word_embeddings": False,
    },
    "Devstral-2-123B": {"architectures": ["Ministral3ForCausalLM"], "dtype": "bfloat16",
                        **_ministral3(False, 16, 64.0, beta=0.0, all_dim=0.0)},
    "Ministral-8B-2410": {
        **_COMMON, "architectures": ["MinistralForCausalLM"], "head_dim": 32, "max_position_embeddings": 32768,
        "model_type": "ministral", "rope_theta": 100000000.0, "sliding_window": 64, "tie_word_embeddings": False,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    },
    "Ministral-3-3B": {**_MISTRAL3, "dtype": "bfloat16", "text_config": _ministral3(True, 16, 16.0)},
    "Ministral-3-14B": {**_MISTRAL3, "dtype": "bfloat16", "text_config": _ministral3(False, 16, 16.0)},
    "Qwen2.5-7B": {
        **_COMMON, "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768, "max_window_layers": 2,
        "model_type": "qwen2", "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "Qwen3-4B": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 32,
        "max_position_embeddings": 40960, "max_window_layers": 4, "model_type": "qwen3", "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    },
    "Qwen2.5-VL-7B": {
        **_COMMON, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "max_position_embeddings": 128000,
        "max_window_layers": 28, "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-06, "sliding_window": 32768,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False, "image_token_id": 371,
        "vision_start_token_id": 368, "vision_end_token_id": 369, "vision_token_id": 370, "video_token_id": 372,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                          "in_chans": 3, "out_hidden_size": 64, "patch_size": 8, "spatial_merge_size": 2,
                          "spatial_patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2,
                          "temporal_patch_size": 2},
    },
    "Qwen3-VL-8B": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 371, "model_type": "qwen3_vl",
        "text_config": {**_COMMON, "attention_bias": False, "dtype": "bfloat16", "head_dim": 32, "model_type": "qwen3_vl_text",
                        "max_position_embeddings": 262144, "rope_theta": 5000000, "use_cache": True, "rms_norm_eps": 1e-06,
                        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}},
        "tie_word_embeddings": False, "video_token_id": 372, "vision_start_token_id": 368, "vision_end_token_id": 369,
        "vision_config": {"deepstack_visual_indexes": [0], "depth": 2, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
                          "in_channels": 3, "intermediate_size": 64, "model_type": "qwen3_vl", "num_heads": 2,
                          "num_position_embeddings": 16, "out_hidden_size": 64, "patch_size": 8, "spatial_merge_size": 2,
                          "temporal_patch_size": 2},
    },
    "Qwen3.5-0.8B": _qwen3_5(True, 2, 2),
    "Qwen3.5-9B": _qwen3_5(False, 2, 4),
    "Qwen3.6-27B": _qwen3_5(False, 2, 6, output_gate_type="swish", partial_rotary_factor=0.25),
    "Qwen3.5-35B-A3B": _qwen3_5_moe(),
    "Qwen1.5-MoE-A2.7B": {
        **_COMMON, "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 64, "norm_topk_prob": False, "num_experts": 8,
        "num_experts_per_tok": 4, "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 256, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "Gemma-3-4B": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 370, "eoi_token_index": 371,
        "eos_token_id": [1, 106], "image_token_index": 372, "initializer_range": 0.02, "mm_tokens_per_image": 4,
        "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "model_type": "gemma3_text",
                        "num_hidden_layers": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        "vision_config": {"hidden_size": 64, "image_size": 16, "intermediate_size": 64, "model_type": "siglip_vision_model",
                          "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 8, "vision_use_head": False},
    },
    "Gemma-4-E2B": _gemma4(num_hidden_layers=7, layer_types=_SHARED, num_kv_shared_layers=3, use_double_wide_mlp=True,
                           hidden_size_per_layer_input=64, num_key_value_heads=1),
    "Gemma-4-E4B": _gemma4(num_hidden_layers=7, layer_types=_SHARED, num_kv_shared_layers=3,
                           hidden_size_per_layer_input=64),
    "Gemma-4-12B": {
        **_gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, use_bidirectional_attention="vision",
                  model_type="gemma4_unified_text"),
        "architectures": ["Gemma4UnifiedForConditionalGeneration"], "model_type": "gemma4_unified",
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 8, "patch_size": 8, "pooling_kernel_size": 1,
                          "output_proj_dims": 64, "model_type": "gemma4_unified_vision"},
    },
    "Gemma-4-26B-A4B": _gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, use_bidirectional_attention="vision",
                               enable_moe_block=True, num_experts=8, top_k_experts=4, moe_intermediate_size=64),
    "Gemma-4-31B": _gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, use_bidirectional_attention="vision"),
    "Phi-4-mini": {
        **_PHI3, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 512, "mlp_bias": False,
        "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_scaling": {"long_factor": [1.0 + 0.5 * i for i in range(6)], "short_factor": [1.0] * 6, "type": "longrope"},
    },
    "Phi-4": {**_PHI3, "original_max_position_embeddings": 16384, "max_position_embeddings": 16384, "rope_scaling": None,
              "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False},
    "Granite-4.0-micro": _GRANITE4,
    "GLM-4-9B-0414": {
        **_COMMON, "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "eos_token_id": [2, 3], "head_dim": 32,
        "max_position_embeddings": 32768, "model_type": "glm4", "pad_token_id": 0, "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "ERNIE-4.5-0.3B": {
        **_COMMON, "architectures": ["Ernie4_5ForCausalLM"], "head_dim": 32, "max_position_embeddings": 131072,
        "model_type": "ernie4_5", "pad_token_id": 0, "rope_theta": 500000, "tie_word_embeddings": True, "use_bias": False,
    },
    "Seed-OSS-36B": {
        **_COMMON, "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_out_bias": False,
        "head_dim": 32, "max_position_embeddings": 524288, "mlp_bias": False, "model_type": "seed_oss", "pad_token_id": 1,
        "pretraining_tp": 1, "residual_dropout": 0.1, "attention_dropout": 0.1, "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0, "tie_word_embeddings": False, "bos_token_id": 0,
    },
    "EXAONE-4.0-1.2B": {**_EXAONE4, "head_dim": 16, "sliding_window": None, "sliding_window_pattern": None,
                        "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
    "EXAONE-4.0-32B": {**_EXAONE4, "head_dim": 16, "sliding_window": 16, "sliding_window_pattern": "LLLG",
                       "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "tie_word_embeddings": False},
    "OLMo-2-7B": {
        **_COMMON, "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "max_position_embeddings": 4096,
        "model_type": "olmo2", "pad_token_id": 0, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "num_key_value_heads": 4,
    },
    "Olmo-3-7B": _OLMO3,
    "Olmo-3-32B": {**_OLMO3, "num_key_value_heads": 2, "num_hidden_layers": 4},
    "Hunyuan-4B": {
        **_COMMON, "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": False, "attention_head_dim": 32,
        "head_dim": 32, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "hunyuan_v1_dense",
        "norm_type": "rms", "pad_token_id": 0, "pretraining_tp": 1, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "use_cla": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "enable_lm_head_fp32": True, "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"},
    },
    "LFM2-350M": _LFM2,
    "LFM2-2.6B": {**_LFM2, "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
                  "layer_types": ["conv", "conv", "full_attention", "conv"], "tie_embedding": True},
    "LFM2.5-1.2B": {
        **{k: v for k, v in _LFM2.items() if k not in ("rope_theta", "full_attn_idxs", "torch_dtype", "block_ff_dim")},
        "dtype": "bfloat16", "intermediate_size": 192, "layer_types": ["conv", "conv", "full_attention", "conv"],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "tie_word_embeddings": True,
    },
    "SmolLM3-3B": {
        **_COMMON, "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "max_position_embeddings": 65536,
        "layer_types": ["full_attention"] * 4, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 0, "pretraining_tp": 2,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_cache": False,
        "use_sliding_window": False, "bos_token_id": None, "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_public(name: str, folder: Path) -> PreTrainedModel:
    """Writes a random model with this config.json and a tokenizer; returns it in the class that the file names, float32."""
    raw = PUBLIC[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = class_named(config)._from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter_name, parameter in model.named_parameters():
            # no scale makes the scores of Gemma 4 small: the norms' weights do
            if raw["model_type"].startswith("gemma4") and parameter_name.endswith(
                ("q_norm.weight", "k_norm.weight")
            ):
                parameter.mul_(0.4)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return model.eval()
