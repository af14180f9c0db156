"""Two processes with gloo on the CPU train as one process does, save once, and go on from each other's checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig

from oribi.errors import ConfigError
from oribi.models.decoder import build
from oribi.selftest.invariance import ROWS, reference_step, step_error, steps_of_ranks
from oribi.selftest.subject import Subject, reference_of, write_small_model
from oribi.train.arguments import SFTConfig
from oribi.train.setup import settle, without_repeats
from oribi.train.sharding import is_sharded
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
from oribi.data.collate import PackCollator
from oribi.errors import ExportError
from oribi.models.load import load_model
from oribi.lora.attach import attach_lora
from oribi.save import save_merged
from oribi.selftest.subject import Subject
from oribi.train.guard import LossGuard
from oribi.train.sharding import is_sharded, own_bytes, sharded

def load():
    model, _ = load_model(
        sys.argv[1], dtype="float32", device_map="cpu", max_seq_length=128, load_in_4bit=sys.argv[2] == "nf4"
    )
    model = attach_lora(model, r=8, lora_alpha=8, use_gradient_checkpointing=sys.argv[3] == "checkpointed")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return model.train()

def gradients(model, rows, targets):
    model.zero_grad()
    model(**PackCollator()(rows), num_items_in_batch=targets, use_cache=False).loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}

dist.init_process_group("gloo")
rows = list(Subject(sys.argv[1], "cpu").rows(8, 320))
targets = sum(label != -100 for row in rows for label in row["labels"][1:])
expected = gradients(load(), rows, targets)
model = load()
assert not is_sharded(model)
whole = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
wrapped = sharded(model, model.get_base_model(), torch.device("cpu"))
assert is_sharded(model)
own = own_bytes(model.get_base_model())
errors = []
for _ in range(2):  # DDP takes the mean over the processes
    found = gradients(wrapped, rows[dist.get_rank() :: 2], targets / 2)
    errors += [float((found[name] - g).norm() / g.norm()) for name, g in expected.items()]
refused = ""
try:
    save_merged(model, sys.argv[4], None)
except ExportError as error:
    refused = str(error)
said = LossGuard()._find(model)
if dist.get_rank() == 0:
    print("worst", max(errors), len(expected), own / whole, flush=True)
    print("refused", refused, flush=True)
    print("guard", said, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("kind", "keeps"), [("nf4", "checkpointed"), ("float32", "all")])
def test_gradients_of_a_sharded_model_equal_one_process(subject, tmp_path, kind, keeps):
    """Twice, since weights are gathered into the same memory again; half of them lies in each process."""
    command = [sys.executable, "-c", SHARDED, subject.path, kind, keeps, str(tmp_path / "merged")]
    said, errors = said_by_two_processes(command, timeout=120)
    lines = dict(
        line.split(" ", 1)
        for line in said.splitlines()
        if line.split(" ")[0] in ("worst", "refused", "guard")
    )
    worst, count, share = lines["worst"].split()
    assert int(count) == 28  # A and B of seven layers in each of two
    assert float(worst) < 1e-5
    assert float(share) == pytest.approx(0.5, abs=0.01)
    assert "is sharded over several processes" in lines["refused"]
    assert "no process can run the sharded model alone" in lines["guard"]
    assert "view tensor" not in errors


def test_sharding_is_refused_where_it_cannot_be(subject, monkeypatch):
    model, _ = subject.load()
    base = model.get_base_model()
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    settle(SFTConfig(max_length=64, fsdp=True), base)  # plain QLoRA can be
    options = {"version": 1, "cpu_offload": True}
    with pytest.raises(ConfigError, match="(?s)asks for version 1.*no cpu_offload of fsdp_config"):
        settle(SFTConfig(max_length=64, fsdp=True, fsdp_config=options), base)
    monkeypatch.setattr(base.model.layers[0].mlp.up_proj, "lora_variant", {"default": object()})
    with pytest.raises(ConfigError, match="layers.0.mlp.up_proj has an adapter that PEFT runs"):
        settle(SFTConfig(max_length=64, fsdp=True), base)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="Start with `torchrun`"):
        settle(SFTConfig(max_length=64), base)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ConfigError, match="Linear runs unfused"):
        settle(SFTConfig(max_length=64, fsdp=True), torch.nn.Linear(2, 2))
    whole = build(
        LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1), device="cpu"
    )
    with pytest.raises(ConfigError, match="every weight is trained"):
        settle(SFTConfig(max_length=64, fsdp=True), whole)


def test_one_process_shards_nothing(subject, tmp_path):
    trainer = trainer_in(subject, tmp_path, fsdp=True, max_steps=1, save_strategy="no")
    trainer.train()
    assert not is_sharded(trainer.model)
    assert "ACCELERATE_USE_FSDP" not in os.environ  # accelerate's mark, which it reads again


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
    assert not list((tmp_path / "two").glob("_partial*"))
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


@pytest.mark.parametrize("packs", [False, True])
def test_an_epoch_that_no_batch_divides_and_an_evaluation_before_it_change_nothing(subject, tmp_path, packs):
    """37 rows: accelerate would repeat the first of them, and take an evaluated model for one that is wrapped."""
    settings = {
        **SETTINGS, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no", "count": 37, "packs": packs,
        "evaluates": 5, "eval_strategy": "no",
    }  # fmt: skip
    one = trainer_in(subject, tmp_path / "one", **settings)
    one.train()
    said = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    more = ("gradient_accumulation_steps=1", "evaluates_first=true")
    both, _ = two_processes(subject, tmp_path / "two", *more, *said)
    assert both == pytest.approx(losses_of(one), rel=1e-5)


def test_a_sharded_run_saves_whole_adapters_and_goes_on_unsharded(subject, tmp_path):
    one = trainer_in(subject, tmp_path / "one", evaluates=5, eval_strategy="steps", eval_steps=3, **SETTINGS)
    one.train()
    more = ("gradient_accumulation_steps=1", "evaluates=5", 'eval_strategy="steps"', "eval_steps=3")
    both, _ = two_processes(subject, tmp_path / "two", "fsdp=true", *more, *SAME)
    assert both == pytest.approx(losses_of(one), rel=1e-5)
    logs = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    evaluated = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    expected = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert len(expected) == 2
    assert evaluated == pytest.approx(
        expected, rel=1e-5
    )  # five rows: accelerate fills up with some of them again
    weights = [
        load_file(tmp_path / name / "checkpoint-6/adapter_model.safetensors") for name in ("one", "two")
    ]
    assert set(weights[0]) == set(weights[1])
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() <= 1e-5 * weight.norm(), name
    resume = json.dumps(str(tmp_path / "one/checkpoint-3"))
    on_two, _ = two_processes(subject, tmp_path / "one-two", "fsdp=true", f"resume={resume}", *more, *SAME)
    assert on_two == pytest.approx(losses_of(one), rel=1e-5)
    on_one = trainer_in(subject, tmp_path / "two-one", **SETTINGS)
    on_one.train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-3"))
    assert losses_of(on_one) == pytest.approx(losses_of(one), rel=1e-5)


@pytest.mark.parametrize(("process", "own"), [(0, 2), (1, 1), (2, 0)])
@pytest.mark.parametrize("batches", ["rectangle", "rows", "packs"])
def test_rows_that_fill_up_the_last_batches_are_not_evaluated_again(process, own, batches):
    """Nine rows in batches of two for three processes: three are left for the last round."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    accelerator = SimpleNamespace(
        num_processes=3, process_index=process, split_batches=False, gradient_state=state
    )
    columns = {"input_ids": [[5] * 4] * 9}
    if batches == "packs":
        columns["seq_lengths"] = [[4]] * 6 + [[1, 3], [2, 1, 1], [3, 1]]
    rows = Dataset.from_dict(columns)
    inputs = {"labels": torch.ones(2, 4, dtype=torch.int64)}
    if batches != "rectangle":
        taken = [6 + i if i < 3 else i - 3 for i in (2 * process, 2 * process + 1)]
        lengths = [n for i in taken for n in (rows[i]["seq_lengths"] if batches == "packs" else [4])]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        inputs = {"labels": inputs["labels"].view(1, 8), "cu_seq_lens_q": ends}
    labels = without_repeats(inputs, accelerator, rows, 2)["labels"].view(2, 4)
    assert labels.tolist() == [[1] * 4] * own + [[-100] * 4] * (2 - own)
    state.end_of_dataloader = False
    assert without_repeats(inputs, accelerator, rows, 2) is inputs
