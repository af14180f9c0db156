"""The model card of an export, and values of models, files and users as they stand in YAML and Markdown."""

import html
import json
import re
import shlex

import oribi
from oribi.save.report import ExportReport
from oribi.text import gigabytes

_PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[._/-][A-Za-z0-9]+)*")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def model_card(report: ExportReport, name: str, base_model: str, usage: str) -> str:
    """README.md of an exported folder.

    Args:
        report: what was written and checked.
        name: the model's name.
        base_model: hub name or path of the model that was trained; a path is left out.
        usage: how to run it, as Markdown.
    """
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base_model) is not None
    library = {"lora": "peft", "gguf": "gguf", "gguf-adapter": "gguf"}.get(report.kind, "transformers")
    front = ["---", f"library_name: {library}"]
    front += [f"base_model: {for_yaml(base_model)}"] * is_hub_name
    front += ["tags:", "- oribi", *(f"- {for_yaml(str(tag))}" for tag in report.tags), "---"]
    sizes = [f"| {for_markdown(file)} | {gigabytes(size)} |" for file, size in report.files.items()]
    checks = [
        f"| {for_markdown(check.name)} | {check.outcome if check.passed else f'**{check.outcome}**'} | "
        f"{for_markdown(check.says)} |"
        for check in report.checks
    ]
    parts = [
        "\n".join(front),
        f"# {for_markdown(name)}",
        f"Fine-tuned with oribi {oribi.__version__}."
        + (f" Base of the merge: {for_markdown(report.base)}." if report.base else ""),
        usage,
        "## Files\n\n| file | size |\n|---|---|\n" + "\n".join(sizes),
    ]
    if checks:
        parts.append(
            f"## Compared with the trained model: {report.verdict}\n\nOn {for_markdown(report.checked_on)}. KL is the mean "
            "divergence of the next token's distribution, in nats.\n\n| check | outcome | finding |\n|---|---|---|\n"
            + "\n".join(checks)
        )
    if report.has_probes:
        parts.append(
            "## Check a server\n\n`probes.json` says what this model answers. Whether a server really answers so, with its weights, "
            "chat template and stop tokens:\n\n"
            + fenced(f"oribi verify http://localhost:8000/v1 --probes {shlex.quote(name)}")
        )
    if report.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {for_markdown(note)}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def for_yaml(text: str) -> str:
    """A YAML scalar that is read back as this text: plain where that is safe, else in double quotes."""
    if _PLAIN_YAML.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def for_markdown(text: str) -> str:
    """Text of a line of Markdown, a table's cell included, that shows as it is."""
    line = html.escape(" ".join(_printable(text).split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def fenced(text: str, language: str = "") -> str:
    """A code block of Markdown, its fence longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{_printable(text)}\n{fence}"


def _printable(text: str) -> str:
    """The text with every other character than printable ones, tabs and line ends as its escape."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)
