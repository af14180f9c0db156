"""`oribi selftest`."""

from pathlib import Path
from typing import Annotated

import typer

from oribi.cli.output import Json, Output
from oribi.text import write_whole


def selftest(
    file: Annotated[Path | None, typer.Argument(help="Write the table to this file as JSON, too.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to test with; a small random one where none is given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the machine's best where none is given.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure that training, files and kernels do what they claim on this machine; fails if one does not."""
    import time
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console
    from rich.text import Text

    from oribi.selftest.suite import selftest as run

    console, group, started = Console(stderr=json, soft_wrap=True), "", time.monotonic()
    out = Output(json)

    def show(check) -> None:
        nonlocal group
        if check.group != group:
            group = check.group
            console.print(Text(group, style="bold"))
        verdict = "ok" if check.passed else "FAILED"
        line = f"  {verdict:<7}{check.name:<46}{check.error:>9.2e}  limit {check.limit:.0e}  {check.note}"
        console.print(Text(line, style="" if check.passed else "red"))
        out.record(**asdict(check), passed=check.passed)

    checks = run(model, device, show)
    failed = [check for check in checks if not check.passed]
    if file is not None:
        entries = [{**asdict(check), "passed": check.passed} for check in checks]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, dumps(entries, indent=2) + "\n")
    console.print(
        f"{len(checks) - len(failed)} of {len(checks)} checks passed in {time.monotonic() - started:.0f} s"
    )
    if failed:
        raise typer.Exit(1)
