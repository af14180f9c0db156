"""Checkpoints are whole or not there, whatever ends a run; what cannot be written is said and loses nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from oribi.cli import main
from oribi.errors import ConfigError, TrainingError
from oribi.run_record import require_writable
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.checkpoints import failed_write, publish
from oribi.train.trainer import SFTTrainer
from tests.trust import forks, runs
from tests.trust.kills import kill_at_random_moments, read
from tests.trust.runs import losses_of, trainer_in, weights_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


@pytest.fixture(scope="module")
def whole(subject, tmp_path_factory) -> SFTTrainer:
    """A run of five steps that nothing stopped."""
    trainer = trainer_in(subject, tmp_path_factory.mktemp("whole"), max_steps=5, save_strategy="no")
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_training_killed_at_random_moments_leaves_readable_checkpoints(subject, tmp_path):
    tries = int(os.environ.get("ORIBI_KILLS", 4))  # `make test-faults` takes a hundred
    found = kill_at_random_moments(subject, tmp_path, tries)
    print(found)
    assert found["killed"] == tries
    assert found["most_steps_lost"] <= 1  # it saves after every step
    assert found["bit_equal"]
    assert found["leftovers"] == []


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on_bit_for_bit(
    subject, tmp_path, capsys, whole, number, ends
):
    trainer = trainer_in(subject, tmp_path, max_steps=5, save_strategy="no")
    collate = trainer.data_collator

    def collate_and_stop(examples):
        if trainer.state.global_step == 2 and trainer.stop_on_signal.asked is None:
            os.kill(os.getpid(), number)
        return collate(examples)

    trainer.data_collator = collate_and_stop
    with pytest.raises(ends) as ended:
        trainer.train()
    assert ends is KeyboardInterrupt or ended.value.code == 128 + number
    assert "the run is saved in" in capsys.readouterr().out
    checkpoint = Path(get_last_checkpoint(str(tmp_path)))
    assert read(checkpoint) == 3
    resumed = trainer_in(subject, tmp_path, max_steps=5, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    expected = weights_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())


def oribi(*words: object) -> None:
    """`oribi ...`, in a copy of this process."""
    sys.argv = ["oribi", *map(str, words)]
    main()


def training(subject: Subject, folder: Path, steps: int) -> list[str]:
    """The words of a command that trains on forty rows and writes to `folder`/run."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"row {n} of many"}) for n in range(40)) + "\n")
    words = f"train --model {subject.path} --dataset {data} --output_dir {folder}/run --max_steps {steps}"
    return [*words.split(), "--max_seq_length", "64", "--dtype", "float32", "--report", "false"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_answers_a_signal_with_its_code_after_saving(subject, tmp_path, number, code):
    words = training(subject, tmp_path, steps=4000)
    process = forks.start(lambda: oribi(*words), tmp_path)
    log, deadline = tmp_path / "run/log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.kill(process, number)
    found, said = forks.ended(process), (tmp_path / "err").read_text()
    assert found == code, said[-2000:]
    assert "Traceback" not in said
    assert "the run is saved in" in said
    assert not (tmp_path / "out").read_text()
    assert read(Path(get_last_checkpoint(str(tmp_path / "run")))) >= 3


def test_a_stopped_run_resumes_bit_for_bit(subject, tmp_path):
    """Losses, weights, optimizer, schedule and random state, with 8-bit states and noise on the embeddings."""
    whole = trainer_in(subject, tmp_path / "whole", max_steps=8, save_strategy="no")
    whole.train()
    stopped = trainer_in(subject, tmp_path / "run", max_steps=8, save_strategy="no")
    stopped.stop_on_signal.agree = lambda asked: stopped.state.global_step == 4
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 4
    resumed = trainer_in(subject, tmp_path / "run", max_steps=8, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    expected = weights_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    ours, theirs = (t.optimizer.optimizer.state_dict()["state"] for t in (resumed, whole))
    assert any(state.get("state1") is not None for state in ours.values())  # 8 bit
    for index, state in ours.items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[index][k])) for k, v in state.items()
        )
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


def test_handlers_of_signals_come_back(subject, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer_in(subject, tmp_path, max_steps=1, save_strategy="no").train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_ends_at_once_wherever_the_training_is(subject, tmp_path, caplog):
    """After the first one the program's own handlers are back: in evaluation, in saving, in waiting for rows."""
    trainer = trainer_in(subject, tmp_path, max_steps=3, save_strategy="no")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    collate, seen = trainer.data_collator, []

    def collate_and_stop(examples):
        if not seen:
            os.kill(os.getpid(), signal.SIGHUP)
            seen.append({number: signal.getsignal(number) for number in before})
        return collate(examples)

    trainer.data_collator = collate_and_stop
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGHUP
    assert seen == [before]
    assert (
        "SIGHUP: training ends after this step, with a checkpoint; a second signal ends it at once"
        in caplog.text
    )
    assert read(tmp_path / "checkpoint-1") == 1


def test_under_nohup_a_closed_terminal_ends_nothing(subject, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = trainer_in(subject, tmp_path, max_steps=2, save_strategy="no")
        collate = trainer.data_collator
        trainer.data_collator = lambda examples: os.kill(os.getpid(), signal.SIGHUP) or collate(examples)
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.global_step == 2


def trained_on(folder: Path) -> bool:
    """Whether the three steps of `training` ended well in `folder`/run."""
    log = (folder / "run/log.jsonl").read_text().splitlines()
    return (folder / "run/adapter/adapter_model.safetensors").is_file() and len(log) == 4


@pytest.mark.long
def test_a_training_whose_reader_went_away_trains_on_and_ends_well(subject, tmp_path):
    """A process from its start, as a shell begins it."""
    words = shlex.join([sys.executable, "-m", "oribi", *training(subject, tmp_path, steps=3)])
    done = subprocess.run(
        ["bash", "-c", f"{words} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0", done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert trained_on(tmp_path)


def test_a_training_without_an_output_trains_on_and_ends_well(subject, tmp_path):
    words = training(subject, tmp_path, steps=3)

    def train():
        os.close(1)
        sys.stdout = None  # as Python begins after `>&-`
        oribi(*words)

    code, said = forks.ended(forks.start(train, tmp_path)), (tmp_path / "err").read_text()
    assert code == 0, said[-2000:]
    assert "Traceback" not in said
    assert trained_on(tmp_path)


def test_output_that_is_closed_is_dropped():
    import io

    from oribi.text import LastingStream, say

    read, write = os.pipe()
    os.close(read)
    stream = LastingStream(lambda: broken)
    with os.fdopen(write, "w") as broken:
        print("lost", file=stream, flush=True)
        print("lost, too", file=stream, flush=True)
    closed = io.StringIO()
    closed.close()
    print("lost", file=LastingStream(lambda: closed), flush=True)
    print("lost", file=LastingStream(lambda: None), flush=True)
    say("read")


def test_a_full_disk_ends_neither_the_run_nor_the_earlier_checkpoints(subject, tmp_path, monkeypatch, caplog):
    trainer = trainer_in(subject, tmp_path, max_steps=5)
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **k: full_disk(trainer, 3, real, *a, **k))
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        f"checkpoint-{n}" for n in (1, 2, 4, 5)
    ]
    assert not list(tmp_path.glob("_partial*"))
    assert "checkpoint-3 could not be written" in caplog.text
    assert "training continues" in caplog.text
    assert [read(path) for path in sorted(tmp_path.glob("checkpoint-*"))] == [1, 2, 4, 5]


def test_a_full_disk_at_the_last_checkpoint_is_an_error(subject, tmp_path, monkeypatch):
    trainer = trainer_in(subject, tmp_path, max_steps=3)
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **k: full_disk(trainer, 3, real, *a, **k))
    with pytest.raises(
        TrainingError,
        match=r"checkpoint-3 could not be written: .*No space left.*newest that is whole is .*checkpoint-2\. Nor could it",
    ):
        trainer.train()
    assert [read(path) for path in sorted(tmp_path.glob("checkpoint-*"))] == [1, 2]


def full_disk(trainer, step: int, real, value, target, *args, **options):
    """torch.save on a disk that is full during one step."""
    if trainer.state.global_step == step:
        raise OSError(28, "No space left on device")
    return real(value, target, *args, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX's")
def test_files_that_really_cannot_grow_are_reported(subject, tmp_path):
    """The kernel refuses the write within torch.save, as on a full disk."""
    import resource

    def train():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # bytes: the adapter fits, the optimizer's state does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        runs.main(subject.path, str(tmp_path / "run"), "max_steps=2")

    code, said = forks.ended(forks.start(train, tmp_path)), (tmp_path / "err").read_text()
    assert code == 1
    assert "checkpoint-1 could not be written" in said
    assert "TrainingError" in said
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_folder_that_cannot_be_written_is_refused_before_training(subject, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"output_dir = .*file/run: cannot be written to \(Not a directory\)"
    ):
        trainer_in(subject, tmp_path / "file/run")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user"
)
def test_a_folder_of_another_user_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o755)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            require_writable(tmp_path)
        except ConfigError as error:
            os.write(tell, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with os.fdopen(told) as message:
        assert "cannot be written to (Permission denied)" in message.read()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes; afterwards it is gone."""
    mounted = []

    def mount(size: int, *options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(place)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a file system"
)


@needs_mount
def test_a_read_only_folder_is_refused_before_training(subject, small_disk):
    place = small_disk(1 << 20, "ro")
    with pytest.raises(ConfigError, match=r"run: cannot be written to \(Read-only file system\)"):
        trainer_in(subject, place / "run")


@needs_mount
def test_a_full_disk_loses_neither_earlier_checkpoints_nor_the_last(
    subject, small_disk, caplog, tmp_path, monkeypatch
):
    """The last checkpoint, which has no room beside the others, lies elsewhere, whole, and the error says where."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = small_disk(1 << 20)  # bytes: one checkpoint of this model and half of another
    trainer = trainer_in(subject, place, max_steps=3, save_steps=1)
    with pytest.raises(
        TrainingError, match=r"checkpoint-3 could not be written: .*It lies in (\S+) instead"
    ) as error:
        trainer.train()
    assert "checkpoint-2 could not be written" in caplog.text
    assert [read(path) for path in sorted(place.glob("checkpoint-*"))] == [1]
    assert not list(place.glob("_partial*"))
    rescued = Path(re.search(r"It lies in (\S+) instead", str(error.value))[1])
    assert read(rescued) == 3
    saved = load_file(rescued / "adapter_model.safetensors")
    assert all(torch.equal(saved[n.replace(".default", "")], w) for n, w in weights_of(trainer).items())


def test_a_log_that_cannot_be_written_does_not_end_a_training(subject, tmp_path, caplog):
    (tmp_path / "log.jsonl").mkdir()
    trainer = trainer_in(subject, tmp_path, max_steps=3, save_strategy="no")
    trainer.state.global_step = 0
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "JsonLog":
            callback.on_train_begin = lambda *a, **k: None
    trainer.train()
    assert trainer.state.global_step == 3
    assert caplog.text.count("cannot be written: Is a directory") == 1


def test_old_checkpoints_go_and_the_best_one_stays_under_its_own_name(subject, tmp_path):
    trainer = trainer_in(
        subject, tmp_path, evaluates=4, max_steps=4, save_total_limit=2, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=5e-2,
    )  # fmt: skip
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert len(left) <= 2
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.name in left
    saved = json.loads((tmp_path / left[-1] / "trainer_state.json").read_text())
    assert "_partial" not in str(saved["best_model_checkpoint"])


def test_a_checkpoint_replaces_one_of_its_name_at_once(tmp_path):
    final = tmp_path / "checkpoint-3"
    final.mkdir()
    (final / "old").write_text("old")
    partial = tmp_path / "_partial/checkpoint-3"
    partial.mkdir(parents=True)
    (partial / "new").write_text("new")
    publish(partial, final)
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_only_failures_of_the_disk_are_taken_for_such(subject, tmp_path, monkeypatch):
    assert failed_write(OSError(28, "No space left on device"))
    assert failed_write(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert not failed_write(RuntimeError("CUDA error: out of memory"))
    trainer = trainer_in(subject, tmp_path, max_steps=2)
    monkeypatch.setattr(torch, "save", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
