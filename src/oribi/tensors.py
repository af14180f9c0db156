"""Named tensors that are read one at a time: what checkpoints, GGUF files and trained models have in common.

The readers of safetensors shards and of PyTorch's .bin files stand here, that of GGUF files in `gguf.source`.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open

from oribi.errors import ModelError

_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_DTYPES = ("F16", "BF16", "F32", "F64", "U8")


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by the model's parameter names, from headers alone."""

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """One tensor in memory of its own, cast to `dtype`; None keeps the stored dtype."""

    def close(self) -> None:
        """Closes open files."""


class SafetensorsSource:
    """Tensors of safetensors shards, memory-mapped one shard at a time.

    Args:
        files: the shards.
        rename: the model's name for a stored name; None leaves the tensor out.
        shard_of: the shard of each stored name, as an index says; None where there is none.
        any_dtype: whether tensors of every dtype are read, for a caller that only copies them or knows how to decode them.

    Attributes:
        dtypes: of each tensor as the format names it, such as "BF16".

    Raises:
        ModelError: a file is damaged, holds tensors of a dtype that is no 16- or 32-bit float, or lacks a tensor that the
            index looks for in it; or the same tensor lies in several files and no index says which counts.
    """

    def __init__(
        self,
        files: Sequence[Path],
        rename: Callable[[str], str | None] = lambda name: name,
        shard_of: Mapping[str, Path] | None = None,
        any_dtype: bool = False,
    ) -> None:
        self._home: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._mapped: tuple[Path, Any] | None = None
        shard_of = shard_of or {}
        for path in files:
            header = read_header(path)
            absent = [stored for stored, home in shard_of.items() if home == path and stored not in header]
            if absent:
                raise ModelError(
                    f"{path}: {len(absent)} tensors are missing that the index looks for in it, {absent[0]} the first. "
                    "Download it again"
                )
            for stored, entry in header.items():
                name = rename(stored)
                if name is None or shard_of.get(stored, path) != path:
                    continue
                if not any_dtype and entry["dtype"] not in _DTYPES:
                    raise ModelError(
                        f"{path}: tensor {stored} has dtype {entry['dtype']}; oribi loads {', '.join(_DTYPES)}. "
                        "Take the 16-bit release of this model"
                    )
                if name in self._home:
                    other, twin = self._home[name]
                    raise ModelError(
                        f"{path}: {stored} lies in {other.name} too, as {twin}, and no index says which counts; leave the "
                        "files of one model in the folder"
                    )
                self._home[name] = (path, stored)
                self._shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = entry["dtype"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        path, stored = self._home[name]
        if self._mapped is None or self._mapped[0] != path:
            try:
                self._mapped = (path, safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}. Download it again") from error
        # without a copy the tensor would change with the file and keep the shard mapped
        return self._mapped[1].get_tensor(stored).to(device=device, dtype=dtype, copy=True)

    def close(self) -> None:
        self._mapped = None


class PickleSource:
    """Tensors of PyTorch's .bin shards, memory-mapped; only tensors are unpickled, never code.

    Args:
        files, rename: as for `SafetensorsSource`.

    Raises:
        ModelError: a file holds anything but named tensors.
    """

    def __init__(
        self, files: Sequence[Path], rename: Callable[[str], str | None] = lambda name: name
    ) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            try:
                shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, UnpicklingError, EOFError, ValueError, OSError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"{path} is no file of tensors alone, so it is not read: {reason}"
                ) from error
            if not isinstance(shard, dict) or not all(torch.is_tensor(value) for value in shard.values()):
                raise ModelError(f"{path} does not hold named tensors and nothing else")
            for stored, tensor in shard.items():
                if (name := rename(stored)) is not None:
                    self._tensors[name] = tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        return self._tensors[name].to(device=device, dtype=dtype, copy=True)

    def close(self) -> None:
        self._tensors = {}


def read_header(path: Path) -> dict[str, dict]:
    """The header of a safetensors file: {name: {dtype, shape, data_offsets}}.

    Raises:
        ModelError: the file is no safetensors file, is damaged, or is cut short.
    """
    size = path.stat().st_size
    with open_bytes(path) as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            pointer = " It is a Git LFS pointer: run `git lfs pull`." if start == b"version " else ""
            raise ModelError(f"{path} ({size} bytes) is not a safetensors file.{pointer} Download it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((_entry_end(name, entry) for name, entry in header.items()), default=0)
        except (AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} has a damaged header: {error}. Download it again") from error
    if end > size:
        raise ModelError(f"{path} is cut short: {size} of {end} bytes. Download it again")
    return header


def _entry_end(name: str, entry: dict[str, Any]) -> int:
    """Where a tensor's bytes end, from the first byte of data; checks the entry."""
    (start, end), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(entry["dtype"], str) or not all(
        type(n) is int and n >= 0 for n in (start, end, *shape)
    ):
        raise ValueError(f"tensor {name!r} is described by {entry}")
    if end < start or (end == start) != (math.prod(shape) == 0):
        raise ValueError(f"tensor {name!r} of shape {shape} lies from byte {start} to {end}")
    return end


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, some rows at a time: the masks of a whole embedding are large."""
    if tensor.dim() < 2:
        return bool(torch.isfinite(tensor).all())
    rows = max(1, (1 << 22) // max(tensor[0].numel(), 1))
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows))


def problems_in_words(problems: Mapping[str, Sequence[str]], most: int = 6) -> str:
    """How many tensors have each kind of problem, and the first of their names; "" where none has one."""
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:most])}{', ...' if len(names) > most else ''}"
        for what, names in problems.items()
        if names
    )


def open_bytes(path: Path) -> BinaryIO:
    """Open a model's file for reading.

    Raises:
        ModelError: this user may not read it, or it is gone.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
