"""Kills a training at random moments and looks at what it left.

Each try is a copy of this process, which has everything loaded; it trains on from the newest checkpoint, saves after
every step, and is killed with SIGKILL.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from oribi.selftest.subject import Subject
from tests.trust import forks
from tests.trust.runs import losses_of, trainer_in, weights_of

STEPS = 8


def read(checkpoint: Path) -> int:
    """Reads every file of a checkpoint; returns its step."""
    load_file(checkpoint / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(checkpoint / name, weights_only=False)
    json.loads((checkpoint / "adapter_config.json").read_text())
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"
    return state["global_step"]


def train_on(subject: Subject, folder: Path) -> None:
    """In a child: train from the newest checkpoint to the end; a file tells how many steps are done."""
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer = trainer_in(subject, folder, max_steps=STEPS)
    done = folder.with_suffix(".done")
    real = trainer.callback_handler.on_step_end

    def count(args, state, control):
        done.with_suffix(".new").write_text(str(state.global_step))
        os.replace(done.with_suffix(".new"), done)
        return real(args, state, control)

    trainer.callback_handler.on_step_end = count
    trainer.train(resume_from_checkpoint=newest)


def kill(subject: Subject, folder: Path, after_seconds: float) -> bool:
    """One try; whether the child was killed before it was finished."""
    child = forks.start(lambda: train_on(subject, folder))
    deadline = time.monotonic() + after_seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill_at_random_moments(subject: Subject, folder: Path, tries: int) -> dict[str, Any]:
    """What so many killed trainings left in `folder`."""
    draw = random.Random(0)
    start = time.monotonic()
    whole = trainer_in(subject, folder / "whole", max_steps=STEPS, save_strategy="no")
    whole.train()
    seconds = 2.0 * (time.monotonic() - start)
    found = {"killed": 0, "finished": 0, "in_a_save": 0, "most_steps_lost": 0, "rounds": 0}
    run, newest = folder / "run-0", 0
    while found["killed"] < tries:
        start = time.monotonic()
        if kill(subject, run, draw.uniform(0.05, 1.0) * seconds):
            found["killed"] += 1
        else:  # the first training, which also imported what it needs, was slower than its copies
            found["finished"] += 1
            seconds = min(seconds, time.monotonic() - start)
        found["in_a_save"] += bool(list(run.glob("_partial*")))
        checkpoints = sorted(run.glob("checkpoint-*"))
        steps = [read(checkpoint) for checkpoint in checkpoints]
        done = run.with_suffix(".done")
        reached = int(done.read_text()) if done.exists() else 0
        latest = max(steps, default=0)
        assert latest >= newest, f"the newest checkpoint was {newest} and is {latest}"
        found["most_steps_lost"] = max(found["most_steps_lost"], reached - latest)
        newest = latest
        if newest == STEPS:
            found["rounds"] += 1
            shutil.rmtree(run)
            done.unlink()
            run, newest = folder / f"run-{found['rounds']}", 0
    resumed = trainer_in(subject, run, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if newest else None)
    expected, ended = weights_of(whole), weights_of(resumed)
    found["bit_equal"] = all(torch.equal(ended[name], expected[name]) for name in expected)
    found["bit_equal"] &= losses_of(resumed) == losses_of(whole)
    found["leftovers"] = sorted(path.name for path in run.iterdir() if "partial" in path.name)
    return found
