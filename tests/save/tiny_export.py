"""Tiny models with tokenizers that llama.cpp reads, adapters of every kind, and llama.cpp's answers to compare with."""

import json
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from oribi.gguf.llama_cpp import LlamaCpp
from oribi.gguf.source import GGUFSource
from oribi.models.decoder import build
from tests.models.tiny import tiny_config, tiny_pair

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 384
# what llama.cpp asks of a family's config, on top of the tiny one
FAMILY_CHANGES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {"use_sliding_window": False, "layer_types": None},
    # llama.cpp takes another epsilon than a file's: that of released models, which moves little
    "qwen2_vl_text": {"use_sliding_window": False, "layer_types": None, "rms_norm_eps": 1e-6},
    "qwen2_5_vl_text": {"use_sliding_window": False, "layer_types": None, "rms_norm_eps": 1e-6},
    "qwen3_vl_text": {"attention_bias": False, "num_deepstack_layers": 2},
    "qwen3_moe": {"use_sliding_window": False, "mlp_only_layers": [], "attention_bias": False},
    "qwen2_moe": {
        "use_sliding_window": False,
        "layer_types": None,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        }
    },
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "final_logit_softcapping": 10.0,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB},
    "gemma4_text+experts": {"vocab_size_per_layer_input": VOCAB},
    "gemma4_unified_text": {"use_double_wide_mlp": False},
    "qwen3_5_text": {"attention_bias": False, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen3_5_moe_text": {"attention_bias": False, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "phi3": {"sliding_window": None},
    "granite": {},
    "olmo2": {"attention_bias": False},
    "hunyuan_v1_dense": {"attention_bias": False},
    "lfm2": {},
    "olmo3": {"attention_bias": False, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "ministral": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "ministral3": {"sliding_window": None},
    "granitemoehybrid": {"position_embedding_type": "rope"},
    "glm4": {},
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"moe_norm_min": 1e-12},
    "granitemoe": {},
    "glm4_moe": {},
    "seed_oss": {"mlp_bias": False},
    "muse_glimmer_text": {
        "attention_bias": False,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "layer_rope_theta": [1e4, 1e4, 1e4, 0],
        "post_norm_eps": 1e-8,
    },
    "cohere": {"attention_bias": False},
    "cohere2": {"attention_bias": False, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "smollm3": {
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1, 1, 1, 0],
        "use_sliding_window": False,
        "layer_types": None,
    },
}


def pieces_of(model_type: str) -> bool | str:
    """Which of the tiny tokenizers a family's file has, as the argument of `exported`."""
    return "gemma4" if model_type.startswith("gemma4") else model_type.startswith("gemma")


# families of the same layers as another's, whose files are tested among all
EXPORTED = [
    pytest.param(name, marks=pytest.mark.long) if name in ("gemma4_unified_text", "granitemoe") else name
    for name in FAMILY_CHANGES
]


def export_config(model_type: str, **changes: object) -> PretrainedConfig:
    """A tiny config of a family that llama.cpp computes as it stands."""
    return tiny_config(model_type, **{"vocab_size": VOCAB, **FAMILY_CHANGES[model_type], **changes})


def tiny_model(config: PretrainedConfig, seed: int = 0):
    """oribi's model of a config, every weight random, in evaluation mode."""
    ours, _ = tiny_pair(config, seed)
    return ours.eval()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the digit split of SmolLM2, 256 bytes, a few merges, ChatML's tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "a"),
        ("i", "n"),
        ("Ġ", "the"),
        ("e", "r"),
        ("o", "n"),
        ("Ġ", "t"),
    ]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=TEMPLATE,
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece BPE as Llama 2's and Gemma's tokenizer.json has it: byte fallback and merges in score order."""
    letters = list(string.ascii_letters + string.digits + ".,!?'-" + "▁é")
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("i", "n"),
        ("▁", "a"),
        ("▁a", "n"),
        ("e", "r"),
        ("1", "2"),
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        BPE(
            {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        chat_template="{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    )  # fmt: skip


def gemma4_tokenizer() -> PreTrainedTokenizerFast:
    """The pieces as Gemma 4's tokenizer.json has them: no space before a text, runs of newlines, BOS before every prompt."""
    spec = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    model = spec["model"]
    model["merges"] += [["\n", "\n"], ["\n\n", "\n"], ["▁", "▁"], ["▁▁", "▁"]]
    for piece in ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁"):
        model["vocab"][piece] = len(model["vocab"])
    specials = [token["content"] for token in spec["added_tokens"]] + ["<|channel>", "<channel|>"]
    spec["added_tokens"] = []
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["decoder"]["decoders"].pop()
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    other = sentencepiece_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        chat_template="{{ bos_token }}" + other.chat_template,
    )  # fmt: skip


def with_splits(*patterns: str, whole_words: bool) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with another pre-tokenizer: patterns that cut one after the other."""
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = whole_words
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def adapted(model, seed: int = 1, scale: float = 0.05, **settings):
    """PEFT's model around `model`, its adapter's B no longer zero, in evaluation mode."""
    projections = [
        name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear
    ]
    targets = sorted(set(projections) - {"lm_head"})
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings})
    tuned = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return tuned.eval()


def read_back(path):
    """oribi's model with the weights of a GGUF file, dequantised by oribi's reader."""
    source = GGUFSource(Path(path))
    model = build(source.config, device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name, torch.device("cpu"), torch.float32))
    return model.eval()


@dataclass
class Distance:
    """How far a model and llama.cpp are apart: largest log-probability difference, mean KL, share of equal top tokens."""

    worst: float
    kl: float
    agreeing: float


def distance_from_llama_cpp(model, path, ids: list[int], steps: int = 12, adapter=None) -> Distance:
    """Compare `model` with llama.cpp on llama.cpp's greedy path of so many tokens from a prompt."""
    answer = LlamaCpp(path, 256, adapter).generate(ids, steps, top=model.config.vocab_size)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer.tokens[:-1]])).logits[0, len(ids) - 1 :]
    expected = logits.float().log_softmax(-1)
    worst, divergences = 0.0, []
    for place, found in zip(expected, answer.logprobs):
        if found is not None:
            theirs = torch.tensor([found[token] for token in range(len(place))])
            worst = max(worst, (place - theirs).abs().max().item())
            divergences.append((place.exp() * (place - theirs)).sum().item())
    likeliest = expected.argmax(-1).tolist()
    equal = sum(a == b for a, b in zip(likeliest, answer.tokens))
    return Distance(worst, sum(divergences) / len(divergences), equal / len(answer.tokens))
