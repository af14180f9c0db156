"""Rotary position embeddings: angles for a model's config, as cos and sin of each token.

T: tokens (batch x sequence flattened); R: rotary dimensions of a head (at most head_dim).
"""

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# frequencies of these kinds depend on the longest position of the batch
_BY_LENGTH = ("dynamic", "longrope")


class RotaryAngles:
    """cos and sin tables for one kind of layer: default, linear, dynamic, llama3, yarn or longrope.

    The frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`); positions are applied in float32, and cos and sin stay
    float32 because rounding them to bfloat16 loses what long contexts need.

    Args:
        config: the model's config; `rope_parameters` is read.
        layer_type: which entry of `rope_parameters` to read where they differ by layer type, else None.
    """

    def __init__(self, config: PretrainedConfig, layer_type: str | None = None) -> None:
        self.config = config
        self.layer_type = layer_type
        self.parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
        self.kind = self.parameters["rope_type"]
        self._frequencies: dict[tuple[torch.device, int], tuple[torch.Tensor, float]] = {}

    @property
    def needs_length(self) -> bool:
        """Whether `angles` must be told the longest position, which costs a host synchronisation on a GPU."""
        return self.kind in _BY_LENGTH

    def angles(self, positions: torch.Tensor, length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for every token.

        Args:
            positions: [T] int64.
            length: longest position + 1 of the batch; read only where `needs_length`.

        Returns:
            cos, sin: [T, R/2] float32 each, with the attention factor of yarn and longrope multiplied in.
        """
        length = length if self.needs_length else 0
        if self.kind == "dynamic":
            length = max(length, self.config.max_position_embeddings)
        elif self.kind == "longrope":
            original = self.parameters["original_max_position_embeddings"]
            length = original + 1 if length > original else original
        key = (positions.device, length)
        if key not in self._frequencies:
            if self.kind == "dynamic":
                self._frequencies.clear()  # a generation asks for each length once
            self._frequencies[key] = self._compute(positions.device, length)
        frequencies, factor = self._frequencies[key]
        phase = positions[:, None].float() * frequencies
        return phase.cos() * factor, phase.sin() * factor

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
        return 1.0 / self.parameters["rope_theta"] ** exponents, 1.0
