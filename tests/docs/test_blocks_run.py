"""Python, run files and rows in the documents work: blocks are executed, read and prepared, with a tiny model for the hub's."""

import json
import re
from pathlib import Path

import pytest

from oribi.config_file import read_run_config
from oribi.data.preferences import prepare_preferences, stage_of_source
from oribi.data.prepare import prepare_dataset
from tests.docs.test_docs import ROOT, blocks

# blocks of Python that go on where their page's text begins, or are run by other tests
FRAGMENTS = {
    ("README.md", "FastLanguageModel"): "the first run of test_docs.py, by command line",
    ("runs.md", "trainer.train"): "resuming is tested in tests/train",
}
HUB_NAME = re.compile(r"\b(?:meta-llama|Qwen|google|HuggingFaceTB)/[\w.-]+")


def name(value: object) -> str | None:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else ""


def python_blocks() -> list[tuple[Path, str]]:
    return [
        (page, text)
        for page, text in blocks("python")
        if not any(page.name == known and start in text for known, start in FRAGMENTS)
    ]


def needs_trl(text: str) -> bool:
    return "oribi.trl" in text


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), python_blocks(), ids=name)
def test_python_of_a_page_runs(page, text, tiny_folder, data_file, tmp_path, monkeypatch):
    if needs_trl(text):
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    for file in (ROOT / "examples" / "data").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in ("train.jsonl", "chats.jsonl"):
        (tmp_path / file).write_bytes(data_file.read_bytes())
    text = HUB_NAME.sub(str(tiny_folder), text)
    text = re.sub(r"max_steps=\d+", "max_steps=1", text).replace("q4_k_m", "f16")
    exec(compile(text, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=name)
def test_a_run_file_of_a_page_is_one(page, text, tmp_path):
    file = tmp_path / "config.yaml"
    needed = {"model": "model: some/model\n", "dataset": "dataset: [train.jsonl]\n"}
    file.write_text(
        "".join(line for key, line in needed.items() if f"{key}: " not in text.split("eval_")[0]) + text
    )
    read_run_config(file)


@pytest.mark.parametrize(("page", "text"), blocks("json"), ids=name)
def test_rows_of_a_page_are_prepared(page, text, chatml_tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in text.splitlines():
        row = json.loads(line)
        stage = stage_of_source([row])
        options = {"max_seq_length": 2048, "announce": None, "use_cache": False}
        if stage != "sft":
            example = prepare_preferences([row], chatml_tokenizer, stage=stage, **options).dataset[0]
            assert len(example["prompt_ids"]) > 4, page.name
            continue
        (example,) = prepare_dataset([row], chatml_tokenizer, **options).dataset
        trained = [label for label in example["labels"] if label != -100]
        last = str(row).partition(", 'difficulty'")[0].rpartition(": ")[2].strip("\"'}] ")
        assert last in chatml_tokenizer.decode(trained), page.name
