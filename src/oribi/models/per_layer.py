"""Inputs of single layers: an embedding of each token for each layer, and the part of a layer that adds it.

    P = (norm(x W_p D^-1/2) + E[ids] N^1/2) 2^-1/2      y = x + norm((act(x W_gate) P_i) W_out)

x is the scaled embedding of each token [B, S, D], P is [B, S, L, N] and computed once, layer i reads P_i. T tokens, D hidden
size, L layers, N size of a layer's input, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family, activation_of
from oribi.kernels.gated_mlp import gated_mlp, gated_mlp_backward, gated_mlp_forward
from oribi.models.core import Result
from oribi.models.half import Kept
from oribi.models.linear_layers import RMSNorm, project
from oribi.models.trained_rows import put_back, taken

if TYPE_CHECKING:
    from oribi.models.layers import Batch, DecoderLayer


def has_per_layer_inputs(config: PretrainedConfig, family: Family) -> bool:
    """Whether a model's layers have inputs of their own."""
    return family.per_layer_inputs and bool(config.hidden_size_per_layer_input)


def entry(index: int) -> str:
    """A layer's entry of `Batch.shared`."""
    return f"per_layer_input_{index}"


class PerLayerInput(nn.Module):
    """What a layer adds of its own input, last; its linear layers lie in the layer, as checkpoints have them.

    Args:
        layer: gets the linear layers and the norm. config, family, index: of the layer.
    """

    # `models.core.Core` says what these are
    input, output, output_result, row_wise, gives = "per_layer_gate", "per_layer_output", None, False, None
    masks_padding = False
    results = (
        Result("per_layer_gate", ("per_layer_gate.out", "per_layer_gate.lora"), made_by="per_layer_gate", balanced="keep"),
        Result("per_layer_gate_xa", ("per_layer_gate.lora",), follows="per_layer_gate"),
        Result("per_layer_output_xa", ("per_layer_output.lora",), follows="per_layer_gate"),
        Result("per_layer_output", ("per_layer_output.out",), made_by="per_layer_output", before_norm=True),
    )  # fmt: skip

    def __init__(self, layer: "DecoderLayer", config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        size, hidden = config.hidden_size_per_layer_input, config.hidden_size
        layer.add_part("per_layer_input_gate", nn.Linear(hidden, size, bias=False))
        layer.add_part("per_layer_projection", nn.Linear(size, hidden, bias=False))
        role = "post_per_layer_input_norm"
        layer.add_part(role, RMSNorm.of(config, family, role, hidden))
        self._layer = (layer,)  # which owns the parts: no second name for them
        self.activation, self.index, self.reads = activation_of(config), index, entry(index)

    def groups(self) -> dict[str, list[nn.Module]]:
        """The gate, and what brings its product back to the hidden size."""
        (layer,) = self._layer
        return {
            "per_layer_gate": [layer.part("per_layer_input_gate")],
            "per_layer_output": [layer.part("per_layer_projection")],
        }

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        groups, (own,) = self.groups(), batch.shared[self.reads]
        (gate,) = project(groups["per_layer_gate"], x)
        h = gated_mlp(gate.flatten(0, 1), taken(own.flatten(0, 1), batch.trained_rows), self.activation)
        return project(groups["per_layer_output"], h.view(gate.shape))[0]

    def prepare(
        self, p: torch.Tensor, batch: "Batch", fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor, "Batch"]:
        """The gate [T, N], the layer's input [T, N], and where its gradient goes."""
        return p, taken(batch.shared[self.reads][0].flatten(0, 1), batch.trained_rows), batch

    def run(self, prepared: tuple[torch.Tensor, torch.Tensor, "Batch"], kept: Kept) -> torch.Tensor:
        """h [T, N]."""
        gate, own, _ = prepared
        return gated_mlp_forward(gate, own, self.activation)

    def backward(self, prepared: tuple[torch.Tensor, torch.Tensor, "Batch"], dh: torch.Tensor) -> None:
        """Writes the gradient of the gate over it, and leaves that of the layer's input in `Batch.gradients`."""
        gate, own, batch = prepared
        _, down, _ = gated_mlp_backward(dh, gate, own, self.activation, dgate=gate)
        whole = batch.shared[self.reads][0].shape
        down = put_back(down, batch.trained_rows, whole[:-1].numel())
        batch.gradients[self.reads] = (down.view(whole),)


class PerLayerEmbedding(nn.Module):
    """Mixed into the decoder: the inputs of all layers."""

    def add_per_layer_inputs(self, config: PretrainedConfig, family: Family) -> None:
        """Adds the embedding and the projection, under the checkpoint's names; nothing in families without them."""
        self.per_layer_size = (
            config.hidden_size_per_layer_input if has_per_layer_inputs(config, family) else 0
        )
        if not self.per_layer_size:
            return
        from oribi.models.layers import Embedding

        size, columns = self.per_layer_size, config.num_hidden_layers * self.per_layer_size
        rows = config.vocab_size_per_layer_input
        self.embed_tokens_per_layer = Embedding(rows, columns, config.pad_token_id, size**0.5)
        # it is read a row per token, and as large as all layers in 4 bits
        self.embed_tokens_per_layer.waits_in_host_memory = True
        self.per_layer_model_projection = nn.Linear(config.hidden_size, columns, bias=False)
        self.per_layer_projection_norm = RMSNorm.of(config, family, "per_layer_projection_norm", size)

    def per_layer_inputs(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """P_i [..., N] of every layer.

        Args:
            ids: [...] int64. x: [..., D], their scaled embeddings.
        """
        size = self.per_layer_size
        (projected,) = project([self.per_layer_model_projection], x)
        projected = self.per_layer_projection_norm(
            (projected * x.shape[-1] ** -0.5).unflatten(-1, (-1, size))
        )
        looked_up = self.embed_tokens_per_layer(ids).to(x.dtype).unflatten(-1, (-1, size))
        # a slice's backward would make zeros for all layers, in each layer
        return ((projected + looked_up) * 2.0**-0.5).unbind(-2)
