"""The process that answers for the page, and the rows that it measures, on a run that was trained."""

import json
from dataclasses import replace

import pytest

from oribi.run import read_run
from oribi.watch.answering import serve
from oribi.watch.data_rows import RunRows
from oribi.watch.runs import Roots, Watched, WatchedRun
from oribi.watch.talk import Talk, TalkError, why_no_talk
from tests.watch.runs_small import log_lines, write_run

QUESTION = [{"role": "user", "content": "the red fox"}]


def replies_of(run, *requests: dict) -> list[dict]:
    replies: list[dict] = []
    serve(str(run), (json.dumps(one) for one in requests), lambda **reply: replies.append(reply))
    return replies


def test_base_and_tuned_answer_piece_by_piece_and_rows_are_measured(trained_run):
    config = read_run(trained_run)
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in RunRows(config).tokens(0, 2)]
    asked = [
        {"messages": QUESTION, "model": model, "max_new_tokens": 6, "temperature": 0}
        for model in ("base", "tuned")
    ]
    ready, *replies, losses = replies_of(trained_run, *asked, {"rows": rows})
    assert ready == {"ready": True, "compares": True, "talks": True}
    whole = [reply for reply in replies if "text" in reply]
    assert len(whole) == 2
    assert "".join(reply.get("piece", "") for reply in replies) == "".join(one["text"] for one in whole)
    for one in losses["losses"]:
        assert one["tuned"] < one["base"]  # what was trained


def test_what_fails_is_an_error_and_not_the_end(trained_run, tmp_path):
    _, refused, said, *_ = replies_of(
        trained_run,
        {"messages": [{"role": "user", "content": "x " * 5000}], "model": "tuned"},
        {"messages": QUESTION, "model": "tuned", "max_new_tokens": 1},
    )
    assert "the model sees at most" in refused["error"]
    assert "piece" in said
    (nothing,) = replies_of(tmp_path)
    assert "error" in nothing


def test_rows_are_shown_a_page_at_a_time(trained_run):
    rows = RunRows(read_run(trained_run))
    first, second = rows.page(0, 5), rows.page(5, 5)
    assert len({view.origin for view in (*first, *second)}) == 10
    assert any(token.kind == "trained" for token in first[0].tokens)
    assert len(rows.page(35, 20)) == 5  # the data has 40 rows
    assert rows.page(40, 5) == []


def test_rows_of_a_data_set_with_settings_of_its_own_are_read_by_them(trained_run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "the red fox", "solution": "over the hills"}\n' * 3)
    source = {"path": str(path), "columns": {"question": "task", "answer": "solution"}, "max_rows": 2}
    rows = RunRows(replace(read_run(trained_run), dataset=[source]))
    assert [view.origin.rpartition(":")[2] for view in rows.page(0, 5)] == ["1", "2"]


def test_nothing_is_loaded_while_a_watched_run_trains_or_without_a_model(trained_run, tmp_path, monkeypatch):
    write_run(tmp_path / "young", log_lines(3))
    runs = Watched(Roots.of([str(trained_run.parent), str(tmp_path)]))
    by_folder = {run.folder: run for run in runs.refresh().values()}
    done, young = by_folder[trained_run], by_folder[tmp_path / "young"]
    assert "young trains now" in why_no_talk(done, runs)
    young.trains = False
    assert why_no_talk(young, runs) == "the run has saved no model yet"
    monkeypatch.setattr("oribi.watch.talk.shutil.which", lambda name: None)
    assert why_no_talk(done, runs) is None


@pytest.mark.parametrize(
    ("used", "reason"),
    [("1000, 80000", None), ("60000, 80000", "58.59 GiB of the GPU's 78.12 GiB are in use")],
)
def test_a_gpu_that_another_program_uses_is_left_alone(trained_run, tmp_path, monkeypatch, used, reason):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{used}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("oribi.watch.talk.shutil.which", lambda name: str(program))
    run = WatchedRun(trained_run, "run")
    run.refresh()
    said = why_no_talk(run, Watched(Roots(())))
    assert said is None if reason is None else said.startswith(reason)


@pytest.mark.long
def test_a_process_answers_for_the_page_and_ends_with_it(trained_run):
    run, talk = WatchedRun(trained_run, "run"), Talk()
    with pytest.raises(TalkError, match="load one first"):
        list(talk.answer("tuned", QUESTION, 4, 0))
    talk.load(run)
    assert (talk.run, talk.compares) == ("run", True)
    leaving = talk.answer("tuned", QUESTION, 8, 0)
    next(leaving)
    leaving.close()  # a visitor who leaves does not disturb the next one
    *_, said = talk.answer("base", QUESTION, 4, 0)
    assert set(said) == {"text", "tokens", "stopped", "seconds"}
    process = talk._process
    talk.close()
    assert process.poll() is not None
    with pytest.raises(TalkError, match="load one first"):
        talk.losses([])


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    talk = Talk()
    with pytest.raises(TalkError, match="adapter|config|model"):
        talk.load(WatchedRun(write_run(tmp_path / "run", log_lines(2)), "run"))
    talk.close()
