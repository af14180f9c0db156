"""What the shell, the environment and typing errors do to the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oribi.cli import main


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command line in a shell, `oribi` standing for this one."""
    ours = command.replace("oribi", f"{sys.executable} -m oribi")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {ours}"], capture_output=True, text=True, timeout=120, env=variables
    )


@pytest.mark.skipif(os.name == "nt", reason="asks a POSIX shell")
def test_closed_streams_and_readers_that_leave_change_nothing():
    closed = shell(
        "oribi train --lora_r 0 --check >&-; oribi version >&-; oribi version 2>&-; oribi --help | head -1"
    )
    assert "Traceback" not in closed.stderr
    assert "lora_r = 0" in closed.stderr
    assert closed.returncode == 0
    assert closed.stdout.splitlines()[0].startswith("oribi 0")


def test_help_and_version_have_their_usual_names(oribi):
    for words in (["-h"], ["help"], ["--help"]):
        assert "Usage: oribi" in oribi(*words).out
    assert "Usage: oribi chat" in oribi("help", "chat").out == oribi("chat", "-h").out
    assert oribi("version").out == oribi("-V").out == oribi("--version").out
    assert oribi("version").out.startswith("oribi ")


def test_an_unexpected_error_is_one_message_and_a_file(oribi, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("so it goes")

    monkeypatch.setattr("oribi.run.run", fail)
    result = oribi("train", "--model", "m", "--dataset", "d")
    assert result.code == 1
    first, second = result.err.splitlines()[-2:]
    assert first == "this is a bug in oribi, or in a library that it calls: ZeroDivisionError: so it goes"
    trace = Path(second.split()[4].rstrip(";"))
    assert "so it goes" in trace.read_text()
    trace.unlink()


def test_a_shortage_of_memory_is_no_bug(oribi, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("oribi.run.run", fail)
    result = oribi("train", "--model", "m", "--dataset", "d")
    assert result.code == 1
    assert result.err.splitlines()[-2:] == [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "End other programs on the GPU, or let `oribi estimate` show what fits",
    ]


def test_an_error_of_the_disk_is_no_bug(oribi, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device", "/mnt/x")

    monkeypatch.setattr("oribi.run.run", fail)
    result = oribi("train", "--model", "m", "--dataset", "d")
    assert (result.code, result.err.splitlines()[-1]) == (1, "/mnt/x: No space left on device")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_errors_have_colour_on_terminals_only_and_not_with_no_color(no_color, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "argv", ["oribi", "train", "--lora_r", "0"])
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit):
            main()
        assert ("\x1b[31m" in capsys.readouterr().err) == (terminal and not no_color)


def test_a_run_that_is_not_there_is_told_with_the_nearest(oribi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    for words in (
        ["export", "runs/latst", "--to", "merged"],
        ["inspect", "run", "runs/latst"],
        ["chat", "runs/latst"],
    ):
        result = oribi(*words)
        assert result.code == 1
        assert "there is no folder runs/latst; did you mean runs/latest?" in result.err


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("base_model: m\ndatasets:\n  - path: d\n    type: alpaca\n", "Axolotl"),
        ("model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: d\n", "LLaMA-Factory"),
        ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\n", "TRL"),
    ],
)
def test_another_programs_config_is_recognised(oribi, tmp_path, text, program):
    file = tmp_path / "other.yaml"
    file.write_text(text)
    for verb in ("train", "estimate"):
        said = oribi(verb, file).err
        assert f"This looks like a config of {program}; `oribi convert {file}` reads it." in said
    file.write_text("base_model: m\ndataset: d\nlora_rnk: 8\n")
    assert "oribi convert" not in oribi("train", file).err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "MODEL", "--to", "gguf:q4km"], "did you mean q4_k_m?"),
        (["export", "MODEL", "--to", "megred"], "did you mean merged?"),
        (["estimate", "--model", "m", "--dataset", "d", "--gpu", "H1000"], "did you mean H100?"),
        (["train"], "give a CONFIG.yaml"),
    ],
)
def test_a_word_that_is_nearly_right_is_answered_with_the_right_one(oribi, tiny_folder, words, says):
    result = oribi(
        *(str(tiny_folder) if word == "MODEL" else word for word in words),
        *OUTPUT[: 2 * (words[0] == "export")],
    )
    assert result.code > 0
    assert says in result.err


OUTPUT = ["--output", "out"]


@pytest.mark.parametrize("folder", ["x" * 300, "/proc/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_is_a_message(oribi, tiny_folder, data_file, folder):
    result = oribi("train", "--model", tiny_folder, "--dataset", data_file, "--output_dir", folder)
    assert result.code == 1
    assert "output_dir" in result.err
    assert "bug" not in result.err
