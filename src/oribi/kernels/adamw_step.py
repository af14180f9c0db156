"""One AdamW step on flat buffers: equations, reference and Triton kernels; `adamw.FlatAdamW` lays the buffers out.

    norm = |g|_2 over all parameters        c = min(1, max_grad_norm / (norm + 1e-6))
    m = m + (1 - b1) (c g - m)              v = b2 v + (1 - b2) (c g)^2
    w = (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Three launches: sums of squares, what to do with them, update and zeroing of the gradients. A step whose norm is
infinite or NaN changes nothing. An 8-bit state is the nearest code of bitsandbytes' dynamic maps, each block of 256
values scaled by its largest magnitude; a positive v never becomes 0, because m / sqrt(0) is no update.

Source: Decoupled Weight Decay Regularization (arXiv:1711.05101); 8-bit Optimizers via Block-wise Quantization
(arXiv:2110.02861).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton

BLOCK = 256
# blocks of one portion of the reference: temporaries of 256 KB stay in a CPU's cache
_PORTION = 256
# blocks of a program; buffers end on whole programs, so that no kernel needs a mask
_TILE_BLOCKS = 4
TILE = _TILE_BLOCKS * BLOCK
# programs that share the gradients when their norm is formed: four for each of an H100's 132 multiprocessors
NORM_PROGRAMS = 528
# columns of Flat.hyper and Flat.factors
HYPER = 5
FACTORS = 8
# float32 words behind the gradients, in which processes tell each other more than gradients
CONTROL_WORDS = 256


@dataclass
class Flat:
    """All parameters of one dtype on one device: the first `quantised` elements have 8-bit states.

    Args:
        weights, grads: [N] in the parameters' dtype, N a multiple of TILE.
        shared: what processes sum in one call: `grads`, and in float32 [CONTROL_WORDS] control words behind it.
        quantised: a multiple of TILE.
        block_group: [N / BLOCK] int32, each block's parameter group.
        hyper: [groups, HYPER] float64: lr, beta1, beta2, eps, weight_decay.
        powers: [groups, 2] float64: b1^t, b2^t.
        factors: [groups, FACTORS] float32, what a step computes from these: lr / (1 - b1^t), sqrt(1 - b2^t),
            1 - lr wd, 1 - b1, b2, 1 - b2, eps, unused.
        partials: sums of squares of all flats' gradients, float32; `own` is this flat's part.
        codes: [2, quantised] uint8 and absmax: [2, quantised / BLOCK] float32, of m and v.
        moments: [2, N - quantised] float32, m and v.
        maps: [2, 2, 256] float32: values and midpoints of the map of m, then of the map of v.
        step, norm: float32 scalars; skipped: int64 scalar; verdict: [2] float32, clip factor and 1 if norm is finite.
    """

    weights: torch.Tensor
    grads: torch.Tensor
    shared: torch.Tensor
    quantised: int
    block_group: torch.Tensor
    hyper: torch.Tensor
    powers: torch.Tensor
    factors: torch.Tensor
    partials: torch.Tensor
    own: slice
    codes: torch.Tensor
    absmax: torch.Tensor
    moments: torch.Tensor
    maps: torch.Tensor
    step: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor
    verdict: torch.Tensor


def adamw_step(flats: Sequence[Flat], max_grad_norm: float | None) -> None:
    """Clip by the norm over all flats, update weights and states, zero the gradients; nothing waits for the device.

    Args:
        flats: buffers; the partials of each are as long as those of all together.
        max_grad_norm: gradients are scaled down to this norm; None does not clip.
    """
    for flat in flats:
        _sum_squares(flat)
    for flat in flats:
        for other in flats:
            # the norm spans dtypes and devices; one flat, the usual case, has all of it already
            if other is not flat:
                other.partials[flat.own].copy_(flat.partials[flat.own], non_blocking=True)
    for flat in flats:
        _decide(flat, max_grad_norm)
        _update(flat)


@lru_cache(maxsize=1)
def dynamic_maps() -> torch.Tensor:
    """[2, 2, 256] float32: bitsandbytes' signed map and the midpoints between its values, then the unsigned map's."""
    from bitsandbytes.functional import create_dynamic_map

    maps = [create_dynamic_map(signed=True), create_dynamic_map(signed=False)]
    ends = [
        torch.cat([(m[1:].double() + m[:-1].double()) / 2, m.new_tensor([torch.inf]).double()]) for m in maps
    ]
    return torch.stack([torch.stack([m, end.float()]) for m, end in zip(maps, ends)])


def _sum_squares(flat: Flat) -> None:
    """Write the flat's part of partials."""
    if use_triton(flat.grads):
        tiles = flat.grads.numel() // TILE
        launch(
            _norm_kernel, min(tiles, NORM_PROGRAMS), flat.grads, flat.partials[flat.own], tiles, TILE, num_warps=4
        )  # fmt: skip
        return
    flat.partials[flat.own].zero_()
    flat.partials[flat.own.start] = flat.grads.float().square().sum()


def _decide(flat: Flat, max_grad_norm: float | None) -> None:
    """From partials: norm, clip factor, whether to step, and each group's factors of this step."""
    if use_triton(flat.grads):
        count = flat.partials.numel()
        launch(
            _decide_kernel, 1, flat.partials, flat.hyper, flat.powers, flat.factors, flat.verdict, flat.norm, flat.step,
            flat.skipped, float(max_grad_norm or 0.0), len(flat.hyper), count, next_power_of_2(count),
            max_grad_norm is not None, HYPER, FACTORS, num_warps=4,
        )  # fmt: skip
        return
    flat.norm.copy_(flat.partials.sum().sqrt())
    finite = flat.norm.isfinite()
    clip = torch.ones_like(flat.norm)
    if max_grad_norm is not None:
        clip = (max_grad_norm / (flat.norm + 1e-6)).clamp(max=1.0)
    flat.verdict.copy_(torch.stack([clip, finite.float()]))
    flat.step += finite
    flat.skipped += ~finite
    flat.powers.copy_(torch.where(finite, flat.powers * flat.hyper[:, 1:3], flat.powers))
    lr, beta1, beta2, eps, decay = flat.hyper.unbind(1)
    correction1, correction2 = (1 - flat.powers).unbind(1)
    factors = (lr / correction1, correction2.sqrt(), 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, eps, eps)
    flat.factors.copy_(torch.stack(factors, dim=1))


def _update(flat: Flat) -> None:
    """Update weights and states, then zero the gradients."""
    if use_triton(flat.grads):
        launch(
            _update_kernel, flat.weights.numel() // TILE, flat.weights, flat.grads, flat.codes, flat.absmax,
            flat.moments, flat.block_group, flat.factors, flat.verdict, flat.maps, flat.quantised,
            flat.moments.shape[1], flat.quantised // TILE, _TILE_BLOCKS, BLOCK, FACTORS,
            num_warps=4,
        )  # fmt: skip
        return
    if bool(flat.verdict[1]):
        first, last = flat.quantised // BLOCK, len(flat.block_group)
        for start in range(0, last, _PORTION):
            if start < first:
                _update_reference(flat, slice(start, min(start + _PORTION, first)), True)
            if start + _PORTION > first:
                _update_reference(flat, slice(max(start, first), min(start + _PORTION, last)), False)
    flat.grads.zero_()


def _update_reference(flat: Flat, blocks: slice, quantised: bool) -> None:
    weights, grads = (x.view(-1, BLOCK)[blocks] for x in (flat.weights, flat.grads))
    factors = flat.factors[flat.block_group[blocks].long()][:, None, :].unbind(-1)
    step_size, correction2, keep, take1, beta2, take2, eps, _ = factors
    g = grads.float() * flat.verdict[0]
    if quantised:
        codes, absmax = flat.codes.view(2, -1, BLOCK)[:, blocks], flat.absmax[:, blocks, None]
        m, v = (flat.maps[i, 0][codes[i].int()] * absmax[i] for i in (0, 1))
    else:
        first = flat.quantised // BLOCK
        moments = flat.moments.view(2, -1, BLOCK)[:, blocks.start - first : blocks.stop - first]
        m, v = moments
    m = m + (g - m) * take1
    v = v * beta2 + take2 * g * g
    w = weights.float() * keep - step_size * (m / (v.sqrt() / correction2 + eps))
    weights.copy_(w)
    if not quantised:
        moments.copy_(torch.stack([m, v]))
        return
    for i, x in enumerate((m, v)):
        largest = x.abs().amax(1, keepdim=True)
        scaled = x / torch.where(largest > 0, largest, 1.0)
        code = torch.searchsorted(flat.maps[i, 1], scaled)
        if i == 1:
            code = torch.where((x > 0) & (code == 0), 1, code)
        codes[i].copy_(code)
        absmax[i].copy_(largest)


@jit(do_not_specialize=["tiles"])
def _norm_kernel(grad_ptr, partial_ptr, tiles, TILE: tl.constexpr):
    total = tl.zeros([TILE], dtype=tl.float32)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        g = tl.load(grad_ptr + at).to(tl.float32)
        total += g * g
        at += tl.num_programs(0) * TILE
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit(do_not_specialize=["groups"])
def _decide_kernel(
    partial_ptr, hyper_ptr, power_ptr, factor_ptr, verdict_ptr, norm_ptr, step_ptr, skipped_ptr, max_norm, groups,
    COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, CLIP: tl.constexpr,
    HYPER: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, COUNT_BLOCK)
    norm = tl.sqrt(tl.sum(tl.load(partial_ptr + at, mask=at < COUNT, other=0.0), axis=0))
    finite = norm < float("inf")  # false for NaN
    clip = 1.0
    if CLIP:
        clip = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    tl.store(norm_ptr, norm)
    tl.store(verdict_ptr, clip)
    tl.store(verdict_ptr + 1, finite.to(tl.float32))
    tl.store(step_ptr, tl.load(step_ptr) + finite.to(tl.float32))
    tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - finite.to(tl.int64))
    for group in range(groups):
        lr = tl.load(hyper_ptr + group * HYPER)
        beta1 = tl.load(hyper_ptr + group * HYPER + 1)
        beta2 = tl.load(hyper_ptr + group * HYPER + 2)
        power1 = tl.load(power_ptr + group * 2)
        power2 = tl.load(power_ptr + group * 2 + 1)
        power1 = tl.where(finite, power1 * beta1, power1)
        power2 = tl.where(finite, power2 * beta2, power2)
        tl.store(power_ptr + group * 2, power1)
        tl.store(power_ptr + group * 2 + 1, power2)
        to = factor_ptr + group * FACTORS
        tl.store(to, (lr / (1.0 - power1)).to(tl.float32))
        tl.store(to + 1, tl.sqrt(1.0 - power2).to(tl.float32))
        tl.store(to + 2, (1.0 - lr * tl.load(hyper_ptr + group * HYPER + 4)).to(tl.float32))
        tl.store(to + 3, (1.0 - beta1).to(tl.float32))
        tl.store(to + 4, beta2.to(tl.float32))
        tl.store(to + 5, (1.0 - beta2).to(tl.float32))
        tl.store(to + 6, tl.load(hyper_ptr + group * HYPER + 3).to(tl.float32))


@jit
def _update_kernel(
    weight_ptr, grad_ptr, code_ptr, absmax_ptr, moment_ptr, group_ptr, factor_ptr, verdict_ptr, map_ptr,
    quantised, precise, quantised_tiles,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    block = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if tl.load(verdict_ptr + 1) > 0:
        factor = factor_ptr + tl.load(group_ptr + block) * FACTORS
        g = tl.load(grad_ptr + at).to(tl.float32) * tl.load(verdict_ptr)
        w = tl.load(weight_ptr + at).to(tl.float32)
        if tile < quantised_tiles:
            m = _decode(code_ptr + at, absmax_ptr + block, map_ptr)
            v = _decode(code_ptr + quantised + at, absmax_ptr + quantised // BLOCK + block, map_ptr + 512)
            w, m, v = _adamw(w, g, m, v, factor)
            _encode(m, code_ptr + at, absmax_ptr + block, map_ptr + 256, 0)
            _encode(v, code_ptr + quantised + at, absmax_ptr + quantised // BLOCK + block, map_ptr + 768, 1)
        else:
            to = moment_ptr + (at - quantised)
            w, m, v = _adamw(w, g, tl.load(to), tl.load(to + precise), factor)
            tl.store(to, m)
            tl.store(to + precise, v)
        tl.store(weight_ptr + at, w.to(weight_ptr.dtype.element_ty))
    tl.store(grad_ptr + at, tl.zeros([BLOCKS, BLOCK], dtype=grad_ptr.dtype.element_ty))


@jit
def _adamw(w, g, m, v, factor):
    m += (g - m) * tl.load(factor + 3)[:, None]
    v = v * tl.load(factor + 4)[:, None] + tl.load(factor + 5)[:, None] * g * g
    root = tl.sqrt(v) / tl.load(factor + 1)[:, None] + tl.load(factor + 6)[:, None]
    w = w * tl.load(factor + 2)[:, None] - tl.load(factor)[:, None] * (m / root)
    return w, m, v


@jit
def _decode(code_ptr, absmax_ptr, map_ptr):
    return tl.load(map_ptr + tl.load(code_ptr).to(tl.int32)) * tl.load(absmax_ptr)[:, None]


@jit
def _encode(x, code_ptr, absmax_ptr, midpoint_ptr, LOWEST: tl.constexpr):
    """Store the nearest codes of x; a positive x gets at least code LOWEST."""
    largest = tl.max(tl.abs(x), axis=1)
    scaled = x / tl.where(largest > 0, largest, 1.0)[:, None]
    # binary search: the code is the number of midpoints below
    code = tl.zeros_like(x).to(tl.int32)
    for power in tl.static_range(8):
        below = scaled > tl.load(midpoint_ptr + code + ((128 >> power) - 1))
        code += tl.where(below, 128 >> power, 0)
    code = tl.where(x > 0, tl.maximum(code, LOWEST), code)
    tl.store(code_ptr, code.to(tl.uint8))
    tl.store(absmax_ptr, largest)
