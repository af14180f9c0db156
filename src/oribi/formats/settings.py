"""What a config.json's quantization_config says of how weights are stored, as far as oribi reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oribi.errors import ModelError

NF4_METHODS = ("bitsandbytes", "bits_and_bytes")
MXFP4_METHOD = "mxfp4"  # of stacks of experts, whose codes oribi keeps
# quant_method -> how messages call its checkpoints
_METHODS = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
}
_DEFAULT_BLOCK = (128, 128)  # of quant_method "fp8" where config.json names none
# formats of compressed-tensors that `codecs` does not decode; those that it does are told apart by their tensors
_UNREAD_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24", "mxfp6-pack-quantized")


@dataclass(frozen=True)
class PackedFormat:
    """A way in which a checkpoint's weights are quantised that oribi dequantises while it loads.

    Args:
        name: of the method, as messages call it.
        block: rows and columns of the blocks that share a scale; None where no layer has blocks.
        bits: of a weight, without its share of scales.
    """

    name: str
    block: tuple[int, int] | None = None
    bits: int = 8

    def __str__(self) -> str:
        blocks = "" if self.block is None else f" in blocks of {self.block[0]} x {self.block[1]}"
        return f"{self.name}, {self.bits} bits per weight{blocks}"


def method_of(settings: Mapping[str, Any]) -> str:
    """The method of a quantization_config, in its own word; bitsandbytes' older ones name none."""
    return str(settings.get("quant_method") or "bitsandbytes").lower()


def packed_format(settings: Mapping[str, Any] | None) -> PackedFormat | None:
    """The format of a checkpoint; None where config.json names none that `packed.PackedSource` reads.

    Args:
        settings: quantization_config of config.json.

    Raises:
        ModelError: its weights are transformed in a way that the tensors do not tell, or blocks are no two numbers.
    """
    if settings is None or (method := method_of(settings)) not in _METHODS:
        return None
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    formats = {settings.get("format"), *(group.get("format") for group in groups)}
    sparsity = settings.get("sparsity_config") or {}
    unread = [
        *sorted(f"format {name}" for name in formats & {*_UNREAD_FORMATS}),
        *(["transform_config"] if settings.get("transform_config") else []),
        *([f"sparsity_config {sparsity['format']}"] if sparsity.get("format", "dense") != "dense" else []),
    ]
    if unread:
        raise ModelError(f"quantization_config has {' and '.join(unread)}, which oribi does not read")
    if method == "fp8":
        named = [settings.get("weight_block_size", _DEFAULT_BLOCK)]
    else:
        named = [(group.get("weights") or {}).get("block_structure") for group in groups]
    blocks = list(dict.fromkeys(_block(one) for one in named if one is not None))
    if len(blocks) > 1:
        raise ModelError(f"quantization_config names blocks of several sizes ({blocks}); oribi reads one")
    bits = [(group.get("weights") or {}).get("num_bits") for group in groups]
    bits = [one for one in bits if isinstance(one, int)] or [4 if "FP4" in str(settings).upper() else 8]
    return PackedFormat(_METHODS[method], blocks[0] if blocks else None, max(bits))


def _block(value: Any) -> tuple[int, int]:
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = map(int, sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ModelError(f"quantization_config: blocks of {value!r}; expected two whole numbers above 0")
    return rows, columns
