"""Longer contexts than a model was trained for, by scaling its rotary embeddings."""

from typing import Any

from transformers import PretrainedConfig

from oribi.errors import ModelError

_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def override_rope(config: PretrainedConfig, scaling: dict[str, Any]) -> None:
    """Replaces a config's RoPE scaling; theta and a partial rotation are kept unless given.

    Args:
        scaling: as in config.json: {"rope_type": "yarn", "factor": 4.0, ...}; "type" is read like "rope_type".

    Raises:
        ModelError: the kind is unknown, or the config does not take it.
    """
    scaling = dict(scaling)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind)
    if scaling["rope_type"] not in _KINDS:
        raise ModelError(
            f"rope_scaling has rope_type {scaling['rope_type']!r}; allowed are {', '.join(_KINDS)}"
        )
    for parameters in _scaled(config):
        kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
        parameters.clear()
        parameters.update(kept | scaling)
        original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        if scaling["rope_type"] in ("yarn", "llama3", "longrope"):
            parameters["original_max_position_embeddings"] = original
        # dynamic scaling is measured from max_position_embeddings, which therefore stays
        if scaling["rope_type"] != "dynamic" and "factor" in scaling:
            positions = int(original * scaling["factor"])
            config.max_position_embeddings = max(config.max_position_embeddings, positions)
    _validate(config)


def extend_context(config: PretrainedConfig, max_seq_length: int) -> list[str]:
    """Makes room for `max_seq_length` positions; does nothing where the config has them already.

    Unscaled RoPE becomes YaRN, which keeps the frequencies that distinguish near tokens and interpolates the rest, and
    which every runtime of exported models reads. Linear, dynamic and YaRN scaling grow their factor.
    Source: YaRN, Peng et al. 2023 (arXiv:2309.00071).

    Returns:
        Notes for the user.

    Raises:
        ModelError: the config's scaling cannot be stretched further.
    """
    trained = getattr(config, "max_position_embeddings", None)
    if trained is None or max_seq_length <= trained:
        return []
    if not getattr(config, "rope_parameters", None):
        raise ModelError(
            f"max_seq_length {max_seq_length} is beyond the model's {trained} positions, and this {config.model_type} model "
            "has no RoPE to stretch; lower max_seq_length"
        )
    ratio = max_seq_length / trained
    for parameters in _scaled(config):
        kind = parameters["rope_type"]
        if kind == "default":
            parameters |= {"rope_type": "yarn", "factor": ratio, "original_max_position_embeddings": trained}
        elif kind in ("linear", "yarn"):
            parameters["factor"] *= ratio
        elif kind != "dynamic":  # which follows the length by itself
            raise ModelError(
                f"max_seq_length {max_seq_length} is beyond the model's {trained} positions, and its {kind} RoPE cannot "
                "be stretched further; lower max_seq_length or pass rope_scaling="
            )
    kind = _scaled(config)[0]["rope_type"]
    if kind != "dynamic":
        config.max_position_embeddings = max_seq_length
    _validate(config)
    return [
        f"max_seq_length {max_seq_length} is {ratio:.3g} times the model's {trained} positions: RoPE is stretched "
        f"({kind}); train on long texts for it to be of use"
    ]


def _scaled(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters that see the whole context; those of sliding layers see a window only."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return [parameters]
    return [parameters["full_attention"]]


def _validate(config: PretrainedConfig) -> None:
    try:
        config.validate_rope()
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the RoPE scaling does not fit this model: {error}") from error
