"""Tiny checkpoints in the formats of other programs, built from their specifications, with the values that they stand for.

Every format is encoded here by itself: no function of oribi's, nor of the formats' own libraries, is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny_checkpoint import checkpoint, edit_config
from tests.save.tiny_export import FAMILY_CHANGES

Parts = dict[str, torch.Tensor]
BLOCK = 128
SIZES = {
    "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _spread(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """The scale of each value of a matrix, by its place."""
    n, k = torch.arange(shape[0]) // rows, torch.arange(shape[1]) // columns
    return scale.float()[n][:, k]


def _e4m3(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(weight: torch.Tensor, key: str = "weight_scale_inv") -> tuple[Parts, torch.Tensor]:
    """As Qwen3-FP8 and DeepSeek-V3; the last blocks are cut off at both edges."""
    grid = [-(-size // BLOCK) for size in weight.shape]
    scale = torch.tensor(
        [
            [weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].abs().max() / 448 for j in range(grid[1])]
            for i in range(grid[0])
        ]
    )  # fmt: skip
    spread = _spread(scale, BLOCK, BLOCK, weight.shape)
    codes = _e4m3(weight, spread)
    return {"weight": codes, key: scale}, codes.float() * spread


def fp8_tensor(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """As Ministral 3: one scale without a dimension, and one for activations."""
    scale = weight.abs().max() / 448
    codes = _e4m3(weight, scale)
    parts = {
        "weight": codes,
        "weight_scale_inv": scale.to(torch.bfloat16),
        "activation_scale": torch.tensor(0.07),
    }
    return parts, codes.float() * parts["weight_scale_inv"].float()


def fp8_channel(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = _e4m3(weight, scale.float())
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def fp8_static(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale [1] of compressed-tensors, and a static one of the inputs."""
    scale = (weight.abs().max() / 448).reshape(1)
    codes = _e4m3(weight, scale)
    return {
        "weight": codes,
        "weight_scale": scale,
        "input_scale": torch.tensor([0.05]),
    }, codes.float() * scale


def int8_channel(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _nearest_e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values of the nearest numbers of four bits."""
    index = (values.abs()[..., None] - _E2M1).abs().argmin(-1)
    negative = (values < 0) & (index > 0)
    return index + 8 * negative, _E2M1[index] * torch.where(negative, -1.0, 1.0)


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def nvfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    global_scale = (448 * 6 / weight.abs().max()).reshape(1)
    amax = weight.unflatten(1, (-1, 16)).abs().amax(2)
    scale = (amax / 6 * global_scale).to(torch.float8_e4m3fn)
    spread = _spread(scale, 1, 16, weight.shape) / global_scale
    codes, values = _nearest_e2m1(weight / spread)
    parts = {"weight_packed": _pairs(codes), "weight_scale": scale, "weight_global_scale": global_scale}
    return parts | {"input_global_scale": torch.tensor([30.0])}, values * spread


def nvfp4_modelopt(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    parts, _ = nvfp4(weight)
    outer = 1 / parts["weight_global_scale"].reshape(())
    spread = _spread(parts["weight_scale"].float() * outer, 1, 16, weight.shape)
    low, high = parts["weight_packed"].long() & 15, parts["weight_packed"].long() >> 4
    codes = torch.stack([low, high], 2).flatten(1)
    values = torch.where(codes < 8, 1.0, -1.0) * _E2M1[codes % 8]
    stored = {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": outer,
    }
    return stored | {"input_scale": torch.tensor(0.01)}, values * spread


def mxfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    exponent = (weight.unflatten(1, (-1, 32)).abs().amax(2) / 6).log2().ceil()
    spread = _spread(torch.exp2(exponent), 1, 32, weight.shape)
    codes, values = _nearest_e2m1(weight / spread)
    return {"weight_packed": _pairs(codes), "weight_scale": (exponent + 127).to(torch.uint8)}, values * spread


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes packed into 32-bit words, the first in the lowest bits."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word)).unflatten(
        1, (-1, per_word)
    )
    words = (codes << torch.arange(per_word) * bits).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def w4a16(weight: torch.Tensor, group: int = 64, bits: int = 4) -> tuple[Parts, torch.Tensor]:
    half = 2 ** (bits - 1)
    scale = (weight.unflatten(1, (-1, group)).abs().amax(2) / (half - 0.5)).to(torch.bfloat16)
    spread = _spread(scale, 1, group, weight.shape)
    codes = (weight / spread).round().clamp(-half, half - 1)
    shape = torch.tensor(weight.shape)
    parts = {"weight_packed": _words(codes + half, bits), "weight_scale": scale, "weight_shape": shape}
    return parts, codes * spread


def w8a16(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """8 bits, and one scale per row."""
    return w4a16(weight, weight.shape[1], 8)


def w4a16_asymmetric(weight: torch.Tensor, group: int = 64) -> tuple[Parts, torch.Tensor]:
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    spread, zeros = (_spread(one, 1, group, weight.shape) for one in (scale, zero))
    codes = (weight / spread + zeros).round().clamp(-8, 7)
    parts = {
        "weight_packed": _words(codes + 8, 4), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": _words((zero + 8).T, 4).T.contiguous(),
    }  # fmt: skip
    return parts, (codes - zeros) * spread


def w4a16_reordered(weight: torch.Tensor, group: int = 64) -> tuple[Parts, torch.Tensor]:
    """Groups of columns that are no neighbours, as GPTQ with activation order makes them."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    of_column = torch.empty_like(order)
    of_column[order] = torch.arange(len(order)) // group
    scale = w4a16(weight[:, order], group)[0]["weight_scale"]
    spread = scale.float()[:, of_column]
    codes = (weight / spread).round().clamp(-8, 7)
    parts = {
        "weight_packed": _words(codes + 8, 4), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": of_column.to(torch.int32),
    }  # fmt: skip
    return parts, codes * spread


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "symmetric": True, **weights},
        "input_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "kv_cache_scheme": None,
    }  # fmt: skip


def _fp8(block: list[int] | None, scheme: str = "dynamic") -> dict[str, Any]:
    skipped = ["lm_head"]
    return {
        "quant_method": "fp8",
        "activation_scheme": scheme,
        "weight_block_size": block,
        "modules_to_not_convert": skipped,
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FLOAT8 = {"num_bits": 8, "type": "float"}
# name -> quantization_config and how a weight is encoded
FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]]] = {
    "fp8 blocks": (_fp8([BLOCK, BLOCK]), fp8_blocks),
    "fp8 tensor": (_fp8(None, "static"), fp8_tensor),
    "ct fp8 channel": (_compressed("float-quantized", strategy="channel", **_FLOAT8), fp8_channel),
    "ct fp8 tensor": (_compressed("float-quantized", strategy="tensor", **_FLOAT8), fp8_static),
    "ct fp8 blocks": (
        _compressed("float-quantized", strategy="block", block_structure=[BLOCK, BLOCK], **_FLOAT8),
        lambda weight: fp8_blocks(weight, "weight_scale"),
    ),
    "ct int8": (_compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8_channel),
    "nvfp4": (_compressed("nvfp4-pack-quantized", **_FP4), nvfp4),
    "nvfp4 modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, nvfp4_modelopt),
    "mxfp4": (_compressed("mxfp4-pack-quantized", **{**_FP4, "strategy": "group", "group_size": 32}), mxfp4),
    "w4a16": (_compressed("pack-quantized", **_INT4), w4a16),
    "w8a16": (_compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), w8a16),
    "w4a16 asymmetric": (_compressed("pack-quantized", **{**_INT4, "symmetric": False}), w4a16_asymmetric),
    "w4a16 reordered": (_compressed("pack-quantized", actorder="group", **_INT4), w4a16_reordered),
}  # fmt: skip


def quantised_checkpoint(
    folder: Path, name: str, model_type: str = "llama", **changes: Any
) -> dict[str, torch.Tensor]:
    """Writes a tiny checkpoint whose linear layers are in a format; returns the values of all its tensors, float32."""
    checkpoint(folder, model_type, **{**SIZES, **FAMILY_CHANGES[model_type], **changes})
    settings, encode = FORMATS[name]
    stored, values = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        values[key] = weight.float()
        if not key.endswith("_proj.weight"):
            stored[key] = weight
            continue
        parts, values[key] = encode(weight.float())
        stored |= {f"{key.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return values
