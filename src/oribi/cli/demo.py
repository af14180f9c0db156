"""`oribi demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    prepare: Annotated[
        Path | None, typer.Option(help="Only write the demo's model and data to this folder.")
    ] = None,
) -> None:
    """Teach a small model to write cron expressions, without a GPU."""
    if prepare is not None:
        from oribi.demo.lesson import write_materials

        for path in write_materials(prepare):
            typer.echo(path)
        return
    from rich.console import Console
    from rich.table import Table

    from oribi.demo.lesson import run_demo

    result = run_demo(output)
    console = Console()
    table = Table(title="held-out requests", title_justify="left")
    for name in ("request", "expected", "before training", "after training"):
        table.add_column(name, overflow="fold")
    for sample in result["samples"]:
        mark = "" if sample["tuned_right"] else "  (wrong)"
        table.add_row(sample["request"], sample["expected"], sample["base"], sample["tuned"] + mark)
    console.print(table)
    low, high = result["tuned_score_interval"]
    console.print(
        f"right answers to {result['held_out_requests']} held-out requests: {result['base_score']:.1%} before, "
        f"{result['tuned_score']:.1%} after {result['train_seconds']:.0f} s of training (95 % interval: {low:.1%} to {high:.1%})"
    )
    for name, path in result["paths"].items():
        console.print(f"{name:<8} {path}", soft_wrap=True)
    console.print(f"figures  {output / 'result.json'}", soft_wrap=True)
