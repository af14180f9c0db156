"""`oribi train --gpus`: the processes that it starts, their signals, exit codes and restarts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import oribi.cli.train
from oribi.cli import build_command
from oribi.errors import ConfigError
from oribi.launch import OTHER_CONNECTIONS, chosen_gpus, free_port, start_together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# rank 1 does what it is told; the others wait until they are ended, and leave a word
WORKER = """
import os, signal, sys, time
folder, act = sys.argv[1], sys.argv[2]
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
def ended(number, frame):
    open(f"{folder}/ended-{rank}", "a").write(f"{number} ")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, ended)
open(f"{folder}/{attempt}-{rank}", "w").write(" ".join(os.environ.get(n, "-") for n in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")))
if act == "ends":
    sys.exit(0)
if rank == "1" and act == "fails":
    sys.exit(3)
if rank == "1" and act == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "is killed once" and attempt == "1":
    sys.exit(0)
if rank == "1" and act == "is killed once":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("asked", "found", "chosen"),
    [
        ("all", 3, [0, 1, 2]),
        ("2", 4, [0, 1]),
        ("0,2", 3, [0, 2]),
        ("2,", 3, [2]),
        ("0", 2, "gpus = 0: this machine has 2"),
        ("5", 2, "gpus = 5: this machine has 2"),
        ("all", 0, "gpus = all: this machine has no CUDA GPU"),
        ("0,4", 2, "there is no GPU 4"),
        ("1,1", 2, "a GPU is named twice"),
        ("both", 2, "must be all, a number of GPUs, or indices such as 0,2"),
        ("-1", 2, "must be all, a number"),
    ],
)
def test_gpus_are_all_a_number_or_indices(asked, found, chosen):
    if isinstance(chosen, list):
        assert chosen_gpus(asked, found) == chosen
    else:
        with pytest.raises(ConfigError, match=chosen):
            chosen_gpus(asked, found)


@pytest.mark.parametrize(
    ("act", "code", "attempts"),
    [("ends", 0, 1), ("fails", 3, 1), ("is killed", 137, 1), ("is killed once", 0, 2)],
)
def test_the_exit_code_is_that_of_the_process_which_failed_first(
    act, code, attempts, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    began = time.monotonic()
    assert start_together(["-c", WORKER, str(tmp_path), act], gpus=[0, 2], restarts=attempts - 1) == code
    assert time.monotonic() - began < 60  # the other one did not have to be waited for
    ranks = {path.name for path in tmp_path.iterdir() if "-" in path.name and path.name[0].isdecimal()}
    assert ranks == {f"{attempt}-{rank}" for attempt in range(attempts) for rank in range(2)}
    assert (tmp_path / "0-1").read_text() == "2 1 4,6"
    said = capfd.readouterr().out
    assert ("process 1 was ended by SIGKILL" in said) == (act in ("is killed", "is killed once"))
    assert ("start again" in said) == (attempts > 1)


def test_a_signal_reaches_every_process_once_and_nothing_is_started_anew(tmp_path):
    code = f"""
import sys
from oribi.launch import start_together
sys.exit(start_together(["-c", {WORKER!r}, {str(tmp_path)!r}, "waits"], gpus=[0, 1], restarts=2))
"""
    started = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    try:
        while len(list(tmp_path.glob("0-*"))) < 2:
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143
    finally:
        started.kill()
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in range(2)] == ["15 ", "15 "]
    assert not list(tmp_path.glob("1-*"))


def test_the_command_starts_a_process_per_gpu_with_its_own_words(monkeypatch, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: m\ndataset: [rows.jsonl]\ngpus: all\n")
    seen = []
    monkeypatch.setattr(oribi.cli.train, "_gpus_here", lambda: 2)
    monkeypatch.setattr(oribi.cli.train, "start_together", lambda *given: seen.append(given) or 143)
    monkeypatch.setattr(sys, "argv", ["oribi", "train", str(config), "--restarts", "2"])
    done = CliRunner().invoke(build_command(), sys.argv[1:])
    assert done.exit_code == 143, done.output
    assert seen == [(["-m", "oribi", "train", str(config), "--restarts", "2"], [0, 1], 2)]


def test_a_process_that_a_launcher_started_trains_and_resumes_after_a_restart(monkeypatch):
    seen = []

    def run(settings, overwrite):
        seen.append((settings.resume, overwrite))
        return {"lora": Path("runs/adapter")}

    monkeypatch.setattr("oribi.run.run", run)
    words = ["train", "--model", "m", "--dataset", "d", "--gpus", "2", "--overwrite"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        done = CliRunner().invoke(build_command(), words)
        assert done.exit_code == 0, done.output
    assert seen == [("false", True), ("true", False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "give --gpus all"),
        (["--nodes", "2", "--gpus", "1"], "--nodes needs --rendezvous HOST:PORT"),
        (["--nodes", "2", "--gpus", "1", "--rendezvous", "node1"], "rendezvous = 'node1'; must be HOST:PORT"),
        (["--gpus", "2", "--total_batch_size", "6"], "6 is no multiple of the 4 rows that 2 GPUs take at once; give 8, or another"),
        (["--gpus", "1", "--nodes", "3", "--rendezvous", "n:1", "--total_batch_size", "8"], "the 6 rows that 3 GPUs .* give 12"),
    ],
)  # fmt: skip
def test_machines_and_batches_that_do_not_fit_together_are_refused_before_anything_starts(
    monkeypatch, words, message
):
    monkeypatch.setattr(oribi.cli.train, "_gpus_here", lambda: 2)
    monkeypatch.setattr(oribi.cli.train, "start_together", lambda *given: pytest.fail("started"))
    done = CliRunner().invoke(build_command(), ["train", "--model", "m", "--dataset", "d", *words])
    assert isinstance(done.exception, ConfigError)
    assert re.search(message, str(done.exception))


@pytest.mark.long
@pytest.mark.parametrize(("act", "stops", "codes"), [("ends", False, {0}), ("waits", True, {143})])
def test_two_machines_meet_and_end_with_the_same_codes(tmp_path, act, stops, codes):
    """Both are this one, each with a process."""
    code = f"""
import sys
from oribi.launch import start_on_machines
sys.exit(start_on_machines(["-c", {WORKER!r}, {str(tmp_path)!r}, {act!r}], [0], 2, "127.0.0.1:{free_port()}"))
"""
    agents = [subprocess.Popen([sys.executable, "-c", code], env=os.environ) for _ in range(2)]
    try:
        ends = time.monotonic() + 120
        while len(list(tmp_path.glob("0-*"))) < 2 and time.monotonic() < ends:
            time.sleep(0.05)
        if stops:
            for agent in agents:
                agent.send_signal(signal.SIGTERM)
        assert {agent.wait(120) for agent in agents} == codes
    finally:
        for agent in agents:
            agent.kill()
    assert sorted((tmp_path / f"0-{rank}").read_text() for rank in range(2)) == ["2 0 0", "2 0 0"]


@pytest.mark.parametrize("name", OTHER_CONNECTIONS)
def test_another_connection_that_accelerates_launcher_asks_for_is_refused_before_anything_loads(
    name, oribi, monkeypatch
):
    monkeypatch.setenv(name, "true")
    done = oribi("train", "--model", "missing", "--dataset", "missing")
    assert done.code == 1
    assert f"asks for {OTHER_CONNECTIONS[name]}, and a run connects its processes itself" in done.err
