"""Writes a random model of public dimensions as a bitsandbytes 4-bit checkpoint, so that all stacks load equal codes.

gpt-oss is written as it is released: experts in MXFP4, everything else in bfloat16.

    python benchmarks/random_model.py llama-3.2-1b /tmp/llama-3.2-1b
    python benchmarks/random_model.py llama-3.1-8b-q4_k_m /tmp/llama-3.1-8b-q4_k_m    # a GGUF file
    python benchmarks/random_model.py qwen3-30b-a3b-q4_k_m /tmp/qwen3-30b-a3b-q4_k_m
    python benchmarks/random_model.py qwen3-30b-a3b-12-layers-16bit /tmp/short        # bfloat16, to quantise when it is loaded

Speed and memory do not depend on the weights' values. N: out features, K: in features.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
LLAMA = {
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


_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS: dict[str, dict[str, object]] = {
    "llama-3.1-8b": {**LLAMA, **_sizes(4096, 32, 32, 8, 14336, False)},
    # beyond its positions, for rows that its own config would cut
    "llama-3.1-8b-1m": {**LLAMA, **_sizes(4096, 32, 32, 8, 14336, False), "max_position_embeddings": 2**20},
    "llama-3.1-70b": {**LLAMA, **_sizes(8192, 80, 64, 8, 28672, False)},
    "llama-3.2-3b": {**LLAMA, **_sizes(3072, 28, 24, 8, 8192, True)},
    "llama-3.2-1b": {**LLAMA, **_sizes(2048, 16, 32, 8, 8192, True)},
    "qwen2.5-0.5b": {**QWEN, **_sizes(896, 24, 14, 2, 4864, True)},
    "gemma-2-2b": {
        **LLAMA,
        **_sizes(2304, 26, 8, 4, 9216, True),
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
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text",
        **_ENDS,
        "vocab_size": 248320,
    },  # transformers' defaults are its sizes
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        **_ENDS,
        **_sizes(2048, 48, 32, 4, 6144, False),
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        **_ENDS,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },  # of the rest, transformers' defaults are its sizes
    "ministral-3-8b": {"model_type": "ministral3", **_ENDS, "vocab_size": 131072},  # here too
    "gemma-4-12b": {
        "model_type": "gemma4_text",
        **_ENDS,
        **_sizes(3840, 48, 16, 8, 15360, True),
        "vocab_size": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "gemma-4-26b-a4b": {
        "model_type": "gemma4_text",
        **_ENDS,
        **_sizes(2816, 30, 16, 8, 2112, True),
        "vocab_size": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "gemma-4-e4b": {
        "model_type": "gemma4_text",
        **_ENDS,
        **_sizes(2560, 42, 8, 2, 10240, True),
        "vocab_size": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 18,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
    },
    "lfm2-1.2b": {
        "model_type": "lfm2",
        **_ENDS,
        **_sizes(2048, 16, 32, 8, 12288, True),
        "vocab_size": 65536,
        "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    },
    "tiny": {**LLAMA, **_sizes(128, 2, 4, 2, 256, True), "vocab_size": 512},
}
# a quarter of the layers, which stacks that leave experts in 16 bits can hold, too
MODELS["qwen3-30b-a3b-12-layers"] = {**MODELS["qwen3-30b-a3b"], "num_hidden_layers": 12}
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


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def mxfp4_tensors(
    key: str, shape: tuple[int, ...], generator: torch.Generator, device: str
) -> dict[str, torch.Tensor]:
    """Random blocks and scales of a stack of experts [E, in, out]; values have a deviation of about 0.02."""
    experts, columns, rows = shape
    sizes = (experts, rows, columns // 32)
    whole = {"dtype": torch.uint8, "generator": generator, "device": device}
    return {
        f"{key}_blocks": torch.randint(0, 256, (*sizes, 16), **whole).cpu(),
        f"{key}_scales": torch.randint(119, 121, sizes, **whole).cpu(),
    }


def packed_matrices(key: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes [N, K] of the matrices of a tensor that is packed; of stacked experts, as checkpoints hold each."""
    prefix, _, stack = key.rpartition(".")
    if stack == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return [
            (f"{prefix}.{i}.{part}.weight", half)
            for i in range(shape[0])
            for part in ("gate_proj", "up_proj")
        ]
    if stack == "down_proj":
        return [(f"{prefix}.{i}.down_proj.weight", tuple(shape[1:])) for i in range(shape[0])]
    return [(key, tuple(shape))]


def write(name: str, directory: Path, seed: int = 0) -> None:
    """Writes config, tokenizer and one safetensors file of the named model, quantised on the GPU if there is one.

    A name that ends with "-16bit" leaves every tensor in bfloat16; one that ends with a method of GGUF, such as "-q4_k_m", writes
    model.gguf in place of the safetensors file.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    in_16_bits = name.endswith("-16bit")
    name = name.removesuffix("-16bit")
    if name not in MODELS:
        write_gguf(*name.rsplit("-", 1), directory, seed)
        return
    fields = dict(MODELS[name])
    directory.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    in_mxfp4 = config.model_type == "gpt_oss"
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path != "lm_head" and not path.endswith(".router.proj")
    }
    tensors: dict[str, torch.Tensor] = {}
    for key, meant in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if in_mxfp4 and key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors |= mxfp4_tensors(key, tuple(meant.shape), generator, device)
            continue
        is_packed = key in linear or (".experts." in key and not in_mxfp4)
        for name, shape in packed_matrices(key, meant.shape) if is_packed else ():
            x = torch.randn(*shape, generator=generator, device=device).mul_(0.02).to(torch.bfloat16)
            codes, state = quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
            if in_16_bits or in_mxfp4:
                # so that stacks that quantise it and stacks that leave it in 16 bits train the same function
                tensors[name] = dequantize_4bit(codes, state).cpu()
                continue
            tensors[name] = codes.cpu()
            for part, value in state.as_dict(packed=True).items():
                tensors[f"{name}.{part}"] = value.cpu()
        if is_packed:
            continue
        if config.model_type == "gemma4_text" and key.endswith(("q_norm.weight", "k_norm.weight")):
            # its attention scales no products: with ones, random keys would be told apart as no trained model does
            tensors[key] = torch.full(meant.shape, len(meant) ** -0.25, dtype=torch.bfloat16)
        elif meant.dim() < 2 and not key.endswith("bias"):  # of norms, and decays
            tensors[key] = torch.ones(meant.shape, dtype=torch.bfloat16)
        else:
            x = torch.randn(*meant.shape, generator=generator, device=device).mul_(0.02)
            tensors[key] = x.to(torch.bfloat16).cpu()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    whole = {
        **config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
    }
    if not in_16_bits:
        whole["quantization_config"] = MXFP4 if in_mxfp4 else QUANTIZATION
    (directory / "config.json").write_text(json.dumps(whole, indent=1))
    _tokenizer().save_pretrained(directory)


def write_gguf(name: str, method: str, directory: Path, seed: int) -> None:
    """Writes config, tokenizer and a GGUF file of the named model by oribi's own quantiser."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from oribi.gguf.writer import write_files

    fields = dict(MODELS[name])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        shapes = {
            name: shape
            for key, value in AutoModelForCausalLM.from_config(config).state_dict().items()
            if key != "lm_head.weight" or not config.tie_word_embeddings
            for name, shape in packed_matrices(key, value.shape)
        }

    def read(key: str, *_: object) -> torch.Tensor:
        shape = shapes[key]
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(0.02) if len(shape) > 1 else torch.ones_like(values)

    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    source = SimpleNamespace(shapes=lambda: shapes, read=read)
    write_files({method: directory / "model.gguf"}, source, config, _tokenizer(), name=name, device=device)


def _tokenizer():
    """A byte-level tokenizer: stacks want one to load, the benchmark feeds token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # a set, in another order each time
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
