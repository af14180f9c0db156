"""The keys and values of a config: from YAML, JSON, or the flags of a command in a shell script."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from oribi.config_yaml import flags_of, parse, parse_word, settings_text
from oribi.errors import ConfigError


def read_entries(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The keys and values of a file.

    Returns:
        The words before the first flag of a shell script (empty for other files), and key -> value.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML or JSON, or its flags depend on shell variables.
    """
    text = settings_text(path)
    return _read_flags(path, text) if path.suffix == ".sh" else ([], _read_mapping(path, text))


def _read_mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        entries = json.loads(text) if path.suffix == ".json" else parse(text, str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: no valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path}: expected lines of 'key: value'")
    return {str(key): value for key, value in entries.items()}


def _read_flags(path: Path, text: str) -> tuple[list[str], dict[str, Any]]:
    """Comments and continued lines are understood; variables are refused, since only a shell knows their values."""
    try:
        words = shlex.split(re.sub(r"\\\n", " ", text), comments=True)
    except ValueError as error:
        raise ConfigError(
            f"{path}: {error}; a shell script with one command and its flags is expected"
        ) from error
    command, flags = flags_of(words)
    entries: dict[str, Any] = {}
    for key, given in flags:
        values = [None if word == "None" else parse_word(word) for word in given]
        entries[key] = True if not values else values[0] if len(values) == 1 else values
    unknown = [name for name, value in entries.items() if "$" in str(value)]
    if unknown:
        raise ConfigError(
            f"{path}: --{', --'.join(unknown)}: a shell variable; write its value in the script first"
        )
    if not entries:
        raise ConfigError(
            f"{path}: no flags (--name value) in it; if it names a config file, convert that one"
        )
    return command, entries
