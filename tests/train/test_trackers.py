"""Trackers: TensorBoard's own files are read back; the others are stood in for by modules that write down their calls."""

import json
import sqlite3
import sys
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import oribi.run
import oribi.train.arguments as trackers
from oribi.config_file import read_run_config
from oribi.errors import ConfigError
from oribi.train.arguments import SFTConfig, require_trackers
from oribi.train.samples import read_samples
from oribi.train.trainer import SFTTrainer
from tests.train.conftest import some_conversations


@pytest.fixture
def trained(tiny_folder, tmp_path, monkeypatch):
    """Trains two steps through a config and returns the run's folder and the losses of its log."""

    # TRL looks for trackers when it is imported, before the stand-ins are there, and its card links to their pages
    monkeypatch.setattr(SFTTrainer, "create_model_card", lambda self, **_: None)

    def run(tracker: str):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in some_conversations(12)))
        folder = tmp_path / "runs" / "red-fox"
        flags = [
            "--model", tiny_folder, "--dataset", data, "--output_dir", folder, "--max_steps", 2, "--dtype", "float32",
            "--max_seq_length", 128, "--report_to", tracker, "--eval_fraction", 0.25, "--eval_steps", 2, "--lora_r", 3,
            "--report", "false", "--learning_rate", 0.003, "--sample_prompts", "held_out", "--sample_tokens", 4,
        ]  # fmt: skip
        config, _ = read_run_config(None, [str(flag) for flag in flags])
        oribi.run.run(config)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return folder, log

    return run


def stand_in(monkeypatch, name: str, **members) -> ModuleType:
    """A module of that name that can be imported and found."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    module.__path__ = []
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Settings(dict):
    """A tracker's config, which may be updated with one more argument."""

    def update(self, values, allow_val_change=False):
        super().update(values)


def answers_of(folder: Path) -> list[list]:
    """The table that a tracker gets of the answers after two steps."""
    base, tuned = read_samples(folder)
    return [[b.prompt, b.expected, b.said, t.said, t.stopped] for b, t in zip(base.samples, tuned.samples)]


COLUMNS = ["prompt", "expected", "base", "tuned", "stopped"]


def series(logged: list[dict], key: str) -> list[float]:
    return [entry[key] for entry in logged if key in entry]


def test_tensorboard_shows_what_the_log_says(trained):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, log = trained("tensorboard")
    (events,) = folder.rglob("events.out.tfevents.*")
    found = reader.EventAccumulator(str(events.parent))
    found.Reload()
    for tag, key in (
        ("train/loss", "loss"), ("train/tokens_per_second", "tokens_per_second"), ("train/learning_rate", "learning_rate"),
        ("train/grad_norm", "grad_norm"), ("eval/loss", "eval_loss"),
    ):  # fmt: skip
        shown = [(event.step, event.value) for event in found.Scalars(tag)]
        expected = [(entry["step"], pytest.approx(entry[key], rel=1e-5)) for entry in log if key in entry]
        assert shown == expected, tag
        assert shown
    (text,) = found.Tensors("args/text_summary")
    assert json.loads(text.tensor_proto.string_val[0])["learning_rate"] == 0.003
    (answers,) = found.Tensors("samples/text_summary")
    assert answers.step == 2
    table = answers.tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == f"| {' | '.join(COLUMNS)} |"
    assert len(table) == 2 + len(answers_of(folder))


def test_weights_and_biases_gets_figures_settings_and_the_runs_name(trained, monkeypatch):
    logged, started, settings = [], [], Settings()
    wandb = stand_in(
        monkeypatch, "wandb", run=None, config=settings, log=logged.append, define_metric=lambda *a, **k: None,
        termwarn=lambda *a, **k: None, Table=lambda columns, data: (columns, data),
    )  # fmt: skip
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=type("WandbError", (Exception,), {}))

    def init(**keywords):
        started.append(keywords)
        wandb.run = SimpleNamespace(summary={}, _label=lambda **k: None)

    wandb.init = init
    folder, log = trained("wandb")
    assert [start["name"] for start in started] == ["red-fox"]
    assert settings["learning_rate"] == 0.003
    assert settings["peft_config"]["default"].r == 3
    assert series(logged, "train/loss") == series(log, "loss")
    assert series(logged, "train/tokens_per_second") == series(log, "tokens_per_second")
    assert series(logged, "eval/loss") == series(log, "eval_loss")
    assert series(logged, "samples") == [(COLUMNS, answers_of(folder))]
    assert wandb.run.summary["train_loss"] == pytest.approx(sum(series(log, "loss")) / 2)


def test_mlflow_gets_figures_settings_and_the_runs_name(trained, monkeypatch):
    logged, started, running, settings, tables = [], [], [], {}, []
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)

    def start_run(**keywords):
        started.append(keywords["run_name"])
        running.append(SimpleNamespace(info=SimpleNamespace(run_id="1")))

    stand_in(
        monkeypatch, "mlflow", __version__="3.1.0", utils=SimpleNamespace(validation=limits),
        is_tracking_uri_set=lambda: True, get_tracking_uri=lambda: "file:here", start_run=start_run,
        active_run=lambda: running[-1] if running else None, end_run=running.clear,
        log_params=lambda values, synchronous=True: settings.update(values),
        log_table=lambda data, artifact_file: tables.append((artifact_file, data)),
        log_metrics=lambda metrics, step, synchronous=True: logged.append({**metrics, "step": step}),
    )  # fmt: skip
    folder, log = trained("mlflow")
    assert started == ["red-fox"]
    assert running == []  # the run was ended
    assert settings["learning_rate"] == 0.003
    ((name, table),) = tables
    assert name == "samples/step-2.json"
    assert list(table) == COLUMNS
    assert [list(row) for row in zip(*table.values())] == answers_of(folder)
    for key in ("loss", "tokens_per_second", "eval_loss"):
        assert series(logged, key) == series(log, key)
    assert series([entry for entry in logged if "loss" in entry], "step") == [1, 2]


def test_trackio_gets_figures_settings_and_the_runs_name(trained, monkeypatch):
    logged, started, finished, settings = [], [], [], Settings()
    space = SimpleNamespace(get=lambda: None)
    stand_in(
        monkeypatch, "trackio", __version__="0.30.0", config=settings, log=logged.append,
        init=lambda **keywords: started.append(keywords), finish=lambda: finished.append(True),
        context_vars=SimpleNamespace(current_space_id=space, current_project=space), Table=lambda dataframe: dataframe,
    )  # fmt: skip
    folder, log = trained("trackio")
    assert [start["name"] for start in started] == ["red-fox"]
    assert settings["learning_rate"] == 0.003
    assert series(logged, "train/loss") == series(log, "loss")
    assert series(logged, "eval/loss") == series(log, "eval_loss")
    (table,) = series(logged, "samples")
    assert [list(table), table.to_numpy().tolist()] == [COLUMNS, answers_of(folder)]
    assert finished == [True]


@pytest.mark.long
def test_trackio_itself_keeps_figures_settings_and_tables(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    folder, log = trained("trackio")
    with closing(sqlite3.connect(next((tmp_path / "trackio").glob("*.db")))) as kept:
        lines = [json.loads(one) for (one,) in kept.execute("select metrics from metrics order by id")]
        ((name, config),) = kept.execute("select run_name, config from configs")
    assert (name, json.loads(config)["learning_rate"]) == ("red-fox", 0.003)
    for tracked, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/grad_norm", "grad_norm"),
    ):
        assert series(lines, tracked) == series(log, key)
    (table,) = series(lines, "samples")
    assert table["_type"] == "trackio.table"
    assert [list(row.values()) for row in table["_value"]] == answers_of(folder)


def test_an_unknown_tracker_is_refused_by_its_name():
    with pytest.raises(
        ConfigError, match="report_to = 'wandbb' .*must be one of none, tensorboard, wandb, mlflow, trackio"
    ):
        read_run_config(None, ["--model", "m", "--dataset", "d", "--report_to", "wandbb"])
    with pytest.raises(ConfigError, match="report_to = 'wandbb'; it can be none, all, or some of .*wandb"):
        SFTConfig(report_to=["tensorboard", "wandbb"])


def test_a_tracker_that_is_not_installed_stops_the_run_before_it_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="report_to = 'wandb': the package is not installed; pip install wandb"
    ):
        SFTConfig(report_to="wandb")
    monkeypatch.setattr(oribi.run, "load_model", lambda *a, **k: pytest.fail("it loaded"))
    config, _ = read_run_config(None, ["--model", "m", "--dataset", "d", "--report_to", "mlflow"])
    with pytest.raises(ConfigError, match="pip install mlflow"):
        oribi.run.run(config)


def test_nothing_is_needed_for_none_and_for_whatever_is_there(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for names in (None, "none", ["none"], "all", []):
        require_trackers(names)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object() if name == "tensorboardX" else None)
    require_trackers("tensorboard")
