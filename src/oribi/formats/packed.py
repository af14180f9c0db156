"""A checkpoint of quantised weights as a `TensorSource`: each weight is dequantised as it is read, with every scale that it has.

Which weights are quantised is told by their tensors: a scale without the weight that it belongs to, or a weight of codes without
its scale, is refused by name, since what it means would be off by orders of magnitude.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from oribi.errors import ModelError
from oribi.formats.codecs import decode_fp4, decode_ints, decode_scaled
from oribi.formats.settings import PackedFormat
from oribi.tensors import SafetensorsSource, TensorSource, problems_in_words

_NUMBERS = ("F8_E4M3", "F8_E5M2", "I8")  # codes that are numbers themselves
_FLOATS = ("F16", "BF16", "F32", "F64")
# a scale beside the weight X.weight: by ending of the weight's own name, and in its place
_SCALES = ("_scale", "_scale_inv")
_SCALES_OF_MODULE = ("scale", "qscale_weight")
# what rounds activations and the cache of keys and values, which training in 16 bits does not round
_OF_ACTIVATIONS = {
    "activation_scale", "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale", "output_zero_point",
    "qscale_act", "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point",
}  # fmt: skip
# parts of a quantised weight, of the formats that are read and of others
_PARTS = {
    "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
    "weight_g_idx", "qscale_weight", "qweight", "qzeros", "g_idx", "scales", "pre_quant_scale",
}  # fmt: skip


@dataclass(frozen=True)
class _Weight:
    """A quantised weight: the kind of its codes, the shape of its values, and its tensors by their part."""

    kind: str
    shape: tuple[int, ...]
    parts: dict[str, str]


class PackedSource:
    """Quantised weights of a checkpoint's files, read dequantised; dense tensors are read as they are.

    Args:
        source: all tensors by the names in the files, of every dtype.
        stored: how config.json says that they are quantised.
        rename: as of `SafetensorsSource`.
        any_dtype: whether tensors that are no weights may have other dtypes than 16- and 32-bit floats.

    Attributes:
        packed: names of the quantised weights.

    Raises:
        ModelError: a part of a quantised weight is missing, unknown, or left over.
    """

    def __init__(
        self,
        source: SafetensorsSource,
        stored: PackedFormat,
        rename: Callable[[str], str | None] = lambda name: name,
        any_dtype: bool = False,
    ) -> None:
        self._source, self.stored = source, stored
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._weights: dict[str, _Weight] = {}
        self._dense: dict[str, str] = {}
        self._of_activations = 0
        in_files = source.shapes()
        found = _weights_among(source, in_files)
        used = {part for weight in found.values() for part in weight.parts.values()}
        problems: dict[str, list[str]] = {}
        for name in [*found, *(name for name in in_files if name not in used)]:
            leaf, inside = name.rpartition(".")[2], rename(name)
            if inside is None:
                continue
            if inside in self._shapes:
                problems.setdefault("tensors that lie in the files under two names", []).append(name)
            elif name in found:
                self._weights[inside], self._shapes[inside] = found[name], found[name].shape
            elif leaf in _OF_ACTIVATIONS:
                self._of_activations += 1
            elif leaf in _PARTS:
                problems.setdefault("parts of quantised weights that lack other parts", []).append(name)
            elif (dtype := source.dtypes[name]) not in _FLOATS and (dtype in _NUMBERS or not any_dtype):
                problems.setdefault("tensors of codes without a scale", []).append(f"{name} ({dtype})")
            else:
                self._dense[inside], self._shapes[inside] = name, in_files[name]
        if problems:
            raise ModelError(
                f"the checkpoint is quantised ({stored.name}), and not every weight can be read from it; {problems_in_words(problems)}"
            )
        self.packed = self._weights.keys()

    @property
    def stored_as(self) -> str:
        """How most weights are stored: "fp8", "int8", "nvfp4", "mxfp4", "packed integers", or "floats"."""
        kinds = [weight.kind for weight in self._weights.values()]
        return max(sorted(set(kinds)), key=kinds.count) if kinds else "floats"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """As `TensorSource.read`; a quantised weight is float32 where no dtype is asked for."""
        if name in self._dense:
            return self._source.read(self._dense[name], device, dtype)
        weight = self._weights[name]
        parts = {part: self._source.read(stored, device, None) for part, stored in weight.parts.items()}
        try:
            return _DECODERS[weight.kind](parts, weight.shape, self.stored.block).to(dtype or torch.float32)
        except ModelError as error:
            raise ModelError(f"{weight.parts['codes']}: {error}") from error

    def close(self) -> None:
        self._source.close()


def note_on_packed(source: TensorSource | None, in_nf4: bool) -> list[str]:
    """What a source dequantises, and into what, in one line; none where it dequantises nothing."""
    if not isinstance(source, PackedSource):
        return []
    kinds = ", ".join(
        sorted({weight.kind for weight in source._weights.values()} - {source.stored.name.lower()})
    )
    form = f"{source.stored.name}: {kinds}" if kinds else source.stored.name
    text = f"{len(source._weights)} weights of the checkpoint are quantised ({form}); they are dequantised exactly"
    text += (
        " and quantised again to NF4, which rounds them once more; load_in_4bit=False keeps their values"
        if in_nf4
        else ""
    )
    if source._of_activations:
        text += (
            f". {source._of_activations} scales of activations are not used: activations are not rounded here"
        )
    return [text]


def _weights_among(source: SafetensorsSource, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Weight]:
    """The quantised weights of a checkpoint by the names that they would have if they were dense."""
    found = {}
    for name, dtype in source.dtypes.items():
        prefix, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        parts = {"codes": name}
        if leaf == "weight_packed":
            kind, shape = _packed_kind(source, prefix, parts)
            if kind:
                found[f"{prefix}.weight"] = _Weight(kind, shape, parts)
        elif dtype in _NUMBERS and not leaf.endswith((*_SCALES, *_SCALES_OF_MODULE)):
            beside = [f"{name}{end}" for end in _SCALES] + [f"{prefix}.{end}" for end in _SCALES_OF_MODULE]
            scales = [scale for scale in beside if scale in shapes]
            if len(scales) == 1:
                found[name] = _Weight(
                    "int8" if dtype == "I8" else "fp8", shapes[name], parts | {"scale": scales[0]}
                )
        elif leaf == "weight" and dtype == "U8" and {f"{name}_scale", f"{name}_scale_2"} <= shapes.keys():
            parts |= {"scale": f"{name}_scale", "outer_scale": f"{name}_scale_2"}
            rows, half = shapes[name]
            found[name] = _Weight("nvfp4", (rows, 2 * half), parts)
    return found


def _packed_kind(
    source: SafetensorsSource, prefix: str, parts: dict[str, str]
) -> tuple[str, tuple[int, ...]]:
    """The kind of a weight_packed and the shape of its values; "" where a part is missing. Adds its parts."""
    names = {
        part: f"{prefix}.weight_{part}"
        for part in ("scale", "global_scale", "shape", "zero_point", "g_idx")
        if f"{prefix}.weight_{part}" in source.dtypes
    }
    parts |= names
    dtype, shape = source.dtypes[parts["codes"]], source.shapes()[parts["codes"]]
    if dtype == "U8" and len(shape) == 2 and "scale" in names:
        nvfp4 = source.dtypes[names["scale"]].startswith("F8") and names.keys() == {"scale", "global_scale"}
        mxfp4 = source.dtypes[names["scale"]] in ("U8", "F8_E8M0") and names.keys() == {"scale"}
        return ("nvfp4" if nvfp4 else "mxfp4" if mxfp4 else ""), (shape[0], 2 * shape[1])
    if (
        dtype == "I32"
        and len(shape) == 2
        and {"scale", "shape"} <= names.keys()
        and "global_scale" not in names
    ):
        stored = tuple(source.read(names["shape"], torch.device("cpu"), None).flatten().tolist())
        return ("packed integers" if len(stored) == 2 and min(stored) > 0 else ""), stored
    return "", ()


def _numbers(parts: dict[str, torch.Tensor], shape: Any, block: tuple[int, int] | None) -> torch.Tensor:
    return decode_scaled(parts["codes"], parts["scale"], block)


def _fp4(parts: dict[str, torch.Tensor], shape: Any, block: Any) -> torch.Tensor:
    scale = parts["scale"]
    if "outer_scale" in parts:
        scale = scale.float() * parts["outer_scale"].float().reshape(())
    return decode_fp4(parts["codes"], scale, parts.get("global_scale"))


def _integers(parts: dict[str, torch.Tensor], shape: tuple[int, int], block: Any) -> torch.Tensor:
    return decode_ints(parts["codes"], parts["scale"], shape, parts.get("zero_point"), parts.get("g_idx"))


_DECODERS: dict[str, Callable[..., torch.Tensor]] = {
    "fp8": _numbers, "int8": _numbers, "nvfp4": _fp4, "mxfp4": _fp4, "packed integers": _integers,
}  # fmt: skip
