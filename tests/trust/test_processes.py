"""Two processes with gloo on the CPU train as one process does, save once, and continue from each other's checkpoints."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig

from oribi.errors import ConfigError
from oribi.models.decoder import build
from oribi.models.unwrap import is_sharded
from oribi.selftest.processes import run_together
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.arguments import SFTConfig
from oribi.train.evaluate import without_repeats
from oribi.train.setup import fit_arguments
from oribi.train.trainer import SFTTrainer
from tests.trust.runs import losses_of, trainer_in

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX"),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


# after the trainings, in their processes and their group
SHARDED = """
import json
import sys
import torch
import torch.distributed as dist
from oribi.data.collate import PackCollator
from oribi.errors import ExportError
from oribi.models import layer_shards
from oribi.models.load import load_model
from oribi.lora.attach import attach_lora
from oribi.save import save_merged
from oribi.selftest.subject import Subject
from oribi.train.guard import LossGuard
from oribi.models.unwrap import is_sharded
from oribi.train.shards import shard

def load(kind, keeps):
    model, _ = load_model(
        sys.argv[1], dtype="float32", device_map="cpu", max_seq_length=128, load_in_4bit=kind == "nf4"
    )
    model = attach_lora(model, r=8, lora_alpha=8, use_gradient_checkpointing=keeps == "checkpointed")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return model.train()

def gradients(model, rows, targets):
    model.zero_grad()
    model(**PackCollator()(rows), num_items_in_batch=targets, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

def compare(kind, keeps, lockstep):
    reads = layer_shards.peer_memory
    if lockstep:
        layer_shards.peer_memory = lambda size, device, group: None
    expected = gradients(load(kind, keeps), rows, targets)
    model = load(kind, keeps)
    assert not is_sharded(model)
    whole = sum(p.nbytes for n, p in model.named_parameters() if ".layers." in n and not p.requires_grad)
    shard(model, model.get_base_model(), torch.device("cpu"))
    assert is_sharded(model)
    layer_shards.peer_memory = reads
    assert model.get_base_model().model.shards.lockstep == lockstep
    found = {"kind": kind, "lockstep": lockstep, "count": len(expected), "share": model.get_base_model().model.shards.own_bytes / whole, "errors": []}
    for _ in range(2):
        own = gradients(model, rows[dist.get_rank() :: 2], targets)
        for gradient in own.values():
            dist.all_reduce(gradient)
        found["errors"] += [float((own[name] - g).norm() / g.norm()) for name, g in expected.items()]
    try:
        save_merged(model, sys.argv[1] + "-merged", None)
    except ExportError as error:
        found["refused"] = str(error)
    found["guard"] = LossGuard()._find(model)[0]
    if dist.get_rank() == 0:
        if not lockstep:  # one process runs the model alone
            gradients(model, rows, targets)
        print(json.dumps(found), flush=True)

rows = list(Subject(sys.argv[1], "cpu").rows(8, 320))
targets = sum(label != -100 for row in rows for label in row["labels"][1:])
compare("nf4", "checkpointed", lockstep=False)
compare("float32", "all", lockstep=False)
compare("nf4", "all", lockstep=True)
dist.destroy_process_group()
"""


def test_sharding_is_refused_where_it_cannot_be(subject, monkeypatch):
    model, _ = subject.load()
    base = model.get_base_model()
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    fit_arguments(SFTConfig(max_length=64, fsdp=True), base)  # plain QLoRA can be
    options = {"version": 1, "cpu_offload": True}
    with pytest.raises(ConfigError, match="(?s)asks for version 1.*no cpu_offload of fsdp_config"):
        fit_arguments(SFTConfig(max_length=64, fsdp=True, fsdp_config=options), base)
    monkeypatch.setattr(base.model.layers[0].mlp.up_proj, "lora_variant", {"default": object()})
    with pytest.raises(ConfigError, match="layers.0.mlp.up_proj has an adapter that PEFT runs"):
        fit_arguments(SFTConfig(max_length=64, fsdp=True), base)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="Start with `torchrun`"):
        fit_arguments(SFTConfig(max_length=64), base)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ConfigError, match="Linear runs unfused"):
        fit_arguments(SFTConfig(max_length=64, fsdp=True), torch.nn.Linear(2, 2))
    whole = build(
        LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1), device="cpu"
    )
    with pytest.raises(ConfigError, match="every weight is trained"):
        fit_arguments(SFTConfig(max_length=64, fsdp=True), whole)


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
EVALUATES = {"evaluates": 5, "eval_strategy": "steps", "eval_steps": 3}
# 21 rows: accelerate would repeat the first of them, and take an evaluated model for one that is wrapped
EPOCHS = {
    **SETTINGS, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no", "count": 21, "evaluates": 5,
    "eval_strategy": "no",
}  # fmt: skip


@dataclass
class Trained:
    """Trainings of one process, and losses of those of two, by the names of their folders in `folder`."""

    folder: Path
    one: SFTTrainer
    epochs: dict[str, SFTTrainer]
    both: dict[str, list[float]]
    sharded: list[dict]  # what SHARDED found
    errors: str  # what the two wrote to standard error

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "checkpoint-6/adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(subject, tmp_path_factory) -> Trained:
    """All that two processes do, in one start: importing takes longer.

    The same rows per step: 2 x 2 micro-batches of one process, 1 x 2 of each of two.
    """
    folder = tmp_path_factory.mktemp("trained")
    one = trainer_in(subject, folder / "one", **SETTINGS, **EVALUATES)
    one.train()
    epochs = {
        name: trainer_in(subject, folder / f"one-{name}", packs=name == "packs", **EPOCHS)
        for name in ("rows", "packs")
    }
    for trainer in epochs.values():
        trainer.train()
    resume = str(folder / "one/checkpoint-3")
    trainings = {
        "ddp": {**SETTINGS, **EVALUATES},
        "ddp-resumed": {**SETTINGS, "resume": resume},
        "rows": {**EPOCHS, "evaluates_first": True},
        "packs": {**EPOCHS, "evaluates_first": True, "packs": True},
        "sharded": {**SETTINGS, **EVALUATES, "fsdp": True},
        "sharded-resumed": {**SETTINGS, "resume": resume, "fsdp": True},
    }
    words = []
    for name, settings in trainings.items():
        settings = {"use_cpu": True, "gradient_accumulation_steps": 1, **settings}
        words += [
            "--",
            str(folder / name),
            *(f"{key}={json.dumps(value)}" for key, value in settings.items()),
        ]
    program = f"import sys\nfrom tests.trust import runs\nruns.main(*sys.argv[1:])\n{SHARDED}"
    said, errors = run_together(["-c", program, subject.path, *words[1:]], threads=1)
    sharded = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    losses = [
        json.loads(line.removeprefix("losses ")) for line in said.splitlines() if line.startswith("losses ")
    ]
    return Trained(folder, one, epochs, dict(zip(trainings, losses, strict=True)), sharded, errors)


def test_gradients_of_a_sharded_model_equal_one_process(trained):
    """Twice, since weights are gathered into the same memory again; half of them lies in each process."""
    assert [one["kind"] for one in trained.sharded] == ["nf4", "float32", "nf4"]
    for one in trained.sharded:
        assert one["count"] == 28  # A and B of seven layers in each of two
        assert max(one["errors"]) < 1e-5, one["kind"]
        assert one["share"] == pytest.approx(0.5, abs=0.01)
        assert "is sharded over several processes" in one["refused"]
        assert ("no process can run the sharded model alone" in one["guard"]) == one["lockstep"]
    assert "view tensor" not in trained.errors


@pytest.mark.parametrize("mode", ["ddp", "sharded"])
def test_two_processes_train_evaluate_and_save_as_one_does(trained, mode):
    assert "find_unused_parameters" not in trained.errors
    assert trained.both[mode] == pytest.approx(losses_of(trained.one), rel=1e-5)
    logs = [json.loads(line) for line in (trained.folder / mode / "log.jsonl").read_text().splitlines()]
    evaluated = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    expected = [entry["eval_loss"] for entry in trained.one.state.log_history if "eval_loss" in entry]
    assert len(expected) == 2
    # five rows: accelerate fills up with some of them again
    assert evaluated == pytest.approx(expected, rel=1e-5)
    # the first process alone saves the model, each its random state
    files = {path.name for path in (trained.folder / mode / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not list((trained.folder / mode).glob("_partial*"))
    one, two = trained.weights("one"), trained.weights(mode)
    assert set(one) == set(two)
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("mode", ["ddp", "sharded"])
def test_a_run_moves_between_one_and_two_processes(trained, subject, tmp_path, mode):
    assert trained.both[f"{mode}-resumed"] == pytest.approx(losses_of(trained.one), rel=1e-5)
    on_one = trainer_in(subject, tmp_path / "two-one", **SETTINGS)
    on_one.train(resume_from_checkpoint=str(trained.folder / mode / "checkpoint-3"))
    assert losses_of(on_one) == pytest.approx(losses_of(trained.one), rel=1e-5)


@pytest.mark.parametrize("kind", ["rows", "packs"])
def test_an_epoch_that_no_batch_divides_and_an_evaluation_before_it_change_nothing(trained, kind):
    assert trained.both[kind] == pytest.approx(losses_of(trained.epochs[kind]), rel=1e-5)


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
