"""Loading from a GGUF file: its config and its tensors, dequantised one at a time.

A GGUF file keeps the network under llama.cpp's names; what differs besides the names is undone here: q and k of the
Llama lineage are permuted for interleaved RoPE, Gemma's norms have 1 added, RoPE factors are tensors.
Source: GGUF, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oribi.errors import ModelError
from oribi.families import FAMILIES, MOST_LAYERS, family_of
from oribi.gguf.file import GGUFFile

# llama.cpp's architecture names for the families of the table; Mistral's dense models are "llama" there
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
# converted for interleaved RoPE: rows of a head alternate between its two halves
_INTERLEAVED = ("llama", "granite", "smollm3")
# what metadata of wrong types or sizes turns into
_DAMAGED = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFSource:
    """Tensors of a GGUF file under the model's parameter names, dequantised as they are read.

    Args:
        path: the file.

    Raises:
        ModelError: it is no GGUF file, is split, or its architecture is outside the family table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        if self.value("split.count", 1) > 1:
            raise ModelError(
                f"{path} is one of {self.value('split.count')} parts; join them with `llama-gguf-split --merge`"
            )
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in MODEL_TYPES:
            raise ModelError(
                f"{path} holds architecture {self.architecture!r}; oribi reads {', '.join(MODEL_TYPES)} from GGUF"
            )
        self._tensors = self.file.tensors
        self._names = {self._rename(name): name for name in self._tensors if name not in _ROPE_TENSORS}
        try:
            self.config = self._config()
        except ModelError:
            raise
        except _DAMAGED as error:
            raise ModelError(
                f"{path}: its metadata or tensors do not make a {self.architecture} model: {error}"
            ) from error
        self._heads = (self.config.num_attention_heads, self.config.num_key_value_heads)
        self._norm_offset = FAMILIES[self.config.model_type].norm_offset

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key stands for the file's architecture."""
        return self.file.metadata.get(key.replace("{arch}", getattr(self, "architecture", "")), default)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._tensors[stored].shape for name, stored in self._names.items()}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        offset = self._norm_offset if "norm" in name else 0.0
        value = self.file.read(self._names[name], dtype or torch.float32, offset)
        if self.architecture in _INTERLEAVED and (match := re.search(r"\.([qk])_proj\.", name)):
            value = _split_halves(value, self._heads[match[1] == "k"])
        return value.to(device)

    def close(self) -> None:
        pass  # nothing stays open

    def _rename(self, stored: str) -> str:
        stem, _, suffix = stored.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is None:
            return f"{_TOP.get(stem, stem)}.{suffix}"
        layer, part = match.groups()
        name = _LAYER.get(part, part)
        if part == "ffn_norm" and f"blk.{layer}.post_attention_norm.weight" in self._tensors:
            name = "pre_feedforward_layernorm"  # sandwich norms
        if part == "ffn_up" and f"blk.{layer}.ffn_gate.weight" not in self._tensors:
            name = "mlp.gate_up_proj"
        return f"model.layers.{layer}.{name}.{suffix}"

    def _config(self) -> PretrainedConfig:
        model_type = MODEL_TYPES[self.architecture]
        if self.value("{arch}.expert_count", 0):
            raise ModelError(f"{self.path} is a mixture of experts, which oribi does not read from GGUF")
        vocab_size, hidden_size = self.shapes()["model.embed_tokens.weight"]
        if self._number("block_count") > MOST_LAYERS:
            raise ModelError(
                f"{self.path}: block_count = {self._number('block_count')}; at most {MOST_LAYERS:,} is possible"
            )
        heads = self._number("attention.head_count")
        head_dim = self.value("{arch}.attention.key_length") or hidden_size // heads
        settings = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.value("{arch}.attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.value("tokenizer.ggml.padding_token_id"),
            "rope_parameters": self._rope(head_dim),
            **_DETAILS.get(self.architecture, lambda source: {})(self),
        }
        if model_type == "phi3":
            settings.pop("head_dim")  # its config derives it
        config = AutoConfig.for_model(model_type, **settings)
        config.architectures = [FAMILIES[model_type].architecture]
        if family_of(config) is None:
            raise ModelError(
                f"{self.path}: this {self.architecture} model uses a feature outside oribi's family table"
            )
        return config

    def _number(self, key: str) -> Any:
        value = self.value(f"{{arch}}.{key}")
        if value is None:
            raise ModelError(f"{self.path} lacks the metadata key {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ModelError(
                    f"{self.path}: {self.architecture}.{key} differs by layer, which oribi does not read"
                )
            return value[0]
        return value

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """`rope_parameters` of a config from the metadata and the factor tensors."""
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": float(self.value("{arch}.rope.freq_base", 10000.0)),
        }
        rotary = self.value("{arch}.rope.dimension_count") or head_dim
        if rotary != head_dim:
            rope["partial_rotary_factor"] = rotary / head_dim
        kind = self.value("{arch}.rope.scaling.type", "none")
        factor = self.value("{arch}.rope.scaling.factor", 1.0)
        original = self.value("{arch}.rope.scaling.original_context_length")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": float(factor)}
            if original:
                rope["original_max_position_embeddings"] = original
        if "rope_factors_long.weight" in self._tensors:
            rope |= {
                "rope_type": "longrope",
                "long_factor": self._factors("rope_factors_long.weight"),
                "short_factor": self._factors("rope_factors_short.weight"),
                "original_max_position_embeddings": original,
                "factor": self._number("context_length") / original,
                "attention_factor": float(self.value("{arch}.rope.scaling.attn_factor", 1.0)),
            }
        elif "rope_freqs.weight" in self._tensors:
            rope |= self._llama3(rope["rope_theta"], rotary)
        return rope

    def _factors(self, name: str) -> list[float]:
        return self.file.read(name, torch.float32).tolist()

    def _llama3(self, theta: float, rotary: int) -> dict[str, Any]:
        """Parameters of the llama3 kind whose factors are those of the file, which keeps only the factors."""
        found = torch.tensor(self._factors("rope_freqs.weight"))
        if bool((found == 1).all()):
            return {}
        plain = 1.0 / theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
        context = self._number("context_length")
        factor = round(found.max().item(), 4)  # float32 arithmetic left its trace in the file
        for original in (8192, int(context / factor)):
            candidate = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            probe = AutoConfig.for_model(
                "llama", head_dim=rotary, max_position_embeddings=max(context, original + 1),
                rope_parameters={**candidate, "rope_theta": theta},
            )  # fmt: skip
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](probe, torch.device("cpu"))
            if torch.allclose(plain / scaled, found, rtol=1e-3):
                return candidate
        factors = found.tolist()
        return {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": context,
            "factor": 1.0,
            "attention_factor": 1.0,
        }


def _gemma2(source: GGUFSource) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": source.value("{arch}.attention.sliding_window", 4096),
        "attn_logit_softcapping": source.value("{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": source.value("{arch}.final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(source, layers_of_27b=46),
    }


def _gemma3(source: GGUFSource) -> dict[str, Any]:
    layers = source.value("{arch}.block_count")
    period = source.value("{arch}.attention.sliding_window_pattern", 6)
    local = float(source.value("{arch}.rope.freq_base_swa", 10000.0))
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": source.value("{arch}.attention.sliding_window"),
        "layer_types": [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)
        ],
        "attn_logit_softcapping": source.value("{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": source.value("{arch}.final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(source, layers_of_27b=62),
        "rope_parameters": {
            "full_attention": source._rope(source.value("{arch}.attention.key_length")),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _query_scalar(source: GGUFSource, layers_of_27b: int) -> float:
    # no metadata key holds it; llama.cpp tells the 27B models, the only ones that differ, by their depth
    if source.value("{arch}.block_count") == layers_of_27b:
        return source.value("{arch}.embedding_length") / source.value("{arch}.attention.head_count")
    return source.value("{arch}.attention.key_length")


def _granite(source: GGUFSource) -> dict[str, Any]:
    return {
        "attention_multiplier": source.value("{arch}.attention.scale"),
        "embedding_multiplier": source.value("{arch}.embedding_scale", 1.0),
        "residual_multiplier": source.value("{arch}.residual_scale", 1.0),
        "logits_scaling": source.value("{arch}.logit_scale", 1.0),
    }


def _phi3(source: GGUFSource) -> dict[str, Any]:
    original = source.value("{arch}.rope.scaling.original_context_length")
    return {
        "sliding_window": source.value("{arch}.attention.sliding_window") or None,
        "original_max_position_embeddings": original or source.value("{arch}.context_length"),
        "pad_token_id": source.value("tokenizer.ggml.padding_token_id"),
    }


def _smollm3(source: GGUFSource) -> dict[str, Any]:
    # llama.cpp holds the interval as a constant of the architecture
    return {"no_rope_layer_interval": 4, "use_sliding_window": False}


_DETAILS: dict[str, Callable[[GGUFSource], dict[str, Any]]] = {
    "qwen2": lambda source: {"use_sliding_window": False},
    "qwen3": lambda source: {"use_sliding_window": False},
    "gemma": lambda source: {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
    "phi3": _phi3,
    "smollm3": _smollm3,
}


def _split_halves(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from alternating between its halves to one half after the other; value [N, ...]."""
    if heads < 1 or value.shape[0] % (2 * heads):
        raise ModelError(
            f"the GGUF file is damaged: {heads} heads cannot share {value.shape[0]} rows of a query or key matrix. "
            "Download it again"
        )
    half = value.shape[0] // heads // 2
    return value.view(heads, half, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
