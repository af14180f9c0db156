"""`oribi train CONFIG.yaml [--key value ...]`."""

from typing import Annotated

import typer

from oribi.cli.output import chatter_aside
from oribi.cli.settings import read_settings

# a form of the model has one name on the command line, whatever a config calls it
SAID = {"lora": "adapter", "merged_16bit": "merged"}


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
    settings = read_settings(config, context.args)
    if check:
        from oribi.config_file import as_yaml

        typer.echo(as_yaml(settings), nl=False)
        return
    with chatter_aside():
        from oribi.run import run

        saved = run(settings, overwrite)
    for name, path in saved.items():
        typer.echo(f"{SAID.get(name, name):<14}{path}")
