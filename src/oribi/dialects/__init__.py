"""Configs of Axolotl, LLaMA-Factory, Unsloth's command line and TRL, converted to a run config of oribi.

Nothing is dropped silently. Each key becomes a setting, is not needed (with the reason), or asks for something beside the
training that oribi does not do (with what to do instead). A config whose training would differ here is refused as a whole.
"""

from pathlib import Path

from oribi.config import ALIASES, SETTINGS
from oribi.dialects import axolotl, llama_factory, trl, unsloth
from oribi.dialects.converted import Converted, Dialect, put_plain
from oribi.dialects.preferences import settle_stage
from oribi.dialects.reading import read_entries
from oribi.errors import ConfigError

__all__ = ["Converted", "convert_file", "program_of"]
# settings without meaning when every weight is trained
ADAPTER = {
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
}


def convert_file(path: str | Path) -> Converted:
    """Read another program's config.

    Args:
        path: a YAML or JSON file, or a shell script with the program's flags.

    Raises:
        ConfigError: the file cannot be read, is not a config of one of these programs, or asks for training that oribi's
            config cannot describe; then every such line is named.
    """
    path = Path(path)
    command, entries = read_entries(path)
    dialect = _dialect_of(set(entries), entries, command)
    if dialect is None:
        raise ConfigError(
            f"{path}: not a config of Axolotl, LLaMA-Factory, TRL or Unsloth; it has the keys "
            f"{', '.join(list(entries)[:8])}. A config of oribi's own needs no conversion"
        )
    found = Converted(dialect.name, path, entries, command)
    dialect.prepare(found)
    for key, value in found.entries.items():
        dialect.handlers.get(key, put_plain)(found, key, value)
    dialect.finish(found)
    for key, value in dialect.defaults.items():
        found.put_default(key, value)
    _settle(found)
    if found.refused:
        raise ConfigError(_refusal(found))
    return found


def program_of(path: str | Path) -> str | None:
    """The program that a config file belongs to, if it has keys of that program that oribi does not know; else None."""
    try:
        command, entries = read_entries(Path(path))
    except ConfigError:
        return None  # reading the file reports what is wrong with it
    dialect = _dialect_of(set(entries), entries, command)
    foreign = [key for key in entries if key not in SETTINGS and key not in ALIASES]
    return dialect.name if dialect is not None and any(key in dialect.handlers for key in foreign) else None


def _settle(found: Converted) -> None:
    """Remove settings without meaning beside the others, and say so."""
    values = found.values
    if values.get("full_finetuning"):
        values["load_in_4bit"] = False
        for key in ADAPTER & set(values):
            del values[key]
        if values.get("save_method") == ["lora"]:
            del values["save_method"]
    if "eval_steps" in values and not (values.get("eval_dataset") or values.get("eval_fraction")):
        found.idle["eval_steps"] = "there are no rows for an evaluation"
        del values["eval_steps"]
    settle_stage(found)


def _refusal(found: Converted) -> str:
    width = max(map(len, found.refused)) + 2
    lines = [f"  {said:<{width}}{why}" for said, why in found.refused.items()]
    count = "1 line asks" if len(lines) == 1 else f"{len(lines)} lines ask"
    return "\n".join(
        [
            f"{found.path} ({found.dialect}): {count} for a training that oribi's config does not describe",
            *lines,
            "Take out what you can do without, and convert again.",
        ]
    )


def _dialect_of(keys: set[str], entries: dict, command: list[str]) -> Dialect | None:
    programs = {Path(word).name for word in command}
    if "unsloth" in programs or any(
        isinstance(entries.get(section), dict) for section in ("training", "lora", "data")
    ):
        return unsloth.DIALECT
    if "base_model" in keys:
        return axolotl.DIALECT
    if "model_name_or_path" in keys:
        if "llamafactory-cli" in programs or keys & llama_factory.SIGNS:
            return llama_factory.DIALECT
        return trl.DIALECT
    return unsloth.SCRIPT if "model_name" in keys or "unsloth-cli.py" in programs else None
