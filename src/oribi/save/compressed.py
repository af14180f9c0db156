"""A merge quantised for vLLM and SGLang, in compressed-tensors' form.

"fp8"    weights in e4m3 with a scale per row; the server rounds activations per token as it runs ("FP8_DYNAMIC")
"w4a16"  weights in 4-bit integers with a scale per group of 128 columns, rounded to the nearest ("W4A16")

The embeddings, the head, routers of experts, and what the checkpoint holds beside the text decoder stay in 16 bits.
"""

import shlex
from collections.abc import Mapping
from typing import Any

import torch

from oribi.errors import ConfigError
from oribi.formats.codecs import encode_fp8, encode_int4
from oribi.save.card import fenced
from oribi.save.merged import MergedExport
from oribi.save.nf4_checkpoint import packed_names
from oribi.save.shards import TensorPlan

_GROUPS = (128, 64, 32)  # columns that share a scale: sizes that vLLM's kernels take, the usual one first
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}


class CompressedExport(MergedExport):
    """A merged checkpoint whose linear layers and experts are in FP8 or in 4-bit integers."""

    group_size = 1  # columns that share a scale
    # the tensor that was encoded last, and its parts
    _encoded: tuple[str, dict[str, torch.Tensor]] = ("", {})

    @property
    def form(self) -> str:
        return self.report.kind

    def names_to_pack(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        # name in the files -> the tensor that it is a part of, and which part
        self.parts: dict[str, tuple[str, str]] = {}
        names = packed_names(self.model, 1)
        if names - shapes.keys():
            raise ConfigError(
                f"save_method = {self.form!r}: this model's checkpoints hold experts in stacks or under other names, which are not "
                "quantised for servers here; give 'merged_16bit'"
            )
        if self.form == "w4a16":
            widths = {shapes[name][1] for name in names}
            whole = [size for size in _GROUPS if all(width % size == 0 for width in widths)]
            self.group_size = whole[0] if whole else _GROUPS[-1]
            if self.group_size != _GROUPS[0]:
                odd = min(width for width in widths if width % _GROUPS[0])
                self.report.notes.append(
                    f"a scale per group of {self.group_size} columns: rows of {odd} values are no multiple of {_GROUPS[0]}"
                )
            left = sorted(name for name in names if shapes[name][1] % self.group_size)
            names -= set(left)
            if left:
                self.report.notes.append(
                    f"{len(left)} linear layers stay in 16 bits, {left[0]} the first: their rows are no whole groups"
                )
        if not names:
            raise ConfigError(
                f"save_method = {self.form!r}: no linear layer can be quantised; give 'merged_16bit'"
            )
        if self.form == "fp8":
            self.report.notes.append(
                "a server rounds activations to FP8, too, as it runs; the comparison here is of the weights alone"
            )
        return names

    def packed_plans(self, name: str, shape: tuple[int, ...]) -> list[TensorPlan]:
        rows, columns = shape
        prefix, scales = name.removesuffix("weight"), (rows, columns // self.group_size)
        if self.form == "fp8":
            parts = {"weight": (shape, torch.float8_e4m3fn), "weight_scale": ((rows, 1), self.dtype)}
        else:
            parts = {
                "weight_packed": ((rows, columns // 8), torch.int32),
                "weight_scale": (scales, self.dtype),
                "weight_shape": ((2,), torch.int64),
            }
        self.parts |= {f"{prefix}{part}": (name, part) for part in parts}
        return [TensorPlan(f"{prefix}{part}", *plan) for part, plan in parts.items()]

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the export; the parts of a quantised one follow one another, so that it is encoded once."""
        if name not in self.parts:
            return super().read(name)
        whole, part = self.parts[name]
        if self._encoded[0] != whole:
            weight = self.read_trained(whole, torch.float32)
            if self.form == "fp8":
                self._encoded = whole, encode_fp8(weight, self.dtype)
            else:
                self._encoded = whole, encode_int4(weight, self.group_size, self.dtype)
        return self._encoded[1][part]

    def quantization_settings(self, unpacked: list[str], beside: list[str]) -> dict[str, Any]:
        if self.form == "fp8":
            weights = {**_FLOAT8, "strategy": "channel", "dynamic": False}
            activations = {**_FLOAT8, "strategy": "token", "dynamic": True}
        else:
            weights = {**_INT4, "strategy": "group", "group_size": self.group_size, "dynamic": False}
            activations = None
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
        # programs name modules of a vision tower in their own ways: each is known by the last part of its name
        others = [f"re:.*{name.rpartition('.')[2]}.*" for name in beside]
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized" if self.form == "fp8" else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *unpacked, *others],
            "kv_cache_scheme": None,
        }

    def usage(self, folder: Any, file: str) -> str:
        name = shlex.quote(self.directory.name)
        return (
            f"With vLLM:\n\n{fenced(f'vllm serve ./{name} --served-model-name {name}', 'bash')}\n\nwith SGLang:\n\n"
            f"{fenced(f'python -m sglang.launch_server --model-path ./{name} --port 8000', 'bash')}\n\n"
            "or with transformers and `pip install compressed-tensors`:\n\n" + super().usage(folder, file)
        )
