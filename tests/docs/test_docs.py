"""Documents name only commands, options and Python names that exist, and the first one is executed word for word."""

import ast
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

import oribi
from oribi.cli import build_command
from oribi.compat.names import NAMES
from oribi.config import ALIASES, RunConfig
from tests.train.conftest import some_conversations

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(kind: str) -> list[tuple[Path, str]]:
    return [
        (page, text)
        for page in PAGES
        for found, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if found == kind
    ]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_a_training_step_is_followed_in_a_few_files():
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    section = page.partition("## One training step\n")[2].partition("\n## ")[0]
    files = [
        ROOT / "src" / "oribi" / name for name in re.findall(r"^\d+\. `([\w/.]+)`: ", section, re.MULTILINE)
    ]
    assert 10 < len(files) <= 16
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 4500


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `oribi ...` in a block of shell, and in running text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for kind, block in BLOCK.findall(text)
            if kind in ("bash", "sh")
            for line in block.splitlines()
        ]
        lines += re.findall(r"`(oribi [^`\n]+)`", BLOCK.sub("", text))
        found += [
            (page.name, shlex.split(line, comments=True)) for line in lines if line.startswith("oribi ")
        ]
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value)[:60])
def test_a_documented_command_exists(page, words):
    group = typer.main.get_command(build_command())
    verb = words[1]
    if verb.isupper():  # a placeholder
        return
    assert verb in group.commands or verb.startswith("--"), f"{page}: oribi {verb}"
    if verb.startswith("--"):
        return
    command, rest = group.commands[verb], words[2:]
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    settings = (
        {f"--{name}" for name in [*RunConfig.__dataclass_fields__, *ALIASES]}
        if verb in ("train", "estimate")
        else set()
    )
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in options | settings | {"--help"}, f"{page}: {' '.join(words)}"


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: getattr(value, "name", "code"))
def test_documented_python_imports_what_exists(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "oribi":
            for name in node.names:
                assert name.name in oribi.__all__, f"{page.name}: {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in re.findall(r"`((?:examples|tests|benchmarks|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    if page.name == "how-it-works.md":
        for name in set(re.findall(r"`([\w/]+(?:\.py|/))`", text)) - {"kernels/NAME.py"}:
            assert (ROOT / name).exists() or (ROOT / "src" / "oribi" / name).exists(), name


@pytest.fixture
def said_by(oribi, tmp_path, monkeypatch):
    """What a documented command writes when it runs in an empty folder with `typed` as its input; it has to succeed."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, typed: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed}\n"))
        done = oribi(*shlex.split(line)[1:])
        assert done.code == 0, f"{line}\n{done.err[-3000:]}"
        return done.out + done.err

    return run


@pytest.mark.long
@pytest.mark.usefixtures("demo_model_file")
def test_the_readmes_path_runs_word_for_word(said_by, tmp_path):
    (block,) = [text for page, text in blocks("bash") if page.name == "README.md"]
    lines = block.splitlines()
    assert [line.split()[1] for line in lines] == [
        "demo", "init", "estimate", "inspect", "train", "chat", "export",
    ]  # fmt: skip
    said = {}
    for line in lines:
        said[line.split()[1]] = said_by(line, "Every day at noon.")
    assert "fits" in said["estimate"]
    assert "⟦" in said["inspect"]
    assert "left 0:00" in said["train"]
    assert said["chat"].strip()
    run = tmp_path / "runs" / "smollm2-135m-instruct-cron"
    exported = [*run.glob("gguf/*.gguf"), *run.glob("merged/*.safetensors"), run / "report.html"]
    assert len(exported) == 3
    assert all(path.is_file() for path in exported)


@pytest.mark.slow
def test_getting_started_runs_as_it_is_written(said_by, tiny_folder, tmp_path):
    """Every `oribi` line of the page, with a model of this machine in place of the hub's and sizes that take seconds."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some_conversations(40)))
    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    lines = [line for kind, block in BLOCK.findall(text) if kind == "bash" for line in block.splitlines()]
    lines = [
        # 4 bits would be refused: they lose too much of random weights
        line.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny_folder)).replace("q4_k_m", "f16")
        for line in lines
        if line.startswith("oribi")
    ]
    assert [line.split()[1] for line in lines] == [
        "doctor", "init", "inspect", "estimate", "train", "train", "chat", "eval", "export",
    ]  # fmt: skip
    for line in lines:
        if " train " in line or line.startswith("oribi estimate"):
            line += " --max_steps 2 --max_seq_length 128 --dtype float32"
        if line.startswith("oribi train config.yaml --max_steps"):
            line += " --output_dir runs/latest"
        said_by(line, "the red fox")
    assert len(list((tmp_path / "runs" / "latest" / "gguf").glob("*.gguf"))) == 2
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()


def test_coming_from_says_of_every_name_of_unsloths_what_it_is_here():
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (works|refused) \|", text, re.MULTILINE))
    assert rows == {name: "works" if known.home else "refused" for name, known in NAMES.items()}
