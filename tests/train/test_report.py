"""The run's report: its figures are those of the log and the model, and the page needs nothing from elsewhere."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml
from datasets import Dataset

from oribi.save.check import Check, Outcome
from oribi.train.evaluate import answer_rows, held_out_loss, stop_rate, text_loss
from oribi.train.measures import GENERAL_TEXT, Measured, measure
from oribi.train.report import (
    as_markdown,
    as_page,
    training_figures,
    warnings_of,
    write_report,
)

LOG = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 100.0, "grad_norm": 1.0},
    {"step": 2, "loss": 2.0, "learning_rate": 5e-4, "tokens_per_second": 300.0, "grad_norm": 0.8},
    {"step": 2, "eval_loss": 2.1},
    {"step": 3, "loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 200.0, "grad_norm": 0.5},
    {"step": 3, "train_runtime": 65.0, "train_loss": 2.0},
]


@pytest.fixture
def rows(load, conversations):
    from oribi.data.prepare import prepare_dataset

    _, tokenizer = load()
    return prepare_dataset(
        conversations, tokenizer, max_seq_length=128, announce=None, progress=False
    ).dataset


def test_the_held_out_loss_is_a_mean_over_tokens(load, rows):
    model, _ = load()
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
            labels = torch.tensor(row["labels"][1:])
            total += float(
                torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            )
            tokens += int((labels != -100).sum())
    found = held_out_loss(model, rows)
    assert found.tokens == tokens
    assert found.rows == len(rows)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert held_out_loss(model, rows, limit=3).rows == 3


def test_measuring_leaves_the_model_as_it_was(load, rows):
    model, tokenizer = load()
    model.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    measure(model, tokenizer, rows)
    assert model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_answers_are_to_the_prompts_of_the_rows(load, rows, conversations):
    model, tokenizer = load()
    samples = answer_rows(model, tokenizer, rows, 3, max_new_tokens=5)
    assert len(samples) == 3
    for sample, row in zip(samples, conversations):
        assert row["messages"][0]["content"] in sample.prompt
        assert sample.expected == row["messages"][1]["content"]
        assert sample.tokens <= 5
    assert 0 <= stop_rate(samples) <= 1
    assert stop_rate([]) is None
    plain = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    assert answer_rows(model, tokenizer, plain, 3) == []  # a text has no prompt


def test_the_general_text_is_read_whole(load):
    model, tokenizer = load()
    found = text_loss(model, tokenizer, GENERAL_TEXT, window=64)
    ids = len(tokenizer(GENERAL_TEXT)["input_ids"])
    assert found.tokens == ids - math.ceil(ids / 64)  # the first token of a window is not predicted
    assert 500 < len(GENERAL_TEXT.split()) < 1000


def test_figures_are_those_of_the_log():
    assert training_figures(LOG) == {
        "steps": 3, "seconds": 65.0, "first_loss": 3.0, "last_loss": 1.0, "tokens_per_second": 200.0, "mfu": None,
    }  # fmt: skip
    assert training_figures([{**entry, "mfu": 0.4} for entry in LOG])["mfu"] == 0.4


class Page(HTMLParser):
    """Tags and the addresses that a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asked += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")
        ]

    def handle_data(self, data):
        self.text += data


def written(folder, load, rows) -> dict:
    model, tokenizer = load()
    base = measure(model, tokenizer, rows)
    export = folder / "adapter"
    export.mkdir(parents=True)
    (export / "export_report.json").write_text(
        json.dumps(
            {
                "passed": True,
                "outcome": "close",
                "checks": [Check("answers", Outcome.CLOSE, "18 of 20 are the same", {"kl": 1e-4}).to_json()],
            }
        )
    )
    return write_report(
        folder,
        config={"model": "m/<b>n</b>", "dataset": ["rows.jsonl"], "learning_rate": 2e-4},
        log=LOG,
        data={"source": "rows.jsonl", "rows_in": 24, "notes": ["a note"]},
        machine={"device": "toy", "peak memory": "1.00 GiB"},
        measures={"base": base, "tuned": base},
        exports={"lora": export},
    )


def test_the_page_needs_nothing_else(load, rows, tmp_path):
    report = written(tmp_path / "run", load, rows)
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.asked == []
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "url(http" not in text
    assert "<b>n</b>" not in text  # what comes from outside is escaped
    assert report["measures"]["base"]["samples"][0]["expected"] in page.text
    assert "close  answers: 18 of 20 are the same" in page.text
    stopped = sum(sample["stopped"] for sample in report["measures"]["base"]["samples"])
    answered = len(report["measures"]["base"]["samples"])
    assert f"{stopped} of {answered} \u2192 {stopped} of {answered}" in page.text
    assert report["versions"]["torch"] in page.text
    assert not re.search(
        r"#(?:1f2937|000000)\b", text.partition("<svg")[2]
    )  # the page's colours, for light and dark
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["steps"] == 3


def test_the_markdown_says_the_same(load, rows, tmp_path):
    report = written(tmp_path / "run", load, rows)
    text = (tmp_path / "run" / "report.md").read_text()
    assert text == as_markdown(report)
    loss = report["measures"]["tuned"]["held_out"]["loss"]
    assert f"{loss:.3f} \u2192 {loss:.3f}" in text
    assert "| lora | close |" in text
    assert "close  answers: 18 of 20 are the same" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL).group(1))
    assert settings == {"model": "m/<b>n</b>", "dataset": ["rows.jsonl"], "learning_rate": 2e-4}


def test_an_answer_that_does_not_end_is_marked_and_quoted_as_it_is(load, rows, tmp_path):
    report = written(tmp_path / "run", load, rows)
    first, second = report["measures"]["tuned"]["samples"][:2]
    first |= {"said": "* * *\n```sh\nls", "stopped": False}
    second |= {"said": "done", "stopped": True}
    report["measures"] = {"tuned": report["measures"]["tuned"]}
    text, page = as_markdown(report), as_page(report, ["<svg>"])
    assert "**tuned (still going after 64 tokens)**\n\n````text\n* * *\n```sh\nls\n````\n" in text
    assert "**tuned**\n\n```text\ndone\n```\n" in text
    assert "<td>done</td>" in page
    assert "ls<i> still going after 64 tokens</i></td>" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["tuned"]["general"].update(perplexity=30.0), "a general text became less likely"),
        (lambda m: m["tuned"]["held_out"].update(loss=9.0), "overfits, or learns nothing"),
        (
            lambda m: m["tuned"].update(stop_rate=0.1, samples=[{"stopped": n == 0} for n in range(10)]),
            "only 1 of 10 answers ended",
        ),
        (lambda m: None, None),
    ],
)
def test_what_went_wrong_is_said(change, words):
    one = {"held_out": {"loss": 2.0}, "general": {"perplexity": 20.0}, "stop_rate": 1.0, "samples": []}
    report = {"measures": {"base": json.loads(json.dumps(one)), "tuned": one}, "exports": []}
    change(report["measures"])
    found = warnings_of(report)
    assert [words in note for note in found] == ([] if words is None else [True])


def test_a_failed_export_is_a_warning():
    report = {"measures": {}, "exports": [{"form": "gguf", "passed": False}]}
    assert warnings_of(report) == ["the export gguf differs from the trained model"]


def test_a_model_without_held_out_rows_is_measured_on_the_general_text(load):
    model, tokenizer = load()
    found = measure(model, tokenizer, None)
    assert isinstance(found, Measured)
    assert found.held_out is None
    assert found.samples == []
    assert found.to_json()["stop_rate"] is None
