"""Two runs are equal to the bit: always on a CPU, with `deterministic` on a GPU; without it a GPU's run says what differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from oribi.errors import ConfigError
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.arguments import SFTConfig, adopt
from oribi.train.determinism import CUBLAS_VARIABLE, LEFT_OPEN, fix_order_of_cublas
from tests.trust.runs import losses_of, trainer_in

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


class Seen(TrainerCallback):
    """Whether PyTorch was told to be deterministic in each step."""

    def __init__(self) -> None:
        self.told = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.told.append(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("settings", [{}, {"packs": True, "per_device_train_batch_size": 1}])
def test_two_runs_on_a_cpu_are_equal_to_the_bit(subject, tmp_path, deterministic, settings):
    found, seen = [], Seen()
    for name in ("first", "second"):
        trainer = trainer_in(
            subject, tmp_path / name, max_steps=4, save_steps=4, deterministic=deterministic, **settings
        )
        trainer.add_callback(seen)
        trainer.train()
        adapter = (tmp_path / name / "checkpoint-4/adapter_model.safetensors").read_bytes()
        found.append((losses_of(trainer), adapter))
    assert found[0] == found[1]
    assert len(found[0][0]) == 4
    assert seen.told == [deterministic] * 8
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_seeds_are_other_runs(subject, tmp_path):
    """What the test above compares does depend on the run."""
    losses = []
    for seed in (1, 2):
        trainer = trainer_in(subject, tmp_path, max_steps=1, save_strategy="no", seed=seed)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] != losses[1]


def test_the_older_name_means_the_same_and_changes_no_variable(monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    before = dict(os.environ)
    for args in (SFTConfig(full_determinism=True), adopt(TrainingArguments(full_determinism=True))):
        assert args.deterministic
        assert not args.full_determinism
    assert not SFTConfig().deterministic
    assert dict(os.environ) == before


def test_the_variable_of_cublas_is_set_while_that_helps_and_asked_for_afterwards(monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fix_order_of_cublas()
    assert CUBLAS_VARIABLE not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(
        ConfigError, match=rf"not set; set it to .* before .*{CUBLAS_VARIABLE}=:4096:8 python"
    ):
        fix_order_of_cublas()
    monkeypatch.setenv(CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match=f"{CUBLAS_VARIABLE} is :0:0"):
        fix_order_of_cublas()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    fix_order_of_cublas()
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    fix_order_of_cublas()


def run_on_gpu(subject: Subject, folder: Path, *settings: str) -> tuple[str, list[float], bytes]:
    """What a run in its own process says, its losses, and the adapter of its last checkpoint."""
    # the model is loaded before the trainer is made, so the variable has to be there already
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", CUBLAS_VARIABLE: ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.runs", subject.path, str(folder), 'device="cuda"', "max_steps=8", *settings],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("losses "))
    adapter = (folder / "checkpoint-8/adapter_model.safetensors").read_bytes()
    return done.stdout, json.loads(line.removeprefix("losses ")), adapter


WAYS = {
    "float32": ['dtype="float32"'],
    "documents": ['dtype="bfloat16"'],
    "packs": ['dtype="bfloat16"', "packs=true", "per_device_train_batch_size=1"],
    "rectangle": ['dtype="bfloat16"', "padding_free=false"],
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", WAYS)
def test_two_runs_on_a_gpu_are_equal_to_the_bit_and_so_is_a_resumed_one(subject, tmp_path, way):
    settings = [*WAYS[way], "deterministic=true", "save_steps=4"]
    said, losses, adapter = run_on_gpu(subject, tmp_path / "first", *settings)
    assert LEFT_OPEN not in said
    assert len(losses) == 8
    assert run_on_gpu(subject, tmp_path / "second", *settings)[1:] == (losses, adapter)
    resume = f"resume={json.dumps(str(tmp_path / 'first/checkpoint-4'))}"
    assert run_on_gpu(subject, tmp_path / "resumed", *settings, resume)[1:] == (losses, adapter)


@pytest.mark.gpu
@needs_gpu
def test_the_usual_way_says_what_differs(subject, tmp_path):
    said, _, _ = run_on_gpu(subject, tmp_path, 'dtype="bfloat16"')
    assert said.count(LEFT_OPEN) == 1
