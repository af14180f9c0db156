"""The gated delta rule of one token per row, which changes the memory that a state holds."""

from typing import Any

import torch

from oribi.kernels.causal_conv import causal_conv_step
from oribi.kernels.gated_delta import gated_delta_step
from oribi.kernels.gated_mlp import gated_mlp_forward
from oribi.models.decoding.groups import groups_of
from oribi.models.decoding.state import DecodingState
from oribi.models.mixers.gated_delta import GatedDelta


class GatedDeltaStep:
    """The mixer of one token per row.

    Args:
        mixer: the module. state: holds the convolution's window and the memory of its layer.
    """

    def __init__(self, mixer: GatedDelta, state: DecodingState) -> None:
        self.mixer, self.state = mixer, state
        self.groups = groups_of(mixer, state)
        self._weight = mixer.conv1d.weight.squeeze(1)

    def __call__(self, x: torch.Tensor, angles: Any, rings: Any) -> torch.Tensor:
        """Output [B, D] of x [B, D]."""
        mixer, held = self.mixer, self.state.held[self.mixer.index]
        qkv, z, b, a = self.groups["delta_in"](x).split(mixer.widths, dim=1)
        q, k, v = mixer.heads(causal_conv_step(qkv, held["window"], self._weight, silu=True))
        q, k = mixer.unit_rows(q)[0], mixer.unit_rows(k)[0]
        o = gated_delta_step(q, k, v, mixer.decays(a), torch.sigmoid(b), held["state"], mixer.scale)
        normed = mixer.norm.compute(o)[0].flatten(1)
        return self.groups["delta_out"](gated_mlp_forward(z, normed, "silu"))
