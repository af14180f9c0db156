"""The gated MLP, as a module and as the core of a layer's hand-written pass.

    gate|up = n W_gate_up      h = act(gate) up      out = h W_down

T tokens, D hidden size, I intermediate size. gate|up and h are the widest results of a layer: the pass computes them in
portions of the tokens, and makes h once more in backward.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family, activation_of
from oribi.families.sizes import mlp_size
from oribi.kernels.gated_mlp import gated_mlp, gated_mlp_backward, gated_mlp_forward
from oribi.models.core import Result
from oribi.models.half import Kept
from oribi.models.linear_layers import NamedParts, project
from oribi.models.mixers.shared_attention import is_shared

if TYPE_CHECKING:
    from oribi.models.layers import Batch

# of an MLP that is not the last part of its layer: its output, which the next part reads
_BEFORE_ANOTHER_PART = (
    Result("x_mlp", ("down.out",), made_by="down", balanced="keep", memory="host"),
    Result("down_xa", ("down.lora",), follows="x_mlp"),
    Result("down", ("down.out",), made_by="down", before_norm=True),
)


class MLP(NamedParts):
    """See the file's docstring.

    Args:
        config: of the model. family: its row. index: of the layer. inner: I; None: as the config says for this layer.
    """

    # `models.half.Core` says what these are
    input, output, output_result, row_wise, masks_padding = "gate_up", "down", None, True, False
    results = (
        Result("gate_up", ("gate_up.out", "gate_up.lora"), made_by="gate_up"),
        Result("gate_up_xa", ("gate_up.lora",), follows="gate_up"),
        Result("down_xa", ("down.lora",), follows="gate_up"),
        Result("down", ("down.out",), made_by="down", before_norm=True),
    )

    def __init__(
        self, config: PretrainedConfig, family: Family, index: int, inner: int | None = None
    ) -> None:
        super().__init__(family)
        size = config.hidden_size
        if inner is None:
            inner = mlp_size(config)
            if family.wide_mlp and config.use_double_wide_mlp and is_shared(config, index):
                inner *= 2
        if family.per_layer_inputs and config.hidden_size_per_layer_input:
            self.output_result, self.results = "x_mlp", (*self.results[:2], *_BEFORE_ANOTHER_PART)
        bias = family.mlp_bias and bool(family.value(config, "mlp_bias"))
        self._inputs = (
            ("gate_up_proj",) if "gate_up" in family.fused_projections else ("gate_proj", "up_proj")
        )
        for role in self._inputs:
            self.add_part(role, nn.Linear(size, 2 * inner // len(self._inputs), bias=bias))
        self.add_part("down_proj", nn.Linear(inner, size, bias=bias))
        self.activation = activation_of(config)

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layers that share an input: gate and up (or the one layer that holds both), and down."""
        return {self.input: [self.part(role) for role in self._inputs], self.output: [self.part("down_proj")]}

    def forward(self, x: torch.Tensor, batch: "Batch | None" = None) -> torch.Tensor:
        groups = self.groups()
        outputs = project(groups[self.input], x)
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        flat = gated_mlp(gate.flatten(0, -2), up.flatten(0, -2), self.activation)
        return project(groups[self.output], flat.view(*x.shape[:-1], -1))[0]

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """gate and up [T, I], views of p."""
        return p.chunk(2, dim=1)

    def run(self, prepared: tuple[torch.Tensor, torch.Tensor], kept: Kept) -> torch.Tensor:
        """h [T, I]."""
        return gated_mlp_forward(*prepared, self.activation)

    def backward(self, prepared: tuple[torch.Tensor, torch.Tensor], dh: torch.Tensor) -> None:
        """Writes the gradient of gate|up over it, and h over dh: at 8B and 4096 tokens that saves 350 MB."""
        gate, up = prepared
        gated_mlp_backward(dh, gate, up, self.activation, dgate=gate, dup=up, h=dh)


class SharedMLP(MLP):
    """An MLP beside a layer's experts, whose results have names of their own."""

    input, output = "shared_gate_up", "shared_down"
    results = (
        Result("shared_gate_up", ("shared_gate_up.out", "shared_gate_up.lora"), made_by="shared_gate_up"),
        Result("shared_gate_up_xa", ("shared_gate_up.lora",), follows="shared_gate_up"),
        Result("shared_down_xa", ("shared_down.lora",), follows="shared_gate_up"),
        Result("shared_down", ("shared_down.out",), made_by="shared_down", before_norm=True),
    )
