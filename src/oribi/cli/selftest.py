"""`oribi selftest`."""

from pathlib import Path
from typing import Annotated

import typer

from oribi.cli.output import Json, Output
from oribi.text import write_whole


def selftest(
    file: Annotated[Path | None, typer.Argument(help="Also write the table to this file as JSON.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to test with (default: a small random model).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: the machine's best).")] = None,
    json: Json = False,
) -> None:
    """Check kernels, training and files against their references."""
    import time
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console
    from rich.text import Text

    from oribi.selftest.suite import run_selftest

    console, group, started = Console(stderr=json, soft_wrap=True), "", time.monotonic()
    out, entries = Output(json), []

    def show(comparison) -> None:
        nonlocal group
        if comparison.group != group:
            group = comparison.group
            console.print(Text(group, style="bold"))
        verdict = "ok" if comparison.passed else "FAILED"
        line = f"  {verdict:<7}{comparison.name:<46}{comparison.error:>9.2e}  limit {comparison.limit:.0e}  {comparison.note}"
        console.print(Text(line, style="" if comparison.passed else "red"))
        entries.append({**asdict(comparison), "passed": comparison.passed})
        out.record(**entries[-1])

    run_selftest(model, device, show)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, dumps(entries, indent=2) + "\n")
    passed = sum(entry["passed"] for entry in entries)
    console.print(f"{passed} of {len(entries)} checks passed in {time.monotonic() - started:.0f} s")
    if passed < len(entries):
        raise typer.Exit(1)
