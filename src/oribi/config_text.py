"""A run config as a file for people: chosen settings in groups, each with what it means."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from oribi.config import RunConfig
from oribi.errors import ConfigError
from oribi.text import write_whole

# first setting of each group, in the order of RunConfig
GROUPS = {"model": "the model", "lora_r": "the adapter", "dataset": "the data", "output_dir": "the training",
          "save_method": "what is saved"}  # fmt: skip
COLUMN = 44


def config_text(
    values: Mapping[str, Any], heading: str, *, notes: Sequence[str] = (), shown: Sequence[str] = ()
) -> str:
    """The file.

    Args:
        values: settings; the others keep their defaults.
        heading: first line.
        notes: further lines at the top.
        shown: settings that are written although they have their default.
    """
    lines = [f"# {heading}", *(f"# {note}" for note in notes)]
    group, pending = "", ""
    for setting in fields(RunConfig):
        pending = GROUPS.get(setting.name, pending)
        if setting.name not in values and setting.name not in shown:
            continue
        if pending != group:
            group = pending
            lines += ["", f"# {group}"]
        value = values.get(setting.name, getattr(RunConfig(), setting.name))
        line = f"{setting.name}: {_plain(value)}"
        lines.append(f"{line:<{COLUMN}}  # {setting.metadata['help']}")
    return "\n".join(lines) + "\n"


def write_config(path: Path, text: str, force: bool) -> None:
    """Write a config file that is whole or not there.

    Raises:
        ConfigError: the file exists and `force` is off.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name, or overwrite it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _plain(value: Any) -> str:
    """A value on one line of YAML; numbers as people write them."""
    if isinstance(value, float) and value and abs(value) < 1e-2:
        return f"{value:g}".replace("e-0", "e-")
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .removesuffix("\n...\n")
        .strip()
    )
