"""Groups of linear layers with LoRA as one token's step computes them, for the few rows of a batch.

B rows, K in features, N out features, P LoRA columns. Weights are read where they lie, packed ones by a kernel on GPUs. For
many rows packed weights are dequantised in every step; a CPU reads a copy in 16 bits where that fits.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels import block_linear, nf4_linear
from oribi.kernels.dispatch import use_triton
from oribi.kernels.lora import AugmentedWeight, Projection, augmented_weight
from oribi.kernels.lora_linear import kept_weight
from oribi.kernels.lora_pack import pack_factors
from oribi.kernels.lora_unpacked import UnpackedWeight, unpacked
from oribi.models.core import Core
from oribi.models.linear_layers import read

if TYPE_CHECKING:
    from oribi.models.decoding.state import DecodingState


# whether steps multiply with the codes of a GGUF base: its kernel agrees with float64 in Triton's interpreter, and no test of it has run
# on a GPU yet
READS_BLOCKS = False


class LinearGroup:
    """Linear layers that share their input.

    Args:
        modules: the layers, or LoRA layers around them, which `read` can read.
        dtype, device: of the rows.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        self._modules, self._dtype, self._device = modules, dtype, device
        self.projections = self._read()
        self.sizes = [p.shape[0] for p in self.projections]

    def _read(self) -> list[Projection]:
        found = [read(module) for module in self._modules]
        if any(p is None for p in found):
            raise ModelError(
                "a linear layer has changed since its group was read; call release() on the model"
            )
        return found

    def refresh(self) -> None:
        """Reads LoRA factors that may have been trained since."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y [B, N] of x [B, K]. Dequantises the weights."""
        return augmented_weight(self.projections, self._dtype, self._device).linear(x)[0]


class CopiedGroup(LinearGroup):
    """A group whose weights were dequantised beside its factors, for as long as `kernels.lora_linear.weights_kept` lasts."""

    def __init__(self, modules: Sequence[nn.Module], copy: AugmentedWeight) -> None:
        super().__init__(modules, copy.augmented.dtype, copy.augmented.device)
        self._copy = copy

    def refresh(self) -> None:
        pack_factors(self._read(), self._copy)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._copy.linear(x)[0]


class UnpackedGroup(LinearGroup):
    """A group whose weights need no dequantising: they are read where they lie, and nothing is copied."""

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(modules, dtype, device)
        kept = kept_weight(self.projections, dtype, device)
        self._weight = UnpackedWeight(self.projections, dtype, device) if kept is None else kept

    def refresh(self) -> None:
        self._weight.refresh(self._read())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._weight(x)


class PackedGroup(LinearGroup):
    """A group whose codes a kernel reads as they are, with the factors where they are trained.

    Args:
        product: `nf4_linear`, or another function like it. modules, dtype: as of any group. counters: of the product.
    """

    def __init__(
        self,
        product: Callable[..., torch.Tensor],
        modules: Sequence[nn.Module],
        dtype: torch.dtype,
        counters: torch.Tensor,
    ) -> None:
        super().__init__(modules, dtype, counters.device)
        self._product, self._counters = product, counters

    def __call__(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        return self._product(x, self.projections, self._counters, activation=activation)


def linear_group(
    modules: Sequence[nn.Module], dtype: torch.dtype, rows: int, counters: torch.Tensor
) -> LinearGroup:
    """A group in the way that suits its weights.

    Args:
        modules: its layers. dtype, rows: of the inputs. counters: of `nf4_linear`, on their device.
    """
    projections, device = [read(module) for module in modules], counters.device
    if unpacked(projections, dtype):
        return UnpackedGroup(modules, dtype, device)
    if use_triton(counters) and dtype.itemsize == 2:
        if nf4_linear.reads(projections, rows):
            return PackedGroup(nf4_linear.nf4_linear, modules, dtype, counters)
        if READS_BLOCKS and block_linear.reads_blocks(projections, rows):
            return PackedGroup(block_linear.block_linear, modules, dtype, counters)
    copy = kept_weight(projections, dtype, device)
    return LinearGroup(modules, dtype, device) if copy is None else CopiedGroup(modules, copy)


def groups_of(core: Core, state: "DecodingState") -> dict[str, LinearGroup]:
    """The groups of linear layers of a mixer or MLP, for the rows of a state."""
    rows = len(state.row)
    return {name: linear_group(ms, state.dtype, rows, state.counters) for name, ms in core.groups().items()}
