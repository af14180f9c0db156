"""Tensors as the bytes of a GGUF type, in PyTorch on any device.

A type packs blocks of 32 values with one scale each, or superblocks of 256 values whose blocks of 16 or 32 have scales
(and minima) that are themselves quantised. Layouts are the format's; scales come from a search, so that the values are
at least as near as those of llama.cpp's own quantiser. B blocks of n values.

The search takes, for each block, the scale (and minimum) whose rounded values are nearest. A block x becomes s q, or
s q - m, with integers q of a few bits. A candidate scale rounds the block; least squares then gives the best s (and m) for
these integers; the candidate with the smallest error wins and is rounded and fitted again. Errors come from sums over the
block, so no candidate is dequantised. A value x counts with the weight |x| + 2 rms of its block: the outputs of a layer
depend most on its large weights. On SmolLM2 the KL divergence of Q6_K is 3 % lower than with equal weights, that of Q5_K
11 %, for errors 1 % larger. Blocks stand as columns, [n, B]: a sum over a block is a sum of rows, which vectorises.

Every device makes the same bytes: each sum has one order (`_total`), and every other step is a single operation that is
rounded as IEEE 754 says. PyTorch's sums, its roots on CPUs and its divisions by a number on GPUs are not; its products, sums of
two, quotients of tensors and conversions are, and the first of equal maxima is found everywhere.

Source: the layouts of ggml's block types; `gguf.quants.dequantize` reads them back.
"""

from collections.abc import Callable, Sequence
from functools import partial

import gguf
import numpy as np
import torch

from oribi.gguf.file import Type

# values quantised at a time: the working set of a search stays in a core's cache
_AT_ONCE = 1 << 18
_REFITS = 2


def encode(values: torch.Tensor, type: Type) -> np.ndarray:
    """A tensor's bytes: [..., N, bytes of a row] uint8, or the values themselves in float32, float16.

    Args:
        values: [..., N, K] or [N], float32 or 16-bit, on any device.
        type: the type; K is a multiple of its block.
    """
    if type == Type.F32:
        return values.float().cpu().numpy()
    if type == Type.F16:
        return values.to(torch.float16).cpu().numpy()
    if type == Type.BF16:
        return values.to(torch.bfloat16).view(torch.uint8).cpu().numpy()
    block, size = gguf.GGML_QUANT_SIZES[type]
    *rows, row = values.shape
    blocks = values.reshape(-1, block)
    out = torch.empty(len(blocks), size, dtype=torch.uint8)
    step = _AT_ONCE // block if values.device.type == "cpu" else (1 << 24) // block
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        out[part] = torch.cat(_PACKERS[type](blocks[part].float()), dim=1).cpu()
    return out.view(*rows, row // block * size).numpy()


def _half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] as stored in float16: its bytes [B, 2], and the values that a reader will see [B]."""
    stored = x.to(torch.float16)
    return stored[:, None].view(torch.uint8), stored.float()


def _columns(x: torch.Tensor, n: int) -> torch.Tensor:
    """[B, m] as blocks of n, one a column: [n, B m / n]."""
    return x.reshape(-1, n).T.contiguous()


def _rounded(columns: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """columns [n, B] / scale [B] as integers from 0, where low becomes 0: [B, n] uint8."""
    q = (columns * _inverse(scale)).round_().clamp_(low, high).sub_(low)
    return q.to(torch.uint8).T.contiguous()


def _q8_0(x: torch.Tensor) -> list[torch.Tensor]:
    scale = _over(x.abs().amax(1), 127)
    # by the scale before it is stored as float16, as llama.cpp rounds: the same bytes
    return [_half(scale)[0], (x * _inverse(scale)[:, None]).round_().to(torch.int8).view(torch.uint8)]


def _mxfp4(x: torch.Tensor) -> list[torch.Tensor]:
    """The scale under which a block's largest value is 4 to 8, as llama.cpp takes it: values that come from MXFP4 stay the same."""
    exponent = torch.frexp(x.abs().amax(1))[1] - 3
    scale = torch.where(x.any(1), exponent + 127, 0).clamp_(0, 254)
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    codes = torch.bucketize(torch.ldexp(x.abs(), 127 - scale[:, None]), between).to(torch.uint8)
    codes |= (x < 0).to(torch.uint8) << 3
    return [scale.to(torch.uint8)[:, None], codes[:, :16] | codes[:, 16:] << 4]


def _legacy_symmetric(x: torch.Tensor, bits: int) -> list[torch.Tensor]:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    columns = _columns(x, 32)
    d, scale = _half(_fit_scale(columns, low, high, _STEPS_SYMMETRIC))
    return [d, *_nibbles(_rounded(columns, scale, low, high), bits)]


def _legacy_affine(x: torch.Tensor, bits: int) -> list[torch.Tensor]:
    high = (1 << bits) - 1
    columns = _columns(x, 32)
    s, m = _fit_affine(columns, high, _STEPS_AFFINE[bits], any_sign=True)
    (d, scale), (least, minimum) = _half(s), _half(-m)
    return [d, least, *_nibbles(_rounded(columns - minimum, scale, 0, high), bits)]


def _nibbles(q: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Integers [B, 32] as a half-block of low nibbles and one of high ones, and before them their fifth bits."""
    packed = [q[:, :16] & 15 | (q[:, 16:] & 15) << 4]
    return packed if bits == 4 else [_bits(q >> 4), *packed]


def _bits(q: torch.Tensor) -> torch.Tensor:
    """Bits [B, 8 k] as bytes [B, k], the first lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=q.device)
    return (q.unflatten(1, (-1, 8)) << places).sum(2, dtype=torch.uint8)


def _quarters(q: torch.Tensor) -> torch.Tensor:
    """Two-bit integers [B, 256] as bytes [B, 64]: of each half, four runs of 32 share the bytes."""
    q = q.view(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).flatten(1)


def _super_affine(
    x: torch.Tensor, n: int, high: int, levels: int, steps: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Superblocks [B, 256] as blocks of n with quantised scales and minima.

    Returns:
        d, dmin [B, 2] bytes; scales, minima [B, 256 / n] and integers [B, 256], uint8.
    """
    columns = _columns(x, n)
    s, m = (t.view(len(x), -1) for t in _fit_affine(columns, high, steps))
    (d, step), (dmin, mstep) = _half(_over(s.amax(1), levels)), _half(_over(m.amax(1), levels))
    step, mstep = step[:, None], mstep[:, None]
    scales = (s * _inverse(step)).round_().clamp_(0, levels)
    minima = (m * _inverse(mstep)).round_().clamp_(0, levels)
    q = _rounded(columns + (minima * mstep).view(-1), (scales * step).view(-1), 0, high)
    return d, dmin, scales.to(torch.uint8), minima.to(torch.uint8), q.view(len(x), 256)


def _q2_k(x: torch.Tensor) -> list[torch.Tensor]:
    d, dmin, scales, minima, q = _super_affine(x, 16, 3, 15, _STEPS_AFFINE[2])
    return [scales | minima << 4, _quarters(q), d, dmin]


def _q4_k(x: torch.Tensor) -> list[torch.Tensor]:
    d, dmin, scales, minima, q = _super_affine(x, 32, 15, 63, _STEPS_AFFINE[4])
    q = q.view(-1, 4, 2, 32)
    return [d, dmin, _six_bits(scales, minima), (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)]


def _q5_k(x: torch.Tensor) -> list[torch.Tensor]:
    d, dmin, scales, minima, q = _super_affine(x, 32, 31, 63, _STEPS_AFFINE[5])
    fifth = _bits((q >> 4).view(-1, 8, 32).transpose(1, 2).flatten(1))
    q = (q & 15).view(-1, 4, 2, 32)
    return [d, dmin, _six_bits(scales, minima), fifth, (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)]


def _six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of six bits, [B, 8] each, as bytes [B, 12]."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat([first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], dim=1)


def _super_symmetric(
    x: torch.Tensor, low: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Superblocks [B, 256] as blocks of 16 with signed quantised scales.

    Returns:
        d [B, 2] bytes; scales [B, 16] float32 integers in [-levels, levels - 1]; integers [B, 256] uint8 from 0.
    """
    columns = _columns(x, 16)
    s = _fit_scale(columns, low, -low - 1, _STEPS_SYMMETRIC).view(len(x), 16)
    largest = s.gather(1, s.abs().argmax(1, keepdim=True))[:, 0]
    d, step = _half(largest / -levels)
    scales = (s * _inverse(step)[:, None]).round_().clamp_(-levels, levels - 1)
    q = _rounded(columns, (scales * step[:, None]).view(-1), low, -low - 1)
    return d, scales, q.view(len(x), 256)


def _q3_k(x: torch.Tensor) -> list[torch.Tensor]:
    d, scales, q = _super_symmetric(x, -4, 32)
    scales = scales.add_(32).to(torch.uint8)
    high = (scales >> 4).view(-1, 4, 4)
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    third = _bits((q >> 2).view(-1, 8, 32).transpose(1, 2).flatten(1))
    return [third, _quarters(q & 3), scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4, high, d]


def _q6_k(x: torch.Tensor) -> list[torch.Tensor]:
    d, scales, q = _super_symmetric(x, -32, 128)
    runs = (q & 15).view(-1, 2, 2, 64)
    low = (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)
    return [low, _quarters(q >> 4), scales.to(torch.int8).view(torch.uint8), d]


# where searches start; least squares moves on from there (see _fit_scale, _fit_affine)
_STEPS_SYMMETRIC = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6)
_STEPS_AFFINE = {
    2: (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75),
    4: (-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6),
    5: (-0.6, -0.2, 0.2, 0.6),
}

_PACKERS: dict[Type, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    Type.Q8_0: _q8_0,
    Type.MXFP4: _mxfp4,
    Type.Q4_0: partial(_legacy_symmetric, bits=4),
    Type.Q5_0: partial(_legacy_symmetric, bits=5),
    Type.Q4_1: partial(_legacy_affine, bits=4),
    Type.Q5_1: partial(_legacy_affine, bits=5),
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
}


def _over(x: torch.Tensor, n: int) -> torch.Tensor:
    """x / n, rounded once: by a number in place of a tensor, a GPU would multiply with 1 / n."""
    return x / x.new_full((), n)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x == 0, 0, 1 / x)


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square roots of float32, rounded once: PyTorch's own on CPUs, MKL's, err in the last bit, which moves codes of Q6_K."""
    return x.double().sqrt_().float()


def _total(x: torch.Tensor) -> torch.Tensor:
    """Sums [1, B] of x [n, B], n a power of two: halves are added, whatever the device or the number of blocks."""
    x = x[: len(x) // 2] + x[len(x) // 2 :]
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half].add_(x[half:])
    return x


def _weights(x: torch.Tensor) -> torch.Tensor:
    rms = _root(_total(x.square()).div_(len(x)))
    return x.abs() + rms.mul_(2)


def _fit_scale(x: torch.Tensor, low: int, high: int, steps: Sequence[float]) -> torch.Tensor:
    """Scales s [B] such that s * q, q integer in [low, high], is near x [n, B].

    Args:
        x: [n, B] float32.
        low, high: the integers' range, low = -high - 1.
        steps: candidates: the value of largest magnitude falls on low - step, so s has the opposite sign of it.
    """
    largest = x.gather(0, x.abs().argmax(0, keepdim=True))  # [1, B]
    unit = _inverse(largest)
    best, scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    w = _weights(x)
    wx = w * x
    q, product = torch.empty_like(x), torch.empty_like(x)
    for step in [*steps, *[None] * _REFITS]:
        torch.mul(x, _inverse(scale) if step is None else (low - step) * unit, out=q)
        q.round_().clamp_(low, high)
        xq = _total(torch.mul(wx, q, out=product))
        qq = _total(torch.mul(w, q, out=product).mul_(q)).clamp_min_(1e-30)
        s = xq / qq
        gain = xq * s  # what s q explains of sum(w x^2)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, s, scale)
    return scale[0]


def _fit_affine(
    x: torch.Tensor, high: int, steps: Sequence[float], *, any_sign: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales s >= 0 and minima m [B] such that s * q - m, q integer in [0, high], is near x [n, B].

    Args:
        x: [n, B] float32.
        high: largest integer.
        steps: candidates: the range of a block is cut into high + step.
        any_sign: whether m may be negative; otherwise it is 0 where a block lies above zero.
    """
    least = x.amin(0, keepdim=True)
    if not any_sign:
        least.clamp_max_(0)
    span = x.amax(0, keepdim=True) - least
    unit = _inverse(span)
    w = _weights(x)
    wx = w * x
    n = _total(w).clamp_min_(1e-30)  # how many values, by weight
    sx, sxx = _total(wx), _total(wx * x)
    best, scale, minimum = torch.full_like(span, torch.inf), torch.zeros_like(span), -least
    q, product, above = torch.empty_like(x), torch.empty_like(x), x - least
    for step in [*steps, *[None] * _REFITS]:
        if step is None:
            torch.add(x, minimum, out=q).mul_(_inverse(scale))
        else:
            torch.mul(above, (high + step) * unit, out=q)
        q.round_().clamp_(0, high)
        sxq = _total(torch.mul(wx, q, out=product))
        sq = _total(torch.mul(w, q, out=product))
        sqq = _total(product.mul_(q))
        s = ((n * sxq - sx * sq) / (n * sqq - sq * sq).clamp_min_(1e-30)).clamp_min_(0)
        m = (s * sq - sx) / n
        if not any_sign:
            s = torch.where(m < 0, sxq / sqq.clamp_min(1e-30), s)
            m.clamp_min_(0)
        error = sxx + s * (s * sqq - 2 * sxq) + m * (n * m + 2 * (sx - s * sq))
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
    return scale[0], minimum[0]
