"""The container of a GGUF file: its metadata and its tensors, read some rows at a time, written one after the other.

The gguf package's own reader keeps an array object for every string of the vocabulary, which costs seconds and hundreds
of megabytes; this one keeps plain lists and maps nothing. The arithmetic of the quantised types is the package's.
Source: GGUF, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from oribi.errors import ModelError
from oribi.tensors import open_bytes

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AT_ONCE = 1 << 22  # values dequantised together: 16 MiB of float32
_SMALL = 1 << 16  # bytes that are read without comparing them with the rest of the file
_MOST_DIMENSIONS = 4
_TYPES = frozenset(Type)
_DEEPEST = 8  # arrays within arrays
_DAMAGED = (struct.error, UnicodeDecodeError, KeyError, MemoryError, ValueError, TypeError, OverflowError)


def stored_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Size of a tensor of `shape` in a type."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def write_header(writer: GGUFWriter, tensors: Iterable[tuple[str, tuple[int, ...], Type]]) -> None:
    """Write a file's metadata and the list of its tensors, whose data must follow in the same order.

    Args:
        writer: with all metadata.
        tensors: name, shape with rows first, and type of each.
    """
    for name, shape, kind in tensors:
        # the writer wants the shape in values, not in bytes, and takes it so where the dtype is a float
        writer.add_tensor_info(name, shape, np.dtype(np.float32), stored_bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: shape with rows first, ggml type, position and size in bytes."""

    shape: tuple[int, ...]
    kind: Type
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file's metadata and tensors.

    Args:
        path: the file, version 2 or 3, little-endian.

    Raises:
        ModelError: it is not a GGUF file, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        size = path.stat().st_size
        with open_bytes(path) as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} ({size} bytes) is not a GGUF file; download it again")
            try:
                end = self._read_header(file)
            except ModelError:
                raise
            except _DAMAGED as error:
                raise ModelError(f"{path} has a damaged GGUF header: {error}") from error
        if end > size:
            raise ModelError(f"{path} is cut short: {size} of {end} bytes. Download it again")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the network."""
        return str(self.metadata.get("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key stands for the file's architecture."""
        return self.metadata.get(key.replace("{arch}", self.architecture), default)

    def number(self, key: str) -> Any:
        """A number that every file of the architecture has, and that is the same for all layers.

        Raises:
            ModelError: it is missing, or differs by layer.
        """
        value = self.value(f"{{arch}}.{key}")
        if value is None:
            raise ModelError(f"{self.path} lacks the metadata key {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ModelError(
                    f"{self.path}: {self.architecture}.{key} differs by layer, which oribi does not read"
                )
            return value[0]
        return value

    def read(
        self, name: str, dtype: torch.dtype, offset: float = 0.0, index: int | None = None
    ) -> torch.Tensor:
        """A tensor's values minus `offset` in dtype, on the host.

        Args:
            name: as stored. dtype: of the result. offset: subtracted in float32.
            index: in the first dimension, whose entry alone is read; None reads all.
        """
        stored = self.tensors[name]
        shape = stored.shape if index is None else stored.shape[1:]
        out = torch.empty(shape, dtype=dtype)
        rows = out.view(-1, shape[-1])
        row_bytes = stored.nbytes // (math.prod(stored.shape) // shape[-1])
        step = max(1, _AT_ONCE // stored.shape[-1])
        with open_bytes(self.path) as file:
            file.seek(stored.offset + (index or 0) * len(rows) * row_bytes)
            for part in rows.split(step):
                packed = np.fromfile(file, dtype=np.uint8, count=len(part) * row_bytes).reshape(
                    len(part), row_bytes
                )
                part.copy_(torch.from_numpy(self._values(packed, name)) - offset)
        return out

    def _values(self, packed: np.ndarray, name: str) -> np.ndarray:
        kind = self.tensors[name].kind
        try:
            return dequantize(packed, kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {name!r} is stored as {kind.name}, which holds no weights that can be read; take the model in "
                "another quantisation, e.g. Q4_K_M"
            ) from error

    def read_codes(self, name: str) -> torch.Tensor:
        """The bytes of a matrix's rows as they are stored, [N, bytes of a row] uint8 on the host."""
        stored = self.tensors[name]
        with open_bytes(self.path) as file:
            file.seek(stored.offset)
            return torch.from_numpy(np.fromfile(file, dtype=np.uint8, count=stored.nbytes)).view(
                stored.shape[0], -1
            )

    def _read_header(self, file: BinaryIO) -> int:
        """Fills metadata and tensors; returns the byte where the last tensor ends."""
        version = _scalar(file, "I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version} (or big-endian); oribi reads 2 and 3")
        tensor_count, key_count = _scalar(file, "Q"), _scalar(file, "Q")
        for _ in range(key_count):
            key = _string(file)
            self.metadata[key] = _value(file, _scalar(file, "I"))
        placed = []
        for _ in range(tensor_count):
            name, count = _string(file), _scalar(file, "I")
            if count > _MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {count} dimensions")
            shape = struct.unpack(f"<{count}Q", file.read(8 * count))
            kind, offset = _scalar(file, "I"), _scalar(file, "Q")
            if kind not in _TYPES:
                raise ModelError(
                    f"{self.path}: tensor {name!r} has ggml type {kind}, which the gguf package does not know: update it "
                    "(pip install -U gguf), take the model in another quantisation, e.g. Q4_K_M, or download a damaged file again"
                )
            placed.append((name, shape[::-1], Type(kind), offset))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-file.tell() // alignment) * alignment
        for name, shape, kind, offset in placed:
            if not shape or 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
                raise ValueError(f"tensor {name!r} has shape {list(shape)}, which {kind.name} cannot hold")
            self.tensors[name] = StoredTensor(shape, kind, start + offset, stored_bytes(shape, kind))
        return max((t.offset + t.nbytes for t in self.tensors.values()), default=start)


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _take(file: BinaryIO, count: int, what: str) -> bytes:
    """Exactly `count` bytes. Large counts are compared with the file first, so that a damaged length allocates nothing."""
    if count > _SMALL and count > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError(f"{what} of {count} bytes goes beyond the end")
    raw = file.read(count)
    if len(raw) != count:
        raise ValueError(f"{what} of {count} bytes goes beyond the end")
    return raw


def _string(file: BinaryIO) -> str:
    return _take(file, _scalar(file, "Q"), "a string").decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    if depth == _DEEPEST:
        raise ValueError(f"arrays lie more than {_DEEPEST} deep in each other")
    kind, count = _scalar(file, "I"), _scalar(file, "Q")
    if kind in (_STRING, _ARRAY):
        return [_value(file, kind, depth + 1) for _ in range(count)]
    raw = _take(file, count * struct.calcsize(f"<{_SCALARS[kind]}"), "an array")
    return np.frombuffer(raw, dtype=f"<{_SCALARS[kind]}").tolist()
