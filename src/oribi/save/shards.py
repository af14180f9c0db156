"""Writing a safetensors checkpoint tensor by tensor, in shards that the hub's own function names and divides.

Source: the safetensors format, https://github.com/huggingface/safetensors (8 bytes of header length, JSON, raw data).
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from oribi.errors import ConfigError

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and dtype of a tensor that will be written; `packed_bytes` where it is packed first, its size then."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.packed_bytes or math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    plans: list[TensorPlan],
    read: Callable[[str], torch.Tensor],
    pack: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    max_shard_bytes: int,
) -> None:
    """Write tensors as model.safetensors, or as numbered shards with their index.

    The host holds one tensor at a time; where a shard has packed ones, whose state has no size before, one shard.

    Args:
        folder: existing folder.
        plans: what will be written, in order.
        read: a tensor by its name.
        pack: the tensors that a packed one becomes.
        max_shard_bytes: a shard ends before it would pass this size; a larger tensor has a shard of its own.
    """
    by_name = {plan.name: plan for plan in plans}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda plan: plan.nbytes,
        get_storage_id=lambda plan: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    total, shard_of = 0, {}
    for file, names in split.filename_to_tensors.items():
        shard = [by_name[name] for name in names]
        tensors: Iterable[torch.Tensor] = map(read, names)
        if any(plan.packed_bytes for plan in shard):
            parts: dict[str, torch.Tensor] = {}
            for plan, tensor in zip(shard, tensors):
                parts |= pack(plan.name, tensor) if plan.packed_bytes else {plan.name: tensor}
            shard = [TensorPlan(name, tuple(part.shape), part.dtype) for name, part in parts.items()]
            tensors = parts.values()
        _write_shard(folder / file, shard, tensors)
        total += sum(plan.nbytes for plan in shard)
        shard_of |= {plan.name: file for plan in shard}
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, plans: list[TensorPlan], tensors: Iterable[torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as readers that map the file expect
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan, tensor in zip(plans, tensors):
            if tuple(tensor.shape) != plan.shape or tensor.dtype != plan.dtype:
                raise ValueError(f"{plan}: got {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")


def shard_bytes(size: str | int) -> int:
    """Bytes of a size such as "5GB", "500MB" or a number.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B\s*", size, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"max_shard_size = {size!r}; expected a number of bytes or a size such as '5GB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
