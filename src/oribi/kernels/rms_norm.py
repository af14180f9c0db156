"""RMSNorm, with the residual addition before it in the same pass.

    s = residual + c x  (or x)      y = s rstd (w + offset)      rstd = 1 / sqrt(mean(s^2) + eps)

    ds = rstd (g - s rstd^2 mean(g s)) + dresidual,  g = dy (w + offset)      dw = sum over tokens of dy s rstd

Where it is centred (a layer norm without bias), s is less its own mean before all else, and so is ds. Without a weight, y is
s rstd. T tokens, H heads (where each head of a token is normalised alone), D normalised size. Computed in float32, rounded
once on the store. dw is only formed for a trained weight.

Source: Root Mean Square Layer Normalization, Zhang and Sennrich 2019 (arXiv:1910.07467); Layer Normalization, Ba et al. 2016
(arXiv:1607.06450).
"""

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, unit_stride, use_triton, warps_for, wide

# programs that share the rows when dweight is formed: two for each of an H100's 132 multiprocessors
_WEIGHT_GRAD_PROGRAMS = 264


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0, centred: bool = False
) -> torch.Tensor:
    """RMSNorm over the last dimension, differentiable in x and weight.

    Args:
        x: [..., D] in 16 or 32 bit.
        weight: [D], or None.
        eps: added to the mean square.
        offset: added to the weight; Gemma's checkpoints hold weight - 1.
        centred: whether the mean is taken off first.

    Returns:
        [..., D] in x's dtype.
    """
    return _RMSNorm.apply(x, weight, eps, offset, centred)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, centred):
        y, rows, rstd = rms_norm_forward(_as_rows(x), weight, eps, offset, centred=centred)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset, ctx.centred = offset, centred
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, rstd = ctx.saved_tensors
        dy_rows = unit_stride(dy.reshape(rows.shape))
        dx, dweight = rms_norm_backward(
            dy_rows, rows, rstd, weight, ctx.offset, centred=ctx.centred, weight_grad=ctx.needs_input_grad[1]
        )
        return dx.view(dy.shape), dweight, None, None, None


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [T, D], or as [T, H, D] where it is a view of heads inside wider rows; else copied."""
    if x.is_contiguous() or x.dim() > 3:
        return x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 and x.dim() > 1 else x.contiguous().view(-1, x.shape[-1])


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    *,
    centred: bool = False,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm of x, or of residual + residual_scale * x, in one pass.

    Args:
        x: [T, D] or [T, H, D]; rows may be strided, the last dimension contiguous.
        weight: [D], or None.
        eps, offset, centred: as in `rms_norm`.
        residual: [T, D], only where x is [T, D]; added before the norm.
        residual_scale: factor on x before the addition; the product and the sum are each rounded to x's dtype.
        out: where y goes, strided rows allowed; may be x where residual is None.

    Returns:
        y in x's dtype; the normalised input (x itself without residual); rstd [T] or [T, H] float32.
    """
    if not use_triton(x):
        return _forward_reference(x, weight, eps, offset, centred, residual, residual_scale, out)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    size = x.shape[-1]
    block, rows = _tile(size)
    launch(
        _forward_kernel, -(-rstd.numel() // rows), x, total if residual is None else residual,
        rstd if weight is None else weight, y, total, rstd, rstd.numel(), *_strides(x), 0 if residual is None else residual.stride(0), *_strides(y), float(eps),
        float(offset), float(residual_scale), _heads(x), size, x.dim() == 3, rows, block, residual is not None,
        residual_scale != 1.0, weight is not None, centred, num_warps=warps_for(rows * block),
    )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    offset: float = 0.0,
    *,
    centred: bool = False,
    dresidual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the normalised input, the residual stream's gradient added in the same pass.

    Args:
        dy: gradient of y, shaped as x, strided rows allowed.
        x: the normalised input that `rms_norm_forward` returned.
        rstd, weight, offset, centred: as in the forward.
        dresidual: gradient that reaches the sum on the residual path; added to dx.
        out: where dx goes; may be dy, x or dresidual.
        weight_grad: whether to form dweight, in an order of additions that never changes.

    Returns:
        dx in dy's dtype; dweight [D] in the weight's dtype, or None.
    """
    if not use_triton(x):
        return _backward_reference(dy, x, rstd, weight, offset, centred, dresidual, out, weight_grad)
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if out is None else out
    size = x.shape[-1]
    block, rows = _tile(size)
    programs = -(-rstd.numel() // rows)
    partials = None
    if weight_grad:
        programs = min(programs, _WEIGHT_GRAD_PROGRAMS)
        partials = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, programs, dy, x, rstd, rstd if weight is None else weight,
        dy if dresidual is None else dresidual, dx, rstd if partials is None else partials, rstd.numel(), *_strides(dy), *_strides(x),
        *_strides(dy if dresidual is None else dresidual), *_strides(dx), float(offset), _heads(x), size,
        x.dim() == 3, rows, block, dresidual is not None, weight_grad, weight is not None, centred,
        num_warps=warps_for(rows * block),
    )  # fmt: skip
    return dx, None if partials is None else partials.sum(0).to(weight.dtype)


def _tile(size: int) -> tuple[int, int]:
    """Columns and rows of a program: one row, or as many short ones as make 2048 elements."""
    block = next_power_of_2(size)
    return block, max(2048 // block, 1)


def _heads(x: torch.Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


@jit
def _row_offsets(row, stride, head_stride, heads, NESTED: tl.constexpr):
    if NESTED:
        return (row // heads).to(tl.int64) * stride + (row % heads) * head_stride
    return row.to(tl.int64) * stride


@jit(do_not_specialize=["rows", "heads"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    rows, x_stride, x_head, residual_stride, y_stride, y_head, eps, offset, residual_scale, heads,
    D: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(
        x_ptr + _row_offsets(row, x_stride, x_head, heads, NESTED)[:, None] + col[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    if RESIDUAL:
        if SCALED:
            x = (x * residual_scale).to(x_ptr.dtype.element_ty).to(tl.float32)
        at = row.to(tl.int64)[:, None] * residual_stride + col[None, :]
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # what the backward will read is what is normalised here
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row.to(tl.int64)[:, None] * D + col[None, :], rounded, mask=inside)
        x = rounded.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd[:, None]
    if WEIGHTED:
        y *= (tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32) + offset)[None, :]
    at = _row_offsets(row, y_stride, y_head, heads, NESTED)[:, None] + col[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "heads"])
def _backward_kernel(
    dy_ptr, x_ptr, rstd_ptr, weight_ptr, dresidual_ptr, dx_ptr, partial_ptr,
    rows, dy_stride, dy_head, x_stride, x_head, dresidual_stride, dresidual_head, dx_stride, dx_head, offset, heads,
    D: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr, WEIGHT_GRAD: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    weight = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32) + offset
    partial = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    # once around, except where few programs share all rows to sum dweight
    for block in range(first, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < D)[None, :]
        at = _row_offsets(row, dy_stride, dy_head, heads, NESTED)[:, None] + col[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = _row_offsets(row, x_stride, x_head, heads, NESTED)[:, None] + col[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTRED:
            x = tl.where(inside, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        normed = x * rstd[:, None]
        if WEIGHT_GRAD:
            partial += dy * normed
        g = dy * weight[None, :]
        dx = rstd[:, None] * (g - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
        if CENTRED:
            dx -= (tl.sum(dx, axis=1) / D)[:, None]
        if RESIDUAL:
            at = _row_offsets(row, dresidual_stride, dresidual_head, heads, NESTED)[:, None] + col[None, :]
            dx += tl.load(dresidual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = _row_offsets(row, dx_stride, dx_head, heads, NESTED)[:, None] + col[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_GRAD:
        tl.store(partial_ptr + first.to(tl.int64) * D + col, tl.sum(partial, axis=0), mask=col < D)


def _forward_reference(x, weight, eps, offset, centred, residual, residual_scale, out):
    total = x
    if residual is not None:
        total = residual + (x if residual_scale == 1.0 else x * residual_scale)
    s = _centred(wide(total), centred)
    rstd = torch.rsqrt((s * s).mean(-1) + eps)
    y = s * rstd[..., None]
    if weight is not None:
        y.mul_(wide(weight) + offset)
    y = y.to(x.dtype) if out is None else out.copy_(y)
    return y, total, rstd


def _backward_reference(dy, x, rstd, weight, offset, centred, dresidual, out, weight_grad):
    s, g = _centred(wide(x), centred), wide(dy)
    normed = s * rstd[..., None]
    dweight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_grad else None
    g = g if weight is None else g * (wide(weight) + offset)
    along = normed.mul_((g * normed).mean(-1, keepdim=True))
    dx = _centred((g - along).mul_(rstd[..., None]), centred)
    if dresidual is not None:
        dx.add_(wide(dresidual))
    return dx.to(dy.dtype) if out is None else out.copy_(dx), dweight


def _centred(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True) if wanted else x
