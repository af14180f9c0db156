"""`oribi train CONFIG.yaml [--key value ...]`."""

from typing import Annotated

import typer

from oribi.cli.output import chatter_aside, lasting_output


def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="YAML file of settings.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that lies in output_dir.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, show all of them, and stop.")
    ] = False,
) -> None:
    """Fine-tune a model.

    Every setting of the file is also a flag, e.g. --learning_rate 1e-4; a flag overrides the file.
    """
    from oribi.config import read_config

    flags = context.args
    if config is not None and config.startswith("--"):  # the first flag, where no file is given
        config, flags = None, [config, *flags]
    settings, notes = read_config(config, flags)
    for note in notes:
        typer.echo(note, err=True)
    if check:
        typer.echo(settings.to_yaml(), nl=False)
        return
    with lasting_output():
        with chatter_aside():
            from oribi.run import run

            saved = run(settings, overwrite)
        for name, path in saved.items():
            typer.echo(f"{name:<14}{path}")
