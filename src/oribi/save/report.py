"""The report of an export: what was written, from which base, how it compared; export_report.json and the model card."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oribi
from oribi.errors import ExportError
from oribi.save.folder import gigabytes
from oribi.save.verify import Check

REPORT_FILE = "export_report.json"


@dataclass
class ExportReport:
    """What one export wrote and how it was checked.

    Args:
        directory: the folder.
        kind: "merged_16bit", "merged_4bit", "lora", "gguf" or "gguf-adapter".
        base: the weights under the adapter.
        files: name and bytes of each file of weights.
        checked_on: which rows.
        checks: every comparison; empty if the caller asked for none.
        notes: what differs in special cases, and what was not written and why.
        tags: for the model card.
    """

    directory: str
    kind: str
    base: str
    files: dict[str, int]
    checked_on: str = ""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tags: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison is within tolerance."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "oribi": oribi.__version__,
            "kind": self.kind,
            "base": self.base,
            "files": self.files,
            "checked_on": self.checked_on,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "notes": self.notes,
        }

    def show(self) -> None:
        """Print the checks and notes, one line each."""
        if self.checks:
            print(f"oribi: checked on {self.checked_on}")
        for check in self.checks:
            print(f"oribi:   {check.line()}")
        for note in self.notes:
            print(f"oribi: note: {note}", flush=True)

    def write(self, folder: Path, card: str) -> None:
        """Write the report and the model card into a folder."""
        (folder / REPORT_FILE).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        (folder / "README.md").write_text(card)

    def require(self) -> None:
        """Raise unless every comparison is within tolerance.

        Raises:
            ExportError: one is not.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            raise ExportError(
                f"the export differs from the trained model; its files are kept in {self.directory}.rejected:\n"
                + "\n".join(f"  {check.line()}" for check in failed)
            )


def model_card(report: ExportReport, name: str, base_model: str, usage: str) -> str:
    """README.md of an exported folder.

    Args:
        report: what was written and checked.
        name: the model's name.
        base_model: hub name or path of the model that was trained; a path is left out.
        usage: how to run it, as Markdown.
    """
    is_hub_name = base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    library = {"lora": "peft", "gguf": "gguf", "gguf-adapter": "gguf"}.get(report.kind, "transformers")
    front = ["---", f"library_name: {library}"]
    front += [f"base_model: {base_model}"] * is_hub_name
    front += ["tags:", "- oribi", *(f"- {tag}" for tag in report.tags), "---"]
    sizes = [f"| {file} | {gigabytes(size)} |" for file, size in report.files.items()]
    checks = [
        f"| {check.name} | {'passed' if check.passed else '**failed**'} | {check.shown()} |"
        for check in report.checks
    ]
    parts = [
        "\n".join(front),
        f"# {name}",
        f"Fine-tuned with oribi {oribi.__version__}."
        + (f" Base of the merge: {report.base}." if report.base else ""),
        usage,
        "## Files\n\n| file | size |\n|---|---|\n" + "\n".join(sizes),
    ]
    if checks:
        parts.append(
            f"## Checked against the trained model\n\nOn {report.checked_on}. KL in nats, mean over places.\n\n"
            "| check | | figures |\n|---|---|---|\n" + "\n".join(checks)
        )
    if report.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"
