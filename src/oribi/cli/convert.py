"""`oribi convert FILE`: another program's config, or a script or notebook written for Unsloth or TRL."""

from pathlib import Path
from typing import Annotated

import typer

from oribi.cli.output import Json, Output, complain
from oribi.errors import ConfigError


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="Config of Axolotl, LLaMA-Factory, TRL or Unsloth (.yaml, .json, .sh), or a script for Unsloth or TRL (.py, .ipynb)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write (default: the terminal for a config, a copy beside the script).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: Json = False,
) -> None:
    """Convert another program's config, script or notebook.

    Reports what happened to each of its keys or lines. Where that program's default differs from oribi's, it is written out. A config that asks for training that oribi
    cannot do, such as PPO, is refused with every such line. In a script, imports and calls that mean something else
    today are changed, and nothing else.
    """
    if file.suffix in (".py", ".ipynb"):
        _convert_script(file, output, force, json)
        return
    from oribi.config_file import commented_yaml, write_config
    from oribi.dialects import convert_file

    found = convert_file(file)
    out = Output(json)
    heading = f"converted from {file.name} ({found.dialect})"
    unsupported = [f"{key}: {why}" for key, why in found.unsupported.items()]
    remarks = [*found.differences, *(f"not taken over: {line}" for line in unsupported)]
    text = commented_yaml(found.values, heading, notes=remarks)
    if output is None:
        out.text(text.rstrip())
    else:
        write_config(output, text, force)
        out.text(f"written: {output}")
    for note in found.notes:
        typer.echo(note, err=True)
    for key, why in found.idle.items():
        typer.echo(f"{key} is not needed: {why}", err=True)
    for line in remarks:
        complain(line, "yellow")
    out.record(
        dialect=found.dialect, values=found.values, notes=found.notes, differences=found.differences,
        not_needed=found.idle, unsupported=found.unsupported, output=output,
    )  # fmt: skip
    missing = [name for name in ("model", "dataset") if name not in found.values]
    if missing:
        raise ConfigError(f"{file} names no {' and no '.join(missing)}; add it before training")


def _convert_script(file: Path, output: Path | None, force: bool, json: bool) -> None:
    """Write a script's copy for oribi, and say what was changed, what is ignored and what is refused."""
    from oribi.compat.script import convert_script
    from oribi.config_file import write_config

    output = output or file.with_stem(f"{file.stem}_oribi")
    found = convert_script(file)
    write_config(output, found.text.encode(found.encoding), force)
    out = Output(json)
    out.text(f"written: {output}")
    for line in found.changed:
        out.text(f"  changed   {line}")
    for line in found.ignored:
        out.text(f"  ignored   {line}")
    for line in found.refused:
        complain(f"  refused   {line}", "yellow")
    out.record(output=output, changed=found.changed, ignored=found.ignored, refused=found.refused)
