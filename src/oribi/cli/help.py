"""`oribi help [COMMAND or KEY]`: a key of run files, as docs/config.md has it; and keys on the command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def help(name: Annotated[str, typer.Argument(help="A key of run files, or a command.")]) -> None:
    """Explain a key of run files, or a command."""
    from oribi.config import ALIASES, SETTINGS
    from oribi.config_advice import WHEN_TO_CHANGE
    from oribi.config_file import hint_for
    from oribi.errors import ConfigError
    from oribi.text import did_you_mean

    word = name.lstrip("-").replace("-", "_")
    key = ALIASES.get(word, word)
    if key not in SETTINGS:
        advice = hint_for(word)
        hint = f"; {advice}" if advice else did_you_mean(word, [*SETTINGS, *ALIASES])
        raise ConfigError(f"no command and no key of run files is called {name!r}{hint}")
    setting = SETTINGS[key]
    default = "has to be given" if key in ("model", "dataset") else _shown(setting.default)
    others = [f"{_shown(value)} for {stage}" for stage, value in setting.stages.items()]
    facts = {
        "default": "; ".join([default, *others]),
        "allowed": setting.allowed(),
        "change it": WHEN_TO_CHANGE[key].replace("`", ""),
        "also read as": ", ".join(alias for alias, meant in ALIASES.items() if meant == key),
    }
    typer.echo(f"{key}: {setting.help}.")
    for fact, text in facts.items():
        if text:
            typer.echo(f"  {fact:<14}{text}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def keys_by_group() -> str:
    """Every key of run files, a paragraph for each group."""
    from oribi.config import SETTINGS
    from oribi.config_file import GROUPS

    groups: dict[str, list[str]] = {}
    for key in SETTINGS:
        groups.setdefault(GROUPS.get(key) or list(groups)[-1], []).append(key)
    paragraphs = [
        f"{group.removeprefix('the ').capitalize()}: {', '.join(keys)}" for group, keys in groups.items()
    ]
    return "\n\n".join(["Keys, each also a flag; `oribi help KEY` explains one:", *paragraphs])


@dataclass(frozen=True)
class ShellWord:
    """What a shell may write in place of a word, as click's own completions are; typer has a click inside."""

    value: str
    help: str | None = None
    type: str = "plain"


class SettingsCommand(TyperCommand):
    """A command that takes every key of run files as a flag, and completes them in a shell."""

    def shell_complete(self, context: Any, incomplete: str) -> list[Any]:
        return [*super().shell_complete(context, incomplete), *self._of_settings(context, incomplete)]

    def _of_settings(self, context: Any, incomplete: str) -> Iterator[ShellWord]:
        from oribi.config import SETTINGS

        before = [word for word in context.args if word.startswith("--")]
        if incomplete.startswith("-") or not before:
            typed = incomplete.lstrip("-").replace("-", "_")
            for key, setting in SETTINGS.items():
                if key.startswith(typed):
                    yield ShellWord(f"--{key}", setting.help)
            return
        setting = SETTINGS.get(before[-1].lstrip("-").replace("-", "_"))
        for choice in setting.choices if setting else ():
            if choice.startswith(incomplete):
                yield ShellWord(choice)
