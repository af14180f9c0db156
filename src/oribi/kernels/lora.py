"""Linear layers on NF4 or 16-bit weights with LoRA, for a group that shares its input.

    y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T

T tokens, K in features, N_i out features, r_i rank; of a group N = sum of N_i, R = sum of r_i. W_i is frozen in the
fused path: its gradient is never formed, and only x and S = x A^T are kept for backward.

    U_i = scale_i dy_i B_i      dx = dy W + U A      dA = U^T x      dB_i = scale_i dy_i^T S_i

One buffer holds a group's weight with its LoRA pair, P spare rows and columns wide (R, and one for a bias, rounded up):

    [ W   sB ]   N rows     sB is block diagonal: projection i owns its rows and its r_i columns; a bias has one column
    [ A   0  ]   P rows

so that S = x A^T is one product, y = [x, S] [W, sB]^T another, U = dy sB a third and dx = [dy, U] [W; A] the last. LoRA
costs P/K more arithmetic and no pass over y or dx, and its term is added in the product's float32 accumulator.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oribi.kernels import nf4
from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton, wide


@dataclass(frozen=True)
class Projection:
    """One linear layer and the LoRA pair on it.

    Args:
        weight: [N, K] in 16 or 32 bit, or bitsandbytes' packed Params4bit.
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
        state = getattr(self.weight, "quant_state", None)
        return tuple(self.weight.shape if state is None else state.shape)

    @property
    def frozen(self) -> bool:
        """Neither weight nor bias is trained."""
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))

    @property
    def fusible(self) -> bool:
        """Whether the fused path computes it: nothing trained but the LoRA pair, and no dropout now."""
        return self.frozen and not self.dropout


def lora_linear(x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
    """Outputs of a group of linear layers with LoRA on one input.

    Args:
        x: [..., K] in 16 or 32 bit; cast to autocast's dtype where autocast is on.
        projections: the group; weights that require a gradient take PyTorch's own linear.

    Returns:
        One [..., N_i] tensor a projection, in x's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if all(p.fusible for p in projections):
        sizes = [p.shape[0] for p in projections]
        if _kept.groups is not None and not torch.is_grad_enabled():
            return list(_kept_group_linear(x, projections).split(sizes, dim=-1))
        y = _LoraLinear.apply(x, projections, *(t for p in projections for t in (p.a, p.b)))
        return list(y.split(sizes, dim=-1))
    return [_composed(x, p) for p in projections]


class _KeptGroups(threading.local):
    # ids of a group's tensors and the dtype -> the group, which keeps those ids taken, and its buffer
    groups: dict[tuple, tuple[Sequence[Projection], "GroupWeight"]] | None = None


_kept = _KeptGroups()


@contextmanager
def weights_kept() -> Iterator[None]:
    """Inside the block, groups that this thread computes without gradients are dequantised once.

    For generation, which asks for every weight once a token; no weight or factor may change inside.
    """
    before = _kept.groups
    _kept.groups = {} if before is None else before
    try:
        yield
    finally:
        _kept.groups = before


def _kept_group_linear(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    key = (x.dtype, *((id(p.weight), id(p.a), id(p.b), p.scale) for p in projections))
    if key not in _kept.groups:
        _kept.groups[key] = projections, augmented_weight(projections, x.dtype, x.device)
    group = _kept.groups[key][1]
    room = group.input_room(x[..., 0].numel())
    room[:, : group.in_features] = x.reshape(len(room), -1)
    return group.forward(room)[:, : group.out_features].unflatten(0, x.shape[:-1])


def _composed(x: torch.Tensor, p: Projection) -> torch.Tensor:
    """The same by PyTorch's autograd: trained weights and biases, and dropout."""
    if p.weight.requires_grad:
        y = F.linear(x, p.weight.to(x.dtype), None if p.bias is None else p.bias.to(x.dtype))
    else:
        y = _LoraLinear.apply(x, [Projection(p.weight)], None, None)
        if p.bias is not None:
            y = y + p.bias.to(x.dtype)
    if p.a is not None:
        low = F.linear(F.dropout(x, p.dropout), p.a.to(x.dtype))
        y = y + F.linear(low, p.b.to(x.dtype)) * p.scale
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, *factors):
        group = augmented_weight(projections, x.dtype, x.device)
        rows = x.reshape(-1, x.shape[-1])
        room = group.input_room(len(rows))
        room[:, : group.in_features] = rows
        y = group.forward(room)[:, : group.out_features]
        ctx.save_for_backward(room if any(ctx.needs_input_grad[2:]) else None)
        ctx.projections, ctx.shape = projections, x.shape
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        (room,) = ctx.saved_tensors
        group = augmented_weight(ctx.projections, dy.dtype, dy.device)
        dy_room = group.output_room(dy[..., 0].numel())
        dy_room[:, : group.out_features] = dy.reshape(len(dy_room), -1)
        u = group.backward_low(dy_room)
        dx = group.backward_input(dy_room).view(ctx.shape) if ctx.needs_input_grad[0] else None
        factors: list[torch.Tensor | None] = [None] * (len(ctx.needs_input_grad) - 2)
        if room is not None:
            k = group.in_features
            dy = dy_room[:, : group.out_features]
            factors = backward_factors(dy, u, room[:, :k], room[:, k:], ctx.projections)
        wanted = ctx.needs_input_grad[2:]
        return (dx, None, *(grad if need else None for grad, need in zip(factors, wanted)))


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
    def spare(self) -> int:
        """P."""
        return self.a.shape[0]

    def low(self, room: torch.Tensor) -> torch.Tensor:
        """S [T, P], copied out of a room [T, K + P] that `forward` has filled."""
        return room[:, self.in_features :].clone()

    def input_room(self, tokens: int) -> torch.Tensor:
        """Uninitialised [T, K + P]: x goes into the first K columns."""
        return self.a.new_empty(tokens, self.in_features + self.spare)

    def output_room(self, tokens: int) -> torch.Tensor:
        """Uninitialised [T, N + P]: dy goes into the first N columns."""
        return self.a.new_empty(tokens, self.out_features + self.spare)

    def forward(self, room: torch.Tensor) -> torch.Tensor:
        """y of x in `room` [T, K + P], whose last P columns become S (and a column of ones where a bias is).

        Returns:
            [T, N + P] with y in the first N columns; the others are `backward_low`'s.
        """
        k = self.in_features
        if self.spare:
            torch.mm(room[:, :k], self.a.t(), out=room[:, k:])
            if self.bias_column is not None:
                room[:, k + self.bias_column] = 1
        out = self.output_room(len(room))
        self._forward(room, out[:, : self.out_features])
        return out

    def forward_onto(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y = residual + x W^T + S (sB)^T, for an x that has no room beside it.

        Args:
            x: [T, K], rows may be strided.
            residual: [T, N] in x's dtype, or None for zero.

        Returns:
            y [T, N] and S [T, P] (None where P is 0).
        """
        low = self.forward_low(x)
        if self.bias_column is not None:
            low[:, self.bias_column] = 1
        return self._forward_onto(x, low, residual), low

    def forward_low(self, x: torch.Tensor) -> torch.Tensor | None:
        """S = x A^T [T, P] of x [T, K]; None where P is 0."""
        return x @ self.a.t() if self.spare else None

    def backward_low(self, dy_room: torch.Tensor) -> torch.Tensor | None:
        """U = dy (sB) [T, P], written into the last P columns of dy_room [T, N + P]; None where P is 0."""
        n = self.out_features
        if not self.spare:
            return None
        return torch.mm(dy_room[:, :n], self.scaled_b, out=dy_room[:, n:])

    @abstractmethod
    def backward_input(self, dy_room: torch.Tensor) -> torch.Tensor:
        """dx [T, K] of a dy_room that `backward_low` has filled."""

    @abstractmethod
    def _forward(self, room: torch.Tensor, y: torch.Tensor) -> None:
        """Writes x W^T + S (sB)^T into y [T, N], whose rows are strided."""

    @abstractmethod
    def _forward_onto(
        self, x: torch.Tensor, low: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """residual + x W^T + S (sB)^T [T, N]."""


@dataclass(frozen=True)
class AugmentedWeight(GroupWeight):
    """A group's weights, LoRA pairs and biases in one buffer [N + P, K + P], as this file's docstring draws it."""

    buffer: torch.Tensor

    @property
    def w(self) -> torch.Tensor:
        """[N, K]"""
        return self.buffer[: self.out_features, : self.in_features]

    def backward_input(self, dy_room: torch.Tensor) -> torch.Tensor:
        return dy_room @ self.buffer[:, : self.in_features]

    def _forward(self, room: torch.Tensor, y: torch.Tensor) -> None:
        torch.mm(room, self.buffer[: self.out_features].t(), out=y)

    def _forward_onto(
        self, x: torch.Tensor, low: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        if low is None:
            return x @ self.w.t() if residual is None else torch.addmm(residual, x, self.w.t())
        if residual is None:
            return expand(low, self.scaled_b, None).addmm_(x, self.w.t())
        # all at once: added to a residual alone, an adapter's small term would be rounded away
        product = x @ self.w.t()
        return expand(low, self.scaled_b, residual, product, out=product)


def augmented_weight(
    projections: Sequence[Projection],
    dtype: torch.dtype,
    device: torch.device,
    dequantized: torch.Tensor | None = None,
) -> AugmentedWeight:
    """Dequantises a group's weights and lays its LoRA pairs and biases beside them.

    Args:
        projections: the group.
        dtype, device: of the buffer.
        dequantized: an earlier buffer of the same weights; only its LoRA pairs are written again.
    """
    n, k = group_shape(projections)
    pad, bias_column = spare_columns(projections, device)
    buffer = dequantized
    if buffer is None or buffer.shape != (n + pad, k + pad):
        buffer = torch.empty(n + pad, k + pad, dtype=dtype, device=device)
        _dequantize_group(projections, buffer[:n, :k])
    group = AugmentedWeight(buffer[n:, :k], buffer[:n, k:], bias_column, buffer)
    pack_factors(projections, group)
    return group


def group_shape(projections: Sequence[Projection]) -> tuple[int, int]:
    """(N, K) of a group."""
    return sum(p.shape[0] for p in projections), projections[0].shape[1]


def spare_columns(projections: Sequence[Projection], device: torch.device) -> tuple[int, int | None]:
    """P of a group, and the column of its biases, None without any."""
    rank = sum(0 if p.a is None else p.a.shape[0] for p in projections)
    biased = any(p.bias is not None for p in projections)
    step = 64 if device.type == "cuda" else 16  # rows of a multiple of 128 bytes keep the fast matrix kernels
    return -(-(rank + biased) // step) * step, rank if biased else None


def _dequantize_group(projections: Sequence[Projection], out: torch.Tensor) -> None:
    if all(hasattr(p.weight, "quant_state") for p in projections):
        nf4.dequantize([p.weight for p in projections], out.dtype, out=out)
        return
    for p, part in zip(projections, out.split([p.shape[0] for p in projections])):
        if hasattr(p.weight, "quant_state"):
            nf4.dequantize([p.weight], out.dtype, out=part)
        else:
            part.copy_(p.weight.detach())


def backward_factors(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    x: torch.Tensor,
    low: torch.Tensor | None,
    projections: Sequence[Projection],
) -> list[torch.Tensor | None]:
    """dA_1, dB_1, dA_2, ... of a group, None where a projection has no adapter.

    Args:
        dy: [T, N]. u: [T, P] of `backward_low`. x: [T, K]. low: S [T, P].

    Returns:
        Gradients in the factors' dtypes, accumulated over the tokens in float32.
    """
    if all(p.a is None for p in projections):
        return [None] * (2 * len(projections))
    da = _product(u.t(), x)
    db = _product(dy.t(), low)
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


def expand(
    low: torch.Tensor,
    scaled_b: torch.Tensor,
    residual: torch.Tensor | None,
    product: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + product + low @ scaled_b^T in one pass over the result.

    Args:
        low: [T, P].
        scaled_b: [N, P], strided in any way.
        residual, product: [T, N] or None for zero, rows may be strided.
        out: [T, N] for the result, rows may be strided; may be residual or product.

    Returns:
        [T, N] in low's dtype.
    """
    if residual is None:
        residual, product = product, None
    if not use_triton(low):
        sum_ = wide(low) @ wide(scaled_b).t()
        for one in (residual, product):
            sum_ = sum_ if one is None else sum_.add_(one)
        return sum_.to(low.dtype) if out is None else out.copy_(sum_)
    tokens, n = low.shape[0], scaled_b.shape[0]
    if out is None:
        out = low.new_empty(tokens, n)
    first, second = (out if one is None else one for one in (residual, product))
    columns = -(-n // 128)
    launch(
        _expand_kernel, columns * -(-tokens // 64), out, low, scaled_b, first, second, tokens, n, columns,
        out.stride(0), low.stride(0), *scaled_b.stride(), first.stride(0), second.stride(0),
        low.shape[1], residual is not None, product is not None, 64, 128, 16 if low.shape[1] % 64 else 64, num_warps=4,
    )  # fmt: skip
    return out


def pack_factors(projections: Sequence[Projection], group: GroupWeight) -> None:
    """Fills a group's `a` and `scaled_b`."""
    if not group.spare:
        return
    if use_triton(group.a) and len(projections) <= 3:
        _pack_factors_triton(projections, group)
        return
    group.a.zero_()
    group.scaled_b.zero_()
    row = column = 0
    for p in projections:
        n = p.shape[0]
        if p.a is not None:
            rank = p.a.shape[0]
            group.a[column : column + rank] = p.a.detach()
            group.scaled_b[row : row + n, column : column + rank] = p.b.detach() * p.scale
            column += rank
        if p.bias is not None:
            group.scaled_b[row : row + n, group.bias_column] = p.bias.detach()
        row += n


def _pack_factors_triton(projections: Sequence[Projection], group: GroupWeight) -> None:
    arguments: list[object] = []
    for i in range(3):
        p = projections[i] if i < len(projections) else None
        # an absent factor is never read: its sizes are 0, and any pointer will do
        a, b, bias = (None, None, None) if p is None else (p.a, p.b, p.bias)
        arguments += [
            group.a if a is None else a, group.a if b is None else b, group.a if bias is None else bias,
            0 if p is None else p.shape[0], 0 if a is None else a.shape[0], int(bias is not None),
            1.0 if p is None else float(p.scale),
        ]  # fmt: skip
    n, k, pad = group.out_features, group.in_features, group.spare
    b_blocks, a_blocks = -(-n // 32), -(-k // 2048)
    launch(
        _pack_kernel, b_blocks + pad * a_blocks, group.scaled_b, group.a, group.scaled_b.stride(0), group.a.stride(0),
        n, k, b_blocks, a_blocks,
        *arguments, pad, next_power_of_2(pad), 32, 2048, num_warps=4,
    )  # fmt: skip


@jit
def _expand_kernel(
    out, low, b, first, second, tokens, n, columns, out_stride, low_stride, b_stride_n, b_stride_p, first_stride,
    second_stride, P: tl.constexpr, ADD_FIRST: tl.constexpr, ADD_SECOND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    t_in, c_in = t < tokens, c < n
    sum_ = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in tl.static_range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        s = tl.load(low + t[:, None].to(tl.int64) * low_stride + p[None, :], mask=t_in[:, None], other=0.0)
        at = b + c[None, :].to(tl.int64) * b_stride_n + p[:, None].to(tl.int64) * b_stride_p
        w = tl.load(at, mask=c_in[None, :], other=0.0)
        sum_ = tl.dot(s, w, sum_, input_precision="ieee")
    inside = t_in[:, None] & c_in[None, :]
    if ADD_FIRST:
        at = first + t[:, None].to(tl.int64) * first_stride + c[None, :]
        sum_ += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD_SECOND:
        at = second + t[:, None].to(tl.int64) * second_stride + c[None, :]
        sum_ += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + t[:, None].to(tl.int64) * out_stride + c[None, :]
    tl.store(at, sum_.to(out.dtype.element_ty), mask=inside)


@jit
def _block(source, row, col, rows, cols):
    """source [rows, cols] at (row, col) in float32, zero outside it."""
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return tl.load(source + row.to(tl.int64) * cols + col, mask=inside, other=0.0).to(tl.float32)


@jit
def _pack_kernel(
    b_out, a_out, b_stride, a_stride, n, k, b_blocks, a_blocks,
    a0, b0, bias0, n0, r0, has0, s0, a1, b1, bias1, n1, r1, has1, s1, a2, b2, bias2, n2, r2, has2, s2,
    P: tl.constexpr, P2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < b_blocks:  # rows of [N, P]
        row = pid * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        col = tl.arange(0, P2)[None, :]
        bias = col - r0 - r1 - r2
        value = _block(b0, row, col, n0, r0) * s0 + _block(bias0, row, bias, n0 * has0, 1)
        value += _block(b1, row - n0, col - r0, n1, r1) * s1 + _block(bias1, row - n0, bias, n1 * has1, 1)
        value += _block(b2, row - n0 - n1, col - r0 - r1, n2, r2) * s2
        value += _block(bias2, row - n0 - n1, bias, n2 * has2, 1)
        tl.store(
            b_out + row.to(tl.int64) * b_stride + col,
            value.to(b_out.dtype.element_ty),
            mask=(row < n) & (col < P),
        )
    else:  # rows of [P, K]
        place = ((pid - b_blocks) % a_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        line = (pid - b_blocks) // a_blocks + place * 0
        factor = _block(a0, line, place, r0, k) + _block(a1, line - r0, place, r1, k)
        factor += _block(a2, line - r0 - r1, place, r2, k)
        start = a_out + line.to(tl.int64) * a_stride
        tl.store(start + place, factor.to(a_out.dtype.element_ty), mask=place < k)
