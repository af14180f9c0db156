"""Sizes and bases that a family computes from its config."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from oribi.families.layer_fields import config_of_layer
from oribi.families.table import row_of

# fields of every family's configs that are whole numbers above 0
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip


def size_fields(config: PretrainedConfig) -> list[str]:
    """Those that a config of the table has to have, and the sizes of its experts; where no layer has an MLP, it may lack an MLP's."""
    rules = row_of(config).experts
    if rules is None:
        return [*SIZES]
    own = filter(None, (rules.count, rules.used, rules.size, rules.shared_columns))
    return [*(name for name in SIZES if name != "intermediate_size" or hasattr(config, name)), *own]


def mlp_size(config: PretrainedConfig) -> int:
    """Columns of the MLP's gate and up.

    Source: the feed-forward size of LLaMA's reference code, which LFM2's configs took over.
    """
    family = row_of(config)
    size = family.value(config, "intermediate_size")
    if not family.adjusts_mlp or not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is not None:
        size = int(config.block_ffn_dim_multiplier * size)
        size = -(-size // config.block_multiple_of) * config.block_multiple_of
    return size


def head_dim_of(config: PretrainedConfig, kind: str = "full_attention") -> int:
    """Dimensions of a head; of the layers of one kind where they differ."""
    own = config_of_layer(config, kind)
    return getattr(own, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_base(config: PretrainedConfig, parameters: Mapping[str, Any]) -> tuple[str, float]:
    """The kind of RoPE and its base, with a stretch that the family applies for good already in it.

    Args:
        config: of the model. parameters: its `rope_parameters`, of one layer type where they differ.

    Source: NTK-aware scaling, as Hunyuan's checkpoints name it: "dynamic" with a fixed `alpha`.
    """
    kind, theta, family = parameters["rope_type"], parameters["rope_theta"], row_of(config)
    alpha = parameters.get("alpha")
    if not (family and family.rope_alpha and kind == "dynamic" and alpha):
        return kind, theta
    head_dim = head_dim_of(config)
    return "default", theta * alpha ** (head_dim / (head_dim - 2))
