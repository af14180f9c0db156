"""A run's folder from the command line: one run in it, continued with as it was, and nothing loaded before it is checked."""

import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from oribi.run_record import RunRecord, checkpoints, newest_model, read_run_record
from tests.train.conftest import some_conversations


@pytest.fixture(scope="module")
def config(tiny_folder, tmp_path_factory) -> Path:
    """A config of a run of 6 steps that keeps its checkpoints."""
    folder = tmp_path_factory.mktemp("config")
    some_conversations(12).to_json(folder / "rows.jsonl")
    path = folder / "run.yaml"
    path.write_text(
        f"model: {tiny_folder}\nmax_seq_length: 64\ndataset: {folder / 'rows.jsonl'}\npacking: false\nmax_steps: 6\n"
        "gradient_accumulation_steps: 1\nlearning_rate: 1e-2\nlora_r: 4\nlora_alpha: 4\ndtype: float32\nwarmup_steps: 0\n"
        "save_steps: 2\nreport: false\n"
    )
    return path


@pytest.fixture(scope="module")
def config_without_checkpoints(config) -> Path:
    path = config.with_name("without.yaml")
    path.write_text(config.read_text().replace("save_steps: 2\n", ""))
    return path


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory) -> Path:
    """The run's folder after it was stopped behind step 4."""
    from oribi.config_file import read_run_config
    from oribi.run import run

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "oribi.train.several.any_process", lambda trainer, asked: trainer.state.global_step == 4
        )
        with pytest.raises(KeyboardInterrupt):
            run(read_run_config(config, ["--output_dir", str(folder)])[0])
    return folder


@pytest.fixture
def folder(stopped, tmp_path) -> Path:
    """A copy of the stopped run's folder."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def no_load(monkeypatch):
    """Loading a model fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("oribi.run.load_model", load)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_used_folder_is_refused_and_stays_as_it_was(oribi, config, folder, no_load, tiny_folder):
    before = contents(folder)
    result = oribi("train", config, "--output_dir", folder)
    assert result.code == 1
    assert f"it holds a run of {tiny_folder} (4 steps)" in result.err
    assert all(way in result.err for way in ("--resume", "another output_dir", "--overwrite"))
    assert contents(folder) == before


def test_overwrite_replaces_the_run_and_nothing_else(oribi, config, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "adapter/thoughts.txt").write_text("mine, too")
    result = oribi(
        "train",
        config,
        "--output_dir",
        folder,
        "--overwrite",
        "--max_steps",
        1,
        "--save_method",
        "merged_16bit",
    )
    assert result.code == 0, result.err
    assert checkpoints(folder)[-1].step == 1
    assert len(checkpoints(folder)) == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in (folder / "adapter").iterdir()] == ["thoughts.txt"]
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 1]
    both = oribi("train", config, "--output_dir", folder, "--overwrite", "--resume")
    assert "give one of them" in both.err


def test_a_run_that_may_be_overwritten_stays_until_the_new_one_begins(oribi, config, folder):
    before = contents(folder)
    result = oribi(
        "train", config, "--output_dir", folder, "--overwrite", "--target_modules", "[nothing_of_it]"
    )
    assert result.code == 1
    assert contents(folder) == before


def test_resume_in_a_new_folder_starts_with_a_line(oribi, config, tmp_path):
    result = oribi("train", config, "--output_dir", tmp_path / "new", "--resume", "--max_steps", 1)
    assert result.code == 0, result.err
    assert "new holds no checkpoint, so the run starts from the beginning" in result.err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--lora_r", 8), "lora_r: 4 in the run, 8 now"),
        (("--lora_alpha", 64), "lora_alpha: 4 in the run, 64 now"),
        (("--use_rslora",), "use_rslora: not set in the run, True now"),
        (("--seed", 1), "seed: 3407 in the run, 1 now"),
        (("--optim", "adamw_torch"), "optim: adamw_8bit in the run, adamw_torch now"),
        (("--packing",), "packing: False in the run, True now"),
        (("--max_seq_length", 32), "max_seq_length: 64 in the run, 32 now"),
        (("--dtype", "bfloat16"), "dtype: float32 in the run, bfloat16 now"),
    ],
)
def test_a_changed_run_is_refused_before_its_model_is_loaded(oribi, config, folder, no_load, flags, line):
    before = contents(folder)
    result = oribi("train", config, "--output_dir", folder, "--resume", *flags)
    assert result.code == 1
    assert "cannot be resumed" in result.err
    assert line in result.err
    assert "Traceback" not in result.err
    assert contents(folder) == before


def test_a_changed_base_is_refused_before_it_is_loaded(oribi, config, folder, no_load, tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    result = oribi("train", config, "--output_dir", folder, "--resume", "--model", other)
    assert result.code == 1
    assert f"base model: {other / 'model.safetensors'} is another file than the run's" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "nope.jsonl"), "nope.jsonl"),
        (("--dataset", "BROKEN"), "broken.jsonl:1"),
        (("--eval_dataset", "BROKEN"), "broken.jsonl:1"),
        (("--dataset", "rows.jsonl", "--eval_dataset", "./rows.jsonl"), "its rows are trained on, too"),
        (("--chat_template", "lama3"), "lama3"),
        (("--output_dir", "/proc/x"), "cannot be written to"),
        (("--report_to", "wandb"), "the package is not installed"),
        (("--quantization_method", "q4_km"), "q4_km"),
    ],
)
def test_what_needs_no_model_is_told_before_it_is_loaded(
    oribi, config, no_load, tmp_path, flags, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oribi.train.arguments.find_spec", lambda name: None)
    (tmp_path / "broken.jsonl").write_text('{"messages": 3}\n')
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    flags = ["broken.jsonl" if flag == "BROKEN" else flag for flag in flags]
    place = [] if "--output_dir" in flags else ["--output_dir", "run"]
    result = oribi("train", config, *place, *flags)
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_gguf_files_that_cannot_be_written_are_told_before_the_model_is_loaded(
    oribi, config, no_load, tiny_folder, tmp_path
):
    for name, changes, message in (
        ("helium", {"model_type": "helium"}, "oribi writes no GGUF for model_type 'helium'"),
        (
            "wide",
            {"head_dim": 24, "model_type": "olmo2"},
            "llama.cpp would compute this olmo2 model differently",
        ),
    ):
        other = Path(shutil.copytree(tiny_folder, tmp_path / name))
        values = json.loads((other / "config.json").read_text())
        values.pop("architectures")
        (other / "config.json").write_text(json.dumps({**values, **changes}))
        flags = ["--model", other, "--quantization_method", "q8_0", "--output_dir", tmp_path / "run"]
        result = oribi("train", config, *flags)
        assert result.code == 1
        assert message in result.err
        assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_new_settings_which_its_config_then_holds(oribi, config, folder):
    result = oribi("train", config, "--output_dir", folder, "--resume", "--learning_rate", 1e-4)
    assert result.code == 0, result.err
    assert "continuing from checkpoint-4 (step 4)" in result.err
    assert "learning_rate: 0.01 in the run, 0.0001 now" in result.err
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 1e-4
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "loss" in entry}
    assert rates[4] == pytest.approx(1e-2 * 3 / 6)
    assert rates[5] == pytest.approx(1e-4 * 2 / 6)
    assert len(rates) == sum("loss" in entry for entry in log) == 6


def test_a_finished_run_has_nothing_left_and_loads_nothing(oribi, config, folder, monkeypatch):
    assert oribi("train", config, "--output_dir", folder, "--resume").code == 0
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr("oribi.run.load_model", None)
        result = oribi("train", config, "--output_dir", folder, "--resume")
    assert result.code == 0
    assert "nothing left to train" in result.err
    assert str(folder / "adapter") in result.out
    assert contents(folder) == before
    shutil.rmtree(folder / "adapter")  # as after a kill while it was saved
    result = oribi("train", config, "--output_dir", folder, "--resume")
    assert "nothing left to train: checkpoint-6 is at step 6 of 6" in result.err
    assert (
        contents(folder / "adapter")["adapter_model.safetensors"]
        == before["adapter/adapter_model.safetensors"]
    )


def test_a_finished_run_without_checkpoints_is_not_begun_again(oribi, config_without_checkpoints, tmp_path):
    once = ["train", config_without_checkpoints, "--output_dir", tmp_path / "run", "--max_steps", 2]
    assert oribi(*once).code == 0
    before = contents(tmp_path / "run")
    again = oribi(*once, "--resume")
    assert again.code == 0
    assert "nothing left to train" in again.err
    more = oribi(*once[:-1], 3, "--resume")
    assert more.code == 1
    assert "without a checkpoint to continue from" in more.err
    assert contents(tmp_path / "run") == before


def test_inspect_tells_a_stopped_run_from_a_finished_one(oribi, config, folder):
    (record,) = oribi("inspect", "run", folder, "--json").records
    assert record["finished"] is False
    assert (
        "no: it was stopped at step 4 of 6; --resume continues from checkpoint-4"
        in oribi("inspect", "run", folder).out
    )
    assert oribi("train", config, "--output_dir", folder, "--resume").code == 0
    (record,) = oribi("inspect", "run", folder, "--json").records
    assert (record["finished"], record["steps"]) == (True, 6)


def test_a_newer_checkpoint_is_loaded_in_place_of_an_older_export(oribi, folder):
    result = oribi("export", folder, "--to", "merged", "--output", folder)
    assert result.code == 0, result.err
    answer = oribi("chat", folder, "-p", "the red fox", "--max-new-tokens", 2)
    assert "is a run: loading its checkpoint-4; merged is from an earlier step" in answer.err


@pytest.mark.parametrize(
    ("saved", "kept", "there", "expected"),
    [
        ({}, [5, 40], [], "checkpoint-40"),
        ({"adapter": 60}, [40, 60], ["adapter", "merged"], "adapter"),
        ({"adapter": 60}, [60, 80], ["adapter", "merged"], "checkpoint-80"),
        ({"merged": 60}, [60], ["merged"], "merged"),
        ({"merged": 60}, [80], ["merged"], "checkpoint-80"),
        ({}, [8], ["merged"], "checkpoint-8"),
        ({}, [], ["merged"], "merged"),
    ],
)
def test_the_model_of_a_run_is_the_one_that_was_trained_longest(tmp_path, saved, kept, there, expected):
    for name in [*there, *(f"checkpoint-{step}" for step in kept)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    RunRecord("one", saved=saved).write(tmp_path)
    assert newest_model(tmp_path).path.name == expected


def test_weights_that_could_not_be_exported_are_kept(
    oribi, config_without_checkpoints, tmp_path, monkeypatch
):
    from oribi.errors import ExportError

    def full(*args, **kwargs):
        raise ExportError("writing needs 2 GB and its disk has 1 MB free")

    monkeypatch.setattr("oribi.run.save_merged", full)
    result = oribi("train", config_without_checkpoints, "--output_dir", tmp_path / "run", "--max_steps", 1)
    assert result.code == 1
    assert f"The trained weights are kept in {tmp_path / 'run'}/checkpoint-1" in result.err
    monkeypatch.undo()
    assert oribi("export", tmp_path / "run", "--to", "adapter").code == 0


def test_a_run_without_its_log_still_ends_well(oribi, config, tmp_path, monkeypatch):
    monkeypatch.setattr("oribi.train.progress.JsonLog.on_log", lambda *args, **kwargs: None)
    result = oribi("train", config, "--output_dir", tmp_path / "run", "--max_steps", 1, "--report", "true")
    assert result.code == 0, result.err
    assert (tmp_path / "run/report.html").is_file()


def test_a_config_with_comments_in_the_folder_of_its_run_is_left_as_it_is(oribi, config, tmp_path):
    own = tmp_path / "config.yaml"
    own.write_text("# mine\n" + config.read_text() + f"output_dir: {tmp_path}\n")
    assert oribi("train", own).code == 0
    assert own.read_text().startswith("# mine\n")
    assert read_run_record(tmp_path).state == "finished"


def test_init_names_the_folder_by_model_and_data(oribi, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    Path("orders").mkdir()
    for name in ("FAQ 2.csv", "chats.jsonl.gz", "orders/train.csv"):
        rows = b'{"question": "a", "answer": "b"}\n' if "jsonl" in name else b"question,answer\na,b\n"
        Path(name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
        assert oribi("init", tiny_folder, name, "-o", "c.yaml", "--force").code == 0
        names.append(yaml.safe_load(Path("c.yaml").read_text())["output_dir"])
    assert names == [f"runs/{tiny_folder.name}-{data}" for data in ("faq-2", "chats", "orders")]


@pytest.mark.parametrize(
    ("words", "resume", "files"),
    [
        ([], ["--resume"], ("adapter_model", "adapter/adapter_model")),
        (["--full_finetuning", "true"], ["--resume", "weights"], ("model", "merged/model")),
    ],
    ids=["adapter", "whole model"],
)
def test_a_signal_during_the_exports_loses_no_training(
    oribi, config_without_checkpoints, tmp_path, monkeypatch, words, resume, files
):
    """Without save_steps, too: the trained weights are in a checkpoint before the first form is written or verified."""
    from oribi.config_file import read_run_config
    from oribi.run import run
    from oribi.train.resume import newest_whole

    folder = tmp_path / "run"
    words = ["--output_dir", str(folder), "--max_steps", "2", *words]
    with monkeypatch.context() as patch:
        patch.setattr("oribi.run.save_merged", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(read_run_config(config_without_checkpoints, words)[0])
    kept = newest_whole(folder, weights_only="weights" in resume)
    assert (kept.step, kept.damaged) == (2, ())
    trained = load_file(kept.path / f"{files[0]}.safetensors")
    result = oribi("train", config_without_checkpoints, *words, *resume)
    assert result.code == 0, result.err
    saved = load_file(folder / f"{files[1]}.safetensors")
    assert all(torch.equal(weight, trained[name].to(weight.dtype)) for name, weight in saved.items())
    assert set(saved) == set(trained)
    # a run that ends well keeps only the checkpoints that were asked for
    result = oribi("train", config_without_checkpoints, *words, "--overwrite")
    assert result.code == 0, result.err
    assert checkpoints(folder) == []
