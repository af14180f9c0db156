"""`oribi train CONFIG.yaml [--key value ...]`."""

from typing import Annotated

import typer

from oribi.cli.output import chatter_aside
from oribi.cli.settings import read_settings
from oribi.run_record import FORM_FOLDERS


def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="YAML file of settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print all of them and stop.")
    ] = False,
) -> None:
    """Fine-tune a model.

    Every key of the file is also a flag, such as --learning_rate 1e-4; a flag overrides the file.
    """
    settings = read_settings(config, context.args)
    if check:
        from oribi.config_file import as_yaml

        typer.echo(as_yaml(settings), nl=False)
        return
    with chatter_aside():
        from oribi.run import run

        saved = run(settings, overwrite)
    for form, path in saved.items():
        typer.echo(f"{FORM_FOLDERS.get(form, form):<14}{path}")
