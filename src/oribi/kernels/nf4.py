"""NF4 with double quantisation, in bitsandbytes' format: dequantised bit for bit as bitsandbytes does.

A weight [N, K] lies flat in blocks of 64 values. Two 4-bit codes share a byte, the earlier in the high half. The blocks'
scales (absmax) are themselves 8-bit codes in groups of 256:

    absmax[b] = code2[absmax_code[b]] * absmax2[b // 256] + offset        w[i] = lut[q[i]] * absmax[i // 64]

Each product and sum is rounded to float32 on its own (no fused multiply-add), then w to the output's dtype.

Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
"""

from collections.abc import Sequence

import torch

from oribi.errors import ModelError
from oribi.kernels.dispatch import jit, launch, tl, use_triton

# values that share one scale in the weights that oribi packs
BLOCK = 64
# weights that one launch can read; q|k|v is the largest group of a decoder layer
_GROUP = 3
# 4-byte words (8 codes) of a program of 4 warps: 4 independent loads per thread hide the latency of the scales
_WORDS = 512


def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in NF4 with double quantisation: codes and scales, without the small tables."""
    blocks = count // 64
    return count // 2 + blocks + 4 * (blocks // 256)


def dequantize(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed weights as one dense matrix.

    Args:
        weights: bitsandbytes' Params4bit (or any packed tensor with a `quant_state`) of [N_i, K] each.
        dtype: bfloat16, float16 or float32.
        out: [sum N_i, K] in dtype for the result; rows may be strided.

    Returns:
        [sum N_i, K]: the weights below each other.

    Raises:
        ModelError: a weight was repacked for bitsandbytes' CPU inference, or the weights do not share K.
    """
    shapes = [_checked_shape(w) for w in weights]
    if len({k for _, k in shapes}) != 1:
        raise ModelError(f"weights of shapes {shapes} cannot lie below each other: their row lengths differ")
    on_triton = use_triton(weights[0])
    if len(weights) == 1 and out is None and not on_triton:
        return _dequantize_one(weights[0], dtype)
    if out is None:
        out = torch.empty(sum(n for n, _ in shapes), shapes[0][1], dtype=dtype, device=weights[0].device)
    if on_triton and kernel_reads(weights, out.shape[1]):
        _launch(weights, out)
        return out
    for part, weight in zip(out.split([n for n, _ in shapes]), weights):
        part.copy_(_dequantize_one(weight, dtype))
    return out


def quantize(
    weight: torch.Tensor, *, blocksize: int = BLOCK, double_quant: bool = True
) -> tuple[torch.Tensor, object]:
    """Packed codes ([N * K / 2, 1] uint8) and bitsandbytes' QuantState of a dense weight, on the weight's device.

    Args:
        weight: [N, K] in 16 or 32 bit.
        blocksize: values that share a scale.
        double_quant: whether the scales are quantised to 8 bit.
    """
    from bitsandbytes.functional import quantize_4bit

    if weight.device.type == "cpu" and weight.numel() % blocksize == 0:
        return _quantize_in_portions(weight, blocksize, double_quant)
    return quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")


def _quantize_in_portions(
    weight: torch.Tensor, blocksize: int, double_quant: bool
) -> tuple[torch.Tensor, object]:
    """The same on the CPU, some blocks at a time.

    Large temporaries fragment the heap: SmolLM2-135M's 106 MB left holes of 430 MB, in portions 90 MB.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    blocks = weight.reshape(-1, blocksize)
    codes = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(len(blocks))
    step = max(16384 // blocksize, 1)
    threads = torch.get_num_threads()
    # portions are too small to share: on a busy machine each would wait for the other thread
    torch.set_num_threads(1)
    try:
        for start in range(0, len(blocks), step):
            part = torch.ops.bitsandbytes.quantize_4bit(
                blocks[start : start + step], blocksize, "nf4", torch.uint8
            )
            first = start * blocksize // 2
            codes[first : first + len(part[0])], absmax[start : start + step] = part
    finally:
        torch.set_num_threads(threads)
    offset = state2 = None
    if double_quant:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=256)
    code = get_4bit_type("nf4", device=weight.device)
    return codes, QuantState(absmax, weight.shape, code, blocksize, "nf4", weight.dtype, offset, state2)


def reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One packed weight dequantised by the formula above, on any device."""
    state = weight.quant_state
    count = state.shape.numel()
    absmax = block_scales(weight)
    pairs = torch.stack([state.code.repeat_interleave(16), state.code.repeat(16)], dim=1)
    values = pairs[_bytes(weight).int()].view(-1)[:count]
    return (values * absmax.repeat_interleave(state.blocksize)[:count]).to(dtype).view(state.shape)


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """absmax of every block of a packed weight, float32, by the formula above."""
    state = weight.quant_state
    if not state.nested:
        return state.absmax
    scale2 = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    return state.state2.code[state.absmax.int()] * scale2 + state.offset


def _dequantize_one(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    state = weight.quant_state
    if state.shape.numel() % state.blocksize:
        return reference(weight, dtype)
    # takes a second to import, and only packed weights need it
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    # one block per row: on the CPU bitsandbytes is wrong where a row ends inside a block
    blocks = (state.shape.numel() // state.blocksize, state.blocksize)
    flat = torch.ops.bitsandbytes.dequantize_4bit(
        _bytes(weight), absmax.float(), state.blocksize, state.quant_type, blocks, dtype
    )
    return flat.view(state.shape)


def kernel_reads(weights: Sequence[torch.Tensor], row_length: int) -> bool:
    """Whether kernels can read a group: at most three weights, NF4 alike in all, whole words of 8 codes in a row."""
    first = weights[0].quant_state
    return (
        len(weights) <= _GROUP
        and row_length % 8 == 0
        and all(
            s.quant_type == "nf4"
            and s.blocksize == first.blocksize
            and s.nested == first.nested
            and (not s.nested or s.state2.blocksize == 256)
            and s.absmax.dtype is (torch.uint8 if s.nested else torch.float32)
            for s in (w.quant_state for w in weights)
        )
    )


def kernel_arguments(weights: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[object]:
    """What `group_member` chooses from: codes and scales of each weight of a group, and its size."""
    arguments: list[object] = []
    for weight, size in zip(weights, sizes):
        s = weight.quant_state
        if s.nested:
            arguments += [weight, s.absmax, s.state2.absmax, s.state2.code, s.offset, size]
        else:  # the last three are not read
            arguments += [weight, s.absmax, s.absmax, s.absmax, s.absmax, size]
    return arguments + arguments[-6:] * (_GROUP - len(weights))  # no program reaches the places left over


def _launch(weights: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    state, row_words = weights[0].quant_state, out.shape[1] // 8
    words = [w.quant_state.shape[0] * row_words for w in weights]
    flat = out.is_contiguous()
    launch(
        _kernel, sum(-(-n // _WORDS) for n in words), out, state.code, *kernel_arguments(weights, words),
        0 if flat else out.stride(0), 1 if flat else row_words, state.blocksize // 8, _WORDS, state.nested, flat,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@jit
def group_member(
    program, programs_0, programs_1,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
):  # fmt: skip
    """A program's place among those of its weight, the sizes of the weights above it, its weight's size and pointers."""
    packed, absmax, absmax2, code2, offset, size = packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0
    before = size_0 * 0
    if program >= programs_0:
        program -= programs_0
        packed, absmax, absmax2, code2, offset = packed_1, absmax_1, absmax2_1, code2_1, offset_1
        before += size_0
        size = size_1
        if program >= programs_1:
            program -= programs_1
            packed, absmax, absmax2, code2, offset = packed_2, absmax_2, absmax2_2, code2_2, offset_2
            before += size_1
            size = size_2
    return program, before, size, packed, absmax, absmax2, code2, offset


# Kernels that call these two are launched without fused multiply-adds where they must have bitsandbytes' bits, which
# rounds every product and sum.
@jit
def block_scale(block, inside, absmax, absmax2, code2, offset, NESTED: tl.constexpr):
    """float32 scales of blocks of values, in block's shape."""
    if NESTED:
        scale_code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(code2 + scale_code) * tl.load(absmax2 + block // 256, mask=inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@jit
def decode(
    word, inside, lut, packed, absmax, absmax2, code2, offset, BLOCK_WORDS: tl.constexpr, NESTED: tl.constexpr
):
    """float32 values [..., 8] of 4-byte words of codes [...], zero outside."""
    codes = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, mask=inside, other=0)
    scale = block_scale(word // BLOCK_WORDS, inside, absmax, absmax2, code2, offset, NESTED)
    # value j of a word: bytes in order, the high half of each byte first
    place = tl.arange(0, 8)
    code = (tl.expand_dims(codes, -1) >> ((place ^ 1) * 4)) & 15
    return tl.load(lut + code) * tl.expand_dims(scale, -1)


# As if unaligned: a thread then loads single words of codes, the layout in which it stores 8 values at once, and weights
# that start anywhere in a shared buffer need no kernel of their own.
UNSPECIALIZED = {
    "do_not_specialize": [f"size_{i}" for i in range(_GROUP)],
    "do_not_specialize_on_alignment": [
        f"{name}_{i}" for name in ("packed", "absmax", "absmax2", "code2", "offset") for i in range(_GROUP)
    ],
}


@jit(**UNSPECIALIZED)
def _kernel(
    out_ptr, lut,
    packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
    packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
    packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    out_stride, ROW_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr,
    NESTED: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    program, before, words, packed, absmax, absmax2, code2, offset = group_member(
        tl.program_id(0), tl.cdiv(size_0, WORDS), tl.cdiv(size_1, WORDS),
        packed_0, absmax_0, absmax2_0, code2_0, offset_0, size_0,
        packed_1, absmax_1, absmax2_1, code2_1, offset_1, size_1,
        packed_2, absmax_2, absmax2_2, code2_2, offset_2, size_2,
    )  # fmt: skip
    word = program * WORDS + tl.arange(0, WORDS)
    inside = word < words
    values = decode(word, inside, lut, packed, absmax, absmax2, code2, offset, BLOCK_WORDS, NESTED)
    values = values.to(out_ptr.dtype.element_ty)
    place = tl.arange(0, 8)
    if CONTIGUOUS:
        start = (before.to(tl.int64) + program * WORDS) * 8
        at = tl.arange(0, WORDS)[:, None] * 8 + place[None, :]
        tl.store(out_ptr + start + at, values, mask=inside[:, None])
    else:
        row = ((before + word) // ROW_WORDS).to(tl.int64) * out_stride
        at = (row + (before + word) % ROW_WORDS * 8)[:, None] + place[None, :]
        tl.store(out_ptr + at, values, mask=inside[:, None])


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.data.view(-1).view(torch.uint8)


def _checked_shape(weight: torch.Tensor) -> tuple[int, int]:
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "a packed weight was rearranged by bitsandbytes' own CPU forward and cannot be trained on; set "
            "support_avx512bf16_for_cpu = False on each Linear4bit before it is called, and load the model again"
        )
    return state.shape[0], state.shape[1]
