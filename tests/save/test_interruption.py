"""A killed export leaves nothing under a final name, and the next one cleans up after it and succeeds."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oribi.errors import ExportError
from oribi.save import folder as folders
from oribi.save.folder import finished_folder, gigabytes

EXPORT = """
import sys, time
from oribi.save import gguf, shards
from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from tests.save.tiny_export import adapted, byte_level_tokenizer, export_config, tiny_model

model = adapted(tiny_model(export_config("llama")))
tokenizer = byte_level_tokenizer()
print("ready", flush=True)
while True:
    save_merged(model, sys.argv[1] + "/merged", tokenizer, max_shard_size="100KB", verify=False)
    save_gguf(model, sys.argv[1] + "/gguf", tokenizer, ["f32", "q8_0"], verify=False)
    print("done", flush=True)
"""


def is_whole(folder: Path) -> bool:
    """Whether every file under a final name is complete: readers refuse what is cut short or lacks a shard."""
    import gguf
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        load_file(path)
    for path in folder.glob("*.gguf"):
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.data.size
    return True


def write_all(final: Path, names: list[str]) -> None:
    with finished_folder(final, 0) as partial:
        for name in names:
            (partial / name).write_text("new")


def test_killed_at_random_moments_no_half_file_has_a_final_name(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, text=True, cwd=root,
    )  # fmt: skip
    picked = random.Random(1)
    seen = set()
    try:
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        for _ in range(25):
            # a stopped process is what a killed one leaves on the disk, without starting Python anew
            time.sleep(picked.uniform(0.01, 0.2))
            process.send_signal(signal.SIGSTOP)
            for name in ("merged", "gguf"):
                if (tmp_path / name).exists():
                    assert is_whole(tmp_path / name)
            seen.add(bool(list(tmp_path.glob(".*.partial-*"))))
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    assert True in seen, "no export was caught in the act"
    for name in ("merged", "gguf"):  # killed, not stopped: SIGKILL
        assert not (tmp_path / name).exists() or is_whole(tmp_path / name)
        with finished_folder(tmp_path / name, 0) as partial:
            (partial / "new.txt").write_text("x")
        assert not list(tmp_path.glob(f".{name}.partial-*"))


def test_killed_while_files_move_a_checkpoint_is_not_taken_for_whole(tmp_path, monkeypatch):
    final = tmp_path / "model"
    with finished_folder(final, 0) as partial:
        for name in ("config.json", "model.safetensors"):
            (partial / name).write_text("old")
    moved = []

    def stop_after_first(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        Path(source).rename(target)

    monkeypatch.setattr(folders.os, "replace", stop_after_first)
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        write_all(final, names)
    assert {path.name for path in final.iterdir()} == {"model-00001-of-00002.safetensors"}


def test_leftovers_of_dead_runs_go_and_of_living_ones_stay(tmp_path):
    dead, living = tmp_path / ".model.partial-999999999", tmp_path / f".model.partial-{os.getppid()}"
    dead.mkdir()
    living.mkdir()
    with finished_folder(tmp_path / "model", 0) as partial:
        (partial / "a").write_text("x")
    assert not dead.exists()
    assert living.exists()


def test_too_little_disk_stops_before_writing(tmp_path):
    with (
        pytest.raises(ExportError, match=r"needs 1000000000\.00 GB and its disk has .* free"),
        finished_folder(tmp_path / "model", 10**18),
    ):
        raise AssertionError("the block must not run")
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(ExportError, match="is a file"), finished_folder(tmp_path / "model", 0):
        pass


def test_an_error_while_writing_leaves_the_earlier_export(tmp_path):
    with finished_folder(tmp_path / "model", 0) as partial:
        (partial / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError):
        write_all(tmp_path / "model", ["config.json", "no/such/folder"])
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sizes_read_well():
    assert [gigabytes(size) for size in (1234567890, 2 * 10**8, 99 * 10**6, 45600)] == [
        "1.23 GB", "0.20 GB", "99.0 MB", "0.0 MB"
    ]  # fmt: skip
