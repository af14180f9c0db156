"""The names of a family's tensors in a GGUF file and in a checkpoint, and how the values of one become those of the other."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from oribi.errors import ExportError, ModelError
from oribi.families import FAMILIES, Family, InGGUF

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
    "shortconv.in_proj": ("conv", "in_proj"),
    "shortconv.conv": ("conv", "conv"),
    "shortconv.out_proj": ("conv", "out_proj"),
    "ffn_gate": ("mlp", "gate_proj"),
    "ffn_up": ("mlp", "up_proj"),
    "ffn_down": ("mlp", "down_proj"),
}
_NORMS = {
    "attn_q_norm": ("self_attn", "q_norm"),
    "attn_k_norm": ("self_attn", "k_norm"),
    "attn_norm": ("mixer_input_norm",),
    "post_attention_norm": ("mixer_output_norm",),
    "ffn_norm": ("mlp_input_norm",),
    "post_ffw_norm": ("mlp_output_norm",),
}
_SPLIT = ("ffn_gate", "ffn_up")  # in the order in which one gate_up_proj holds them
ROPE_FACTORS = {
    "llama3": "rope_freqs.weight",
    "long": "rope_factors_long.weight",
    "short": "rope_factors_short.weight",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name in the GGUF file, its name in the checkpoint, and how one becomes the other.

    Args:
        name, source: in the file and in the checkpoint.
        heads: how many heads share its rows, where llama.cpp wants the rows of a head in pairs; else 0.
        part: which of how many equal parts of its rows it is, where the checkpoint holds several layers as one.
        shift: added to the checkpoint's values, because the family multiplies by (shift + weight).
        kernel: it is a depthwise convolution's, [N, 1, W] in the checkpoint and [N, W] in the file.
    """

    name: str
    source: str
    heads: int = 0
    part: tuple[int, int] = (0, 1)
    shift: float = 0.0
    kernel: bool = False

    def to_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """The checkpoint's values [N, ...] as llama.cpp wants them."""
        index, count = self.part
        values = values.chunk(count)[index] if count > 1 else values
        if self.heads:
            # rows of a head: first halves then second halves -> pairs
            values = values.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).reshape(values.shape)
        if self.kernel:
            values = values.squeeze(1)
        return values.float() + self.shift if self.shift else values

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor that has `shape` in the checkpoint."""
        return (shape[0], shape[2]) if self.kernel else (shape[0] // self.part[1], *shape[1:])

    def shape_in_checkpoint(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor that has `shape` in the file."""
        return (shape[0], 1, *shape[1:]) if self.kernel else shape

    def from_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of a file's values [N, ...] in the checkpoint's order; the shift is left to the reader.

        Raises:
            ModelError: the rows cannot be divided among the heads.
        """
        if self.kernel:
            return values.unsqueeze(1)
        if not self.heads:
            return values
        if self.heads < 0 or len(values) % (2 * self.heads):
            raise ModelError(
                f"the GGUF file is damaged: {self.heads} heads cannot share {len(values)} rows of a query or key matrix. "
                "Download it again"
            )
        return values.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).reshape(values.shape)


def family_in_gguf(config: PretrainedConfig) -> tuple[Family, InGGUF]:
    """The row of a config's family.

    Raises:
        ExportError: oribi writes no GGUF files of this family.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.gguf is None:
        written = ", ".join(name for name, row in FAMILIES.items() if row.gguf is not None)
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
    parts = {**_LINEAR, **norms, **fused}
    return {
        facts.names.get(roles[-1], name): ".".join(map(family.attribute, roles))
        for name, roles in parts.items()
    }


def _tensor(config: PretrainedConfig, name: str, source: str) -> Tensor:
    family, facts = family_in_gguf(config)
    heads = 0
    if (
        facts.interleaved_rope
        and not family.interleaved_rope
        and (match := re.search(r"\.attn_([qk])\.", name))
    ):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    offset = family.norm_offset if name.endswith("_norm.weight") else 0.0
    stem = name.split(".")[-2]
    part = (_SPLIT.index(stem), len(_SPLIT)) if facts.splits_gate_up and stem in _SPLIT else (0, 1)
    return Tensor(name, source, heads, part, offset, kernel=name.endswith("conv.weight"))


def _top_parts(family: Family, facts: InGGUF) -> dict[str, str]:
    """Parts outside the layers: llama.cpp's name -> the checkpoint's."""
    norm = f"model.{family.attribute('norm')}"
    return {"token_embd": "model.embed_tokens", facts.last_norm: norm, "output": "lm_head"}


def tensors_to_write(config: PretrainedConfig, sources: Iterable[str]) -> list[Tensor]:
    """The tensors of the GGUF file of a checkpoint with these names.

    Raises:
        ExportError: llama.cpp has no place for one of them.
    """
    family, facts = family_in_gguf(config)
    top = {source: name for name, source in _top_parts(family, facts).items()}
    layer: dict[str, list[str]] = {}
    for name, source in _layer_parts(family, facts).items():
        layer.setdefault(source, []).append(name)
    sources, tensors = list(sources), []
    for source in sources:
        if source == "lm_head.weight" and facts.head == "tied":
            raise ExportError(
                f"llama.cpp ties the head of {config.model_type} models; this one has its own lm_head"
            )
        module, _, leaf = source.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        parts = layer.get(match[2], []) if match else [top[module]] if module in top else []
        if not parts or (leaf == "bias" and not _reads_bias(facts, parts[0])):
            raise ExportError(f"llama.cpp has no place for {source} in a {config.model_type} model")
        names = [f"blk.{match[1]}.{part}" if match else part for part in parts]
        tensors += [_tensor(config, f"{name}.{leaf}", source) for name in names]
    if facts.head == "separate" and "lm_head.weight" not in sources:
        tensors.append(Tensor("output.weight", "model.embed_tokens.weight"))
    return tensors


def _reads_bias(facts: InGGUF, part: str) -> bool:
    return part in (("attn_q", "attn_k", "attn_v") if facts.biases == "qkv" else _LINEAR)


def tensors_to_read(config: PretrainedConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a GGUF file by their names in the checkpoint; unknown ones keep their names.

    Args:
        config: made from the file.
        names: of the file's tensors.
    """
    family, facts = family_in_gguf(config)
    parts, top, found = _layer_parts(family, facts), _top_parts(family, facts), {}
    for name in names:
        if name in ROPE_FACTORS.values():
            continue
        stem, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", stem)
        source = top.get(stem, stem)
        if match:
            source = f"model.layers.{match[1]}.{parts.get(match[2], match[2])}"
        found[f"{source}.{leaf}"] = _tensor(config, name, f"{source}.{leaf}")
    return found
