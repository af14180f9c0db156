"""Linear layers with LoRA on weights that need no dequantising, without gradients: read where they lie, never copied.

    y_i = x W_i^T + b_i + scale_i (x A_i^T) B_i^T

B rows, K in features, N out features of a group that shares x, P LoRA columns. Only the factors are packed (`lora_pack`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from oribi.kernels.dispatch import use_triton, wide
from oribi.kernels.lora import AugmentedWeight, Projection, group_shape, lora_layout
from oribi.kernels.lora_expand import expand
from oribi.kernels.lora_pack import pack_factors
from oribi.kernels.packed_weight import is_packed

_FEW = 64  # rows up to which a CPU's product is that of a token's step


def unpacked(projections: Sequence[Projection], dtype: torch.dtype) -> bool:
    """Whether a group's weights can be read as they are for inputs of this dtype."""
    return all(not is_packed(p.weight) and p.weight.dtype == dtype for p in projections)


class UnpackedWeight:
    """A group's weights where they lie, and its packed LoRA pairs.

    Args:
        projections: a group that is `unpacked`.
        dtype, device: of its inputs.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, device: torch.device) -> None:
        self._projections, self._factors = projections, None
        if any(p.a is not None for p in projections):
            n, k = group_shape(projections)
            pad, _ = lora_layout(self._adapted, device)
            a, b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((pad, k), (n, pad)))
            self._factors = AugmentedWeight(a, b, None, a)  # of which only the factors are used
            self.refresh(projections)

    @property
    def _adapted(self) -> list[Projection]:
        return [replace(p, bias=None) for p in self._projections]

    def refresh(self, projections: Sequence[Projection]) -> None:
        """Packs the factors again, which may have been trained since."""
        self._projections = projections
        if self._factors is not None:
            pack_factors(self._adapted, self._factors)
            b = self._factors.scaled_b
            self._scaled_b = b if use_triton(b) else wide(b)  # `expand` would widen it for each token

    def linear(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """y [..., N] of x [..., K], and nothing that a backward would read."""
        return self(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1]), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y [B, N] of x [B, K]."""
        y = _few_rows_linears(x, [p.weight for p in self._projections], [p.bias for p in self._projections])
        if self._factors is None:
            return y
        return expand(self._factors.compute_xa(x), self._scaled_b, None, y, out=y)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, fast for few rows too.

    Args:
        x: [B, K]. weight: [N, K]. bias: [N] or None.

    Returns:
        [B, N], contiguous.
    """
    return _few_rows_linears(x, [weight], [bias])


def _few_rows_linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """The same of several weights, side by side."""
    rows, is_wide = len(x), x.dtype.itemsize > 2
    if x.is_cuda or rows > _FEW or (is_wide and rows <= 8):
        parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # PyTorch's CPU products are faster with the larger operand in front, and 16-bit ones with four rows than with one. The
    # layers of SmolLM2-135M on one core with AMX: 25 ms instead of 35 for 16 rows in bfloat16 and instead of 31 for one row,
    # 70 ms instead of 82 for 16 rows in float32
    columns = (x if is_wide or rows >= 4 else F.pad(x, (0, 0, 0, 4 - rows))).t()
    parts = [torch.mm(weight, columns) for weight in weights]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts))[:, :rows].t().contiguous()
    if any(bias is not None for bias in biases):
        for part, bias in zip(y.split([len(weight) for weight in weights], dim=1), biases):
            if bias is not None:
                part.add_(bias)
    return y
