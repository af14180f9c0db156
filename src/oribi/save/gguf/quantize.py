"""Tensors as the bytes of a GGUF type."""

import gguf
import numpy as np
import torch
from gguf.quants import quantize as package_quantize

Type = gguf.GGMLQuantizationType


def quantized_bytes(shape: tuple[int, ...], type: Type) -> int:
    """Size of a tensor of `shape` in a type."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    count = int(np.prod(shape))
    return count // block * size


def quantize(values: torch.Tensor, type: Type) -> np.ndarray:
    """A tensor's bytes [N, bytes of a row] uint8 (or [N, K] float32, float16).

    Args:
        values: [N, K] or [N] float32.
        type: the type; K is a multiple of its block.
    """
    if type == Type.F32:
        return values.cpu().numpy()
    if type == Type.F16:
        return values.to(torch.float16).cpu().numpy()
    if type == Type.BF16:
        return values.to(torch.bfloat16).view(torch.uint8).cpu().numpy()
    return package_quantize(values.cpu().numpy(), type)
