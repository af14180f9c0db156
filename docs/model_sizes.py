"""Sizes of common models as their published config.json states them: for the generated pages and for the example run files.

hub name -> (model_type, fields). Fields that do not change memory or time are left out.
"""

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from oribi.memory.architecture import Architecture
from oribi.models.decoder import build

_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_DELTA = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
_GEMMA4 = _TIED | {"global_head_dim": 512}


def _kinds(period: int, layers: int, others: str = "sliding_attention") -> dict[str, Any]:
    """The last layer of each period sees everything."""
    return {"layer_types": [others if (i + 1) % period else "full_attention" for i in range(layers)]}


# width, MLP, layers, heads, key-value heads, head dimensions, vocabulary, positions; further fields
_MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", (2048, 8192, 16, 32, 8, 64, 128256, 131072), _TIED),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", (3072, 8192, 28, 24, 8, 128, 128256, 131072), _TIED),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", (4096, 14336, 32, 32, 8, 128, 128256, 131072), _UNTIED),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", (8192, 28672, 80, 64, 8, 128, 128256, 131072), _UNTIED),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", (576, 1536, 30, 9, 3, 64, 49152, 8192), _TIED),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", (2048, 8192, 24, 32, 32, 64, 49152, 8192), _TIED),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "mistral", (4096, 14336, 32, 32, 8, 128, 32768, 32768), {**_UNTIED, "sliding_window": None},
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        "mistral", (5120, 14336, 40, 32, 8, 128, 131072, 131072), {**_UNTIED, "sliding_window": None},
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        "mistral", (5120, 32768, 40, 32, 8, 128, 131072, 32768), {**_UNTIED, "sliding_window": None},
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", (896, 4864, 24, 14, 2, 64, 151936, 32768), _TIED),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", (1536, 8960, 28, 12, 2, 128, 151936, 32768), _TIED),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", (2048, 11008, 36, 16, 2, 128, 151936, 32768), _TIED),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", (3584, 18944, 28, 28, 4, 128, 152064, 32768), _UNTIED),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", (5120, 13824, 48, 40, 8, 128, 152064, 32768), _UNTIED),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", (5120, 27648, 64, 40, 8, 128, 152064, 32768), _UNTIED),
    "Qwen/Qwen2.5-72B-Instruct": ("qwen2", (8192, 29568, 80, 64, 8, 128, 152064, 32768), _UNTIED),
    "Qwen/Qwen3-0.6B": ("qwen3", (1024, 3072, 28, 16, 8, 128, 151936, 40960), _TIED),
    "Qwen/Qwen3-1.7B": ("qwen3", (2048, 6144, 28, 16, 8, 128, 151936, 40960), _TIED),
    "Qwen/Qwen3-4B": ("qwen3", (2560, 9728, 36, 32, 8, 128, 151936, 40960), _TIED),
    "Qwen/Qwen3-8B": ("qwen3", (4096, 12288, 36, 32, 8, 128, 151936, 40960), _UNTIED),
    "Qwen/Qwen3-14B": ("qwen3", (5120, 17408, 40, 40, 8, 128, 151936, 40960), _UNTIED),
    "Qwen/Qwen3-32B": ("qwen3", (5120, 25600, 64, 64, 8, 128, 151936, 40960), _UNTIED),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl_text", (3584, 18944, 28, 28, 4, 128, 152064, 128000), _UNTIED,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl_text", (4096, 12288, 36, 32, 8, 128, 151936, 262144), _UNTIED),
    "Qwen/Qwen3.5-9B": (
        "qwen3_5_text", (4096, 12288, 32, 16, 4, 256, 248320, 262144),
        _UNTIED | _DELTA | {"linear_num_value_heads": 32} | _kinds(4, 32, "linear_attention"),
    ),
    "Qwen/Qwen3.5-27B": (
        "qwen3_5_text", (5120, 17408, 64, 24, 4, 256, 248320, 262144),
        _UNTIED | _DELTA | {"linear_num_value_heads": 48} | _kinds(4, 64, "linear_attention"),
    ),
    "Qwen/Qwen3.5-35B-A3B": (
        "qwen3_5_moe_text", (2048, 512, 40, 16, 2, 256, 248320, 262144),
        _UNTIED | _DELTA | {"linear_num_value_heads": 32} | _kinds(4, 40, "linear_attention"),
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        "qwen2_moe", (2048, 5632, 24, 16, 16, 128, 151936, 8192), _UNTIED | {"shared_expert_intermediate_size": 5632},
    ),
    "Qwen/Qwen3-30B-A3B": (
        "qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151936, 40960),
        _UNTIED | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss", (2880, 2880, 24, 64, 8, 64, 201088, 131072), _UNTIED | {"num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": (
        "ernie4_5_moe", (2560, 12288, 28, 20, 4, 128, 103424, 131072),
        _TIED | {"moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2},
    ),
    "zai-org/GLM-4.5-Air": (
        "glm4_moe", (4096, 10944, 46, 96, 8, 128, 151552, 131072),
        _UNTIED | {"n_routed_experts": 128, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    ),
    "google/gemma-2b-it": ("gemma", (2048, 16384, 18, 8, 1, 256, 256000, 8192), _TIED),
    "google/gemma-2-2b-it": ("gemma2", (2304, 9216, 26, 8, 4, 256, 256000, 8192), _TIED),
    "google/gemma-2-9b-it": ("gemma2", (3584, 14336, 42, 16, 8, 256, 256000, 8192), _TIED),
    "google/gemma-2-27b-it": ("gemma2", (4608, 36864, 46, 32, 16, 128, 256000, 8192), _TIED),
    "google/gemma-3-1b-it": ("gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144, 32768), _TIED | {"sliding_window": 512}),
    "google/gemma-3-4b-it": (
        "gemma3_text", (2560, 10240, 34, 8, 4, 256, 262208, 131072), _TIED | {"sliding_window": 1024},
    ),
    "google/gemma-3-12b-it": (
        "gemma3_text", (3840, 15360, 48, 16, 8, 256, 262208, 131072), _TIED | {"sliding_window": 1024},
    ),
    "google/gemma-3-27b-it": (
        "gemma3_text", (5376, 21504, 62, 32, 16, 128, 262208, 131072), _TIED | {"sliding_window": 1024},
    ),
    "google/gemma-4-E2B-it": (
        "gemma4_text", (1536, 6144, 35, 8, 1, 256, 262144, 131072),
        _GEMMA4 | _kinds(5, 35) | {"sliding_window": 512, "num_kv_shared_layers": 20, "use_double_wide_mlp": True},
    ),
    "google/gemma-4-E4B-it": (
        "gemma4_text", (2560, 10240, 42, 8, 2, 256, 262144, 131072),
        _GEMMA4 | _kinds(6, 42) | {"sliding_window": 512, "num_kv_shared_layers": 18},
    ),
    "google/gemma-4-12B-it": (
        "gemma4_unified_text", (3840, 15360, 48, 16, 8, 256, 262144, 262144),
        _GEMMA4 | _kinds(6, 48) | {"sliding_window": 1024, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "google/gemma-4-26B-A4B-it": (
        "gemma4_text", (2816, 2112, 30, 16, 8, 256, 262144, 262144),
        _GEMMA4 | _kinds(6, 30) | {"sliding_window": 1024, "attention_k_eq_v": True, "num_global_key_value_heads": 2,
                                   "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128,
                                   "top_k_experts": 8, "moe_intermediate_size": 704},
    ),
    "google/gemma-4-31B-it": (
        "gemma4_text", (5376, 21504, 60, 32, 16, 256, 262144, 262144),
        _GEMMA4 | _kinds(6, 60) | {"sliding_window": 1024, "attention_k_eq_v": True, "num_global_key_value_heads": 4,
                                   "hidden_size_per_layer_input": 0},
    ),
    "microsoft/Phi-3.5-mini-instruct": (
        "phi3", (3072, 8192, 32, 32, 32, 96, 32064, 131072), _UNTIED | {"sliding_window": None},
    ),
    "microsoft/phi-4": ("phi3", (5120, 17920, 40, 40, 10, 128, 100352, 16384), _UNTIED | {"sliding_window": None}),
    "ibm-granite/granite-3.3-2b-instruct": ("granite", (2048, 8192, 40, 32, 8, 64, 49159, 131072), _TIED),
    "ibm-granite/granite-3.3-8b-instruct": ("granite", (4096, 12800, 40, 32, 8, 128, 49159, 131072), _TIED),
    "allenai/OLMo-2-0425-1B-Instruct": ("olmo2", (2048, 8192, 16, 16, 16, 128, 100352, 4096), _UNTIED),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", (4096, 11008, 32, 32, 32, 128, 100352, 4096), _UNTIED),
    "allenai/OLMo-2-1124-13B-Instruct": ("olmo2", (5120, 13824, 40, 40, 40, 128, 100352, 4096), _UNTIED),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", (2048, 11008, 36, 16, 4, 128, 128256, 65536), _TIED),
    "allenai/Olmo-3-7B-Instruct": ("olmo3", (4096, 11008, 32, 32, 32, 128, 100278, 65536), _UNTIED),
    "mistralai/Ministral-8B-Instruct-2410": ("ministral", (4096, 12288, 36, 32, 8, 128, 131072, 32768), _UNTIED),
    "mistralai/Ministral-3-8B-Instruct-2512": ("ministral3", (4096, 14336, 34, 32, 8, 128, 131072, 262144), _UNTIED),
    "ibm-granite/granite-4.0-1b": (
        "granitemoehybrid", (2048, 4096, 40, 16, 4, 128, 100352, 131072),
        _TIED | {"shared_intermediate_size": 4096, "num_local_experts": 0, "layer_types": ["full_attention"] * 40,
                 "position_embedding_type": "rope", "mamba_n_heads": 64},
    ),
    "zai-org/GLM-4-9B-0414": ("glm4", (4096, 13696, 40, 32, 2, 128, 151552, 32768), _UNTIED),
    "baidu/ERNIE-4.5-0.3B-PT": ("ernie4_5", (1024, 3072, 18, 16, 2, 128, 103424, 131072), _TIED),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": ("seed_oss", (5120, 27648, 64, 80, 8, 128, 155136, 524288), _UNTIED),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": (
        "exaone4", (2048, 4096, 30, 32, 8, 64, 102400, 65536),
        _TIED | {"sliding_window": None, "layer_types": ["full_attention"] * 30},
    ),
    "LiquidAI/LFM2-1.2B": (
        "lfm2", (2048, 12288, 16, 32, 8, 64, 65536, 128000),
        _TIED | {"layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]},
    ),
    "meta-models/Muse-Glimmer-30B": ("muse_glimmer_text", (6656, 19968, 52, 32, 2, 128, 202048, 131072), _UNTIED),
    "CohereLabs/c4ai-command-r7b-12-2024": ("cohere2", (4096, 14336, 32, 32, 8, 128, 256000, 132096), _TIED),
    "CohereLabs/c4ai-command-a-03-2025": ("cohere2", (12288, 36864, 64, 96, 8, 128, 256000, 131072), _TIED),
    "LGAI-EXAONE/EXAONE-4.0-32B": ("exaone4", (5120, 27392, 64, 40, 8, 128, 102400, 131072), _UNTIED),
}  # fmt: skip
NAMES = tuple(_MODELS)


def config_of(name: str) -> PretrainedConfig:
    """A model's config, as far as its sizes go."""
    model_type, sizes, more = _MODELS[name]
    fields = dict(zip(_FIELDS, sizes, strict=True))
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    if model_type == "phi3":
        del fields["head_dim"]  # it follows from the width
    return AutoConfig.for_model(model_type, **fields, **special, **more)


def architecture(name: str) -> Architecture:
    """A model's sizes as the estimate takes them, without its files."""
    config = config_of(name)
    decoder = build(config, dtype=torch.bfloat16)
    return Architecture(name, config, None, decoder, in_mxfp4=config.model_type == "gpt_oss")  # type: ignore[arg-type]
