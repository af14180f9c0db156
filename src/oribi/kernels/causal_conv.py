"""Depthwise causal convolution over the tokens of packed documents, with an activation and gates in the same pass.

    u = before x  (or x)      z[t] = bias + sum over j < W of w[W-1-j] u[t-j], where t-j >= doc_start[t]
    y = after act(z)  (or act(z), z)      act(z) = z sigmoid(z), where asked for

    dafter = dy act(z)      dz = dy after act'(z)      du[t] = sum over j < W of w[W-1-j] dz[t+j], where t >= doc_start[t+j]
    dx = du before          dbefore = du x             dw[W-1-j] = sum over t of dz[t] u[t-j]      dbias = sum over t of dz

T tokens, C channels, W width of the kernel, B rows that decode. Computed in float32; u is rounded to x's dtype, as a
decoding window holds it, and every result once on the store.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.causal_conv_kernels import (
    forward_kernel,
    input_kernel,
    output_kernel,
    step_kernel,
    weight_kernel,
)
from oribi.kernels.dispatch import launch, next_power_of_2, unit_stride, use_triton, wide

# tokens of a tile: the last W - 1 of the tile before are read too, a tenth more at W = 4
_TOKENS = 32
# programs that share the tokens when dweight is formed: two for each of an H100's 132 multiprocessors
_WEIGHT_GRAD_PROGRAMS = 264


class ConvGradients(NamedTuple):
    """What `causal_conv_backward` returns: [T, C] each, dweight [C, W], dbias [C]; None where there is none."""

    dx: torch.Tensor
    dbefore: torch.Tensor | None
    dafter: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    doc_start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each channel convolved along its document's tokens, differentiable in all but doc_start.

    Args:
        x: [T, C] in 16 or 32 bit; rows may be strided.
        weight: [C, W], the last column for the token itself. bias: [C].
        doc_start: [T] int32, the first token of each token's document.
        silu: whether the sum passes through SiLU.
        before, after: [T, C] factors of the input and of the result; rows may be strided.

    Returns:
        [T, C] in x's dtype.
    """
    return _CausalConv.apply(x, weight, doc_start, bias, silu, before, after)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, doc_start, bias, silu, before, after):
        ctx.save_for_backward(x, weight, doc_start, bias, before, after)
        ctx.silu = silu
        return causal_conv_forward(x, weight, doc_start, bias, silu=silu, before=before, after=after)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, doc_start, bias, before, after = ctx.saved_tensors
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        grads = causal_conv_backward(
            dy, x, weight, doc_start, bias, silu=ctx.silu, before=before, after=after, weight_grad=trains,
            dz=torch.empty(x.shape, dtype=x.dtype, device=x.device),
        )  # fmt: skip
        return grads.dx, grads.dweight, None, grads.dbias, None, grads.dbefore, grads.dafter


def causal_conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    doc_start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `causal_conv`, without gradients.

    Args:
        x, weight, doc_start, bias, silu, before, after: as there.
        out: [T, C] for the result, strided rows allowed; may be after, but neither x nor before, whose rows are read
            again for later tokens.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not use_triton(x):
        z = _convolved_reference(_input_reference(x, before), weight, doc_start, bias)
        y = z * torch.sigmoid(z) if silu else z
        return out.copy_(y if after is None else y * wide(after))
    x, before, after = (None if t is None else unit_stride(t) for t in (x, before, after))
    tokens, size = x.shape
    tile = _tile(size)
    launch(
        forward_kernel, _programs(tokens, size, *tile), x, _or(before, x), _or(after, x), weight.contiguous(),
        _or(bias, weight), doc_start, out, tokens, x.stride(0), _or(before, x).stride(0), _or(after, x).stride(0),
        out.stride(0), size, weight.shape[1], *tile, silu, bias is not None, before is not None, after is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def causal_conv_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    doc_start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    dbefore: torch.Tensor | None = None,
    dafter: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> ConvGradients:
    """Gradients of the convolution, in two passes that may write over all that they read.

    Args:
        dy: [T, C] gradient of y, in x's dtype; overwritten by dz where there is an activation or `after`, if dz is None.
        x, weight, doc_start, bias, silu, before, after: as in the forward.
        dz: [T, C] for the gradient of z, in x's dtype.
        dx, dbefore, dafter: [T, C] for the gradients, strided rows allowed; may be x, before and after.
        weight_grad: whether to form dweight and dbias, in an order of additions that never changes.
    """
    like = {"dtype": x.dtype, "device": x.device}
    dx = torch.empty(x.shape, **like) if dx is None else dx
    dbefore = torch.empty(x.shape, **like) if dbefore is None and before is not None else dbefore
    dafter = torch.empty(x.shape, **like) if dafter is None and after is not None else dafter
    dz = dy if dz is None or not (silu or after is not None) else dz
    if not use_triton(x):
        return _backward_reference(
            dy, x, weight, doc_start, bias, silu, before, after, (dz, dx, dbefore, dafter), weight_grad
        )
    dy, dz, x = unit_stride(dy), unit_stride(dz), unit_stride(x)
    gates = [None if t is None else unit_stride(t) for t in (before, after)]
    weight, (tokens, size) = weight.contiguous(), x.shape
    tile = _tile(size)
    shape, options = (size, weight.shape[1], *tile), {"num_warps": 4, "enable_fp_fusion": False}
    programs, given = _programs(tokens, size, *tile), [t is not None for t in gates]
    b, a = (_or(t, x) for t in gates)
    if silu or after is not None:
        launch(
            output_kernel, programs, dy, x, b, a, weight, _or(bias, weight), doc_start, dz, _or(dafter, dz), tokens,
            dy.stride(0), x.stride(0), b.stride(0), a.stride(0), dz.stride(0), _or(dafter, dz).stride(0), *shape, silu,
            bias is not None, *given, **options,
        )  # fmt: skip
    dweight = dbias = None
    if weight_grad:  # before x is written over
        dweight, dbias = _weight_gradients(dz, x, gates[0], doc_start, shape)
    launch(
        input_kernel, programs, dz, x, b, weight, doc_start, dx, _or(dbefore, dx), tokens, dz.stride(0), x.stride(0),
        b.stride(0), dx.stride(0), _or(dbefore, dx).stride(0), *shape, given[0], **options,
    )  # fmt: skip
    if dweight is not None:
        dweight, dbias = dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
    return ConvGradients(dx, dbefore, dafter, dweight, dbias)


def _weight_gradients(dz, x, before, doc_start, shape):
    """dweight [C, W] and dbias [C] in float32."""
    size, width, token_tile, columns = shape
    blocks, tiles = -(-size // columns), -(-len(x) // token_tile)
    splits = min(max(_WEIGHT_GRAD_PROGRAMS // (blocks * (width + 1)), 1), tiles)
    partials = torch.empty(splits, width + 1, size, dtype=torch.float32, device=x.device)
    b = _or(before, x)
    launch(
        weight_kernel, splits * (width + 1) * blocks, dz, x, b, doc_start, partials, len(x), splits, dz.stride(0),
        x.stride(0), b.stride(0), *shape, before is not None, num_warps=4,
    )  # fmt: skip
    total = partials.sum(0)
    return total[:width].flip(0).t(), total[width]


def causal_conv_step(
    x: torch.Tensor,
    window: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = False,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution at one new token per row, whose input moves into the row's window.

    Args:
        x: [B, C]; rows may be strided.
        window: [B, C, W - 1] contiguous, in x's dtype: u of the tokens before, zero before the document; shifted here.
        weight, bias, silu, before, after: as in `causal_conv`.

    Returns:
        [B, C] in x's dtype.
    """
    if not use_triton(x):
        u = _input_reference(x, before)
        taps = torch.cat([wide(window), u[..., None]], dim=2)
        z = (taps * wide(weight)).sum(-1)
        z = z if bias is None else z + wide(bias)
        y = z * torch.sigmoid(z) if silu else z
        window.copy_(taps[..., 1:])
        return (y if after is None else y * wide(after)).to(x.dtype)
    x, before, after = (None if t is None else unit_stride(t) for t in (x, before, after))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, size = x.shape
    block = min(next_power_of_2(size), 256)
    launch(
        step_kernel, rows * -(-size // block), x, _or(before, x), _or(after, x), weight.contiguous(), _or(bias, weight),
        window, y, x.stride(0), _or(before, x).stride(0), _or(after, x).stride(0), size, weight.shape[1], block, silu,
        bias is not None, before is not None, after is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def window_after(
    x: torch.Tensor,
    last: torch.Tensor,
    doc_start: torch.Tensor,
    width: int,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The window that decoding goes on from after some tokens.

    Args:
        x, doc_start, before: as in `causal_conv`.
        last: [B] int64, the tokens.
        width: W.

    Returns:
        [B, C, W - 1] in x's dtype.
    """
    at = last[:, None] + torch.arange(2 - width, 1, device=last.device)
    seen = (at >= doc_start[last][:, None])[..., None]
    at = at.clamp_min(0)
    u = x[at] if before is None else x[at] * before[at]
    return u.masked_fill(~seen, 0).transpose(1, 2).contiguous()


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """What a kernel is given in place of an argument that it does not read."""
    return other if tensor is None else tensor


def _tile(size: int) -> tuple[int, int]:
    """Tokens and channels of a program: 128 threads with 4 vectors of 16 bytes of 16-bit values each."""
    return _TOKENS, min(next_power_of_2(size), 128)


def _programs(tokens: int, size: int, token_tile: int, columns: int) -> int:
    return -(-tokens // token_tile) * -(-size // columns)


def _input_reference(x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    return wide(x) if before is None else wide(x * before)


def _shifts(doc_start: torch.Tensor, width: int) -> list[torch.Tensor]:
    """For j = 1 to W - 1, at [j - 1]: [T - j, 1] bool, whether tokens from j on see the one j before them."""
    token = torch.arange(len(doc_start), device=doc_start.device)
    return [(token[j:] - j >= doc_start[j:])[:, None] for j in range(1, width)]


def _convolved_reference(u, weight, doc_start, bias):
    weight = wide(weight)
    z = u * weight[:, -1]
    for j, seen in enumerate(_shifts(doc_start, weight.shape[1]), 1):
        z[j:] += u[:-j] * seen * weight[:, -1 - j]
    return z if bias is None else z + wide(bias)


def _backward_reference(dy, x, weight, doc_start, bias, silu, before, after, places, weight_grad):
    dz_place, dx_place, dbefore_place, dafter_place = places
    u, dz, dafter = _input_reference(x, before), wide(dy), None
    if silu or after is not None:
        y, slope = _convolved_reference(u, weight, doc_start, bias), None
        if silu:
            p = torch.sigmoid(y)
            slope, y = p * (1 + y * (1 - p)), y * p
        if after is not None:
            dafter, dz = dz * y, dz * wide(after)
        dz = wide(dz_place.copy_(dz if slope is None else dz * slope))
    shifts, w = _shifts(doc_start, weight.shape[1]), wide(weight)
    du = dz * w[:, -1]
    for j, seen in enumerate(shifts, 1):
        du[:-j] += dz[j:] * seen * w[:, -1 - j]
    dweight = dbias = None
    if weight_grad:
        taps = [(dz * u).sum(0)] + [(dz[j:] * u[:-j] * seen).sum(0) for j, seen in enumerate(shifts, 1)]
        dweight = torch.stack(taps[::-1], 1).to(weight.dtype)
        dbias = None if bias is None else dz.sum(0).to(bias.dtype)
    # after all is read: they may be the inputs
    dx, dbefore = (du, None) if before is None else (du * wide(before), du * wide(x))
    dx_place.copy_(dx)
    if before is not None:
        dbefore_place.copy_(dbefore)
    if after is not None:
        dafter_place.copy_(dafter)
    return ConvGradients(dx_place, dbefore_place, dafter_place, dweight, dbias)
