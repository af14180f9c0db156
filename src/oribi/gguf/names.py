"""The names of a family's tensors in a GGUF file and in a checkpoint."""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from oribi.errors import ExportError
from oribi.families import FAMILIES, Family, row_of
from oribi.families.expert_rules import ExpertRules
from oribi.families.in_gguf import InGGUF
from oribi.gguf.tensor import Tensor, ValueHeads

# the families whose files have an architecture, the one that they are read as first
MODEL_TYPES: dict[str, list[str]] = {}
for _model_type, _family in FAMILIES.items():
    if _family.gguf is not None:
        MODEL_TYPES.setdefault(_family.gguf.architecture, []).append(_model_type)

# llama.cpp's name of a part of a layer -> its roles, as `Family.names` has them, from outside to inside
_LINEAR = {
    "attn_q": ("self_attn", "q_proj"),
    "attn_k": ("self_attn", "k_proj"),
    "attn_v": ("self_attn", "v_proj"),
    "attn_qkv": ("self_attn", "qkv_proj"),
    "attn_output": ("self_attn", "o_proj"),
    "ffn_gate": ("mlp", "gate_proj"),
    "ffn_up": ("mlp", "up_proj"),
    "ffn_down": ("mlp", "down_proj"),
}
_ROUTER = "ffn_gate_inp"
# of experts, with a star for the number of each
_EXPERTS = {
    _ROUTER: ("mlp", "router"),
    "ffn_gate_exps": ("mlp", "experts", "*", "gate_proj"),
    "ffn_up_exps": ("mlp", "experts", "*", "up_proj"),
    "ffn_down_exps": ("mlp", "experts", "*", "down_proj"),
}
# of an expert that has one matrix for both in a file; names of matrices that lie one behind the other are joined by a bar
_JOINED = "gate_proj|up_proj"
_SHARED_GATE = "ffn_gate_inp_shexp"
# of an MLP beside the experts
_SHARED = {
    "ffn_gate_shexp": ("mlp", "shared_experts", "gate_proj"),
    "ffn_up_shexp": ("mlp", "shared_experts", "up_proj"),
    "ffn_down_shexp": ("mlp", "shared_experts", "down_proj"),
    _SHARED_GATE: ("mlp", "shared_expert_gate"),
}
# a mixer other than attention -> likewise
_MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "short_conv": {
        "shortconv.in_proj": ("conv", "in_proj"),
        "shortconv.conv": ("conv", "conv"),
        "shortconv.out_proj": ("conv", "out_proj"),
    },
    "gated_delta": {
        "attn_qkv": ("linear_attn", "in_proj_qkv"),
        "attn_gate": ("linear_attn", "in_proj_z"),
        "ssm_beta": ("linear_attn", "in_proj_b"),
        "ssm_alpha": ("linear_attn", "in_proj_a"),
        "ssm_conv1d": ("linear_attn", "conv1d"),
        "ssm_norm": ("linear_attn", "norm"),
        "ssm_out": ("linear_attn", "out_proj"),
    },
}
_PER_LAYER_INPUT: dict[str, tuple[str, ...]] = {
    "inp_gate": ("per_layer_input_gate",),
    "proj": ("per_layer_projection",),
    "post_norm": ("post_per_layer_input_norm",),
}
# tensors of a layer that are no module's weight or bias: whole names, in the file and in the checkpoint
_WITHOUT_MODULE = {
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "layer_output_scale.weight": "layer_scalar",
    "attn_sinks.weight": "self_attn.sinks",
}
# what is added to the scores by which experts are chosen
_CORRECTION = "exp_probs_b.bias"
_NORMS = {
    "attn_q_norm": ("self_attn", "q_norm"),
    "attn_k_norm": ("self_attn", "k_norm"),
    "attn_norm": ("mixer_input_norm",),
    "post_attention_norm": ("mixer_output_norm",),
    "ffn_norm": ("mlp_input_norm",),
    "post_ffw_norm": ("mlp_output_norm",),
    "post_ffw_norm_1": ("shared_output_norm",),
    "pre_ffw_norm_2": ("experts_input_norm",),
    "post_ffw_norm_2": ("experts_output_norm",),
}
# weights of the norms of q and k; where a checkpoint has none, a file has constants
NORMS_OF_HEADS = ("attn_q_norm.weight", "attn_k_norm.weight")
_SPLIT = ("ffn_gate", "ffn_up")  # in the order in which one gate_up_proj holds them
# tensors of the checkpoint to which llama.cpp applies no adapter
WITHOUT_ADAPTER = ("model.per_layer_model_projection.weight", ".shared_expert_gate.weight")
# how the names of depthwise convolutions end
KERNELS = ("conv.weight", "conv1d.weight")
ROPE_FACTORS = {
    "llama3": "rope_freqs.weight",
    "proportional": "rope_freqs.weight",
    "long": "rope_factors_long.weight",
    "short": "rope_factors_short.weight",
}


def family_in_gguf(config: PretrainedConfig) -> tuple[Family, InGGUF]:
    """The row of a config's family.

    Raises:
        ExportError: oribi writes no GGUF files of this family.
    """
    family = row_of(config)
    if family is None or family.gguf is None:
        written = ", ".join(
            name for name, row in FAMILIES.items() if row.gguf is not None and "+" not in name
        )
        raise ExportError(
            f"oribi writes no GGUF for model_type {config.model_type!r}; it writes {written}. "
            "Save merged_16bit and convert that folder with llama.cpp's own script"
        )
    return family, family.gguf


def _layer_parts(family: Family, facts: InGGUF) -> dict[str, str]:
    """Parts of a layer: llama.cpp's name -> the checkpoint's."""
    held = _SPLIT if facts.splits_gate_up else ("ffn_up",)
    fused = dict.fromkeys(held, ("mlp", "gate_up_proj")) if "gate_up" in family.fused_projections else {}
    norms = {
        name: roles for name, roles in _NORMS.items() if len(roles) > 1 or roles[0] in family.layer_norms()
    }
    parts = {**_LINEAR, **norms, **fused, **(_PER_LAYER_INPUT if family.per_layer_inputs else {})}
    parts |= {"attn_gate": ("self_attn", "output_gate")} if family.output_gate == "output_gate" else {}
    if family.experts is not None:
        parts |= _of_experts(family.experts, facts)
    for mixer in family.mixers.values():
        parts |= _MIXERS.get(mixer, {})
    return {
        facts.names.get(roles[-1], name): ".".join(map(family.attribute, roles))
        for name, roles in parts.items()
    }


def _of_experts(rules: ExpertRules, facts: InGGUF) -> dict[str, tuple[str, ...]]:
    """The router, the experts and the MLP beside them: llama.cpp's names -> roles."""
    parts = {**_EXPERTS, _ROUTER: (*_EXPERTS[_ROUTER], *filter(None, [rules.router_part]))}
    if facts.joins_gate_up:
        parts["ffn_gate_up_exps"] = ("mlp", "experts", "*", _JOINED)
    if rules.in_layer_itself:  # and the MLP beside them under the names of an MLP
        return {name: roles[1:] for name, roles in parts.items()}
    shared = {name: roles for name, roles in _SHARED.items() if rules.shared_gate or name != _SHARED_GATE}
    return parts | (shared if rules.has_shared else {})


def _without_module(family: Family) -> dict[str, str]:
    """Tensors of a layer that are no module's weight or bias: llama.cpp's names -> the checkpoint's."""
    rules = family.experts
    if rules is None:
        return _WITHOUT_MODULE
    router = "" if rules.in_layer_itself else f"{family.attribute('mlp')}."
    router += family.attribute("router")
    own = {"router": "", "moe_statics": "moe_statics."}
    found = {**_WITHOUT_MODULE}
    if rules.correction is not None:
        found[_CORRECTION] = f"{router}.{own[rules.correction]}e_score_correction_bias"
    if rules.router_norm:
        found[f"{_ROUTER}.scale"] = f"{router}.scale"
    if rules.expert_scale:
        found["ffn_down_exps.scale"] = f"{router}.per_expert_scale"
    return found


def _tensor(config: PretrainedConfig, name: str, source: str) -> Tensor:
    family, facts = family_in_gguf(config)
    stem, split = name.split(".")[-2], {}
    if facts.interleaved_rope and not family.interleaved_rope and stem in ("attn_q", "attn_k"):
        split["heads"] = config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads
    if facts.splits_gate_up and stem in _SPLIT:
        split["part"] = (_SPLIT.index(stem), len(_SPLIT))
    if "*" in source:
        split["experts"] = getattr(config, family.experts.count)
    if ".linear_attn." in source:
        split |= _of_gated_delta(config, source)
    elif name.endswith("_norm.weight"):
        is_last = name.startswith(f"{facts.last_norm}.")
        split["shift"] = family.offset_of_norm("norm") if is_last else family.norm_offset
    if name.endswith(KERNELS):
        split["single"] = 1
    elif stem == _SHARED_GATE or ".moe_statics." in source:
        split["single"] = 0
    return Tensor(name, source, **split)


def _of_gated_delta(config: PretrainedConfig, source: str) -> dict[str, Any]:
    """How a tensor of the mixer becomes llama.cpp's, as fields of `Tensor`."""
    part = source.split(".linear_attn.")[1].removesuffix(".weight")
    if part == "norm":  # one for all heads, and multiplied by its weight alone
        return {}
    heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
    before = 2 * key_heads * config.linear_key_head_dim if part in ("in_proj_qkv", "conv1d") else 0
    return {"value_heads": ValueHeads(heads, key_heads, before, part == "out_proj"), "decay": part == "A_log"}


def _top_parts(family: Family, facts: InGGUF) -> dict[str, str]:
    """Parts outside the layers: llama.cpp's name -> the checkpoint's."""
    parts = {
        "token_embd": "model.embed_tokens",
        facts.last_norm: f"model.{family.attribute('norm')}",
        "output": "lm_head",
    }
    if family.per_layer_inputs:
        parts |= {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        }
    return parts


def tensors_to_write(config: PretrainedConfig, sources: Iterable[str]) -> list[Tensor]:
    """The tensors of the GGUF file of a checkpoint with these names.

    Raises:
        ExportError: llama.cpp has no place for one of them.
    """
    family, facts = family_in_gguf(config)
    top = {source: name for name, source in _top_parts(family, facts).items()}
    alone = {source: name for name, source in _without_module(family).items()}
    layer: dict[str, list[str]] = {}
    for name, source in _layer_parts(family, facts).items():
        layer.setdefault(source, []).append(name)
    # experts of a layer share a tensor
    sources = [re.sub(r"(\.experts\.)\d+\.", r"\1*.", source) for source in sources]
    if facts.joins_gate_up:
        sources = [re.sub(r"(\.\*\.)(gate|up)_proj", rf"\1{_JOINED}", source) for source in sources]
    sources = list(dict.fromkeys(sources))
    tensors = []
    for source in sources:
        if source == "lm_head.weight" and facts.head == "tied":
            raise ExportError(
                f"llama.cpp ties the head of {config.model_type} models; this one has its own lm_head"
            )
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", source)
        if match and match[2] in alone:
            tensors.append(_tensor(config, f"blk.{match[1]}.{alone[match[2]]}", source))
            continue
        module, _, leaf = (match[2] if match else source).rpartition(".")
        parts = layer.get(module, []) if match else [top[module]] if module in top else []
        if not parts or (leaf == "bias" and not _reads_bias(facts, parts[0])):
            raise ExportError(f"llama.cpp has no place for {source} in a {config.model_type} model")
        names = [f"blk.{match[1]}.{part}" if match else part for part in parts]
        tensors += [_tensor(config, f"{name}.{leaf}", source) for name in names]
    if facts.head == "separate" and "lm_head.weight" not in sources:
        tensors.append(Tensor("output.weight", "model.embed_tokens.weight"))
    return tensors


def _reads_bias(facts: InGGUF, part: str) -> bool:
    return part in (("attn_q", "attn_k", "attn_v") if facts.biases == "qkv" else {**_LINEAR, **_EXPERTS})


def tensors_to_read(config: PretrainedConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a GGUF file by their names in the checkpoint; unknown ones keep their names.

    Layers behind the model's own, which predict further tokens, are left out.

    Args:
        config: made from the file.
        names: of the file's tensors.
    """
    family, facts = family_in_gguf(config)
    parts, top, found = _layer_parts(family, facts), _top_parts(family, facts), {}
    alone = _without_module(family)
    for name in names:
        if name in ROPE_FACTORS.values():
            continue
        match = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", name)
        if match and int(match[1]) >= config.num_hidden_layers:
            continue
        if match and match[2] in NORMS_OF_HEADS and not family.qk_norm_weights:
            continue
        stem, _, leaf = (match[2] if match else name).rpartition(".")
        if match:
            source = alone.get(match[2]) or f"{parts.get(stem, stem)}.{leaf}"
            source = f"model.layers.{match[1]}.{source}"
        else:
            source = f"{top.get(stem, stem)}.{leaf}"
        found[source] = _tensor(config, name, source)
    return found
