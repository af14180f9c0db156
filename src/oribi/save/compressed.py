"""A merge quantised for vLLM and SGLang, in compressed-tensors' form.

"fp8"    weights in e4m3 with a scale per row; the server rounds activations per token as it runs ("FP8_DYNAMIC")
"w4a16"  weights in 4-bit integers with a scale per group of 128 columns, rounded to the nearest ("W4A16")

The embeddings, the head, routers of experts, and what the checkpoint holds beside the text decoder stay in 16 bits. Each matrix of
experts is written by itself (`mlp.experts.3.gate_proj.weight`) whatever the checkpoint has: so llm-compressor writes them, and so
vLLM's loaders look for their scales.

Source: vLLM's loaders of these families and llm-compressor's linearised experts (vllm-project/vllm#44953, #50037, #52706).
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from oribi.errors import ConfigError
from oribi.formats.codecs import encode_fp8, encode_int4
from oribi.models.checkpoint_tensors import DRAFTS
from oribi.models.expert_names import apart, expert_modules, in_model_names, matrix_names, stored_name
from oribi.save.card import fenced
from oribi.save.carried import Carried
from oribi.save.forms import GROUPS
from oribi.save.merged import MergedExport
from oribi.save.nf4_checkpoint import packed_names
from oribi.save.shards import TensorPlan
from oribi.save.trained import MergedModel
from oribi.tensors import TensorSource

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

    def in_files(self, source: TensorSource) -> TensorSource:
        return apart(source, self.inner)

    def in_model(self, source: TensorSource) -> TensorSource:
        return in_model_names(source, self.inner)

    def find_carried(self, merged: MergedModel, base: str) -> Carried | str | None:
        """As of `MergedExport`, with the matrices of each stack of experts in place of the stack."""
        found, stacks = super().find_carried(merged, base), matrix_names(self.inner)
        if isinstance(found, Carried):
            text, found.text = found.text, {}
            for stored, own in text.items():
                place, module = stored.rpartition(".")[0], own.rpartition(".")[0]
                parts = stacks.get(own, [])
                found.text |= {place + part.removeprefix(module): part for part in parts} or {stored: own}
        return found

    def names_to_pack(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        # name in the files -> the tensor that it is a part of, and which part
        self.parts: dict[str, tuple[str, str]] = {}
        names = packed_names(self.model, 1)
        stacks = [name for name, shape in shapes.items() if ".experts." in name and len(shape) > 2]
        if stacks:
            raise ConfigError(
                f"save_method = {self.form!r}: {stacks[0]} and {len(stacks) - 1} more stacks of experts are trained in transformers' own class, "
                "and not quantised for servers here; give 'merged_16bit'"
            )
        if self.form == "w4a16":
            widths = {shapes[name][1] for name in names}
            whole = [size for size in GROUPS if all(width % size == 0 for width in widths)]
            self.group_size = whole[0] if whole else GROUPS[-1]
            if self.group_size != GROUPS[0]:
                odd = min(width for width in widths if width % GROUPS[0])
                self.report.notes.append(
                    f"a scale per group of {self.group_size} columns: rows of {odd} values are no multiple of {GROUPS[0]}"
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
        others = [f"re:.*{name.rpartition('.')[2]}.*" for name in beside] + self._drafts()
        unpacked = [self._in_files(name) for name in unpacked]
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized" if self.form == "fp8" else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *unpacked, *others],
            "kv_cache_scheme": None,
        }

    def _in_files(self, module: str) -> str:
        """A module's name in the files, where those of experts' routers have others."""
        return stored_name(f"{module}.weight", self.inner).removesuffix(".weight")

    def _drafts(self) -> list[str]:
        """Patterns for the layers that predict further tokens, which are carried as they are."""
        found = set()
        for name in () if self.carried is None else self.carried.others:
            layer = re.search(r"\blayers\.(\d+)\.", name)
            if name.startswith(DRAFTS):
                found.add("re:.*mtp.*")
            elif layer and int(layer[1]) >= self.inner.config.get_text_config().num_hidden_layers:
                found.add(rf"re:.*layers\.{layer[1]}\..*")
        return sorted(found)

    def usage(self, folder: Any, file: str) -> str:
        name = shlex.quote(self.directory.name)
        vllm = f"With vLLM:\n\n{fenced(f'vllm serve ./{name} --served-model-name {name}', 'bash')}"
        if any(one.rules.stored == "stacked" for one in expert_modules(self.inner).values()):
            self.report.notes.append(
                "vLLM reads the experts of this family so from August 2026 on (its pull request 52706); transformers' class and SGLang read "
                "them in stacks alone, which 'merged_16bit' writes"
            )
            return vllm
        return (
            f"{vllm}\n\nwith SGLang:\n\n"
            f"{fenced(f'python -m sglang.launch_server --model-path ./{name} --port 8000', 'bash')}\n\n"
            "or with transformers and `pip install compressed-tensors`:\n\n" + super().usage(folder, file)
        )
