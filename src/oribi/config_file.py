"""A run's config as a file: read from YAML and flags, and written with what each setting means.

The names that other trainers use are read too, and reported. Every problem of a file and of the flags is found before
the first is told.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from oribi.config import ALIASES, OLDER_CHECKPOINTING, SETTINGS, RunConfig
from oribi.config_advice import INSTEAD
from oribi.config_checks import Given, Problem, contradictions, without_effect
from oribi.config_setting import Setting
from oribi.config_yaml import compose, flags_of, parse_word, settings_text, value_of, words_of
from oribi.errors import ConfigError
from oribi.text import nearest, shown, write_whole

# files of data and models, which are easily given in place of a config
OTHER_FILES = (".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".gguf", ".safetensors")
# first setting of each group, in the order of RunConfig
GROUPS = {"stage": "what is trained", "model": "the model", "lora_r": "the adapter", "dataset": "the data", "output_dir": "the training",
          "beta": "the stage", "save_method": "what is saved"}  # fmt: skip
# names by which other trainers switch a data type on
_PRECISION = {
    **dict.fromkeys(("bf16", "bfloat16", "pure_bf16"), "bfloat16"), **dict.fromkeys(("fp16", "float16", "half"), "float16"),
    **dict.fromkeys(("fp32", "float32"), "float32"),
}  # fmt: skip
COLUMN = 44  # where the explanations of a written file begin


def read_run_config(path: str | Path | None, flags: Iterable[str] = ()) -> tuple[RunConfig, list[str]]:
    """A checked config from a YAML file and command-line flags; a flag overrides its line in the file.

    Args:
        path: the file, or None for flags alone.
        flags: `--key value`, `--key=value`, or `--key` alone for true; dashes within a key may be underscores.

    Returns:
        The config, and a sentence for each name that was read as another.

    Raises:
        ConfigError: naming every problem of the file and the flags, with its line.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    given = _resolve([] if path is None else _read_file(Path(path), problems), problems, notes)
    given |= _resolve(_read_flags(flags, problems), problems, notes)
    config = RunConfig()
    for key, one in given.items():
        converted, expected = SETTINGS[key].check(one.value)
        if expected is None:
            setattr(config, key, converted)
            if SETTINGS[key].same is OLDER_CHECKPOINTING and str(one.value).lower() != converted:
                notes.append(f"{one.name}: {shown(one.value)} read as {converted}")
        elif one.value is True and one.line is None:
            problems.append(Problem(None, f"--{one.name}", f"its value is missing; {expected}"))
        else:
            problems.append(Problem(one.line, f"{one.name} = {shown(one.value)}", expected))
    for key, setting in SETTINGS.items():
        if key not in given:
            setattr(config, key, setting.default_of(config.stage))
    if config.reward_funcs and given["reward_funcs"].line is not None:
        config.reward_funcs = [beside(name, Path(path).parent) for name in config.reward_funcs]
    if config.early_stopping_patience is not None and "load_best_model_at_end" not in given:
        config.load_best_model_at_end = True  # the last weights are those that did not improve
    if config.full_finetuning:  # defaults of an adapter mean nothing
        config.load_in_4bit &= "load_in_4bit" in given
        config.save_method = config.save_method if "save_method" in given else ["merged_16bit"]
    problems += contradictions(config, given)
    notes += without_effect(config, given)
    if problems:
        raise ConfigError(_report("flags" if path is None else str(path), problems))
    return config, notes


def beside(name: str, folder: Path) -> str:
    """`file.py:function` with the whole path of a file that lies beside a config; other names as they are."""
    file, colon, function = name.rpartition(":")
    if not file.endswith(".py") or Path(file).is_absolute() or not (folder / file).exists():
        return name
    return f"{(folder / file).resolve()}{colon}{function}"


def _read_file(path: Path, problems: list[Problem]) -> list[Given]:
    if path.is_dir():
        own = path / "config.yaml"
        hint = f", such as its own {own}" if own.is_file() else "; oribi init writes one"
        raise ConfigError(f"{path} is a folder; a config is a YAML file{hint}")
    if path.suffix in OTHER_FILES:
        raise ConfigError(
            f"{path} is not a config: a config is a YAML file; `oribi init MODEL DATA` writes one"
        )
    reader, node = compose(settings_text(path), str(path))
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines of 'key: value', got a {node.id}")
    entries = []
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        setting = _setting_named(name)
        if not isinstance(key, yaml.ScalarNode):
            problems.append(Problem(line, f"a {key.id}", "a key is one word"))
        elif name == "<<":
            problems.append(Problem(line, "<<", "merge keys are not read; write the settings out"))
        elif isinstance(value, yaml.MappingNode) and not (
            setting and (setting.container is dict or setting.sources)
        ):
            problems.append(Problem(line, f"{name}: ...", "the file is flat; write its keys one level up"))
        else:
            read = words_of if setting and setting.is_words else value_of
            entries.append(Given(name, line, read(reader, value, str(path))))
    return entries


def _setting_named(name: str) -> Setting | None:
    return SETTINGS.get(ALIASES.get(name, name))


def _read_flags(flags: Iterable[str], problems: list[Problem]) -> list[Given]:
    before, found = flags_of(flags)
    problems += [Problem(None, word, "flags are written --key value") for word in before]
    entries = []
    for key, words in found:
        setting = _setting_named(key)
        values = [parse_word(word, as_written=bool(setting and setting.is_words)) for word in words]
        entries.append(Given(key, None, True if not values else values[0] if len(values) == 1 else values))
    return entries


def _resolve(entries: list[Given], problems: list[Problem], notes: list[str]) -> dict[str, Given]:
    """Entries by their key; an entry without value counts as not given."""
    found: dict[str, Given] = {}
    for one in _with_dtype(entries, notes):
        key = ALIASES.get(one.name, one.name)
        key = "dtype" if one.name.casefold() in _PRECISION and one.value in _PRECISION.values() else key
        first = found.get(key)
        if key not in SETTINGS:
            near = nearest(one.name, [*SETTINGS, *ALIASES])
            advice = hint_for(one.name) or (f"did you mean {ALIASES.get(near, near)}?" if near else "")
            problems.append(Problem(one.line, one.name, f"unknown key{f'; {advice}' if advice else ''}"))
        elif first is not None and first.value != one.value:
            where = f" on line {first.line}" if first.line else ""
            why = "given twice" if first.name == one.name else f"means the same as {first.name}"
            allowed = f"{why}, {shown(first.value)}{where}; keep one"
            problems.append(Problem(one.line, f"{one.name} = {shown(one.value)}", allowed))
        else:
            if one.name != key and key != "dtype":
                notes.append(f"{one.name} read as {key}")
            if one.value is not None:
                found[key] = one
    return found


def _with_dtype(entries: list[Given], notes: list[str]) -> Iterator[Given]:
    """Entries with `bf16: true` and its like, as other trainers write the data type, read as `dtype`."""
    for one in entries:
        meant = _PRECISION.get(one.name.casefold())
        value = str(one.value).lower()
        if meant is None or value not in ("true", "false", "auto", "full", "none"):
            yield one
        elif value in ("true", "full"):
            yield Given(one.name, one.line, meant)
            notes.append(f"{one.name}: {shown(one.value)} read as dtype: {meant}")
        else:
            notes.append(f"{one.name}: {shown(one.value)} is not used: dtype decides, auto if not given")


def setting_of(key: str, value: Any) -> Any:
    """The value of a flag as its setting's type.

    Raises:
        ConfigError: the setting may not be this.
    """
    converted, expected = SETTINGS[key].check(value)
    if expected is not None:
        raise ConfigError(f"--{key} {shown(value)}: {expected}")
    return converted


def _report(origin: str, problems: list[Problem]) -> str:
    problems = sorted(problems, key=lambda problem: problem.line or 0)
    width = max(len(problem.what) for problem in problems) + 2
    lines = [
        f"  {f'line {problem.line}:' if problem.line else '-':<10}{problem.what:<{width}}{problem.allowed}"
        for problem in problems
    ]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{origin}: {count}", *lines])


def as_yaml(settings: RunConfig | Mapping[str, Any]) -> str:
    """Settings as a file that `read_run_config` reads back."""
    values = asdict(settings) if isinstance(settings, RunConfig) else dict(settings)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def commented_yaml(
    values: Mapping[str, Any], heading: str, *, notes: Sequence[str] = (), shown: Sequence[str] = ()
) -> str:
    """A config file for people: settings in groups, each with what it means.

    Args:
        values: settings; the others keep their defaults.
        heading: first line.
        notes: further lines at the top.
        shown: settings that are written although they have their default.
    """
    lines = [f"# {heading}", *(f"# {note}" for note in notes)]
    group = written = ""
    stage = values.get("stage", "sft")
    for name, setting in SETTINGS.items():
        group = GROUPS.get(name, group)
        if name not in values and (name not in shown or stage not in setting.used_by):
            continue
        if group != written:
            written = group
            lines += ["", f"# {group}"]
        line = f"{name}: {_on_one_line(values.get(name, setting.default_of(stage)))}"
        lines.append(f"{line:<{COLUMN}}  # {setting.help}")
    return "\n".join(lines) + "\n"


def require_free(path: Path, force: bool) -> None:
    """Refuse to overwrite a file that `force` does not give up.

    Raises:
        ConfigError: the file exists and `force` is off.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name, or overwrite it with --force")


def write_config(path: Path, text: str | bytes, force: bool) -> None:
    """Write a config, or a script, that a command made.

    Raises:
        ConfigError: the file exists and `force` is off.
    """
    require_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _on_one_line(value: Any) -> str:
    """A value on one line of YAML; numbers as people write them."""
    if isinstance(value, float) and value and abs(value) < 1e-2:
        return f"{value:g}".replace("e-0", "e-")
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def hint_for(key: str) -> str | None:
    """What to write instead of a key of another program, if it is a known one."""
    return INSTEAD.get(key.casefold().replace("-", "_"))
