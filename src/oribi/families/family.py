"""What a row of the family table can say: how a family differs from the plain pre-norm decoder (Llama).

Sizes, epsilons, biases and windows come from the checkpoint's config. A flag names a property, never a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PretrainedConfig

from oribi.families.expert_rules import ExpertRules
from oribi.families.in_gguf import InGGUF

# norms before and after the mixer and the MLP -> what most checkpoints call them, by the places that have one
_NORMS: dict[str, dict[str, str]] = {
    "pre": {"mixer_input_norm": "input_layernorm", "mlp_input_norm": "post_attention_layernorm"},
    "post": {"mixer_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "mixer_input_norm": "input_layernorm", "mixer_output_norm": "post_attention_layernorm",
        "mlp_input_norm": "pre_feedforward_layernorm", "mlp_output_norm": "post_feedforward_layernorm",
    },
    "parallel": {"mixer_input_norm": "input_layernorm"},
}  # fmt: skip
# those of layers whose experts, and the MLP beside them, have norms of their own
_NORMS_OF_EXPERTS = {
    "shared_output_norm": "post_feedforward_layernorm_1", "experts_input_norm": "pre_feedforward_layernorm_2",
    "experts_output_norm": "post_feedforward_layernorm_2",
}  # fmt: skip
# mixers whose queries and keys are rotated
_ATTENTION = ("attention", "shared_attention")
# group of linear layers -> the projections in it, and the one layer that may hold them all
_FUSED = {
    "qkv": (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    "gate_up": (("gate_proj", "up_proj"), "gate_up_proj"),
}


@dataclass(frozen=True)
class Family:
    """How one family differs from the plain pre-norm decoder.

    Args:
        architecture: class name of the family's causal LM in transformers, written to config.json on saving.
        mixers: entry of config.layer_types -> what mixes the tokens of such a layer, in the words of `models.mixers.MIXERS`;
            others are attention.
        kv_sharing: whether config.num_kv_shared_layers is read: the last layers have no keys and values of their own and read
            those of the last layer of their type that has.
        wide_mlp: whether config.use_double_wide_mlp is read: the MLP of those last layers is twice as wide.
        keys_as_values: whether config.attention_k_eq_v is read: layers that see everything have no v_proj, and take what
            k_proj gives for both.
        value_norm: v is divided by its root mean square over each head.
        layer_scalar: each layer's output is multiplied by a number that the checkpoint holds and nobody trains.
        per_layer_inputs: whether config.hidden_size_per_layer_input is read: each layer adds, last, what it makes of an
            embedding of its own of each token.
        norms: "pre" (norm before attention and before the MLP), "post" (after each), "sandwich" (before and after), "parallel"
            (one before both, which read the same and are added together).
        norm_offset: RMSNorm multiplies by (norm_offset + weight).
        last_norm_offset: that of the norm after the last layer, where it is another.
        centred_norms: norms take the mean off first: layer norms without bias.
        names: a part's role -> the checkpoint's attribute, where it is not the usual one: a layer's norms by their places
            (mixer_input_norm, mixer_output_norm, mlp_input_norm, mlp_output_norm), every other part by its usual attribute
            (mlp, q_norm, o_proj, gate_up_proj, ...); the norm after the last layer is "norm".
        config_fields: a field that oribi reads (attention_bias, mlp_bias, intermediate_size) -> the one that the config has for it.
        norm_eps: config field that gives the norms' epsilon.
        output_norm_eps: the field of the norms after attention and after the MLP, where it is another.
        activation: of the MLP, in the kernels' words, where the config has no field for it.
        adjusts_mlp: the MLP's size is config.intermediate_size adjusted as config.block_auto_adjust_ff_dim says.
        qk_norm: RMSNorm of q and k: over each head, over the whole projection, or none.
        qk_norm_weights: whether these norms have weights.
        qk_norm_field: the config's field that says whether q and k are normed; None: they are.
        qk_norm_after_rope: q and k are normed after their rotation, not before it.
        output_gate: attention's output is gated by numbers that "q_proj" has behind each head's query, or that a projection
            of its own, "output_gate", gives; None without a gate.
        fused_projections: groups that the checkpoint holds as one layer: q, k, v as qkv_proj, gate, up as gate_up_proj.
        attention_bias: "config" reads config.attention_bias for q, k, v; "qkv" is q, k, v always; else none.
        output_bias: the config's field for the bias of o where attention_bias is "config"; None: it has none.
        mlp_bias: whether config.mlp_bias is read.
        windows: which layers slide: none, all (config.sliding_window), or by config.layer_types.
        sinks: attention's softmax has one more logit per head, which has no value.
        attention_scale: the scale, or the name of the config field that gives it; None is head_dim ** -0.5.
        attention_scale_power: the scale is that field to this power.
        query_factor: config field that queries are multiplied by, beside the scale.
        softcaps: whether config.attn_logit_softcapping and config.final_logit_softcapping are read, or "final" alone.
        embedding_scale: embeddings are multiplied by sqrt(hidden_size), rounded to the weight's dtype.
        embedding_norm: embeddings are divided by their root mean square.
        multipliers: whether config.embedding_multiplier, residual_multiplier and logits_scaling are read.
        logit_scale: config field that logits are multiplied by, before they are capped.
        rope_by_layer_type: config.rope_parameters has one entry for each layer type.
        rope_alpha: `alpha` in config.rope_parameters stretches RoPE's base for good, whatever the text's length.
        interleaved_rope: RoPE turns neighbouring dimensions of a head, not one of each half.
        query_scale_by_position: queries grow with the logarithm of their position, by llama_4_scaling_beta in rope_parameters.
        without_rope: which layers are not rotated: those for which config.no_rope_layers or config.layer_rope_theta has 0,
            those that see everything beside sliding ones ("full_attention"), or all unless config.position_embedding_type
            is "rope".
        unread: fields of the config for which oribi has no layers: a model that sets one is outside the table.
        experts: how experts are chosen and stored in layers that have them in place of an MLP; None: none has.
        gguf: how it is stored in a GGUF file; None where oribi reads and writes none.
    """

    architecture: str
    mixers: Mapping[str, str] = field(default_factory=dict)
    kv_sharing: bool = False
    wide_mlp: bool = False
    keys_as_values: bool = False
    value_norm: bool = False
    layer_scalar: bool = False
    per_layer_inputs: bool = False
    norms: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    norm_offset: float = 0.0
    last_norm_offset: float | None = None
    centred_norms: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    config_fields: Mapping[str, str] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    output_norm_eps: str | None = None
    activation: Literal["silu", "swiglu_clamped"] | None = None
    adjusts_mlp: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    qk_norm_weights: bool = True
    qk_norm_field: str | None = None
    qk_norm_after_rope: bool = False
    output_gate: Literal["q_proj", "output_gate"] | None = None
    fused_projections: tuple[Literal["qkv", "gate_up"], ...] = ()
    attention_bias: Literal["config", "qkv"] | None = "config"
    output_bias: str | None = "attention_bias"
    mlp_bias: bool = False
    windows: Literal["all", "layer_types"] | None = None
    sinks: bool = False
    attention_scale: str | float | None = None
    attention_scale_power: float = 1.0
    query_factor: str | None = None
    softcaps: bool | Literal["final"] = False
    embedding_scale: bool = False
    embedding_norm: bool = False
    multipliers: bool = False
    logit_scale: str | None = None
    rope_by_layer_type: bool = False
    rope_alpha: bool = False
    interleaved_rope: bool = False
    query_scale_by_position: bool = False
    without_rope: (
        Literal["no_rope_layers", "layer_rope_theta", "full_attention", "position_embedding_type"] | None
    ) = None
    unread: tuple[str, ...] = ()
    experts: ExpertRules | None = None
    gguf: InGGUF | None = None

    def flags(self) -> dict[str, object]:
        """The fields that differ from the plain decoder, with the plain value; what a parity test switches off."""
        plain = Family(self.architecture, gguf=self.gguf)
        return {
            one.name: getattr(plain, one.name)
            for one in fields(self)
            if getattr(self, one.name) != getattr(plain, one.name)
        }

    def mixer(self, config: PretrainedConfig, index: int) -> str:
        """What mixes the tokens of a layer, in the words of `models.mixers.MIXERS`."""
        return self.mixers.get(config.layer_types[index], "attention") if self.mixers else "attention"

    @property
    def reads_layer_types(self) -> bool:
        """Whether config.layer_types changes what is computed."""
        return self.windows == "layer_types" or self.rope_by_layer_type or bool(self.mixers)

    def rope_kinds(self, config: PretrainedConfig) -> list[str | None]:
        """Entries of config.layer_types whose layers have a RoPE of their own; [None] where all share one."""
        if not self.rope_by_layer_type:
            return [None]
        layers = range(config.num_hidden_layers)
        return sorted({config.layer_types[i] for i in layers if self.mixer(config, i) in _ATTENTION})

    def attribute(self, role: str) -> str:
        """The checkpoint's name of a part, by its role as in `names`."""
        return self.names.get(role) or {**_NORMS[self.norms], **_NORMS_OF_EXPERTS}.get(role, role)

    def value(self, config: PretrainedConfig, name: str) -> Any:
        """A field of a config, by the name that most families have for it; None where it is not set."""
        return getattr(config, self.config_fields.get(name, name), None)

    def rotates(self, config: PretrainedConfig, index: int) -> bool:
        """Whether a layer rotates q and k."""
        if self.without_rope in ("no_rope_layers", "layer_rope_theta"):
            return bool(getattr(config, self.without_rope)[index])
        if self.without_rope == "full_attention":
            return config.sliding_window is None or config.layer_types[index] == "sliding_attention"
        return self.without_rope is None or config.position_embedding_type == "rope"

    def layer_norms(self) -> dict[str, str]:
        """Role -> attribute of the norms that a layer has."""
        own = _NORMS_OF_EXPERTS if self.experts is not None and self.experts.own_norms else ()
        return {role: self.attribute(role) for role in (*_NORMS[self.norms], *own)}

    def eps_of_norm(self, role: str) -> str:
        """The config's field for the epsilon of a norm, by its role as in `names`."""
        return (self.output_norm_eps if role.endswith("output_norm") else None) or self.norm_eps

    def offset_of_norm(self, role: str) -> float:
        """What is added to the weight of a norm, by its role as in `names`."""
        return (
            self.last_norm_offset
            if role == "norm" and self.last_norm_offset is not None
            else self.norm_offset
        )

    def projections(self) -> dict[str, str]:
        """q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj -> the attribute that holds each."""
        roles = {role: role for role in ("o_proj", "down_proj")}
        for group, (members, whole) in _FUSED.items():
            roles |= {role: whole if group in self.fused_projections else role for role in members}
        return {role: self.attribute(held) for role, held in roles.items()}
