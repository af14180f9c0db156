"""Writes a random model of public dimensions as a bitsandbytes 4-bit checkpoint, so that all stacks load equal codes.

    python benchmarks/random_model.py llama-3.2-1b /tmp/llama-3.2-1b

Speed and memory do not depend on the weights' values. N: out features, K: in features.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": LLAMA3_ROPE,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, tied: bool) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }


MODELS: dict[str, dict[str, object]] = {
    "llama-3.1-8b": {**LLAMA, **_sizes(4096, 32, 32, 8, 14336, False)},
    # beyond its positions, for rows that its own config would cut
    "llama-3.1-8b-1m": {**LLAMA, **_sizes(4096, 32, 32, 8, 14336, False), "max_position_embeddings": 2**20},
    "llama-3.2-3b": {**LLAMA, **_sizes(3072, 28, 24, 8, 8192, True)},
    "llama-3.2-1b": {**LLAMA, **_sizes(2048, 16, 32, 8, 8192, True)},
    "qwen2.5-0.5b": {**QWEN, **_sizes(896, 24, 14, 2, 4864, True)},
    "gemma-2-2b": {
        **LLAMA,
        **_sizes(2304, 26, 8, 4, 9216, True),
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256000,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 13,
    },
    "tiny": {**LLAMA, **_sizes(128, 2, 4, 2, 256, True), "vocab_size": 512},
}
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}


def write(name: str, directory: Path, seed: int = 0) -> None:
    """Writes config, tokenizer and one safetensors file of the named model, quantised on the GPU if there is one."""
    from bitsandbytes.functional import quantize_4bit

    config = MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    tensors: dict[str, torch.Tensor] = {}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(0.02).to(torch.bfloat16)

    def packed(key: str, n: int, k: int) -> None:
        codes, state = quantize_4bit(normal(n, k), blocksize=64, compress_statistics=True, quant_type="nf4")
        tensors[f"{key}.weight"] = codes.cpu()
        for part, value in state.as_dict(packed=True).items():
            tensors[f"{key}.weight.{part}"] = value.cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors["model.embed_tokens.weight"] = normal(config["vocab_size"], hidden).cpu()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, n, k in (
            ("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            packed(f"{layer}.{part}", n, k)
            if config["model_type"] == "qwen2" and part[-6] in "qkv":
                tensors[f"{layer}.{part}.bias"] = normal(n).cpu()
        for norm in norms:
            tensors[f"{layer}.{norm}.weight"] = ones()
    tensors["model.norm.weight"] = ones()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden).cpu()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    whole = {**config, "dtype": "bfloat16", "use_cache": True, "quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(whole, indent=1))
    _tokenizer().save_pretrained(directory)


def _tokenizer():
    """A byte-level tokenizer: stacks want one to load, the benchmark feeds token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocabulary[letter] = len(vocabulary)
    vocabulary["Ġt"] = len(vocabulary)  # llama.cpp loads no BPE tokenizer without merges
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
