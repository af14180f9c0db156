"""Every verb on a tiny run: what people see, what programs read, and how it ends where something is wrong."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from oribi import __version__
from oribi.errors import ConfigError

HELP_SECONDS = 0.5


def test_help_is_quick_plain_and_names_every_verb():
    from oribi.cli import VERBS

    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "oribi", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
    assert min(times) < HELP_SECONDS
    assert all(f"\n  {verb}" in done.stdout for verb in VERBS)
    assert "\u2500" not in done.stdout  # no boxes where there is no terminal
    assert "\x1b" not in done.stdout


def test_a_prompt_is_answered(oribi, trained_run):
    plain = oribi("chat", trained_run, "--prompt", "the red fox", "--temperature", 0, "--max-new-tokens", 8)
    assert plain.code == 0
    assert plain.out.strip()
    assert "oribi:" not in plain.out  # what loading says goes to standard error
    (record,) = oribi(
        "chat", trained_run, "-p", "the red fox", "--temperature", 0, "--max-new-tokens", 8, "--json"
    ).records
    assert record["answer"].strip() == plain.out.strip()
    assert 1 <= record["tokens"] <= 8


def test_the_base_answers_without_the_adapter(oribi, trained_run, tiny_folder):
    ask = ["-p", "the red fox", "--temperature", 0, "--max-new-tokens", 8, "--json"]
    (base,) = oribi("chat", trained_run, "--base", *ask).records
    (model,) = oribi("chat", tiny_folder, *ask).records
    (tuned,) = oribi("chat", trained_run, *ask).records
    assert base["answer"] == model["answer"]
    assert base["answer"] != tuned["answer"]
    refused = oribi("chat", tiny_folder, "--base", *ask)
    assert refused.code == 1
    assert "has no adapter" in refused.err


def test_answers_of_the_base_and_the_trained_model_are_compared(oribi, trained_run, tiny_folder):
    ask = ["-p", "the red fox", "-p", "and then", "--temperature", 0, "--max-new-tokens", 8]
    apart = {
        name: oribi("chat", trained_run, *options, *ask, "--json").records
        for name, options in (("base", ["--base"]), ("tuned", []))
    }
    both = oribi("chat", trained_run, "--compare", *ask, "--json").records
    assert [(turn["prompt"], turn["model"]) for turn in both] == [
        ("the red fox", "base"), ("the red fox", "tuned"), ("and then", "base"), ("and then", "tuned")
    ]  # fmt: skip
    for name, turns in apart.items():
        assert [turn["answer"] for turn in both if turn["model"] == name] == [
            turn["answer"] for turn in turns
        ]
    assert all(turn["tokens_per_second"] > 0 for turn in both)
    shown = oribi("chat", trained_run, "--compare", *ask).out.splitlines()
    assert (
        sum(line.startswith("base ") for line in shown)
        == sum(line.startswith("tuned ") for line in shown)
        == 2
    )
    assert "has no adapter" in oribi("chat", tiny_folder, "--compare", *ask).err
    assert "leave out --base" in oribi("chat", trained_run, "--compare", "--base", *ask).err


def test_a_terminal_shows_the_answer_as_it_comes_and_its_speed(oribi, trained_run, monkeypatch):
    monkeypatch.setattr("oribi.cli.chat.sys.stdout.isatty", lambda: True, raising=False)
    shown = oribi(
        "chat", trained_run, "--compare", "-p", "the red fox", "--temperature", 0, "--max-new-tokens", 8
    )
    assert shown.out.startswith("base:")
    assert "\ntuned:" in shown.out
    assert len(re.findall(r"\d+ tokens, [\d.]+ tokens/s", shown.err)) == 2


def test_lines_of_a_pipe_are_turns_of_one_conversation(oribi, trained_run, monkeypatch):
    import io

    def piped(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return oribi("chat", trained_run, "--temperature", 0, "--max-new-tokens", 6, "--json").records

    turns = piped("the red fox\n\nsees a bird\n/new\nthe red fox\n/quit\nnever asked\n")
    assert [turn["prompt"] for turn in turns] == ["the red fox", "sees a bird", "the red fox"]
    assert turns[0]["answer"] == turns[2]["answer"]
    (alone,) = piped("sees a bird")
    assert turns[1]["answer"] != alone["answer"]  # it saw the first turn


def test_eval_compares_base_and_tuned(oribi, trained_run, data_file):
    records = oribi("eval", trained_run, "--samples", 2, "--json").records
    base, tuned, *samples = records
    assert tuned["loss"] < base["loss"]
    assert base["rows"] == tuned["rows"] == 8
    assert base["tokens"] == tuned["tokens"] > 0
    assert 0 <= tuned["stop_rate"] <= 1
    assert [sorted(sample) for sample in samples] == [["base", "expected", "prompt", "sample", "tuned"]] * 2
    plain = oribi("eval", trained_run, "--samples", 1)
    assert f"{tuned['loss']:.4f}" in plain.out
    (_, whole, *_) = oribi("eval", trained_run, "--dataset", data_file, "--samples", 0, "--json").records
    assert whole["rows"] == 40


def test_the_evaluated_loss_is_the_trainers(oribi, trained_run):
    """The same rows and the same mean as the trainer's last evaluation."""
    log = [json.loads(line) for line in (trained_run / "log.jsonl").read_text().splitlines()]
    last = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    tuned = oribi("eval", trained_run, "--samples", 0, "--json").records[1]
    if last:
        assert tuned["loss"] == pytest.approx(last[-1], rel=1e-4)


def test_eval_without_held_out_rows_says_what_to_do(oribi, tiny_folder):
    result = oribi("eval", tiny_folder)
    assert result.code == 1
    assert "--dataset FILE" in result.err


def test_exports_are_written_and_checked(oribi, trained_run, tmp_path):
    result = oribi(
        "export", trained_run, "--to", "adapter,merged,gguf:f16,q8_0", "--output", tmp_path, "--json"
    )
    assert result.code == 0, result.err
    forms = {record["form"]: record for record in result.records}
    assert set(forms) == {"adapter", "merged_16bit", "gguf"}
    assert len(forms["gguf"]["files"]) == 2
    assert all(record["passed"] and record["checks"] for record in forms.values())
    assert {record["outcome"] for record in forms.values()} <= {"equal", "close"}
    assert all(check["outcome"] for record in forms.values() for check in record["findings"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_an_export_beyond_its_tolerance_fails_and_says_what_to_do(oribi, trained_run, tmp_path, monkeypatch):
    from oribi.save.verify import KL_TOLERANCE

    monkeypatch.setitem(KL_TOLERANCE, "q8_0", -1.0)
    result = oribi("export", trained_run, "--to", "gguf:q8_0", "--output", tmp_path)
    assert result.code == 1
    assert "different  q8_0: weights read back: the likeliest" in result.err
    assert str(tmp_path / "gguf.rejected") in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["gguf.rejected"]


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("adapter", {"adapter": []}),
        ("lora,merged", {"adapter": [], "merged_16bit": []}),
        ("adapter,merged,gguf:q4_k_m,q8_0", {"adapter": [], "merged_16bit": [], "gguf": ["q4_k_m", "q8_0"]}),
        ("gguf", {"gguf": ["q8_0"]}),
        ("q4_k_m", {"gguf": ["q4_k_m"]}),
        ("GGUF:Q8_0,q8_0", {"gguf": ["q8_0"]}),
        ("gguf-adapter:f16", {"gguf-adapter": ["f16"]}),
    ],
)
def test_forms_are_read(text, forms):
    from oribi.cli.export import read_forms

    assert read_forms(text) == forms


@pytest.mark.parametrize("text", ["", "onnx", "gguf:q9", "merged:q8_0"])
def test_unknown_forms_are_refused(text):
    from oribi.cli.export import read_forms

    with pytest.raises(ConfigError):
        read_forms(text)


def test_data_is_inspected_by_config_and_by_file(oribi, config_file, data_file, tiny_folder, tmp_path):
    by_config = oribi("inspect", "data", config_file, "--rows", 1)
    assert "\u27e6" in by_config.out  # a trained span
    assert "40 in, 40 kept" in by_config.out
    page = tmp_path / "rows.html"
    by_file = oribi(
        "inspect",
        "data",
        data_file,
        "--model",
        tiny_folder,
        "--max-seq-length",
        128,
        "--html",
        page,
        "--json",
    )
    (record,) = by_file.records
    assert record["rows_kept"] == 40
    assert page.is_file()
    unnamed = oribi("inspect", "data", data_file)
    assert unnamed.code == 1
    assert "--model" in unnamed.err


def test_data_is_inspected_with_columns_of_other_names_and_without_its_broken_rows(
    oribi, tiny_folder, tmp_path
):
    rows = tmp_path / "rows.csv"
    rows.write_text("Task,Reply,id\nwhat,that,1\nwhat,,2\n")
    asked = ("inspect", "data", rows, "--model", tiny_folder)
    flags = ("--columns", "question=Task", "--columns", "answer=Reply")
    found = oribi(*asked, *flags, "--malformed", "drop", "--json").records[0]
    assert (found["rows_kept"], found["rows_malformed"], found["unused_columns"]) == (1, 1, ["id"])
    assert "columns not used: id" in oribi(*asked, *flags, "--malformed", "drop").out
    assert "rows.csv:3: 'answer' is empty" in oribi(*asked, *flags).err
    assert "--malformed 'skip': must be error or drop" in oribi(*asked, "--malformed", "skip").err


def test_a_model_is_inspected_without_weights(oribi, tiny_folder, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (record,) = oribi("inspect", "model", bare, "--json").records
    from safetensors import safe_open

    with safe_open(tiny_folder / "model.safetensors", "pt") as file:
        counted = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert record["parameters"] == counted
    assert "LlamaForCausalLM" in oribi("inspect", "model", bare).out


def test_an_adapter_is_inspected(oribi, trained_run, tiny_folder):
    (record,) = oribi("inspect", "adapter", trained_run, "--json").records
    assert record["rank"] == 4
    assert set(record["kinds"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(kind["count"] == 2 and kind["norm"] > 0 for kind in record["kinds"].values())
    assert record["problems"] == []
    refused = oribi("inspect", "adapter", tiny_folder)
    assert refused.code == 1
    assert "is not an adapter" in refused.err


def test_norms_of_products_are_those_of_the_whole_matrix():
    import torch

    from oribi.lora.contents import product_norm

    b, a = torch.randn(40, 3), torch.randn(3, 50)
    assert product_norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-5)


def test_a_run_is_inspected(oribi, trained_run, tmp_path):
    (record,) = oribi("inspect", "run", trained_run, "--json").records
    assert record["steps"] == 4
    assert len(record["losses"]) == 4
    assert record["finished"]
    assert "adapter/adapter_model.safetensors" in record["files"]
    refused = oribi("inspect", "run", tmp_path)
    assert refused.code == 1
    assert "is no run: it has no config.yaml" in refused.err


def test_doctor_names_reasons_and_versions(oribi):
    (record,) = oribi("doctor", "--json").records
    assert set(record["machine"]) == {"device", "memory", "dtype", "triton", "attention"}
    assert record["problems"] == []
    assert record["packages"]["torch"]
    plain = oribi("doctor")
    assert plain.code == 0
    assert "No problems found." in plain.out


def test_doctor_says_what_a_report_of_a_fault_needs(oribi, monkeypatch):
    import platform

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (record,) = oribi("doctor", "--json").records
    assert record["system"]["oribi"] == __version__
    assert record["system"]["python"] == platform.python_version()
    assert record["system"]["os"] == platform.platform()
    assert "online" not in record["files"]["hub"]


@pytest.mark.parametrize(
    ("script", "cuda", "visible", "advice"),
    [
        ("echo 575.57", None, None, "its build has no CUDA"),
        ("echo 575.57", "12.8", "", "CUDA_VISIBLE_DEVICES is ''"),
        ("echo 470.82", "12.8", None, "driver 470.82 is probably too old for CUDA 12.8"),
        ("echo cannot communicate; exit 9", "12.8", None, "the driver does not answer"),
    ],
)
def test_doctor_advises_where_a_driver_is_there_and_torch_finds_no_gpu(
    script, cuda, visible, advice, oribi, monkeypatch, tmp_path
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = oribi("doctor")
    assert done.code == 0
    assert advice in " ".join(done.err.split())


def test_doctor_fails_over_a_package_outside_its_range(oribi, monkeypatch):
    import oribi.cli.doctor as doctor

    real = doctor.version
    monkeypatch.setattr(doctor, "requires", lambda name: ["peft>=0.15"])
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "peft" else real(name))
    result = oribi("doctor")
    assert result.code == 1
    assert "peft 0.1.0 is outside the supported" in result.err


def test_a_wrong_command_line_ends_with_2(oribi):
    assert oribi("chatt").code == 2
    assert oribi("chat").code == 2


def test_training_prints_results_only_and_no_warning_of_libraries(oribi, config_file, tmp_path, caplog):
    """Also with rows cut far shorter than the texts that the check of an export tokenises."""
    out = tmp_path / "out"
    done = oribi("train", config_file, "--output_dir", out, "--max_seq_length", 32, "--max_steps", 1)
    assert done.code == 0
    assert [line.split() for line in done.out.splitlines()] == [
        ["adapter", str(out / "adapter")],
        ["report", str(out / "report.html")],
    ]
    assert "rows      40 in" in done.err
    assert "longer than the specified maximum" not in caplog.text
    report = json.loads((out / "adapter" / "export_report.json").read_text())
    assert report["checks"]
    assert not any("advice" in check for check in report["checks"])  # nothing is to be done where all is well


def test_a_verb_that_is_stopped_says_so_in_one_line(oribi, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oribi.environment.detect", stop)
    done = oribi("doctor")
    assert (done.code, done.out, done.err) == (130, "", "stopped\n")


def test_doctor_runs_where_oribi_is_only_on_the_path(oribi, monkeypatch):
    import oribi.cli.doctor as doctor

    def absent(name: str) -> list[str]:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", absent)
    (record,) = oribi("doctor", "--json").records
    assert record["system"]["oribi"] == __version__
    assert record["packages"]["peft"]
    done = oribi("doctor")
    assert done.code == 0
    assert "not installed, so the versions that it needs are not known" in " ".join(done.err.split())
