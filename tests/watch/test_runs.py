"""Runs are found and followed by their folders, whatever state these are in, and nothing in them is changed."""

import json
import os
import time
from pathlib import Path

import pytest

from oribi.errors import ConfigError
from oribi.run_record import run_lock
from oribi.watch.compare import results_of, settings_that_differ
from oribi.watch.curves import POINTS, figure_frame, loss_frame
from oribi.watch.figures import cards_of, concerns_of, standing_of
from oribi.watch.fragments import cards_html, comparison_html, samples_html, standing_html
from oribi.watch.runs import Roots, Watched, WatchedRun
from tests.watch.runs_small import answered, log_lines, write_lines, write_run


def watched(*folders: Path) -> Watched:
    return Watched(Roots.of([str(folder) for folder in folders]))


def only(folder: Path) -> WatchedRun:
    (run,) = watched(folder).refresh().values()
    return run


def cards(run: WatchedRun) -> dict[str, str]:
    return {card.name: card.figure for card in cards_of(run)}


def contents(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime) for path in folder.rglob("*") if path.is_file()
    }


def test_runs_are_found_below_a_folder_and_what_lies_in_them_is_none(tmp_path):
    for name in ("a", "deep/er/b"):
        write_run(tmp_path / name, log_lines(2))
    write_run(tmp_path / "a/checkpoint-2", log_lines(2))
    write_run(tmp_path / "_earlier/old", log_lines(2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("theme: dark\n")
    assert set(watched(tmp_path).refresh()) == {"a", "deep/er/b"}
    assert set(watched(tmp_path / "a").refresh()) == {"a"}
    assert len(watched(tmp_path / "a", tmp_path / "deep").refresh()) == 2
    with pytest.raises(ConfigError, match="nowhere: it does not exist. Name a run's folder"):
        Roots.of([str(tmp_path / "nowhere")])


def test_a_training_is_followed_while_it_writes(tmp_path):
    folder = write_run(tmp_path / "run", log_lines(10, seconds=2.0), max_steps=20)
    runs = watched(tmp_path)
    before = contents(tmp_path)
    with run_lock(folder), pytest.MonkeyPatch.context() as patch:
        # it is another process that holds the lock of a training
        patch.setattr("oribi.watch.runs.is_locked", lambda folder: True)
        run = runs.refresh()["run"]
        assert standing_of(run) == ("training", "trains now, step 10 of 20")
        assert cards(run)["time left"] in ("0:19", "0:20")
        assert cards(run)["peak memory"] == "1.00 GiB"
        version = run.version
        assert runs.refresh()["run"].version == version  # nothing new, nothing to draw
        write_lines(folder / "log.jsonl", log_lines(1, first=11, eval_loss=0.5), "a")
        run = runs.refresh()["run"]
        assert run.version > version
        assert cards(run)["held-out loss"] == "0.500"
        assert runs.training == ["run"]
    after = contents(tmp_path)
    assert {path: after[path] for path in before if not path.endswith("log.jsonl")} == {
        path: kept for path, kept in before.items() if not path.endswith("log.jsonl")
    }


def test_a_run_that_ended_says_how(tmp_path):
    for state, words in (
        ("finished", "finished at step 3"),
        ("stopped", "was stopped at step 3 of 100, without a checkpoint"),
    ):
        assert standing_of(only(write_run(tmp_path / state, log_lines(3), state=state))).words == words
    killed = write_run(tmp_path / "killed", log_lines(3))
    (killed / "_lock").write_text("process 1 on elsewhere\n")
    run = only(killed)
    assert standing_of(run) == ("ended", "ended before its time at step 3 of 100, without a checkpoint")
    assert any("its process is gone" in concern for concern in concerns_of(run))
    # without a lock, as on disks that have none, the age of the log tells
    assert standing_of(only(write_run(tmp_path / "young", log_lines(3)))).kind == "training"
    old = write_run(tmp_path / "old", log_lines(3))
    for path in old.iterdir():
        os.utime(path, (1e9, 1e9))
    assert standing_of(only(old)).kind == "ended"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", b"\x00\xff{\n[]\n" + b'{"step": 1, "loss": "high"}\n{"step": 2, "loss": null, "time": "now"}\n{"step": 3, "loss": NaN}\n'),
        ("samples.jsonl", b'{"step": 1}\n{"step": 2, "samples": [3]}\n{"step": 3, "samples": [{"prompt": 1}]}\n'),
        ("oribi_run.json", b'{"run": 3, "step": []}'), ("config.yaml", b"learning_rate: [\n"), ("report.json", b'{"measures": [], "warnings": 3}'),
        ("report.json", b'{"measures": {"base": [], "tuned": {"samples": 4}}, "warnings": [{}]}'),
    ],
)  # fmt: skip
def test_a_broken_folder_is_shown_as_far_as_it_can_be(tmp_path, name, content):
    folder = write_run(tmp_path / "run", log_lines(3), answers=[answered(0, "x")])
    (folder / name).write_bytes(content)
    runs = list(watched(tmp_path).refresh().values())
    page = standing_html(runs[0]) + cards_html(runs[0]) + samples_html(runs[0]) + comparison_html(runs)
    assert "run" in page
    loss_frame(runs[0])
    if name == "config.yaml":
        assert "its settings cannot be read" in page


def test_an_empty_run_and_no_run(tmp_path):
    assert watched(tmp_path).refresh() == {}
    run = only(write_run(tmp_path / "run", []))
    assert "No log yet" in cards_html(run)
    assert len(loss_frame(run)) == 0
    assert "sample_prompts" in samples_html(run)


def test_a_log_of_100_000_lines_is_read_in_parts_and_drawn_thin(tmp_path):
    lines = log_lines(100_000, seconds=0.01)
    lines[70_000]["loss"] = 99.0
    folder = write_run(tmp_path / "run", lines)
    runs = watched(tmp_path)
    run = runs.refresh()["run"]
    assert not run.log.is_complete  # the page is drawn before
    assert "reading its log" in standing_html(run)
    while not run.log.is_complete:
        runs.refresh()
    assert run.last_step == 100_000
    frame = figure_frame(run, "loss")
    assert len(frame) <= POINTS + 2
    assert frame.value.max() == 99.0  # what stands out is not thinned away
    assert frame.step.is_monotonic_increasing
    started = time.process_time()
    write_lines(folder / "log.jsonl", log_lines(1, first=100_001), "a")
    assert runs.refresh()["run"].last_step == 100_001
    assert time.process_time() - started < 0.5  # only the new line was read


def test_concerns_are_of_what_the_log_shows(tmp_path):
    rising = [
        {"step": step, "time": 1.0, "eval_loss": loss}
        for step, loss in ((1, 1.0), (2, 0.8), (3, 0.9), (4, 1.1))
    ]
    (found,) = concerns_of(only(write_run(tmp_path / "overfits", rising, state="finished")))
    assert found.startswith("the held-out loss rises since step 2, from 0.800 to 1.100")
    diverged = log_lines(60)
    for entry in diverged[30:]:
        entry["loss"] = 8.0
    (found,) = concerns_of(only(write_run(tmp_path / "diverges", diverged, state="finished")))
    assert "learning_rate may be too high" in found
    (found,) = concerns_of(
        only(
            write_run(
                tmp_path / "nan", [*log_lines(3), *log_lines(2, first=4, loss=float("nan"))], state="stopped"
            )
        )
    )
    assert "the loss is nan since step 4" in found
    endless = [answered(0, "a", False), answered(5, "b", False)]
    (found,) = concerns_of(
        only(write_run(tmp_path / "endless", log_lines(3), state="finished", answers=endless))
    )
    assert "only 0 of 1 sample answers ended by themselves" in found
    assert concerns_of(only(write_run(tmp_path / "good", log_lines(60), state="finished"))) == []


def test_samples_are_escaped_and_show_how_they_changed(tmp_path):
    answers = [
        answered(0, "<script>base"),
        answered(10, "first", False),
        answered(20, "second"),
        answered(30, "second"),
    ]
    run = only(write_run(tmp_path / "run", log_lines(3), answers=answers))
    page = samples_html(run)
    assert "<script>" not in page
    assert "&lt;script&gt;base" in page
    assert "tuned, steps 20 to 30" in page
    assert "1 earlier answer<" in page
    assert "still going at the limit" in page
    assert cards(run)["answers that stop"] == "1 of 1"


def test_runs_are_compared_by_settings_and_results(tmp_path):
    write_run(tmp_path / "a", log_lines(3, eval_loss=1.5), state="finished", learning_rate=1e-3)
    write_run(tmp_path / "b", log_lines(5), state="finished", lora_r=64)
    report = {
        "measures": {
            name: {"held_out": {"loss": loss}, "samples": [{"stopped": True}] * 2}
            for name, loss in (("base", 2.0), ("tuned", 1.0))
        }
    }
    (tmp_path / "a/report.json").write_text(json.dumps(report))
    runs = watched(tmp_path).refresh()
    chosen = [runs["a"], runs["b"]]
    differ = settings_that_differ(chosen)
    assert set(differ) == {"learning_rate", "lora_r"}
    assert differ["lora_r"][1] == "64"
    first, second = results_of(chosen)
    assert first["report: held out"] == "2.000 \u2192 1.000"
    assert first["report: stops"] == "2 of 2"
    assert first["lowest"] == "1.500 at 1"
    assert second["held-out loss"] == ""
    assert "Settings that differ" in comparison_html(chosen)
