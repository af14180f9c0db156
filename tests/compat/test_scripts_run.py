"""Scripts in the manner of Unsloth's notebooks run after `oribi convert`, without another edit."""

import json
import runpy
from pathlib import Path

import pytest

from oribi.compat.script import convert_script
from tests.compat.test_embeddings import write_encoder
from tests.compat.test_trl import JUDGED, NEEDS_DRIVER, PAIRS, words
from tests.train.conftest import write_tiny_model

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
PLACE = {
    "name": "find",
    "description": "finds things",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "fox"}}}
ROWS = {
    "alpaca": [{"instruction": words(i, 4), "input": words(i, i % 3), "output": words(i + 1, 3)} for i in range(8)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": words(i, 4)}, {"from": "gpt", "value": words(i + 2, 3)}]}
        for i in range(10)
    ],
    "reasoning": [
        {"problem": words(i, 3), "thinking": words(i, 4), "solution": words(i, 2)} for i in range(8)
    ],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": words(i, 3)},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": words(i, 2)},
                {"role": "assistant", "content": words(i, 3)},
            ],
            "tools": json.dumps([{"type": "function", "function": PLACE}]),
        }
        for i in range(4)
    ],
    "texts": [{"text": words(i, 30)} for i in range(8)],
    "pairs": PAIRS,
    "judged": JUDGED,
    "labelled": [{"text": words(i, 4), "labels": i % 3} for i in range(16)],
    "anchors": [{"anchor": words(i, 3), "positive": words(i, 4)} for i in range(16)],
    "questions": [{"question": words(i, 4), "answer": words(i, 1)} for i in range(6)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny model and the rows that the scripts name."""
    folder = tmp_path_factory.mktemp("scripts")
    write_tiny_model(folder / "tiny")
    write_encoder(folder / "encoder", "bert")
    write_tiny_model(folder / "tiny_tied", tie_word_embeddings=True)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# one of each kind of trainer and of data; the others differ in what is converted, which tests of their own look at
SHORT = {
    "alpaca",
    "chat",
    "classification",
    "continued_pretraining",
    "dpo",
    "embedding",
    "grpo",
    "tool_calling",
}


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    needed = [NEEDS_DRIVER] if name in ("dpo", "kto", "grpo") else []
    return needed if name in SHORT else [*needed, pytest.mark.long]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=marks_of(s.stem)) for s in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_runs_after_conversion(script, folder, monkeypatch, tmp_path):
    found = convert_script(script)
    assert found.refused == []
    copy = tmp_path / script.name
    copy.write_text(found.text)
    monkeypatch.chdir(folder)
    runpy.run_path(str(copy), run_name="__main__")
