"""The gated MLP, as a module and as the core of a layer's hand-written pass.

    gate|up = n W_gate_up      h = act(gate) up      out = h W_down

T tokens, D hidden size, I intermediate size. gate|up and h are the widest results of a layer: the pass computes them in
portions of the tokens, and makes h once more in backward.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family, activation_of
from oribi.families.sizes import mlp_size
from oribi.kernels.dispatch import wide
from oribi.kernels.expert_rows import products_and_weighted
from oribi.kernels.gated_mlp import gated_mlp, gated_mlp_backward, gated_mlp_forward
from oribi.kernels.lora import padded_columns
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
        if family.per_layer_inputs and config.hidden_size_per_layer_input and inner is None:
            self.output_result, self.results = "x_mlp", (*self.results[:2], *_BEFORE_ANOTHER_PART)
        inner = mlp_size(config) if inner is None else inner
        if family.wide_mlp and config.use_double_wide_mlp and is_shared(config, index):
            inner *= 2
        self.inner = inner
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
        beside = outputs[len(self._inputs) :]  # what the gate of the output gives, where there is one
        gate, up = outputs[0].chunk(2, dim=-1) if len(self._inputs) == 1 else outputs[:2]
        flat = gated_mlp(gate.flatten(0, -2), up.flatten(0, -2), self.activation)
        for numbers in beside:
            flat = flat * torch.sigmoid(numbers.flatten(0, -2))
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
    """An MLP beside a layer's experts, whose results have names of their own.

        out = sigmoid(n w^T) (h W_down)      which is (sigmoid(n w^T) h) W_down

    where the family has a gate w [1, D], a linear layer that lies beside the MLP and is computed with W_gate_up.

    Args:
        config, family, index, inner: as `MLP` takes them.
        gate: gives the gate as it is now, for PEFT may have put a LoRA layer around it; None without one.
    """

    input, output = "shared_gate_up", "shared_down"
    results = (
        Result("shared_gate_up", ("shared_gate_up.out", "shared_gate_up.lora"), made_by="shared_gate_up"),
        Result("shared_gate_up_xa", ("shared_gate_up.lora",), follows="shared_gate_up"),
        Result("shared_down_xa", ("shared_down.lora",), follows="shared_gate_up"),
        Result("shared_down", ("shared_down.out",), made_by="shared_down", before_norm=True),
    )

    def __init__(
        self,
        config: PretrainedConfig,
        family: Family,
        index: int,
        inner: int,
        gate: Callable[[], nn.Module] | None,
    ) -> None:
        super().__init__(config, family, index, inner)
        self._gate = gate

    def groups(self) -> dict[str, list[nn.Module]]:
        """As of `MLP`, with the gate behind gate and up."""
        groups = super().groups()
        if self._gate is not None:
            groups[self.input].append(self._gate())
        return groups

    def rows_beside(self, device: torch.device) -> int:
        """Rows of zeros behind the gate's, with which a product's rows stay aligned as without a gate."""
        return 0 if self._gate is None else padded_columns(1, device) - 1

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> tuple[torch.Tensor, ...]:
        """gate and up [T, I], and what the gate gives, with zeros beside it, views of p."""
        return p.split([self.inner, self.inner, p.shape[1] - 2 * self.inner], dim=1)

    def run(self, prepared: tuple[torch.Tensor, ...], kept: Kept) -> torch.Tensor:
        """h [T, I], gated."""
        gate, up, numbers = prepared
        h = gated_mlp_forward(gate, up, self.activation)
        return h if self._gate is None else h.mul_(torch.sigmoid(numbers[:, :1]))

    def backward(self, prepared: tuple[torch.Tensor, ...], dh: torch.Tensor) -> None:
        """Writes the gradient of all of p over it, and the gated h over dh."""
        gate, up, numbers = prepared
        if self._gate is None:
            super().backward((gate, up), dh)
            return
        share = torch.sigmoid(numbers[:, :1])
        dshare = products_and_weighted(dh, gated_mlp_forward(gate, up, self.activation), share[:, 0])
        super().backward((gate, up), dh)
        dh.mul_(share)
        numbers.zero_()
        numbers[:, 0] = dshare * wide(share[:, 0]) * (1 - wide(share[:, 0]))
