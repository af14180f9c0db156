"""Damaged and hostile files end in an OribiError, soon, and without memory for what they claim to hold."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from oribi.errors import ModelError, OribiError
from oribi.gguf.file import GGUFFile
from oribi.gguf.source import GGUFSource
from oribi.tensors import SafetensorsSource, read_header

# ORIBI_FUZZ=20000 for a long run
EXAMPLES = int(os.environ.get("ORIBI_FUZZ", 300))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=20_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MOST_BYTES = 64 << 20  # the files have a few KiB


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory) -> Path:
    """A whole llama of one layer."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_token_types([1, 1, 1, 3])
    shapes = {
        "token_embd": (4, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def damaged(draw, whole: bytes) -> bytes:
    """Some bytes or 8-byte numbers of the first 2 KiB replaced, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(4, min(len(data), 2048) - 9))
        if draw(st.booleans()):
            data[place] = draw(st.integers(0, 255))
        else:
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            size = draw(st.sampled_from([4, 8]))
            data[place : place + size] = number.to_bytes(8, "little")[:size]
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return bytes(data)


def read_everything(path: Path) -> None:
    source = GGUFSource(path)
    for name in source.shapes():
        source.read(name, torch.device("cpu"), torch.float32)


def within_memory(action, *arguments) -> None:
    """Runs an action that may only end well or in an OribiError, and must not allocate what a header claims."""
    tracemalloc.start()
    try:
        action(*arguments)
    except OribiError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES


@FUZZ
@given(st.data())
def test_a_damaged_gguf_file_is_an_error_or_reads(whole_gguf, tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged(data.draw, whole_gguf.read_bytes()))
    within_memory(read_everything, path)


@pytest.mark.parametrize("heads", [3, 257])
def test_heads_that_do_not_divide_the_rows_are_named(whole_gguf, tmp_path, heads):
    key = b"llama.attention.head_count_kv" + struct.pack("<I", 4)
    whole = whole_gguf.read_bytes()
    assert whole.count(key + struct.pack("<I", 1)) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.replace(key + struct.pack("<I", 1), key + struct.pack("<I", heads)))
    with pytest.raises(ModelError, match=f"{heads} heads cannot share 16 rows"):
        read_everything(path)


@FUZZ
@given(st.binary(max_size=400))
def test_random_bytes_behind_the_magic_are_an_error(tmp_path, tail):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    within_memory(read_everything, path)


def kv(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**40), "a string of 1099511627776 bytes"),
        (
            struct.pack("<QQ", 0, 1) + kv("k", 9, struct.pack("<IQ", 4, 2**40)),
            "an array of 4398046511104 bytes",
        ),
        (struct.pack("<QQ", 0, 1) + kv("k", 9, struct.pack("<IQ", 9, 1) * 5000), "deep in each other"),
        (struct.pack("<QQ", 1, 0) + kv("t", 2**31, b""), "2147483648 dimensions"),
        (struct.pack("<QQ", 2**60, 2**60), "damaged GGUF header"),
        (struct.pack("<QQ", 1, 0) + kv("t", 2, struct.pack("<QQIQ", 2**33, 2**33, 0, 0)), "cut short"),
        (struct.pack("<QQ", 1, 0) + kv("t", 1, struct.pack("<QIQ", 33, 2, 0)), "which Q4_0 cannot hold"),
        (
            struct.pack("<QQ", 0, 1) + kv("general.alignment", 4, struct.pack("<I", 0)),
            "general.alignment is 0",
        ),
        (
            struct.pack("<QQ", 0, 1) + kv("general.alignment", 8, struct.pack("<Q", 1) + b"x"),
            "general.alignment is 'x'",
        ),
    ],
)
def test_hostile_gguf_headers_are_named(tmp_path, header, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + header)
    tracemalloc.start()
    with pytest.raises(ModelError, match=says):
        GGUFFile(path)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


SAFE = save(
    {"a.weight": torch.zeros(4, 8), "b.weight": torch.ones(3, dtype=torch.bfloat16)}, {"format": "pt"}
)


def read_safetensors(path: Path) -> None:
    source = SafetensorsSource([path])
    for name in source.shapes():
        source.read(name, torch.device("cpu"), torch.float32)


@FUZZ
@given(st.data())
def test_a_damaged_safetensors_file_is_an_error_or_reads(tmp_path, data):
    path = tmp_path / "model.safetensors"
    whole = bytearray(SAFE)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    within_memory(read_safetensors, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]) | st.text(max_size=4), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(JSON)
def test_any_json_as_a_safetensors_header_is_an_error_or_reads(tmp_path, value):
    path = tmp_path / "model.safetensors"
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    within_memory(read_safetensors, path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 50_000,
        b"\xff\xfe",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 0]}}',
        b'{"a": 3}',
    ],
    ids=range(8),
)
def test_hostile_safetensors_headers_are_errors(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelError, match="damaged header"):
        read_header(path)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_header(path)
