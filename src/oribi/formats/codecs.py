"""Quantised weights as values, and values as quantised weights.

Values are products in float32, which hold each of them exactly, and are rounded once, to the dtype that a caller asks for.
N rows, K columns, G groups of a row.

Source: compressed-tensors' formats float-quantized, naive-quantized, pack-quantized, nvfp4-pack-quantized and
mxfp4-pack-quantized, https://github.com/vllm-project/compressed-tensors; quant_method "fp8" of transformers.
"""

import torch

from oribi.errors import ModelError

FP8_MAX = 448.0  # of e4m3
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127
_WORD = 32  # bits of a word of packed integers
_PACKED_BITS = (2, 4, 8)  # others were packed in two ways by different releases
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's largest value that its scale may be made for


def as_scale(scale: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32: floats of any width, or bytes that are exponents of two."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - _E8M0_BIAS)
    return scale.float()


def decode_scaled(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """Codes that are numbers themselves, FP8 or int8, times their scales.

    Args:
        codes: [N, K], or [E, N, K] of several matrices.
        scale: one number, [N] or [N, 1] per row, [N, G] per group of a row, or [ceil(N / rows), ceil(K / columns)] per block; of
            several matrices, these for each.
        block: rows and columns of a block, as config.json has them.

    Returns:
        Values, float32 in the shape of the codes.

    Raises:
        ModelError: the scales fit no layout of these.
    """
    if codes.dim() == 3 and scale.dim() and len(scale) == len(codes):
        return torch.stack([decode_scaled(one, own, block) for one, own in zip(codes, scale)])
    values, scale = codes.float(), as_scale(scale)
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    if codes.dim() != 2 or scale.dim() not in (1, 2):
        raise ModelError(f"scales {list(scale.shape)} fit no matrix {list(codes.shape)}")
    rows, columns = codes.shape
    grid = tuple(scale.shape) if scale.dim() == 2 else (len(scale), 1)
    if block is not None and grid == (-(-rows // block[0]), -(-columns // block[1])):
        return _times_blocks(values, scale, *block)
    if grid[0] == rows and columns % grid[1] == 0:
        return _times_blocks(values, scale.reshape(grid), 1, columns // grid[1])
    raise ModelError(
        f"scales {list(scale.shape)} fit no matrix {list(codes.shape)}"
        + (f" in blocks of {list(block)}" if block is not None else ", and config.json names no blocks")
    )


def decode_fp4(
    packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Pairs of e2m1 numbers, the first in the low bits, times the scale of their group.

    Args:
        packed: [N, K / 2] uint8.
        scale: [N, G], e4m3 with `global_scale`, else exponents of two.
        global_scale: one number that the scales are divided by.

    Returns:
        Values [N, K] float32.

    Raises:
        ModelError: the scales do not fit.
    """
    scale = as_scale(scale)
    if global_scale is not None:
        scale = scale / global_scale.float().reshape(())
    return decode_scaled(fp4_pairs(packed).flatten(1), scale)


def fp4_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The two e2m1 numbers [..., 2] of each byte, float32, the one in the low bits first."""
    signed = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    pairs = torch.stack([signed.repeat(16), signed.repeat_interleave(16)], dim=1)
    return pairs[packed.int()]


def decode_ints(
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    zero_point: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integers packed into words, the first in the lowest bits, less their zero, times the scale of their group.

    Args:
        packed: [N, ceil(K * bits / 32)] int32.
        scale: [N, G], or one number.
        shape: N and K.
        zero_point: [ceil(N * bits / 32), G] int32, packed along the rows; None: the middle of the range.
        group_index: [K] group of each column, where groups are not made of neighbours; all -1 where they are.

    Returns:
        Values [N, K] float32.

    Raises:
        ModelError: the parts do not fit.
    """
    rows, columns = shape
    bits = [bits for bits in _PACKED_BITS if -(-columns * bits // _WORD) == packed.shape[1]]
    scale = as_scale(scale)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    if (
        len(bits) != 1
        or len(packed) != rows
        or scale.dim() != 2
        or len(scale) != rows
        or columns % scale.shape[1]
    ):
        raise ModelError(
            f"words {list(packed.shape)} and scales {list(scale.shape)} fit no matrix {[rows, columns]} of integers of 2, 4 or 8 bits"
        )
    groups = scale.shape[1]
    values = _unpacked(packed, bits[0], columns).float()
    if zero_point is None:
        zeros = torch.full_like(scale, 2 ** (bits[0] - 1))
    elif tuple(zero_point.shape) != (-(-rows * bits[0] // _WORD), groups):
        raise ModelError(
            f"zero points {list(zero_point.shape)} fit no matrix {[rows, columns]} of {groups} groups"
        )
    else:
        zeros = _unpacked(zero_point.T, bits[0], rows).T.float()
    if group_index is not None and bool((group_index >= 0).any()):
        counts = torch.bincount(group_index.clamp_min(0).long(), minlength=groups)
        if len(group_index) != columns or len(counts) != groups or bool((counts != columns // groups).any()):
            raise ModelError(
                f"its group index does not give each of {groups} groups {columns // groups} columns"
            )
        chosen = group_index.long()
        return values.sub_(zeros[:, chosen]).mul_(scale[:, chosen])
    grouped = values.unflatten(1, (groups, -1))
    return grouped.sub_(zeros[..., None]).mul_(scale[..., None]).flatten(1)


def encode_fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix in e4m3 with a scale per row.

    Args:
        weight: [N, K]. scale_dtype: of the scales; values are rounded to what they are with the scales so rounded.

    Returns:
        "weight" [N, K] e4m3 and "weight_scale" [N, 1], as `decode_scaled` reads them.
    """
    weight = weight.float()
    scale = _rounded_scale(weight.abs().amax(1, keepdim=True) / FP8_MAX, scale_dtype)
    codes = (weight / scale.float()).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def encode_int4(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix in 4-bit integers, each rounded to the nearest, with a scale per group and zero in the middle.

    Of a few scales, each group takes the one with the least squared error.

    Args:
        weight: [N, K], K a multiple of `group_size`. group_size: columns that share a scale. scale_dtype: as of `encode_fp8`.

    Returns:
        "weight_packed" [N, K / 8] int32, "weight_scale" [N, K / group_size], "weight_shape" [2], as `decode_ints` reads them.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    largest = groups.abs().amax(2, keepdim=True) / 7.5
    best = None
    for share in _CLIPPED:
        scale = _rounded_scale(largest * share, scale_dtype)
        codes = (groups / scale.float()).round_().clamp_(-8, 7)
        error = (codes * scale.float() - groups).square_().sum(2, keepdim=True)
        if best is None:
            best = error, scale, codes.to(torch.int8)
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, codes.to(torch.int8), best[2]),
        )
    _, scale, codes = best
    nibbles = (codes.flatten(1) + 8).to(torch.uint8)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_shape": shape}


def _times_blocks(values: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Multiply a matrix [N, K] in place by a scale per block, the last of which may be cut off at either edge."""
    of_row = scale.repeat_interleave(rows, 0)[: len(values)]
    whole = values.shape[1] // columns
    values[:, : whole * columns].unflatten(1, (whole, columns)).mul_(of_row[:, :whole, None])
    values[:, whole * columns :].mul_(of_row[:, whole:])
    return values


def _unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` integers of each row of words, as they are stored, uint8."""
    bytes_ = packed.contiguous().view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (bytes_[..., None] >> shifts & (1 << bits) - 1).flatten(1)[:, :count]


def _rounded_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in a dtype, none of them zero nor, in float16, so small that it has few bits."""
    least = 2.0**-18 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return scale.clamp_min(least).to(dtype)
