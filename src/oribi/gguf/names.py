"""How each family of the table lies in a GGUF file: tensor names, row order, shifts, and what llama.cpp computes.

Names come from the gguf package's maps. A row of `LAYOUTS` says what differs, and `check_config` refuses a model that
llama.cpp would load and compute differently. H heads, E head_dim, R rotary dimensions of a head.
"""

from dataclasses import dataclass

import gguf
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oribi.errors import ExportError

_QKV = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_ALL_BIASES = (*_QKV, "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")


@dataclass(frozen=True)
class Layout:
    """What differs from the plain layout.

    Args:
        arch: architecture in the gguf package's words.
        interleaved: llama.cpp rotates neighbouring pairs, so the rows of q and k are reordered.
        norm_shift: added to every norm's weight, because the family multiplies by (1 + weight).
        biases: biases that llama.cpp reads.
        rope_factors: whether it reads frequency factors (llama3, longrope).
        untied: whether it needs an output tensor even where embeddings are tied.
        tied: whether it never reads an output tensor.
        window_period: it slides in all but every so many layers; 0: it knows no windows.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    norm_shift: float = 0.0
    biases: tuple[str, ...] = _QKV
    rope_factors: bool = False
    untied: bool = False
    tied: bool = False
    window_period: int = 0


_ARCH = gguf.MODEL_ARCH
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(_ARCH.LLAMA, interleaved=True, biases=_ALL_BIASES, rope_factors=True),
    "mistral": Layout(_ARCH.LLAMA, interleaved=True, biases=_ALL_BIASES, rope_factors=True),
    "qwen2": Layout(_ARCH.QWEN2),
    "qwen3": Layout(_ARCH.QWEN3),
    "gemma": Layout(_ARCH.GEMMA, norm_shift=1.0, tied=True),
    "gemma2": Layout(_ARCH.GEMMA2, norm_shift=1.0, tied=True, window_period=2),
    "gemma3_text": Layout(_ARCH.GEMMA3, norm_shift=1.0, window_period=6),
    "phi3": Layout(_ARCH.PHI3, rope_factors=True),
    "granite": Layout(_ARCH.GRANITE, interleaved=True, biases=_ALL_BIASES, rope_factors=True),
    "olmo2": Layout(_ARCH.OLMO2, untied=True),
    "smollm3": Layout(_ARCH.SMOLLM3, interleaved=True),
}


def layout_of(config: PretrainedConfig) -> Layout:
    """The family's row.

    Raises:
        ExportError: there is none.
    """
    if config.model_type not in LAYOUTS:
        raise ExportError(
            f"oribi writes no GGUF for model_type {config.model_type!r}; it writes {', '.join(LAYOUTS)}. "
            "Save merged_16bit and convert that folder with llama.cpp's own script"
        )
    return LAYOUTS[config.model_type]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: its name there, its name in the checkpoint, and how one becomes the other."""

    name: str
    source: str
    heads: int = 0
    shift: float = 0.0

    def to_gguf(self, tensor: torch.Tensor) -> torch.Tensor:
        """The checkpoint's tensor as llama.cpp wants it."""
        if self.heads:
            # rows of a head: first halves then second halves -> pairs
            tensor = tensor.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        return tensor.float() + self.shift if self.shift else tensor


def tensors_of(config: PretrainedConfig, names: list[str]) -> list[Tensor]:
    """The tensors of the GGUF file of a checkpoint with these names.

    Raises:
        ExportError: llama.cpp has no place for one of them.
    """
    layout = layout_of(config)
    name_map = gguf.get_tensor_name_map(layout.arch, config.num_hidden_layers)
    tensors = []
    for name in names:
        if name == "lm_head.weight" and layout.tied:
            raise ExportError(
                f"llama.cpp ties the head of {config.model_type} models; this one has its own lm_head"
            )
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        leaf = ".".join(name.split(".")[-2:])
        if stored is None or (leaf.endswith(".bias") and leaf not in layout.biases):
            raise ExportError(f"llama.cpp has no place for {name} in a {config.model_type} model")
        heads = 0
        if layout.interleaved and leaf.startswith(("q_proj.", "k_proj.")):
            heads = config.num_attention_heads if leaf[0] == "q" else config.num_key_value_heads
        shift = layout.norm_shift if name.endswith("norm.weight") else 0.0
        tensors.append(Tensor(stored, name, heads, shift))
    if layout.untied and "lm_head.weight" not in names:
        tensors.append(Tensor("output.weight", "model.embed_tokens.weight"))
    return tensors


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: PretrainedConfig) -> dict:
    """RoPE parameters of the layers that see everything."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def rope_tensors(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Frequency factors by tensor name: what each frequency of plain RoPE is divided by, [R / 2] float32."""
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
        return {"rope_freqs.weight": rope["rope_theta"] ** -exponents / scaled}
    return {}


def check_config(config: PretrainedConfig) -> list[str]:
    """What llama.cpp does otherwise only in special cases, one sentence each.

    Raises:
        ExportError: llama.cpp would load the file and compute something else.
    """
    layout = layout_of(config)
    refused = [*_rope_refusals(config, layout), *_attention_refusals(config)]
    if refused:
        raise ExportError(
            f"llama.cpp computes {config.model_type} models otherwise than this one is configured: "
            + "; ".join(refused)
            + ". Save merged_16bit instead"
        )
    notes = []
    window = getattr(config, "sliding_window", None)
    slides = any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [])
    if not layout.window_period and window and (slides or config.model_type in ("mistral", "phi3")):
        notes.append(
            f"llama.cpp ignores this model's window: answers differ beyond {window} tokens of context"
        )
    if rope_of(config)["rope_type"] == "dynamic":
        notes.append(
            f"GGUF has no dynamic RoPE: answers differ beyond {config.max_position_embeddings} tokens of context"
        )
    return notes


def _rope_refusals(config: PretrainedConfig, layout: Layout) -> list[str]:
    rope, refused = rope_of(config), []
    if rope["rope_type"] in ("llama3", "longrope") and not layout.rope_factors:
        refused.append(f"no {rope['rope_type']} RoPE")
    if rope["rope_type"] == "llama3" and config.model_type == "phi3":
        refused.append("no llama3 RoPE")
    if rope["rope_type"] == "yarn" and (
        rope.get("mscale") or rope.get("mscale_all_dim") or not rope.get("truncate", True)
    ):
        refused.append("YaRN without mscale and truncate=false")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0 and config.model_type != "phi3":
        refused.append(f"all dimensions of a head are rotated, not {partial} of them")
    if (
        config.model_type == "gemma3_text"
        and config.rope_parameters["sliding_attention"]["rope_type"] != "default"
    ):
        refused.append("sliding layers have plain RoPE")
    return refused


def _attention_refusals(config: PretrainedConfig) -> list[str]:
    refused = []
    if config.model_type in ("qwen2", "phi3", "olmo2") and (
        head_dim_of(config) * config.num_attention_heads != config.hidden_size
    ):
        refused.append("head_dim is hidden_size / num_attention_heads")
    if config.model_type in ("gemma2", "gemma3_text"):
        largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
        expected = head_dim_of(config)
        if config.num_hidden_layers == largest:
            expected = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != expected:
            refused.append(f"query_pre_attn_scalar is {expected}, not {config.query_pre_attn_scalar}")
    if config.model_type == "gemma3_text" and getattr(config, "attn_logit_softcapping", None):
        refused.append("no attn_logit_softcapping")
    if config.model_type == "smollm3":
        expected = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            refused.append("every fourth layer, and no other, is without RoPE")
    kinds = getattr(config, "layer_types", None) or []
    period = LAYOUTS[config.model_type].window_period
    if (
        period
        and kinds
        and [i % period != period - 1 for i in range(len(kinds))]
        != [kind == "sliding_attention" for kind in kinds]
    ):
        refused.append(f"every layer slides but each {period}th")
    return refused
