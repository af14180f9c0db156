"""A loaded base says what it is: other weights of the same shape are another base, a moved folder is the same one."""

import json
import shutil
import time
from pathlib import Path

import pytest

from oribi.errors import ModelError
from oribi.models.identity import BaseIdentity, fingerprint
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint, edit_config, edit_tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "llama"
    checkpoint(path)
    return path


def identity(path: Path, **arguments) -> BaseIdentity:
    settings = {"dtype": "float32", "device_map": "cpu", "max_seq_length": 64, **arguments}
    return load_model(str(path), **settings)[0].oribi.identity


def test_one_value_changed_in_weights_of_the_same_shape_is_another_base(llama, tmp_path):
    before = identity(llama)
    shutil.copytree(llama, tmp_path / "copy")
    assert before.differences(identity(tmp_path / "copy")) == []
    edit_tensors(tmp_path / "copy", lambda tensors: tensors["model.norm.weight"][3:4].add_(1e-3))
    lines = before.differences(identity(tmp_path / "copy"))
    assert len(lines) == 2
    assert str(llama) in lines[0]
    assert str(tmp_path) in lines[0]
    assert lines[1].startswith("model.safetensors: ")


def test_a_change_of_config_json_is_a_difference(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    edit_config(tmp_path / "copy", rms_norm_eps=1e-3)
    assert [line[:11] for line in identity(llama).changed_files(identity(tmp_path / "copy"))] == [
        "config.json"
    ]


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": False}, "float32"),
        ({"load_in_4bit": False, "dtype": "bfloat16"}, "bfloat16"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}},
            "nf4, single",
        ),
    ],
)
def test_how_the_weights_lie_in_memory_is_part_of_it(llama, arguments, weights):
    found = identity(llama, **arguments)
    assert found.weights == weights
    assert found.in_nf4 == weights.startswith("nf4")


def test_every_shard_is_part_of_it(tmp_path):
    checkpoint(tmp_path, shard_size="200KB")
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    assert set(identity(tmp_path).files) == {"config.json", *shards}


def test_it_survives_json_and_a_damaged_record_is_named(llama):
    found = identity(llama)
    assert BaseIdentity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for damage in ({"files": None}, {"weights": 3}):
        with pytest.raises(ModelError, match="record of a base model is damaged"):
            BaseIdentity.from_dict({**found.to_dict(), **damage})


def test_a_large_file_costs_milliseconds_and_its_later_bytes_count(tmp_path):
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # sparse
    start = time.process_time()
    before = fingerprint(path)
    assert time.process_time() - start < 0.1
    with path.open("r+b") as file:
        file.seek(1 << 30)
        file.write(b"\1" * (16 << 20))
    assert fingerprint(path)["sample_sha256"] != before["sample_sha256"]
