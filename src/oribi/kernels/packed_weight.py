"""Frozen weights that are held as codes, of whatever format, and read as dense ones.

N rows, K columns. NF4 matrices are bitsandbytes' Params4bit with a `quant_state`; all other codes are a `PackedWeight`.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels import nf4


class Codes(Protocol):
    """Codes of a frozen weight.

    Args:
        shape: of the weight: (N, K), or (E, N, K) of E experts.
        codes: uint8, most of its bytes.
    """

    shape: tuple[int, ...]
    codes: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of all tensors."""

    def moved(self, device: torch.device, codes: torch.Tensor) -> "Codes":
        """The same with scales on a device, and with other memory for the codes."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds: codes, scales, and whatever else."""

    def write(self, out: torch.Tensor) -> None:
        """Writes the dense weight into `out`, whose rows may be strided, rounded once to its dtype."""


@dataclass
class ShiftedCodes:
    """Codes of a weight that has an update already, less that update: W = codes - B A, to which a LoRA pair adds its B A again.

    Args:
        whole: of the updated weight [N, K].
        a, b: [r, K] and [N, r], float32, with the scale in b.
    """

    whole: Codes
    a: torch.Tensor
    b: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def codes(self) -> torch.Tensor:
        return self.whole.codes

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes + self.a.nbytes + self.b.nbytes

    def moved(self, device: torch.device, codes: torch.Tensor) -> "ShiftedCodes":
        """The same on a device, with other memory for the codes."""
        return ShiftedCodes(self.whole.moved(device, codes), self.a.to(device), self.b.to(device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        yield from (*self.whole.tensors(), self.a, self.b)

    def write(self, out: torch.Tensor) -> None:
        """Writes the values into out [N, K], whose rows may be strided."""
        self.whole.write(out)
        out.addmm_(self.b.to(out.dtype), self.a.to(out.dtype), alpha=-1)


class PackedWeight(nn.Parameter):
    """The parameter of packed weights: it has their shape, dtype and device, and no storage for them.

    Its one stored number is a nan, so that whoever reads it as dense weights gets nothing that looks like a result.

    Args:
        packed: its codes. dtype: of the weights.
    """

    packed: Codes

    def __new__(cls, packed: Codes, dtype: torch.dtype) -> "PackedWeight":
        device = next(packed.tensors()).device
        shaped = torch.full((1,), torch.nan, dtype=dtype, device=device).expand(packed.shape)
        weight = torch.Tensor._make_subclass(cls, shaped, False)
        weight.packed = packed
        return weight

    @property
    def data(self) -> torch.Tensor:
        """Refused: by this name PEFT reads the weights that it merges into, or that DoRA and its ways of beginning need.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "these weights are codes in memory, which PEFT can neither merge an adapter into nor read for DoRA, PiSSA, OLoRA and the like: "
            "load the model with load_in_4bit=False. To save it merged, in 16 bits, call oribi.save_merged or oribi.save_gguf"
        )

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, values)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.packed.nbytes

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        if id(self) not in memo:
            memo[id(self)] = PackedWeight(copy.deepcopy(self.packed, memo), self.dtype)
        return memo[id(self)]


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight is held as codes, which have to be dequantised."""
    return isinstance(weight, PackedWeight) or hasattr(weight, "quant_state")


def weight_shape(weight: torch.Tensor) -> tuple[int, int]:
    """(N, K) of a matrix, packed or dense."""
    return tuple(getattr(weight, "quant_state", weight).shape)


def write_dense(weights: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Writes matrices below each other, whatever each is held as.

    Args:
        weights: [N_i, K] each.
        out: [sum N_i, K]; rows may be strided.
    """
    if all(hasattr(weight, "quant_state") for weight in weights):  # in one launch
        nf4.dequantize(weights, out.dtype, out=out)
        return
    for weight, part in zip(weights, out.split([weight_shape(weight)[0] for weight in weights])):
        if isinstance(weight, PackedWeight):
            weight.packed.write(part)
        elif hasattr(weight, "quant_state"):
            nf4.dequantize([weight], out.dtype, out=part)
        else:
            part.copy_(weight.detach())


def dense_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One weight's values in dtype; a dense weight that has it is returned as it is."""
    if isinstance(weight, PackedWeight):
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        weight.packed.write(out)
        return out
    if hasattr(weight, "quant_state"):
        return nf4.dequantize([weight], dtype)
    return weight.detach().to(dtype)
