"""`oribi train CONFIG.yaml [--key value ...]`."""

import sys
from typing import Annotated

import typer

from oribi.cli.output import chatter_aside
from oribi.cli.settings import read_settings
from oribi.errors import ConfigError
from oribi.launch import (
    chosen_gpus,
    is_launched,
    is_restarted,
    require_groups,
    start_on_machines,
    start_together,
)
from oribi.run_record import FORM_FOLDERS
from oribi.text import say_notes


def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="YAML file of settings.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print all of them and stop.")
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="With gpus: how often all processes start again from the newest checkpoint when one fails.",
        ),
    ] = 0,
    nodes: Annotated[
        int,
        typer.Option(min=1, help="With gpus: machines that train together; start the same command on each."),
    ] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(help="HOST:PORT of one of these machines, where all of them meet.")
    ] = None,
) -> None:
    """Fine-tune a model.

    Every key of the file is also a flag, such as --learning_rate 1e-4; a flag overrides the file.
    """
    settings = read_settings(config, context.args)
    if check:
        with chatter_aside():
            from oribi.config_file import as_yaml
            from oribi.preflight import check_settings

            check_settings(settings)
        typer.echo(as_yaml(settings), nl=False)
        return
    if nodes > 1 and not is_launched():
        _require_meeting(settings.gpus, rendezvous)
    if settings.gpus is not None and not is_launched():
        gpus = chosen_gpus(settings.gpus, _gpus_here())
        require_groups(settings.context_parallel, len(gpus) * nodes)
        settings.shared_by(len(gpus) * nodes)  # told once, before the processes start
        words = ["-m", "oribi", *sys.argv[1:]]
        if nodes > 1:
            raise typer.Exit(start_on_machines(words, gpus, nodes, rendezvous, restarts))
        if len(gpus) > 1 or "," in settings.gpus:
            raise typer.Exit(start_together(words, gpus, restarts))
    elif settings.gpus is not None:
        say_notes(["gpus is left to the launcher that started these processes"])
    if is_restarted():  # the run that this process was part of is there, where it got as far as a checkpoint
        overwrite = False
        if settings.resume == "false":
            settings.resume = "true"
    with chatter_aside():
        from oribi.run import run

        saved = run(settings, overwrite)
    for form, path in saved.items():
        typer.echo(f"{FORM_FOLDERS.get(form, form):<14}{path}")


def _require_meeting(gpus: str | None, rendezvous: str | None) -> None:
    if gpus is None:
        raise ConfigError(
            "--nodes starts a process per GPU of each machine: give --gpus all, or --gpus and their number"
        )
    if rendezvous is None:
        raise ConfigError(
            "--nodes needs --rendezvous HOST:PORT of one of the machines, as in --rendezvous node1:29400"
        )


def _gpus_here() -> int:
    """GPUs that this process may use; asking takes no memory on them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
