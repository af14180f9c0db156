"""The table of model families: one row per family, with what the decoder reads and how the family is stored in a GGUF file.

A row says how a family differs from the plain pre-norm decoder (Llama). Sizes, epsilons, biases and windows come from
the checkpoint's config. A new family is a new row; a flag names a property, never a model.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Literal

from transformers import PretrainedConfig

# the deepest models have some hundreds; each layer costs host memory before a weight is read
MOST_LAYERS = 4096


@dataclass(frozen=True)
class InGGUF:
    """How a family is stored in a GGUF file, and what llama.cpp computes; the decoder's own flags are not repeated here.

    Args:
        architecture: llama.cpp's name. Files of an architecture are read as its first row.
        interleaved_rope: llama.cpp rotates neighbouring pairs, so the rows of q and k are reordered.
        biases: the biases that it reads: of q, k and v, or of every linear layer.
        rope_factors: the kinds of RoPE that it reads from tensors of frequency factors.
        partial_rope: it rotates as many dimensions of a head as the file says; otherwise all.
        head: "tied": it reads no output tensor; "separate": it needs one even where the embeddings are tied.
        window_period: every `window_period`-th layer sees everything and the others slide; 0: no windows.
        window_key_required: it loads no file without the window's key, whose value it ignores.
        no_rope_period: every `no_rope_period`-th layer has no RoPE; 0: all have.
        derived_head_dim: a head has hidden_size / num_attention_heads dimensions; the config has no field for it.
        original_context_field: the config has original_max_position_embeddings outside `rope_parameters`.
        attention_softcap: it reads attn_logit_softcapping.
        stripping_names: a model whose general.name holds one of these, whatever its architecture, was trained with the
            whitespace after control tokens swallowed.
        layers_of_27b: queries are scaled by head_dim ** -0.5, but in a model with this many layers by
            (hidden_size / num_attention_heads) ** -0.5.
        layers_of_70b: in a model with this many layers whose heads share values, values get more bits.
    """

    architecture: str
    interleaved_rope: bool = False
    biases: Literal["qkv", "all"] = "qkv"
    rope_factors: tuple[Literal["llama3", "longrope"], ...] = ()
    partial_rope: bool = False
    head: Literal["tied", "separate"] | None = None
    window_period: int = 0
    window_key_required: bool = False
    no_rope_period: int = 0
    derived_head_dim: bool = False
    original_context_field: bool = False
    attention_softcap: bool = False
    stripping_names: tuple[str, ...] = ()
    layers_of_27b: int = 0
    layers_of_70b: int = 0


@dataclass(frozen=True)
class Family:
    """How one family differs from the plain pre-norm decoder.

    Args:
        architecture: class name of the family's causal LM in transformers, written to config.json on saving.
        mixers: entry of config.layer_types -> what mixes the tokens of such a layer, in the words of `models.mixers.MIXERS`;
            others are attention.
        norms: "pre" (norm before attention and before the MLP), "post" (after each), "sandwich" (before and after).
        norm_offset: RMSNorm multiplies by (norm_offset + weight).
        qk_norm: RMSNorm of q and k: over each head, over the whole projection, or none.
        fused_projections: the checkpoint holds q, k, v as one qkv_proj and gate, up as one gate_up_proj.
        attention_bias: "config" reads config.attention_bias for q, k, v, o; "qkv" is q, k, v always; else none.
        mlp_bias: whether config.mlp_bias is read.
        windows: which layers slide: none, all (config.sliding_window), or by config.layer_types.
        attention_scale: name of the config field that gives the scale; None is head_dim ** -0.5.
        attention_scale_power: the scale is that field to this power.
        softcaps: whether config.attn_logit_softcapping and config.final_logit_softcapping are read.
        embedding_scale: embeddings are multiplied by sqrt(hidden_size), rounded to the weight's dtype.
        multipliers: whether config.embedding_multiplier, residual_multiplier and logits_scaling are read.
        rope_by_layer_type: config.rope_parameters has one entry for each layer type.
        no_rope_layers: whether config.no_rope_layers turns RoPE off in some layers.
        gguf: how it is stored in a GGUF file; None where oribi reads and writes none.
    """

    architecture: str
    mixers: Mapping[str, str] = field(default_factory=dict)
    norms: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "projection"] | None = None
    fused_projections: bool = False
    attention_bias: Literal["config", "qkv"] | None = "config"
    mlp_bias: bool = False
    windows: Literal["all", "layer_types"] | None = None
    attention_scale: str | None = None
    attention_scale_power: float = 1.0
    softcaps: bool = False
    embedding_scale: bool = False
    multipliers: bool = False
    rope_by_layer_type: bool = False
    no_rope_layers: bool = False
    gguf: InGGUF | None = None

    def flags(self) -> dict[str, object]:
        """The fields that differ from the plain decoder, with the plain value; what a parity test switches off."""
        plain = {
            field.name: _default(field)
            for field in fields(self)
            if field.name not in ("architecture", "gguf")
        }
        return {name: default for name, default in plain.items() if getattr(self, name) != default}

    def mixer(self, config: PretrainedConfig, index: int) -> str:
        """What mixes the tokens of a layer, in the words of `models.mixers.MIXERS`."""
        return self.mixers.get(config.layer_types[index], "attention") if self.mixers else "attention"


def _default(field: Field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


# what llama.cpp reads of the Llama lineage
_LLAMA_CPP = InGGUF("llama", interleaved_rope=True, biases="all", rope_factors=("llama3", "longrope"))

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", mlp_bias=True, gguf=replace(_LLAMA_CPP, layers_of_70b=80)),
    "mistral": Family(
        "MistralForCausalLM", attention_bias=None, windows="all", gguf=replace(_LLAMA_CPP, layers_of_70b=80)
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        attention_bias="qkv",
        windows="layer_types",
        gguf=InGGUF("qwen2", derived_head_dim=True, layers_of_70b=80),
    ),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", windows="layer_types", gguf=InGGUF("qwen3")),
    "gemma": Family(
        "GemmaForCausalLM", norm_offset=1.0, embedding_scale=True, gguf=InGGUF("gemma", head="tied")
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norms="sandwich",
        norm_offset=1.0,
        windows="layer_types",
        attention_scale="query_pre_attn_scalar",
        attention_scale_power=-0.5,
        softcaps=True,
        embedding_scale=True,
        gguf=InGGUF("gemma2", head="tied", window_period=2, attention_softcap=True, layers_of_27b=46),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        norms="sandwich",
        norm_offset=1.0,
        qk_norm="head",
        windows="layer_types",
        attention_scale="query_pre_attn_scalar",
        attention_scale_power=-0.5,
        softcaps=True,
        embedding_scale=True,
        rope_by_layer_type=True,
        gguf=InGGUF("gemma3", window_period=6, layers_of_27b=62),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        fused_projections=True,
        attention_bias=None,
        windows="all",
        gguf=InGGUF(
            "phi3",
            rope_factors=("longrope",),
            partial_rope=True,
            window_key_required=True,
            derived_head_dim=True,
            original_context_field=True,
            stripping_names=("phi-3", "phi3", "phi 3"),
        ),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        mlp_bias=True,
        attention_scale="attention_multiplier",
        multipliers=True,
        gguf=replace(_LLAMA_CPP, architecture="granite"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        norms="post",
        qk_norm="projection",
        gguf=InGGUF("olmo2", head="separate", derived_head_dim=True),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        mlp_bias=True,
        windows="layer_types",
        no_rope_layers=True,
        gguf=InGGUF("smollm3", interleaved_rope=True, no_rope_period=4),
    ),
}


def family_of(config: PretrainedConfig) -> Family | None:
    """The family's row for a checkpoint's config, or None when oribi's decoder does not cover it.

    Args:
        config: a transformers config; `model_type`, `hidden_act` and a few refusing fields are read.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or activation_of(config) is None:
        return None
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "pretraining_tp", 1) not in (
        None,
        1,
    ):
        return None
    return family


def activation_of(config: PretrainedConfig) -> Literal["silu", "gelu_tanh", "gelu"] | None:
    """The gated MLP's activation in the kernels' words, or None if no kernel computes it."""
    # Gemma's first release wrote "gelu" in hidden_act and meant the tanh form, named by hidden_activation
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu": "gelu",
    }.get(name)
