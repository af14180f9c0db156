"""A GGUF file with the first layers of another: real tokenizer, widths and types, at a fraction of the arithmetic."""

import struct
from pathlib import Path

from oribi.gguf.file import GGUFFile


def write_shortened(source: Path, target: Path, layers: int) -> Path:
    """Writes a file's metadata as it is but for the number of layers, and the tensors of so many; returns `target`."""
    file, whole = GGUFFile(source), source.read_bytes()
    kept = {
        name: stored
        for name, stored in file.tensors.items()
        if not name.startswith("blk.") or int(name.split(".")[1]) < layers
    }
    first = next(iter(file.tensors)).encode()
    metadata = bytearray(whole[24 : whole.index(struct.pack("<Q", len(first)) + first)])
    key = f"{file.architecture}.block_count".encode()
    struct.pack_into("<I", metadata, metadata.index(key) + len(key) + 4, layers)  # behind the value's type
    listed, data = bytearray(), bytearray()
    for name, stored in kept.items():
        shape = stored.shape[::-1]
        listed += struct.pack("<Q", len(name)) + name.encode()
        listed += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, stored.kind, len(data))
        data += whole[stored.offset : stored.offset + stored.nbytes]
        data += bytes(-len(data) % 32)
    head = whole[:8] + struct.pack("<QQ", len(kept), len(file.metadata)) + metadata + listed
    target.write_bytes(head + bytes(-len(head) % 32) + data)
    return target
