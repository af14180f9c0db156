"""Groups of linear layers with LoRA as one token's step computes them, for the few rows of a batch.

B rows, K in features, N out features, P LoRA columns. Weights are read where they lie, packed ones by a kernel on GPUs. For
many rows packed weights are dequantised in every step; a CPU reads a copy in 16 bits where that fits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from oribi.errors import ModelError
from oribi.kernels.dispatch import use_triton
from oribi.kernels.lora import (
    AugmentedWeight,
    Projection,
    augmented_weight,
    group_shape,
    kept_weight,
    lora_layout,
)
from oribi.kernels.lora_expand import expand
from oribi.kernels.lora_pack import pack_factors
from oribi.kernels.nf4_linear import nf4_linear, reads
from oribi.models.linear_layers import read


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
    """A group whose weights were dequantised beside its factors, for as long as `kernels.lora.weights_kept` lasts."""

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
        self.factors = None
        if any(p.a is not None for p in self.projections):
            n, k = group_shape(self.projections)
            pad, _ = lora_layout(self._adapted(), device)
            a, b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((pad, k), (n, pad)))
            self.factors = AugmentedWeight(a, b, None, a)  # of which only the factors are used
            self.refresh()

    def _adapted(self) -> list[Projection]:
        return [replace(p, bias=None) for p in self._read()]

    def refresh(self) -> None:
        if self.factors is not None:
            pack_factors(self._adapted(), self.factors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = [few_rows_linear(x, p.weight, p.bias) for p in self.projections]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.factors is None:
            return y
        return expand(self.factors.compute_xa(x), self.factors.scaled_b, None, y, out=y)


class PackedGroup(LinearGroup):
    """A group whose 4-bit weights a kernel reads as they are, with the factors where they are trained."""

    def __init__(
        self, modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device, counters: torch.Tensor
    ) -> None:
        super().__init__(modules, dtype, device)
        self._counters = counters

    def __call__(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        return nf4_linear(x, self.projections, self._counters, activation=activation)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b for few rows.

    Args:
        x: [B, K]. weight: [N, K]. bias: [N] or None.

    Returns:
        [B, N], contiguous.
    """
    rows, wide = len(x), x.dtype.itemsize > 2
    if x.is_cuda or (wide and rows <= 8):
        return F.linear(x, weight, bias)
    # PyTorch's CPU products are faster with the larger operand in front, and 16-bit ones with four rows than with one. The
    # layers of SmolLM2-135M on one core with AMX: 25 ms instead of 35 for 16 rows in bfloat16 and instead of 31 for one row,
    # 70 ms instead of 82 for 16 rows in float32
    some = x if wide or rows >= 4 else F.pad(x, (0, 0, 0, 4 - rows))
    y = torch.mm(weight, some.t())[:, :rows].t().contiguous()
    return y if bias is None else y.add_(bias)


def linear_group(
    modules: Sequence[nn.Module], dtype: torch.dtype, rows: int, counters: torch.Tensor
) -> LinearGroup:
    """A group in the way that suits its weights.

    Args:
        modules: its layers. dtype, rows: of the inputs. counters: of `nf4_linear`, on their device.
    """
    projections, device = [read(module) for module in modules], counters.device
    if all(not hasattr(p.weight, "quant_state") and p.weight.dtype == dtype for p in projections):
        return UnpackedGroup(modules, dtype, device)
    if use_triton(counters) and dtype.itemsize == 2 and reads(projections, rows):
        return PackedGroup(modules, dtype, device, counters)
    copy = kept_weight(projections, dtype, device)
    return LinearGroup(modules, dtype, device) if copy is None else CopiedGroup(modules, copy)
