"""Two processes with gloo on the CPU train as one process does, save once, and go on from each other's checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oribi.errors import ConfigError
from oribi.selftest.invariance import ROWS, reference_step, step_error, steps_of_ranks
from oribi.selftest.subject import Subject, reference_of, write_small_model
from oribi.train.arguments import SFTConfig
from oribi.train.setup import settle
from tests.trust.runs import losses_of, trainer_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX"),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


def said_by_two_processes(command: list[str], timeout: int) -> tuple[str, str]:
    """What the first of two processes wrote to standard output, and both to standard error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "\n".join(text for _, text in said)
    assert [process.returncode for process in processes] == [0, 0], errors[-4000:]
    return said[0][0], errors


def two_processes(subject: Subject, folder: Path, *settings: str) -> tuple[list[float], str]:
    """Losses that the first of two processes logged, and what both wrote to standard error."""
    command = [sys.executable, "-m", "tests.trust.runs", subject.path, str(folder), "use_cpu=true", *settings]
    said, errors = said_by_two_processes(command, timeout=240)
    lines = [line for line in said.splitlines() if line.startswith("losses ")]
    return json.loads(lines[0].removeprefix("losses ")), errors


def test_gradients_and_loss_of_two_processes_equal_the_reference(subject, tmp_path):
    model, _ = subject.load()
    rows = subject.rows(11, 320).select(range(ROWS))
    expected = reference_step(reference_of(model), rows)
    error, note = step_error(steps_of_ranks(subject, tmp_path), expected)
    assert error < 1e-5, note


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from oribi.data.collate import PackCollator
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.selftest.subject import Subject

def load():
    model, _ = load_model(sys.argv[1], dtype="float32", device_map="cpu", max_seq_length=128, load_in_4bit=False)
    model = attach_lora(model, r=8, lora_alpha=8, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return model.train()

def gradients(model, rows, targets):
    model(**PackCollator()(rows), num_items_in_batch=targets, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

dist.init_process_group("gloo")
rows = list(Subject(sys.argv[1], "cpu").rows(8, 320))
targets = sum(label != -100 for row in rows for label in row["labels"][1:])
expected = gradients(load(), rows, targets)
model, mesh = load(), init_device_mesh("cpu", (2,))
for layer in model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
# FSDP takes the mean over the processes
found = gradients(model, rows[dist.get_rank() :: 2], targets / 2)
errors = [(found[name].full_tensor() - g).norm() / g.norm() for name, g in expected.items()]
if dist.get_rank() == 0:
    print("worst", max(errors).item(), len(errors), flush=True)
dist.destroy_process_group()
"""


def test_gradients_of_a_model_that_fsdp_shards_equal_one_process(subject):
    """PyTorch's fully_shard around each layer and the whole, LoRA on float32 weights, two processes with gloo."""
    said, _ = said_by_two_processes([sys.executable, "-c", SHARDED, subject.path], timeout=120)
    line = next(line for line in said.splitlines() if line.startswith("worst "))
    _, worst, count = line.split()
    assert int(count) == 28  # A and B of seven layers in each of two
    assert float(worst) < 1e-5


def test_fsdp_is_refused_where_it_cannot_be(subject, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="shards on GPUs only"):
        trainer_in(subject, tmp_path, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="shards on GPUs only"):
        trainer_in(subject, tmp_path)
    model, _ = subject.load()
    base = model.get_base_model()
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    with pytest.raises(ConfigError, match="packed weights lose their shape"):
        settle(SFTConfig(max_length=64), base)


# Noise on the embeddings is drawn by each process for itself. With Adam's usual epsilon, and with 8-bit states, a
# gradient that is nothing but rounding moves its weight as far as any other does.
SETTINGS = {
    "neftune_noise_alpha": None, "max_steps": 6, "save_steps": 3, "optim": "paged_adamw_32bit", "adam_epsilon": 1e-3,
}  # fmt: skip
SAME = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]


def test_a_run_moves_between_one_and_two_processes(subject, tmp_path):
    """The same rows a step: 2 x 2 micro-batches of one process, 1 x 2 of each of two."""
    one = trainer_in(subject, tmp_path / "one", **SETTINGS)
    one.train()
    both, errors = two_processes(subject, tmp_path / "two", "gradient_accumulation_steps=1", *SAME)
    assert "find_unused_parameters" not in errors
    assert both == pytest.approx(losses_of(one), rel=1e-5)
    # the first process alone saves the model, each its random state
    files = {path.name for path in (tmp_path / "two/checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not (tmp_path / "two/_partial").exists()
    weights = [
        load_file(tmp_path / name / "checkpoint-6/adapter_model.safetensors") for name in ("one", "two")
    ]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() <= 1e-5 * weight.norm(), name

    resume = json.dumps(str(tmp_path / "one/checkpoint-3"))
    on_two, _ = two_processes(
        subject, tmp_path / "one-two", "gradient_accumulation_steps=1", f"resume={resume}", *SAME
    )
    assert on_two == pytest.approx(losses_of(one), rel=1e-5)
    on_one = trainer_in(subject, tmp_path / "two-one", **SETTINGS)
    on_one.train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-3"))
    assert losses_of(on_one) == pytest.approx(losses_of(one), rel=1e-5)
