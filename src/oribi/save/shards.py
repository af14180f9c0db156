"""Writing a safetensors checkpoint tensor by tensor: the host holds one tensor at a time, never a shard.

Source: the safetensors format, https://github.com/huggingface/safetensors (8 bytes of header length, JSON, raw data).
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from oribi.errors import ConfigError
from oribi.text import write_whole

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_shards(
    folder: Path,
    plans: list[TensorPlan],
    tensors: Iterable[torch.Tensor],
    max_shard_bytes: int,
) -> list[Path]:
    """Write tensors as model.safetensors, or as numbered shards with their index.

    Args:
        folder: existing folder.
        plans: what will be written, in order.
        tensors: the tensors in the order of `plans`; each is consumed before the next is asked for.
        max_shard_bytes: a shard ends before it would pass this size; a larger tensor has a shard of its own.

    Returns:
        The shard files.
    """
    shards: list[list[TensorPlan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + plan.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    paths = [folder / name for name in _shard_names(len(shards))]
    remaining = iter(tensors)
    for path, shard in zip(paths, shards):
        _write_shard(path, shard, remaining)
    _write_index(
        folder, {plan.name: path.name for path, shard in zip(paths, shards) for plan in shard}, plans
    )
    return paths


def write_unplanned(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> list[Path]:
    """The same for tensors whose sizes are known only when they come (packed weights); the host holds one shard."""
    shards: list[list[TensorPlan]] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        shards.append([TensorPlan(name, tuple(t.shape), t.dtype) for name, t in held.items()])
        _write_shard(folder / f"part-{len(shards)}", shards[-1], iter(held.values()))
        held.clear()

    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
    flush()
    paths = [folder / name for name in _shard_names(len(shards))]
    for i, path in enumerate(paths):
        (folder / f"part-{i + 1}").rename(path)
    plans = [plan for shard in shards for plan in shard]
    _write_index(
        folder, {plan.name: path.name for path, shard in zip(paths, shards) for plan in shard}, plans
    )
    return paths


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(folder: Path, weight_map: dict[str, str], plans: list[TensorPlan]) -> None:
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": sum(plan.nbytes for plan in plans)}, "weight_map": weight_map}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, plans: list[TensorPlan], tensors: Iterator[torch.Tensor]) -> None:
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
        for plan in plans:
            tensor = next(tensors)
            if tuple(tensor.shape) != plan.shape or tensor.dtype != plan.dtype:
                raise ValueError(f"{plan}: got {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else b"")


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
