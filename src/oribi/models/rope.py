"""Rotary position embeddings: the angles of each token, and their scaling to longer contexts than a model was trained for.

T: tokens (batch x sequence flattened); R: rotary dimensions of a head (at most head_dim).
"""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oribi.errors import ModelError
from oribi.families import row_of
from oribi.families.layer_fields import config_of_layer
from oribi.families.sizes import rope_base
from oribi.kernels.rope import Angles

_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# frequencies of these kinds depend on the longest position of the batch
_BY_LENGTH = ("dynamic", "longrope")


class RotaryAngles:
    """cos and sin tables for one kind of layer: default, linear, dynamic, llama3, yarn, longrope or proportional.

    The frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`); positions are applied in float32, and cos and sin stay
    float32 because rounding them to bfloat16 loses what long contexts need.

    Args:
        config: the model's config; `rope_parameters` is read.
        layer_type: which entry of `rope_parameters` to read where they differ by layer type, else None.
    """

    def __init__(self, config: PretrainedConfig, layer_type: str | None = None) -> None:
        self.config = config_of_layer(config, layer_type) if layer_type else config
        self.layer_type = layer_type
        self.parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
        self.kind, self.theta = rope_base(config, self.parameters)
        family = row_of(config)
        self.interleaved = family is not None and family.interleaved_rope
        self.query_scale: tuple[float, int] | None = None  # beta, and the positions that share a scale
        if family is not None and family.query_scale_by_position:
            beta = self.parameters.get("llama_4_scaling_beta")
            self.query_scale = beta and (
                float(beta),
                int(self.parameters["original_max_position_embeddings"]),
            )
        self._frequencies: dict[tuple[torch.device, int], tuple[torch.Tensor, float]] = {}

    @property
    def needs_length(self) -> bool:
        """Whether `angles` must be told the longest position, which costs a host synchronisation on a GPU."""
        return self.kind in _BY_LENGTH

    def angles(self, positions: torch.Tensor, length: int = 0) -> Angles:
        """How every token is rotated.

        Args:
            positions: [T] int64.
            length: longest position + 1 of the batch; read only where `needs_length`.

        Returns:
            cos, sin: [T, R/2] float32 each, with the attention factor of yarn and longrope multiplied in; the rest of `Angles` as
            the family has it.
        """
        length = self.set_of(length)
        key = (positions.device, length)
        if key not in self._frequencies:
            if self.kind == "dynamic":
                self._frequencies.clear()  # a generation asks for each length once
            with torch.inference_mode(False):  # a training may read them later
                self._frequencies[key] = self._compute(positions.device, length)
        frequencies, factor = self._frequencies[key]
        phase = positions[:, None].float() * frequencies
        q_scale = None
        if self.query_scale:
            beta, original = self.query_scale
            q_scale = 1 + beta * torch.log1p((positions / original).floor())
        return Angles(phase.cos() * factor, phase.sin() * factor, q_scale, self.interleaved)

    def set_of(self, length: int) -> int:
        """The length that stands for all with the frequencies of this one; 0 where there is one set."""
        if self.kind == "dynamic":
            return max(length, self.config.max_position_embeddings)
        if self.kind == "longrope":
            original = self.parameters["original_max_position_embeddings"]
            return original + 1 if length > original else original
        return 0

    def _compute(self, device: torch.device, length: int) -> tuple[torch.Tensor, float]:
        if self.kind != "default":
            compute = ROPE_INIT_FUNCTIONS[self.kind]
            layer = {"layer_type": self.layer_type} if self.layer_type else {}
            frequencies, factor = compute(self.config, device, seq_len=length or None, **layer)
            return frequencies.float().to(device), factor
        head_dim = (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )
        rotary_dims = int(head_dim * self.parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dims, 2, dtype=torch.float32, device=device) / rotary_dims
        return 1.0 / self.theta**exponents, 1.0


def documents_from_positions(position_ids: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Offsets [docs + 1] int32 and longest document of a pack, from positions [1, S] that restart at 0."""
    starts = (position_ids[0] == 0).nonzero().flatten().to(torch.int32)
    if len(starts) <= 1:
        return None, 0
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])
    if starts[0] != 0:
        ends = torch.cat([starts.new_zeros(1), ends])
    return ends, int(ends.diff().max())


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


def trained_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that a model was made for; None where its config names no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None  # XLNet's -1 is none


def extend_context(config: PretrainedConfig, max_seq_length: int) -> list[str]:
    """Stretches the context to `max_seq_length` positions; does nothing where the config has them already.

    Unscaled RoPE becomes YaRN, which keeps the frequencies that distinguish near tokens and interpolates the rest, and
    which every runtime of exported models reads. Linear, dynamic and YaRN scaling grow their factor.
    Source: YaRN, Peng et al. 2023 (arXiv:2309.00071).

    Returns:
        Notes for the user.

    Raises:
        ModelError: the config's scaling cannot be stretched further.
    """
    trained = trained_positions(config)
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
        if rope_base(config, parameters)[0] != kind:
            raise ModelError(
                f"max_seq_length {max_seq_length} is beyond the model's {trained} positions, for which `alpha` in its "
                "rope_parameters has stretched RoPE already; lower max_seq_length or pass rope_scaling="
            )
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
        f"({kind}); train on long texts to make use of it"
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
