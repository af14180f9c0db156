"""`oribi convert FILE`."""

from pathlib import Path
from typing import Annotated

import typer

from oribi.cli.output import Json, Output, complain
from oribi.errors import ConfigError


def convert(
    file: Annotated[
        Path, typer.Argument(help="Config of Axolotl, LLaMA-Factory, TRL or Unsloth; .yaml, .json or .sh.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (default: print to the terminal).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: Json = False,
) -> None:
    """Convert another program's config, and report what happened to each key.

    Where that program's default differs from oribi's, it is written out. A config that asks for training that oribi
    cannot do, such as DPO, is refused with every such line.
    """
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
