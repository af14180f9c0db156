"""The run config that a verb works on: a file, flags, or both."""

from typing import TYPE_CHECKING

import typer

from oribi.launch import launcher_spoke
from oribi.text import is_first_process

if TYPE_CHECKING:
    from oribi.config import RunConfig


def read_settings(config: str | None, flags: list[str]) -> "RunConfig":
    """The settings of a file and of flags; names that were read as others are noted on standard error.

    Raises:
        ConfigError: naming every problem, and `oribi convert` where the file is another program's.
    """
    from oribi.config_file import read_run_config
    from oribi.dialects import program_of
    from oribi.errors import ConfigError

    if config is not None and config.startswith("--"):  # the first flag, where no file is given
        config, flags = None, [config, *flags]
    if config is None and not flags:
        raise typer.BadParameter("give a CONFIG.yaml, or flags such as --model and --dataset")
    try:
        settings, notes = read_run_config(config, flags)
    except ConfigError as error:
        program = None if config is None else program_of(config)
        if program is None:
            raise
        raise ConfigError(
            f"{error}\nThis looks like a config of {program}; `oribi convert {config}` reads it."
        ) from error
    if is_first_process() and not launcher_spoke():
        for note in notes:
            typer.echo(note, err=True)
    return settings
