"""What a mixer or an MLP says of itself to the hand-written pass around it, to plans of memory and to generation.

T tokens (rows flattened), D hidden size. A group of linear layers has weights [N, K] and P columns beside them, which hold
LoRA factors and biases (`kernels/lora.py`). `models/half.py` runs the pass.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from oribi.models.half import Kept
    from oribi.models.layers import Batch

Place = Literal["keep", "host", "recompute"]


@dataclass(frozen=True)
class Result:
    """A result of a layer's forward pass that its backward pass reads.

    Args:
        name: its entry in `Keep`.
        columns: numbers per token, the sum of these: "qkv.in", "qkv.out" and "qkv.lora" are K, N and P of the group qkv,
            "hidden" is D, others are the mixer's.
        made_by: the group whose product it is, or "core" if a mixer's own arithmetic makes it: what computing it again costs.
        follows: the result that it is kept beside, or computed again with; it never waits in host memory.
        itemsize: bytes of a number; None is the model's dtype.
        before_norm: it exists only in layers with a norm after the product.
        balanced, memory: its place under the policies of these names; under "speed" everything stays on the device.
    """

    name: str
    columns: tuple[str, ...]
    made_by: str | None = None
    follows: str | None = None
    itemsize: int | None = None
    before_norm: bool = False
    balanced: Place = "recompute"
    memory: Place = "recompute"


class Keep(dict[str, Place]):
    """Where each result of a layer is between forward and backward, by name; one without an entry stays on the device.

    "weights" are the layer's dequantised weights, kept from step to step ("keep") or made again ("recompute", unless
    there is an entry); they never wait in host memory.
    """

    def __missing__(self, name: str) -> Place:
        return "recompute" if name == "weights" else "keep"


class Core(Protocol):
    """What a mixer or an MLP (a module) provides for the pass.

    results: what a half around it can keep. The product of the group `input` has its name, that of `output` (before a
        norm) too; xa of both groups follow a result.
    input, output: names of the groups W_in and W_out. output_result: name of y where it can be kept, else None.
    reads, gives (only where there is one): the entry of `Batch.shared` that it reads beside its input, and that it leaves.
    row_wise: whether tokens do not see each other: then the half runs in portions of the tokens, and `backward` leaves h
        where dh was, so that h is never kept.
    masks_padding: whether its input has to be zero at padding, because what it sees there would stay with it.
    """

    results: tuple[Result, ...]
    input: str
    output: str
    output_result: str | None
    row_wise: bool
    masks_padding: bool

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layers of W_in and W_out, by the names of the groups."""

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Any:
        """The cheap part, done in forward and in backward: p [T, N] may be overwritten where it is `fresh` from W_in."""

    def run(self, prepared: Any, kept: "Kept") -> torch.Tensor:
        """h [T, K of W_out]; takes its own results from `kept`, or computes them and puts them there."""

    def backward(self, prepared: Any, dh: torch.Tensor) -> None:
        """Writes the gradient of p over the p that was given to `prepare`."""


@dataclass(frozen=True)
class Held:
    """What a mixer holds of each row while it continues texts, beside what other mixers hold.

    Args:
        shape: per row. dtype: None is the model's.
        slots: the dimension of `shape` along which tokens lie, one in each slot; None where the size does not depend on
            the tokens. Such a tensor is zero when a row begins; of slots, those that hold no token are not read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    slots: int | None = None

    def bytes(self, itemsize: int) -> int:
        """Per row, where a number of the model has `itemsize` bytes."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else itemsize)


class Mixer(Core, Protocol):
    """What mixes the tokens of a layer.

    attribute: its name in a layer, as checkpoints have it.
    projections: names of its linear layers that get an adapter where nothing else is asked for.
    index: of its layer.
    window: tokens that it sees, itself included; None: all before it.
    needs_bounds: whether it asks on the host where the documents of a pack begin, which no recorded graph can.
    needs_whole_rows: why processes cannot share its rows, in words; None where they can.
    columns: numbers per token by the names that its `results` use, beside those of the groups.
    core_by_products: how many times as long its own arithmetic takes as that much of a matrix product.
    """

    attribute: str
    projections: tuple[str, ...]
    index: int
    window: int | None
    needs_bounds: bool
    needs_whole_rows: str | None
    columns: dict[str, int]
    core_by_products: float

    def holds(self, length: int) -> dict[str, Held]:
        """What it holds while rows of at most `length` tokens are continued."""

    def core_flop(self, longest: float) -> float:
        """Its own arithmetic in forward, for one token of a document of `longest`."""

    def core_backward_bytes(self, tokens: int, width: int) -> int:
        """Device bytes of its `backward` beside its results; of numbers of `width` bytes."""

    def autograd_columns(self) -> int:
        """Numbers per token that PyTorch's autograd keeps of it, beside the inputs of linear layers."""
