"""A stack of experts' weights with their LoRA pairs, and its products with rows that are sorted by expert.

    y_r = x_r W_e^T + s (x_r A_e^T) B_e^T + b_e        e = expert of row r

E experts, N out and K in features, r rank, R rows, P columns beside the weights: r, and one for a bias, rounded up. One buffer
holds, per expert,

    [ W   sB  b ]   N rows
    [ A   0   0 ]   P rows

as `kernels/lora.py` draws it for one layer: xa = [x A^T, 1], y = [x, xa] [W, sB, b]^T, dyb = dy [sB, b], dx = [dy, dyb] [W; A].
PEFT keeps the pairs of all experts in two matrices: A is [E r, K], expert by expert, and B is [N, r E], the experts next to each
other. Its rows are those of the checkpoint, where gate and up may alternate; W and b have all of gate first.
"""

from dataclasses import dataclass

import torch

from oribi.kernels.expert_rows import take_rows
from oribi.kernels.expert_stack import StackCodes, dequantize_stack
from oribi.kernels.grouped import grouped_matmul, grouped_outer, torch_is_fast

_STEP = 16  # P is a multiple: rows of the buffer start at multiples of 16 bytes


@dataclass(frozen=True)
class StackProjection:
    """The weights of a layer's experts, and the pairs on them.

    Args:
        weight: [E, N, K], dense or a `PackedWeight`.
        a, b: LoRA factors [E r, K] and [N, r E] as PEFT has them, or None without an adapter.
        scale: alpha / r (or alpha / sqrt(r)).
        bias: [E, N], or None.
        alternating: whether the rows of B belong to gate and up in turn.
    """

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    bias: torch.Tensor | None = None
    alternating: bool = False

    @property
    def packed(self) -> StackCodes | None:
        """Codes of packed weights."""
        return getattr(self.weight, "packed", None)

    @property
    def rank(self) -> int:
        """r; 0 without an adapter."""
        return 0 if self.a is None else len(self.a) // len(self.weight)

    @property
    def columns(self) -> int:
        """P."""
        return columns_beside(self.rank, self.bias is not None)


def columns_beside(rank: int, has_bias: bool) -> int:
    """P for pairs of a rank."""
    return -(-(rank + has_bias) // _STEP) * _STEP


class StackWeight:
    """The weights of a projection, dequantised, with its pairs beside them.

    Args:
        projection: of E experts.
        dtype: of the buffer.
        experts: [L] int64, whose weights are wanted; None takes all.
    """

    def __init__(
        self, projection: StackProjection, dtype: torch.dtype, experts: torch.Tensor | None = None
    ) -> None:
        p, weight = projection, projection.weight
        count, n, k = weight.shape
        self.out_features, self.in_features, self.lora_columns = n, k, p.columns
        self.rank, self.scale, self._alternating = p.rank, p.scale, p.alternating
        self.has_bias = p.bias is not None
        if p.packed is None and not p.columns and weight.dtype == dtype:
            self._buffer = weight.detach() if experts is None else weight.detach()[experts]
            return
        count, pad = (count if experts is None else len(experts)), p.columns
        self._buffer = torch.empty(count, n + pad, k + pad, dtype=dtype, device=weight.device)
        place = self._buffer[:, :n, :k]
        if p.packed is not None:
            dequantize_stack(p.packed, dtype, place, experts)
        else:
            place.copy_(weight.detach() if experts is None else weight.detach()[experts])
        if pad:  # what lies behind the pairs is multiplied by zero, and must be no nan
            self._buffer[:, n:].zero_()
            self._buffer[:, :n, k:].zero_()
        if p.rank:
            a, b = factors_by_expert(p.a.detach(), p.b.detach(), len(weight), p.alternating)
            if experts is not None:
                a, b = a[experts], b[experts]
            self._buffer[:, n : n + p.rank, :k] = a
            self._buffer[:, :n, k : k + p.rank] = b * p.scale
        if p.bias is not None:
            self._buffer[:, :n, k + p.rank] = p.bias.detach() if experts is None else p.bias.detach()[experts]

    def with_columns(self, rows: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """x or dy [R, C], or the rows [R] int64 of it, in the first columns of [R, C + P]; x itself where P is 0."""
        if not self.lora_columns:
            return rows if tokens is None else rows[tokens]
        size = len(rows) if tokens is None else len(tokens)
        buffer = rows.new_empty(size, rows.shape[1] + self.lora_columns)
        place = buffer[:, : rows.shape[1]]
        place.copy_(rows) if tokens is None else take_rows(rows, tokens, place)
        return buffer

    def fill_xa(self, x_buffer: torch.Tensor, offs: torch.Tensor) -> None:
        """Writes xa into the last P columns of a buffer [R, K + P] with x."""
        n, k = self.out_features, self.in_features
        if self.rank:
            grouped_matmul(
                x_buffer[:, :k], self._buffer[:, n:, :k].transpose(1, 2), offs, out=x_buffer[:, k:]
            )
        elif self.lora_columns:
            x_buffer[:, k:] = 0
        if self.has_bias:
            x_buffer[:, k + self.rank] = 1

    def forward(self, x_buffer: torch.Tensor, offs: torch.Tensor, with_columns: bool = True) -> torch.Tensor:
        """y of x in `x_buffer` [R, K + P], whose last P columns become xa.

        Args:
            with_columns: whether y is to be the first N columns of [R, N + P].
        """
        n = self.out_features
        self.fill_xa(x_buffer, offs)
        if not (self.lora_columns and with_columns):
            return grouped_matmul(x_buffer, self._buffer[:, :n].transpose(1, 2), offs)
        if torch_is_fast(x_buffer):
            # it writes no wider rows: a product with all rows of the buffer takes less time than a copy of y
            return grouped_matmul(x_buffer, self._buffer.transpose(1, 2), offs)
        out = x_buffer.new_empty(len(x_buffer), n + self.lora_columns)
        grouped_matmul(x_buffer, self._buffer[:, :n].transpose(1, 2), offs, out=out[:, :n])
        return out

    def backward_input(self, dy_buffer: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """dx [R, K] of dy in `dy_buffer` [R, N + P], whose last P columns become dyb."""
        n, k = self.out_features, self.in_features
        if not self.lora_columns:
            return grouped_matmul(dy_buffer, self._buffer, offs)
        grouped_matmul(dy_buffer[:, :n], self._buffer[:, :n, k:], offs, out=dy_buffer[:, n:])
        return grouped_matmul(dy_buffer, self._buffer[:, :, :k], offs)

    def factor_gradients(
        self,
        x_buffer: torch.Tensor,
        dy_buffer: torch.Tensor,
        offs: torch.Tensor,
        like: tuple,
        weights: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of A and B in PEFT's layout, in the dtypes of `like`; None without a pair.

        Args:
            x_buffer: [R, K + P] that `forward` has filled. dy_buffer: [R, N + P] that `backward_input` has filled.
            like: A and B.
            weights: [R] that dy is to be multiplied by, which changes the last P columns of both buffers.
        """
        if not self.rank:
            return [None, None]
        n, k, r = self.out_features, self.in_features, self.rank
        if weights is not None:  # the narrow factor of each product takes them
            dy_buffer[:, n:] *= weights[:, None]
            x_buffer[:, k:] *= weights[:, None]
        da = grouped_outer(dy_buffer[:, n : n + r], x_buffer[:, :k], offs)
        db = grouped_outer(dy_buffer[:, :n], x_buffer[:, k : k + r], offs) * self.scale
        if self._alternating:
            db = db.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return [
            da.reshape(-1, k).to(like[0].dtype),
            db.permute(1, 2, 0).reshape(n, -1).to(like[1].dtype),
        ]


def factors_by_expert(
    a: torch.Tensor, b: torch.Tensor, experts: int, alternating: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's factors [E r, K] and [N, r E] as [E, r, K] and [E, N, r], with all of gate before up."""
    a, b = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)
    return a, b.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if alternating else b


def expert_linear(
    x: torch.Tensor, projection: StackProjection, ids: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    """y [R, N] of rows x [R, K] that are sorted by expert; differentiable in x, the pair, a dense weight and the bias.

    Args:
        ids: [R] int64, the expert of each row. offs: [E] int32, where the rows of each expert end.
    """
    p = projection
    if not torch.is_grad_enabled() and 2 * len(x) <= len(p.weight):
        # few rows, as while generating: the weights of their experts alone, one copy a row
        each = torch.arange(1, len(x) + 1, dtype=torch.int32, device=x.device)
        return _forward(x, StackWeight(p, x.dtype, ids), each)[0]
    return _ExpertLinear.apply(x, p, offs, p.weight if p.packed is None else None, p.bias, p.a, p.b)


def _forward(x: torch.Tensor, weight: StackWeight, offs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = weight.with_columns(x)
    return weight.forward(buffer, offs, with_columns=False), buffer


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projection, offs, weight, bias, a, b):
        y, buffer = _forward(x, StackWeight(projection, x.dtype), offs)
        ctx.projection = projection
        ctx.save_for_backward(buffer, offs)
        return y

    @staticmethod
    def backward(ctx, dy):
        buffer, offs = ctx.saved_tensors
        p = ctx.projection
        weight = StackWeight(p, dy.dtype)
        dy_buffer = weight.with_columns(dy)
        dx = weight.backward_input(dy_buffer, offs)
        factors = weight.factor_gradients(buffer, dy_buffer, offs, (p.a, p.b))
        dweight = dbias = None
        if ctx.needs_input_grad[3]:
            outer = grouped_outer(dy_buffer[:, : weight.out_features], buffer[:, : weight.in_features], offs)
            dweight = outer.to(p.weight.dtype)
        if ctx.needs_input_grad[4]:
            ones = dy.new_ones(len(dy), 1)
            outer = grouped_outer(dy_buffer[:, : weight.out_features], ones, offs)
            dbias = outer[..., 0].to(p.bias.dtype)
        wanted = ctx.needs_input_grad[5:]
        return (
            dx,
            None,
            None,
            dweight,
            dbias,
            *(grad if want else None for grad, want in zip(factors, wanted)),
        )
