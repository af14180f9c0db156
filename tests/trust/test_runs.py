"""A run is one run: nothing of another is continued, rotated away or overwritten, and what changed is refused or acts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from oribi.config import RunConfig
from oribi.errors import ConfigError, DataError
from oribi.lora.attach import attach_lora
from oribi.run_record import RECORD_FILE, checkpoints, own_checkpoints, read_run_record, remove_run, run_lock
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.fingerprint import APPLIED, BASE, FIXED, FREE, ON_RESUME, ROWS, data_record
from tests.trust.runs import losses_of, trainer_in, weights_of

PLAIN = {"neftune_noise_alpha": None, "save_strategy": "no"}
VOCABULARY = 320


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


@pytest.fixture(scope="module")
def stopped(subject, tmp_path_factory) -> Path:
    """A run of 8 steps that was stopped after the fourth; it kept checkpoints 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    trainer = trainer_in(subject, folder, max_steps=8, save_total_limit=3, neftune_noise_alpha=None)
    trainer.stop_on_signal.agree = lambda asked: trainer.state.global_step == 4
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return folder


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resumed(subject, folder, **settings):
    return trainer_in(subject, folder, **{"max_steps": 8, "neftune_noise_alpha": None, **settings})


def steps_of(folder: Path) -> list[int]:
    return [one.step for one in checkpoints(folder)]


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    assert len(found) == len(dict(found)), "a step stands twice in the log"
    return dict(found)


def test_a_new_run_neither_rotates_nor_continues_the_checkpoints_of_another(subject, run, capsys):
    other = trainer_in(subject, run, max_steps=4, save_total_limit=2, seed=7)
    other.train()
    assert steps_of(run) == [3, 4]
    assert {read_run_record(one.path).run for one in checkpoints(run)} == {other.run_id}
    (earlier,) = (run / "_earlier").iterdir()
    assert steps_of(earlier) == [2, 3, 4]
    assert (earlier / "log.jsonl").is_file()
    assert (
        "holds checkpoints of an earlier run (checkpoint-2 to checkpoint-4); they are kept in"
        in capsys.readouterr().out
    )
    assert list(logged(run)) == [1, 2, 3, 4]


def test_resume_is_refused_where_only_another_run_left_checkpoints(subject, run):
    """As after a kill before the first save of a run that was started in the folder of another."""
    record = read_run_record(run)
    record.run = "20990101-000000-aaaaaa"
    record.write(run)
    assert own_checkpoints(run) == []
    with pytest.raises(
        ConfigError, match=r"those of an earlier one are checkpoint-2, checkpoint-3, checkpoint-4"
    ):
        resumed(subject, run).train(resume_from_checkpoint=True)
    assert steps_of(run) == [2, 3, 4]


CHANGES = {
    "lora_alpha: 32 in the run, 64 now": {"lora_alpha": 64},
    "lora_r: 32 in the run, 4 now": {"r": 4},
    "target_modules: ": {"target_modules": ["q_proj"]},
    "use_rslora: not set in the run, True now": {"use_rslora": True},
    "seed: 3407 in the run, 5 now": {"seed": 5},
    "optim: adamw_8bit in the run, adamw_torch now": {"optim": "adamw_torch"},
    "max_seq_length: 192 in the run, 128 now": {"max_length": 128},
    "train_sampling_strategy: random in the run, sequential now": {"train_sampling_strategy": "sequential"},
    "adam_beta2: 0.999 in the run, 0.95 now": {"adam_beta2": 0.95},
}


@pytest.mark.parametrize("line", CHANGES)
def test_what_changes_the_meaning_is_refused_with_both_values(subject, run, line):
    changed = CHANGES[line]
    adapter = {k: v for k, v in changed.items() if k in ("lora_alpha", "r", "target_modules", "use_rslora")}
    loaded = None
    if adapter:
        model, tokenizer = subject.load("float32")
        settings = {"r": 32, "lora_alpha": 32, **adapter}
        loaded = attach_lora(model.unload(), **settings), tokenizer
    trainer = resumed(subject, run, loaded=loaded, **{k: v for k, v in changed.items() if k not in adapter})
    with pytest.raises(ConfigError, match="cannot be resumed") as refused:
        trainer.train(resume_from_checkpoint=True)
    assert line in str(refused.value)
    assert steps_of(run) == [2, 3, 4]
    assert read_run_record(run).state == "stopped"


@pytest.mark.parametrize("change", ["one token", "other order", "fewer"])
def test_other_rows_are_refused_and_the_first_of_them_is_named(subject, run, change):
    rows = subject.rows(40, VOCABULARY).to_list()
    if change == "one token":
        rows[17]["input_ids"][0] += 1
    elif change == "other order":
        rows[17], rows[18] = rows[18], rows[17]
    else:
        rows = rows[:17]
    with pytest.raises(ConfigError, match=r"rows: 40 in the run.*(row 18|first 17)"):
        resumed(subject, run, rows=Dataset.from_list(rows)).train(resume_from_checkpoint=True)


def test_another_base_of_the_same_shape_is_refused(subject, run, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(subject.path, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"base model: model.safetensors: .* bytes"):
        resumed(Subject(str(other), "cpu"), run).train(resume_from_checkpoint=True)


def test_a_base_that_moved_is_the_same(subject, run, tmp_path):
    moved = Path(shutil.copytree(subject.path, tmp_path / "moved"))
    trainer = resumed(Subject(str(moved), "cpu"), run, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


def test_a_new_learning_rate_acts_from_the_checkpoint_on_and_is_said(subject, run, capsys):
    trainer = resumed(subject, run, learning_rate=1e-5, weight_decay=0.3, warmup_steps=0)
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "learning_rate: 0.001 in the run, 1e-05 now" in said
    assert "weight_decay: 0.0 in the run, 0.3 now" in said
    rates = logged(run, "learning_rate")
    assert list(rates) == list(range(1, 9))
    assert rates[5] == pytest.approx(1e-5 * 4 / 8)  # linear over 8 steps without warm-up
    assert rates[8] == pytest.approx(1e-5 * 1 / 8)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.3}
    assert read_run_record(run).settings["learning_rate"] == 1e-5
    moved = [w.norm() for n, w in weights_of(trainer).items() if "lora_B" in n]
    assert max(moved) > 0


def test_a_schedule_that_finds_its_own_rate_takes_no_other(subject, run):
    record = read_run_record(run / "checkpoint-4")
    record.settings["lr_scheduler_type"] = "reduce_lr_on_plateau"
    record.write(run / "checkpoint-4")
    trainer = resumed(subject, run, learning_rate=1e-5)
    with pytest.raises(ConfigError, match="learning_rate: 0.001 in the run, 1e-05 now"):
        trainer.train(resume_from_checkpoint=True)


def test_weight_decay_may_be_switched_off_where_some_weights_never_had_any(subject, tmp_path):
    from oribi.models.load import load_model

    def trainer(**settings):
        loaded = load_model(
            subject.path, dtype="float32", device_map="cpu", full_finetuning=True, max_seq_length=192
        )
        rows = subject.rows(20, VOCABULARY)
        return trainer_in(subject, tmp_path, loaded=loaded, rows=rows, neftune_noise_alpha=None, **settings)

    trainer(max_steps=1, weight_decay=0.1).train()
    second = trainer(max_steps=2, weight_decay=0.0)
    second.train(resume_from_checkpoint=True)
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.0}
    assert second.state.global_step == 2


def test_more_steps_follow_the_schedule_of_the_longer_run(subject, run, tmp_path):
    resumed(subject, run, max_steps=16).train(resume_from_checkpoint=True)
    whole = resumed(subject, tmp_path / "whole", max_steps=16, save_strategy="no")
    whole.train()
    rates, expected = logged(run, "learning_rate"), logged(tmp_path / "whole", "learning_rate")
    assert {step: rates[step] for step in range(5, 17)} == {step: expected[step] for step in range(5, 17)}


class Seen:
    """The rows that a trainer reads, by the first tokens of each."""

    def __init__(self, trainer):
        self.rows: list[tuple] = []
        collate = trainer.data_collator
        trainer.data_collator = lambda examples: self.read(examples, collate)

    def read(self, examples, collate):
        self.rows += [tuple(example["input_ids"]) for example in examples]
        return collate(examples)


@pytest.fixture(scope="module")
def rows_of_two_passes(subject, tmp_path_factory) -> list[tuple]:
    """The rows in the order in which a run that nothing stops reads them."""
    folder = tmp_path_factory.mktemp("whole")
    whole = resumed(subject, folder, max_steps=-1, num_train_epochs=2, save_strategy="no")
    read = Seen(whole)
    whole.train()
    return read.rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, marks=pytest.mark.long
        ),
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
        pytest.param(
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}, marks=pytest.mark.long
        ),
    ],
)
def test_another_batch_layout_reads_every_row_of_the_pass_once(
    subject, run, layout, rows_of_two_passes, capsys
):
    """4 steps of 2 x 2 rows are done; the rest of the pass follows in its order, then whole passes."""
    rows = subject.rows(40, VOCABULARY)
    trainer = resumed(subject, run, max_steps=-1, num_train_epochs=2, save_steps=2, **layout)
    seen = Seen(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert seen.rows[:24] == rows_of_two_passes[16:40]
    assert sorted(seen.rows[24:]) == sorted(map(tuple, rows["input_ids"]))
    step = layout["per_device_train_batch_size"] * layout["gradient_accumulation_steps"]
    assert trainer.state.global_step == trainer.state.max_steps == 4 + -(-24 // step) + -(-40 // step)
    assert "per_device_train_batch_size: 2 in the run" in capsys.readouterr().out
    # and a checkpoint of the second layout is resumed rightly, too
    last = checkpoints(run)[-2]
    again = resumed(subject, run, max_steps=-1, num_train_epochs=2, **layout)
    seen_again = Seen(again)
    again.train(resume_from_checkpoint=str(last.path))
    assert seen_again.rows == seen.rows[-len(seen_again.rows) :]
    assert losses_of(again) == losses_of(trainer)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_added_at_the_end_come_last_in_the_pass_and_no_row_is_lost(subject, tmp_path, packing, capsys):
    rows, words = subject.rows(60, VOCABULARY), {"packing": packing, "max_length": 64, "save_steps": 1}
    words |= {"dataset_kwargs": None, "num_train_epochs": 2, "max_steps": -1}

    def read_by(seen):
        return sorted(example for row in seen.rows for example in documents(row))

    lengths = {tuple(ids) for ids in rows["input_ids"]}

    def documents(row):
        found, start = [], 0
        while start < len(row):
            end = next(e for e in range(start + 1, len(row) + 1) if tuple(row[start:e]) in lengths)
            found.append(tuple(row[start:end]))
            start = end
        return found

    first = resumed(subject, tmp_path / "run", rows=rows.select(range(40)), **words)
    first.stop_on_signal.agree = lambda asked: first.state.global_step == 3
    seen = Seen(first)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    done = seen.rows[: 3 * 4]
    second = resumed(subject, tmp_path / "run", rows=rows, **{**words, "save_steps": 100})
    seen = Seen(second)
    second.train(resume_from_checkpoint=True)
    assert "rows: 40 in the run, 20 more now" in capsys.readouterr().out
    everything = sorted(map(tuple, rows["input_ids"]))
    items = len(second.train_dataset)
    seen.rows, later = done + seen.rows[: items - len(done)], seen.rows[items - len(done) :]
    assert read_by(seen) == everything
    seen.rows = later
    assert read_by(seen) == everything


def test_a_finished_run_has_nothing_left_however_often_it_is_started(subject, tmp_path, capsys):
    words = {"max_steps": 3, "neftune_noise_alpha": None}
    trainer = trainer_in(subject, tmp_path, **words)
    trainer.train()
    log, weights = (tmp_path / "log.jsonl").read_text(), weights_of(trainer)
    for steps in (3, 2):
        again = trainer_in(subject, tmp_path, **{**words, "max_steps": steps})
        output = again.train(resume_from_checkpoint=True)
        assert (output.global_step, again.state.global_step) == (3, 3)
        assert output.training_loss == losses_of(trainer)[-1]
        assert f"nothing left to train: checkpoint-3 is at step 3 of {steps}" in capsys.readouterr().out
        assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(again).items())
        assert steps_of(tmp_path) == [1, 2, 3]
        assert [json.loads(a)["loss"] for a in log.splitlines()[:3]] == list(logged(tmp_path).values())
    assert read_run_record(tmp_path).state == "finished"
    further = trainer_in(subject, tmp_path, **{**words, "max_steps": -1, "num_train_epochs": 1})
    further.train(resume_from_checkpoint=True)
    assert further.state.global_step == 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """A byte of the largest tensor changes, which PyTorch reads without a word."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGES = [
    ("optimizer.pt", cut), ("optimizer.pt", flip), ("optimizer.pt", Path.unlink), ("scheduler.pt", Path.unlink),
    ("scheduler.pt", cut), ("adapter_model.safetensors", cut), ("adapter_model.safetensors", Path.unlink),
    ("adapter_config.json", cut), ("trainer_state.json", cut), ("trainer_state.json", Path.unlink),
    ("rng_state.pth", cut), (RECORD_FILE, cut), ("any", empty),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{n}-{d.__name__}" for n, d in DAMAGES])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(run, name, damage, recorded):
    from oribi.train.resume import newest_whole

    if not recorded:
        for one in checkpoints(run):
            (one.path / RECORD_FILE).unlink()
        if name == RECORD_FILE:
            return
    damage(run / "checkpoint-4" / name)
    found = newest_whole(run)
    assert found.step == 3
    ((one, problem),) = found.damaged
    assert one.path.name == "checkpoint-4"
    assert name in problem or name == "any"


def test_a_run_goes_on_behind_a_damaged_checkpoint_and_says_so(subject, run, capsys):
    cut(run / "checkpoint-4/optimizer.pt")
    trainer = resumed(subject, run, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "checkpoint-4 is not whole (optimizer.pt has" in said
    assert "continuing from checkpoint-3" in said
    assert steps_of(run) == [7, 8]
    assert list(logged(run)) == list(range(1, 9))


def test_without_a_whole_checkpoint_one_error_lists_them(subject, run):
    for step in (2, 3, 4):
        (run / f"checkpoint-{step}/optimizer.pt").unlink()
    with pytest.raises(
        ConfigError,
        match=r"no checkpoint is whole \(checkpoint-4: optimizer.pt is missing; .*--resume weights",
    ):
        resumed(subject, run).train(resume_from_checkpoint=True)
    trainer = resumed(subject, run)
    trainer.train(resume_from_checkpoint=True, resume_weights_only=True)
    rates = logged(run, "learning_rate")
    assert list(rates) == list(range(1, 9))
    assert rates[5] == pytest.approx(1e-3 * (8 - 4) / (8 - 2))


def test_a_named_checkpoint_that_is_not_whole_is_refused(subject, run):
    (run / "checkpoint-4/scheduler.pt").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-4 is not whole: scheduler.pt is missing"):
        resumed(subject, run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        resumed(subject, run).train(resume_from_checkpoint=str(run / "checkpoint-40"))


def test_checkpoints_behind_the_one_that_is_named_move_aside(subject, run):
    trainer = resumed(subject, run, save_total_limit=2)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert steps_of(run) == [7, 8]
    assert steps_of(next((run / "_earlier").iterdir())) == [3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, r"lora_r: 32 in the run, 4 now"),
        ({"optim": "adamw_torch"}, "its optimizer is another than optim = "),
    ],
)
def test_a_checkpoint_of_another_program_is_compared_by_what_it_holds(subject, run, change, message, capsys):
    (run / "checkpoint-4" / RECORD_FILE).unlink()
    loaded = None
    if "r" in change:
        model, tokenizer = subject.load("float32")
        loaded, change = (attach_lora(model.unload(), r=4, lora_alpha=32), tokenizer), {}
    with pytest.raises(ConfigError, match=message):
        resumed(subject, run, loaded=loaded, **change).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_a_second_training_in_a_folder_is_refused_and_touches_nothing(subject, run):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from oribi.run_record import run_lock\nwith run_lock({str(run)!r}):\n print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    trainer = resumed(subject, run)
    with pytest.raises(ConfigError, match=rf"another process trains there \(process {holder.pid} on "):
        trainer.train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    os.kill(holder.pid, signal.SIGKILL)  # the lock goes with its process
    holder.wait()
    with run_lock(run), run_lock(run):
        pass
    assert not (run / "_lock").exists()


def stream_of(rows: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows), features=rows.features)


def test_a_stream_that_fills_no_step_is_an_error(subject, tmp_path):
    rows = stream_of(subject.rows(6, VOCABULARY))
    trainer = trainer_in(subject, tmp_path, rows=rows, gradient_accumulation_steps=4, max_steps=2, **PLAIN)
    with pytest.raises(DataError, match="the stream has 3 micro-batches of 2 rows, a step needs 4"):
        trainer.train()


def test_a_stream_without_rows_is_an_error(subject, tmp_path):
    rows = stream_of(subject.rows(6, VOCABULARY)).filter(lambda row: False)
    with pytest.raises(DataError, match="the training stream has no rows"):
        trainer_in(subject, tmp_path, rows=rows, max_steps=2, **PLAIN)


@pytest.mark.parametrize("own", [True, False])
def test_the_model_card_of_a_trainer_goes_with_its_run(run, own):
    """transformers writes it for the hub; a README of the user's stays."""
    card = run / "README.md"
    card.write_text("---\ntags:\n- generated_from_trainer\n---\n# run\n")
    if own:
        card.write_text("# My runs\n---\n- generated_from_trainer\n---\n")
    remove_run(run)
    assert card.exists() == own


def test_the_end_of_a_stream_that_fills_no_step_is_said_and_reaches_no_other_step(subject, tmp_path, capsys):
    """Five micro-batches make two steps of two; the fifth is left out of the next pass's first step."""
    rows = subject.rows(10, VOCABULARY)
    losses = []
    for name, given in (("whole", rows), ("short", rows.select(range(8)))):
        trainer = trainer_in(subject, tmp_path / name, rows=stream_of(given), max_steps=4, **PLAIN)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]
    assert capsys.readouterr().out.count("the last 1 of the stream's micro-batches fill no step of 2") == 1


def test_a_stream_goes_on_in_the_pass_and_at_the_row_where_it_stopped(subject, tmp_path):
    rows, words = subject.rows(12, VOCABULARY), {"max_steps": 7, "neftune_noise_alpha": None}
    whole = trainer_in(subject, tmp_path / "run", rows=stream_of(rows), **words)
    seen = Seen(whole)
    whole.train()
    for layout in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}):
        again = trainer_in(subject, tmp_path / "again", rows=stream_of(rows), **{**words, **layout})
        seen_again = Seen(again)
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-5"))
        assert seen_again.rows[:8] == seen.rows[20:28]
        if not layout:
            assert losses_of(again) == losses_of(whole)


def test_a_warm_up_that_fills_the_training_is_said(subject, tmp_path, capsys):
    trainer = trainer_in(subject, tmp_path, max_steps=1, **PLAIN)
    before = weights_of(trainer)
    trainer.train()
    assert "warmup_steps = 2 and the training has 1: " in capsys.readouterr().out
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_every_key_of_a_config_says_what_a_resumed_run_does_with_it():
    kinds = {BASE, ROWS, FIXED, APPLIED, FREE}
    assert {field.name for field in fields(RunConfig)} <= set(ON_RESUME)
    assert set(ON_RESUME.values()) == kinds


def test_hashes_of_rows_are_quick():
    import time

    import pyarrow as pa

    ids = pa.ListArray.from_arrays(
        pa.array(range(0, 10_000_001, 1000), pa.int32()), pa.array(np.zeros(10_000_000, np.int32))
    )
    rows = Dataset(pa.table({"input_ids": ids, "labels": ids}))
    started = time.process_time()
    data_record(rows)
    assert 80e6 / (time.process_time() - started) > 100e6  # bytes per second
