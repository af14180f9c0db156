"""Kill one of two processes of `oribi train` at random moments: python -m tests.trust.kills_of_ranks CONFIG FOLDER KILLS [FLAG VALUE].

The launcher is the real one; its processes are forks of this one, which has everything imported. A run that ends before it is
killed makes place for the next one. Prints one line of JSON with what was found.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import oribi.cli
import oribi.launch
import oribi.run
from oribi.run_record import own_checkpoints

PROCESSES = 2


class Forked:
    """A process as `subprocess.Popen` gives it; the words after `-m oribi` are run in a fork."""

    def __init__(self, words: list[str], env: dict[str, str], **ignored: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            KILLER.started(self)
            return
        code = 1
        try:
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            output = os.open(KILLER.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = oribi.cli._run(words[3:])
        finally:
            os._exit(code if isinstance(code, int) else 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            KILLER.look()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Killer:
    """Kills one process of each attempt of a run, and counts what it cost.

    Args:
        seconds: within which an attempt is killed; 0 kills none.
        kills: how many.
    """

    def __init__(self, seconds: float, kills: int, output: Path) -> None:
        self.seconds, self.kills, self.output = seconds, kills, output
        self.draw, self.group, self.folder = random.Random(1), [], Path()
        self.found = {"killed": 0, "steps_lost": [], "seconds_to_restart": [], "steps_at_kill": []}
        self.killed_at: float | None = None
        self.reached = 0

    def started(self, process: Forked) -> None:
        if len(self.group) == PROCESSES:
            self.group = []
        if not self.group:
            self.at = time.monotonic() + self.draw.uniform(0.02, 1.0) * self.seconds
            if self.killed_at is not None:
                self.found["seconds_to_restart"].append(round(time.monotonic() - self.killed_at, 1))
                newest = max((one.step for one in own_checkpoints(self.folder)), default=0)
                self.found["steps_lost"].append(self.reached - newest)
            self.killed_at = None
        self.group.append(process)

    def look(self) -> None:
        due = self.seconds and self.killed_at is None and time.monotonic() > self.at
        if due and len(self.group) == PROCESSES and self.found["killed"] < self.kills:
            victim = self.draw.choice(self.group)
            if victim.returncode is not None:
                return
            if os.waitid(
                os.P_PID, victim.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):  # it has ended by itself
                return
            log = self.folder / "log.jsonl"
            steps = (
                [json.loads(line).get("step", 0) for line in log.read_text().splitlines()]
                if log.exists()
                else []
            )
            os.kill(victim.pid, signal.SIGKILL)
            self.killed_at, self.reached = time.monotonic(), max(steps, default=0)
            self.found["killed"] += 1
            self.found["steps_at_kill"].append(self.reached)


KILLER: Killer


def result_of(folder: Path) -> tuple[list[Any], bytes]:
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
    return losses, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def train(config: str, folder: Path, restarts: int, *words: str) -> int:
    KILLER.folder, KILLER.group, KILLER.killed_at = folder, [], None
    return oribi.launch.start_together(
        ["-m", "oribi", "train", config, "--output_dir", str(folder), *words], range(PROCESSES), restarts
    )


def main(config: str, out: str, kills: int, *words: str) -> None:
    global KILLER
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.Popen = Forked  # of this process alone: what the launcher starts
    KILLER = Killer(0.0, 0, folder / "output.txt")
    began = time.monotonic()
    assert train(config, folder / "whole", 0, *words) == 0, (folder / "output.txt").read_text()
    seconds = time.monotonic() - began
    expected = result_of(folder / "whole")
    KILLER = Killer(seconds, kills, folder / "output.txt")
    found, runs, began = KILLER.found, 0, time.monotonic()
    found["same"] = True
    while found["killed"] < kills:
        run = folder / f"run-{runs}"
        assert train(config, run, kills, *words) == 0, (folder / "output.txt").read_text()[-3000:]
        found["same"] &= result_of(run) == expected
        runs += 1
    found |= {
        "runs": runs,
        "seconds_undisturbed": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
