"""Sizes of decoder layers, which the account of bytes and arithmetic multiplies by tokens.

D hidden size. A group of linear layers that share their input has weights [N, K] and P columns beside them, which hold LoRA
factors and biases (`kernels/lora.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from oribi.kernels.lora import padded_columns
from oribi.memory.experts_shape import ExpertsShape, experts_of, experts_shape
from oribi.models.core import Core, Mixer
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.experts import ExpertsMLP
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import read
from oribi.models.mlp import SharedMLP

# what makes results of experts -> the stack
_STACKS = {"experts": "gate_up_proj", "experts_down": "down_proj"}


@dataclass(frozen=True, eq=False)
class LayerShape:
    """Sizes of the decoder layers of one kind: with mixers of one kind, and with linear layers of the same sizes.

    Args:
        layers: with or without weights. They may differ in what their mixers see.
        width: bytes of a number.
        ranks: group -> ranks of the adapted linear layers in it, and stack of experts -> the rank of its pairs.
        device: that they train on.
    """

    layers: Sequence[DecoderLayer]
    width: int
    ranks: Mapping[str, Sequence[int]]
    device: torch.device

    @property
    def layer(self) -> DecoderLayer:
        """One of them."""
        return self.layers[0]

    @property
    def mixer(self) -> Mixer:
        """Its mixer."""
        return self.layer.mixer

    @property
    def lent(self) -> int:
        """Numbers per token of the keys and values that later layers read, which stay until its backward whatever is kept."""
        return self.mixer.lent if getattr(self.mixer, "gives", None) else 0

    @cached_property
    def cores(self) -> list[Core]:
        """The mixer, the MLP or the experts, and the MLP beside them."""
        found = [core for core, _, _ in self.layer.parts()]
        beside = (core.shared for core in found if isinstance(core, ExpertsMLP))
        return [*found, *(core for core in beside if core is not None)]

    @cached_property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """Group -> (N, K, P)."""
        return {
            name: (
                sum(module.out_features for module in modules) + self._rows_beside(core, name),
                modules[0].in_features,
                padded_columns(sum(self.ranks[name]) + any(m.bias is not None for m in modules), self.device),
            )
            for core in self.cores
            for name, modules in core.groups().items()
        }

    @property
    def gated_columns(self) -> int:
        """Columns of h of an MLP beside experts whose output is gated."""
        beside = [core for core in self.cores if isinstance(core, SharedMLP)]
        return sum(core.inner for core in beside if core.rows_beside(self.device))

    def _rows_beside(self, core: Core, group: str) -> int:
        """Rows of a group that belong to no linear layer."""
        return core.rows_beside(self.device) if isinstance(core, SharedMLP) and group == core.input else 0

    @cached_property
    def experts(self) -> ExpertsShape | None:
        """Sizes of the experts that the layer has in place of an MLP."""
        found = (experts_shape(core, self.ranks, self.width) for core in self.cores)
        return next((one for one in found if one is not None), None)

    @property
    def hidden(self) -> int:
        """D."""
        return self.groups[self.cores[0].output][0]

    def columns(self, terms: Sequence[str]) -> int:
        """Numbers per token, in the words of `models.half.Result`."""
        sizes = {"hidden": self.hidden, **self.mixer.columns}
        if self.experts is not None:
            sizes |= self.experts.columns()
        for name, (n, k, p) in self.groups.items():
            sizes |= {f"{name}.out": n, f"{name}.in": k, f"{name}.lora": p}
        return sum(sizes[term] for term in terms)

    def weight_buffer(self, group: str) -> int:
        """Bytes of a group's dequantised weights with their LoRA factors beside them."""
        n, k, p = self.groups[group]
        return (n + p) * (k + p) * self.width

    @property
    def mlp_buffer(self) -> int:
        """Bytes of the dequantised weights of gate|up, or of the experts."""
        if self.experts is None:
            return self.weight_buffer(self.cores[1].input)
        return self.experts.buffers + sum(self.weight_buffer(core.input) for core in self.cores[2:])

    @property
    def mlp_terms(self) -> list[str]:
        """The numbers per token that the MLP's or the experts' element-wise passes move, as `columns` takes them."""
        if self.experts is None:
            return 3 * ["down.in"]
        return 3 * ["experts_gate_up", *(f"{core.output}.in" for core in self.cores[2:])]

    @property
    def experts_traffic(self) -> float:
        """Bytes that forward and backward move to dequantise the experts, which are never kept so."""
        return 0.0 if self.experts is None else self.experts.traffic

    @property
    def dequantised_traffic(self) -> float:
        """Bytes that forward and backward move to dequantise the linear layers: half a byte of codes read, a number written."""
        return 2 * (0.5 + self.width) * sum(n * k for n, k, _ in self.groups.values())

    def product_flop(self, group: str) -> int:
        """Arithmetic of a group's forward for one token: S = x A^T, and [x, S] [W, sB]^T; of "experts", that of gate|up, and of
        "experts_down" that of down and of the weights of its rows."""
        if group in _STACKS:
            return self.experts.flop([_STACKS[group]]) + self.experts.router_flop * (group == "experts_down")
        n, k, p = self.groups[group]
        return 2 * (k * p + n * (k + p))

    def core_flop(self, longest: float) -> float:
        """The mixers' own arithmetic in forward for one token of a document of `longest`, the mean over the layers."""
        return sum(layer.mixer.core_flop(longest) for layer in self.layers) / len(self.layers)


def layer_shapes(
    decoder: DecoderForCausalLM,
    ranks: Callable[[DecoderLayer], Mapping[str, Sequence[int]]] | None = None,
    device: torch.device | None = None,
) -> list[LayerShape]:
    """The sizes of a model's layers, one for each layer; layers of one kind share one.

    Args:
        decoder: with LoRA attached, or not.
        ranks: gives a layer's ranks as `LayerShape` has them; None reads the adapter that is attached.
        device: that it trains on; None is where it lies.
    """
    kinds: dict[tuple, list[DecoderLayer]] = {}
    order = []
    for layer in decoder.model.layers:
        sizes = [
            (name, module.in_features, module.out_features)
            for core, _, _ in layer.parts()
            for name, modules in core.groups().items()
            for module in modules
        ]
        sizes += [
            tuple(experts_of(core).gate_up_proj.shape)
            for core, _, _ in layer.parts()
            if isinstance(core, ExpertsMLP)
        ]
        of_layer = (ranks or attached_ranks)(layer)
        gives = getattr(layer.mixer, "gives", None)
        key = type(layer.mixer), gives, *sizes, *((name, *found) for name, found in of_layer.items())
        kinds.setdefault(key, []).append(layer)
        order.append((key, of_layer))
    width, device = decoder.dtype.itemsize, device or decoder.device
    shapes = {key: LayerShape(kinds[key], width, of_layer, device) for key, of_layer in order}
    return [shapes[key] for key, _ in order]


def attached_ranks(layer: DecoderLayer) -> dict[str, list[int]]:
    """Group, or stack of experts, -> ranks of the adapter that is attached to a layer."""
    found = {
        name: [p.a.shape[0] for p in map(read, modules) if p is not None and p.a is not None]
        for core, _, _ in layer.parts()
        for name, modules in core.groups().items()
    }
    for core, _, _ in layer.parts():
        if isinstance(core, ExpertsMLP):
            found |= {name: [one.rank] for name, one in (core.stacks() or {}).items() if one.rank}
    return found
