"""The report of an export: what was written, from which base, how it compared; export_report.json."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oribi
from oribi.errors import ExportError
from oribi.save.check import Check, Outcome, overall, verdict
from oribi.text import say, write_whole

REPORT_FILE = "export_report.json"


@dataclass
class ExportReport:
    """What one export wrote and how it was checked.

    Args:
        directory: the folder.
        kind: "merged_16bit", "merged_4bit", "fp8", "w4a16", "lora", "lora_per_expert", "gguf" or "gguf-adapter".
        base: the weights under the adapter.
        files: name and bytes of each file of weights.
        checked_on: which rows.
        checks: every comparison; empty if the caller asked for none.
        notes: what differs in special cases, and what was not written and why.
        tags: for the model card.
        has_probes: whether probes.json lies beside the files.
    """

    directory: str
    kind: str
    base: str
    files: dict[str, int]
    checked_on: str = ""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    has_probes: bool = False

    @property
    def passed(self) -> bool:
        """Whether no comparison found anything different."""
        return all(check.passed for check in self.checks)

    @property
    def outcome(self) -> Outcome:
        """What the comparisons found, the worst of them; `NOT_TESTED` without any."""
        return overall(self.checks)

    @property
    def verdict(self) -> str:
        """The outcome in words, with the checks that were not made."""
        return verdict(self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "oribi": oribi.__version__,
            "kind": self.kind,
            "base": self.base,
            "files": self.files,
            "checked_on": self.checked_on,
            "outcome": str(self.outcome),
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "notes": self.notes,
        }

    def show(self) -> None:
        """Print the checks and notes, one line each."""
        if self.checks:
            say(f"oribi: {self.verdict}, checked on {self.checked_on}")
        for check in self.checks:
            say(f"oribi:   {check.line()}")
        for note in self.notes:
            say(f"oribi: note: {note}")

    def write(self, folder: Path, card: str) -> None:
        """Write the report and the model card into a folder."""
        write_whole(folder / REPORT_FILE, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        write_whole(folder / "README.md", card)

    def require(self, kept: Iterable[str] = ()) -> None:
        """Raise if a comparison found something different.

        Args:
            kept: names of other files of the same export, which are right.

        Raises:
            ExportError: one did.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            others, place = ", ".join(kept), f"{self.directory}.rejected"
            raise ExportError(
                (
                    f"{', '.join(self.files)}: not what was trained, and set aside in {place}; in place: {others}\n"
                    if others
                    else f"the export differs from the trained model; its files are kept in {place}:\n"
                )
                + "\n".join(f"  {check.line()}" for check in failed)
                + "\nTo keep it under its own name nevertheless: verify='report', or --keep-different on the command line"
            )
