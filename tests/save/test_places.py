"""What disks, mounts and paths do to an export: one clear error, nothing half-written, the trained model kept."""

import errno
import os
from pathlib import Path

import pytest
import torch

from oribi.errors import ExportError
from oribi.save import folder as folders
from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from tests.save.tiny_export import adapted, byte_level_tokenizer, export_config, tiny_model


@pytest.fixture(scope="module")
def tuned():
    return adapted(tiny_model(export_config("llama")))


def fail(number: int):
    def raise_it(*_, **__):
        raise OSError(number, os.strerror(number), "/some/where")

    return raise_it


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["mkdir", "write", "move"])
def test_a_disk_that_cannot_be_written_is_one_error_and_leaves_nothing(
    number, step, tuned, tmp_path, monkeypatch
):
    target = {"mkdir": (Path, "mkdir"), "write": (Path, "write_bytes"), "move": (folders.os, "replace")}[step]
    with monkeypatch.context() as patched:
        patched.setattr(*target, fail(number))
        with pytest.raises(ExportError, match=f"cannot be written: {os.strerror(number)}.*another folder"):
            save_merged(tuned, tmp_path / "out", None, "lora", verify=False)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_full_disk_that_a_rust_library_meets_is_the_same_error(tuned, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("oribi.save.adapter.write_adapter", full)
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        save_merged(tuned, tmp_path / "out", None, "lora")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/proc/nowhere/out"])
@pytest.mark.parametrize("form", ["lora", "merged_16bit"])
def test_a_path_that_cannot_be_is_one_error(name, form, tuned, tmp_path):
    with pytest.raises(ExportError, match=r"cannot be written|has 0.0 MB free"):
        save_merged(tuned, os.path.join(tmp_path, name), None, form, verify=False)


def test_an_export_does_not_replace_its_own_base(tmp_path):
    model = tiny_model(export_config("llama"))
    save_merged(model, tmp_path / "base", dtype="float32", verify=False)
    written = save_gguf(model, tmp_path / "base", byte_level_tokenizer(), "f32", name="m", verify=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    tuned = adapted(model)
    tuned.config._name_or_path = str(tmp_path / "base")
    for form in ("merged_16bit", "lora"):
        with pytest.raises(ExportError, match="is the base model itself"):
            save_merged(tuned, tmp_path / "there" / ".." / "base", None, form)
    tuned.config._name_or_path = written["gguf_files"][0]
    with pytest.raises(ExportError, match="is the base model itself"):
        save_gguf(tuned, tmp_path / "base", byte_level_tokenizer(), "f32", name="m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_the_folder_one_stands_in_can_be_exported_into(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_merged(tuned, ".", None, "lora", verify=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert torch.isfinite(next(tuned.parameters())).all()
