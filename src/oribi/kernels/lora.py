"""Weights of linear layers with LoRA, NF4 or 16-bit, of a group that shares its input, and their products.

    y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T

T tokens, K in features, N_i out features, r_i rank; of a group N = sum of N_i. W_i is frozen in the fused path: its
gradient is never formed, and only x and xa = x A^T are kept for backward. `lora_linear` is the function on them.

    dyb_i = scale_i dy_i B_i      dx = dy W + dyb A      dA = dyb^T x      dB_i = scale_i dy_i^T xa_i

One buffer holds a group's weight with its LoRA pairs, P LoRA rows and columns wide (the sum of ranks, and one for a bias,
rounded up):

    [ W   sB ]   N rows     sB is block diagonal: projection i owns its rows and its r_i columns; a bias has one column
    [ A   0  ]   P rows

so that xa = x A^T is one product, y = [x, xa] [W, sB]^T another, dyb = dy sB a third and dx = [dy, dyb] [W; A] the last.
LoRA costs P/K more arithmetic and no pass over y or dx, and its term is added in the product's float32 accumulator.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oribi.kernels.lora_expand import expand
from oribi.kernels.lora_pack import pack_factors
from oribi.kernels.packed_weight import weight_shape, write_dense


@dataclass(frozen=True)
class Projection:
    """One linear layer and the LoRA pair on it.

    Args:
        weight: [N, K] in 16 or 32 bit, or packed (`kernels.packed_weight`).
        bias: [N] or None.
        a, b: LoRA factors [r, K] and [N, r], or None without an adapter.
        scale: alpha / r (or alpha / sqrt(r)).
        dropout: probability with which an input element of the LoRA branch is zeroed now.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), of the packed weight too."""
        return weight_shape(self.weight)

    @property
    def frozen(self) -> bool:
        """Neither weight nor bias is trained."""
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))

    @property
    def fusible(self) -> bool:
        """Whether the fused path computes it: nothing trained but the LoRA pair, and no dropout now."""
        return self.frozen and not self.dropout


@dataclass(frozen=True)
class GroupWeight(ABC):
    """A group's LoRA pairs and biases, and its products in a layer; the frozen weights are the subclasses'.

    Args:
        a: [P, K], zero below the last A.
        scaled_b: [N, P]: block diagonal scale_i B_i, and the biases.
        bias_column: which of the P columns holds the biases, None without any.
    """

    a: torch.Tensor
    scaled_b: torch.Tensor
    bias_column: int | None

    @property
    def out_features(self) -> int:
        """N."""
        return self.scaled_b.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.a.shape[1]

    @property
    def lora_columns(self) -> int:
        """P."""
        return self.a.shape[0]

    def copy_xa(self, x_buffer: torch.Tensor) -> torch.Tensor:
        """xa [T, P], copied out of an x_buffer [T, K + P] that `forward` has filled."""
        return x_buffer[:, self.in_features :].clone()

    def input_buffer(self, tokens: int) -> torch.Tensor:
        """[T, K + P]: x goes into the first K columns, which are uninitialised."""
        return self._buffer(tokens, self.in_features)

    def output_buffer(self, tokens: int) -> torch.Tensor:
        """[T, N + P]: dy goes into the first N columns, which are uninitialised."""
        return self._buffer(tokens, self.out_features)

    def _buffer(self, tokens: int, columns: int) -> torch.Tensor:
        buffer = self.a.new_empty(tokens, columns + self.lora_columns)
        if not buffer.is_cuda and buffer.itemsize == 2:
            # oneDNN's 16-bit products read behind a row's last column and count that as 0 times what lies there: a nan stays one
            buffer[:, columns:] = 0
        return buffer

    def linear(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y [..., N] of x [..., K], and the buffer [T, K + P] with x and xa."""
        x_buffer = self.input_buffer(x[..., 0].numel())
        x_buffer[:, : self.in_features] = x.reshape(len(x_buffer), -1)
        y = self.forward(x_buffer)[:, : self.out_features]
        return y.unflatten(0, x.shape[:-1]), x_buffer

    def forward(self, x_buffer: torch.Tensor) -> torch.Tensor:
        """y of x in `x_buffer` [T, K + P], whose last P columns become xa (and a column of ones where a bias is).

        Returns:
            [T, N + P] with y in the first N columns; the others are `compute_dyb`'s.
        """
        k = self.in_features
        if self.lora_columns:
            torch.mm(x_buffer[:, :k], self.a.t(), out=x_buffer[:, k:])
            if self.bias_column is not None:
                x_buffer[:, k + self.bias_column] = 1
        out = self.output_buffer(len(x_buffer))
        self._forward(x_buffer, out[:, : self.out_features])
        return out

    def forward_onto(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y = residual + x W^T + xa (sB)^T, for an x without columns for xa beside it.

        Args:
            x: [T, K], rows may be strided.
            residual: [T, N] in x's dtype, or None for zero.

        Returns:
            y [T, N] and xa [T, P] (None where P is 0).
        """
        xa = self.compute_xa(x)
        if self.bias_column is not None:
            xa[:, self.bias_column] = 1
        return self._forward_onto(x, xa, residual), xa

    def compute_xa(self, x: torch.Tensor) -> torch.Tensor | None:
        """xa = x A^T [T, P] of x [T, K]; None where P is 0."""
        return x @ self.a.t() if self.lora_columns else None

    def compute_dyb(self, dy_buffer: torch.Tensor) -> torch.Tensor | None:
        """dyb = dy (sB) [T, P], written into the last P columns of dy_buffer [T, N + P]; None where P is 0."""
        n = self.out_features
        if not self.lora_columns:
            return None
        return torch.mm(dy_buffer[:, :n], self.scaled_b, out=dy_buffer[:, n:])

    @abstractmethod
    def backward_input(self, dy_buffer: torch.Tensor) -> torch.Tensor:
        """dx [T, K] of a dy_buffer that `compute_dyb` has filled."""

    @abstractmethod
    def _forward(self, x_buffer: torch.Tensor, y: torch.Tensor) -> None:
        """Writes x W^T + xa (sB)^T into y [T, N], whose rows are strided."""

    @abstractmethod
    def _forward_onto(
        self, x: torch.Tensor, xa: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """residual + x W^T + xa (sB)^T [T, N]."""


@dataclass(frozen=True)
class AugmentedWeight(GroupWeight):
    """A group's weights, LoRA pairs and biases in one buffer [N + P, K + P], as this file's docstring draws it."""

    augmented: torch.Tensor

    @property
    def w(self) -> torch.Tensor:
        """[N, K]"""
        return self.augmented[: self.out_features, : self.in_features]

    def backward_input(self, dy_buffer: torch.Tensor) -> torch.Tensor:
        return dy_buffer @ self.augmented[:, : self.in_features]

    def _forward(self, x_buffer: torch.Tensor, y: torch.Tensor) -> None:
        torch.mm(x_buffer, self.augmented[: self.out_features].t(), out=y)

    def _forward_onto(
        self, x: torch.Tensor, xa: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        if xa is None:
            return x @ self.w.t() if residual is None else torch.addmm(residual, x, self.w.t())
        if residual is None:
            return expand(xa, self.scaled_b, None).addmm_(x, self.w.t())
        # all at once: added to a residual alone, an adapter's small term would be rounded away
        product = x @ self.w.t()
        return expand(xa, self.scaled_b, residual, product, out=product)


def augmented_weight(
    projections: Sequence[Projection],
    dtype: torch.dtype,
    device: torch.device,
    dequantized: torch.Tensor | None = None,
    packed: bool = False,
) -> AugmentedWeight:
    """Dequantises a group's weights and packs its LoRA pairs and biases beside them.

    Args:
        projections: the group.
        dtype, device: of the buffer.
        dequantized: an earlier buffer of the same weights; only its LoRA pairs are written again.
        packed: whether its LoRA pairs are already those of now.
    """
    n, k = group_shape(projections)
    pad, bias_column = lora_layout(projections, device)
    buffer = dequantized
    if buffer is None or buffer.shape != (n + pad, k + pad):
        buffer = torch.empty(n + pad, k + pad, dtype=dtype, device=device)
        write_dense([p.weight for p in projections], buffer[:n, :k])
    group = AugmentedWeight(buffer[n:, :k], buffer[:n, k:], bias_column, buffer)
    if not (packed and buffer is dequantized):
        pack_factors(projections, group)
    return group


def group_shape(projections: Sequence[Projection]) -> tuple[int, int]:
    """(N, K) of a group."""
    return sum(p.shape[0] for p in projections), projections[0].shape[1]


def lora_layout(projections: Sequence[Projection], device: torch.device) -> tuple[int, int | None]:
    """P of a group, and the column of its biases, None without any."""
    rank = sum(0 if p.a is None else p.a.shape[0] for p in projections)
    biased = any(p.bias is not None for p in projections)
    return padded_columns(rank + biased, device), rank if biased else None


def padded_columns(columns: int, device: torch.device) -> int:
    """P for so many columns of factors and biases."""
    step = 64 if device.type == "cuda" else 16  # rows of a multiple of 128 bytes keep the fast matrix kernels
    return -(-columns // step) * step


def backward_factors(
    dy: torch.Tensor,
    dyb: torch.Tensor | None,
    x: torch.Tensor,
    xa: torch.Tensor | None,
    projections: Sequence[Projection],
) -> list[torch.Tensor | None]:
    """dA_1, dB_1, dA_2, ... of a group, None where a projection has no adapter.

    Args:
        dy: [T, N]. dyb: [T, P] of `compute_dyb`. x: [T, K]. xa: [T, P].

    Returns:
        Gradients in the factors' dtypes, accumulated over the tokens in float32.
    """
    if all(p.a is None for p in projections):
        return [None] * (2 * len(projections))
    da = _product(dyb.t(), x)
    db = _product(dy.t(), xa)
    grads: list[torch.Tensor | None] = []
    row = column = 0
    for p in projections:
        if p.a is None:
            grads += [None, None]
        else:
            rank = p.a.shape[0]
            block = db[row : row + p.shape[0], column : column + rank]
            grads.append(da[column : column + rank].to(p.a.dtype))
            grads.append((block if p.scale == 1.0 else block * p.scale).to(p.b.dtype))
            column += rank
        row += p.shape[0]
    return grads


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # float32 out of 16-bit operands: a gradient summed over thousands of tokens keeps its accumulator's digits
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
