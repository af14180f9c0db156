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
    if len(weights) == 1 and out is None:
        return _dequantize_one(weights[0], dtype)
    if out is None:
        out = torch.empty(sum(n for n, _ in shapes), shapes[0][1], dtype=dtype, device=weights[0].device)
    for part, weight in zip(out.split([n for n, _ in shapes]), weights):
        part.copy_(_dequantize_one(weight, dtype))
    return out


def quantize(
    weight: torch.Tensor, *, blocksize: int = 64, double_quant: bool = True
) -> tuple[torch.Tensor, object]:
    """Packed codes ([N * K / 2, 1] uint8) and bitsandbytes' QuantState of a dense weight, on the weight's device.

    Args:
        weight: [N, K] in 16 or 32 bit.
        blocksize: values that share a scale.
        double_quant: whether the scales are quantised to 8 bit.
    """
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")


def reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One packed weight dequantised by the formula above, on any device."""
    state = weight.quant_state
    count = state.shape.numel()
    absmax = state.absmax
    if state.nested:
        scale2 = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scale2 + state.offset
    pairs = torch.stack([state.code.repeat_interleave(16), state.code.repeat(16)], dim=1)
    values = pairs[_bytes(weight).int()].view(-1)[:count]
    return (values * absmax.repeat_interleave(state.blocksize)[:count]).to(dtype).view(state.shape)


def _dequantize_one(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    state = weight.quant_state
    if state.shape.numel() % state.blocksize:
        return reference(weight, dtype)
    from bitsandbytes.functional import (
        dequantize_blockwise,
    )  # a second to import, and only packed weights need it

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    # one block a row: on the CPU bitsandbytes is wrong where a row ends inside a block
    blocks = (state.shape.numel() // state.blocksize, state.blocksize)
    flat = torch.ops.bitsandbytes.dequantize_4bit(
        _bytes(weight), absmax.float(), state.blocksize, state.quant_type, blocks, dtype
    )
    return flat.view(state.shape)


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
