"""The result of a conversion, and the ways in which a key can be read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oribi.config import ALIASES, SETTINGS


@dataclass
class Converted:
    """Another program's config as settings of oribi; every key ends up in one of the lists.

    Args:
        dialect: the program.
        path: the file.
        entries: its keys and values.
        command: the words before the first flag of a shell script.
        values: settings.
        notes: one line for each key that was read under another name, and for each default of that program.
        differences: what oribi does slightly differently, or what should be checked.
        idle: key -> why it is not needed.
        unsupported: key -> what to do instead; the model learns the same, or nearly so.
        refused: key with its value -> why. The model would learn something else, so nothing is converted.
    """

    dialect: str
    path: Path
    entries: dict[str, Any]
    command: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, said: str) -> None:
        """Set a setting; `said` quotes the words of the file that it comes from."""
        if value is None:
            return
        problem = SETTINGS[key].check(value)[1]
        if problem is not None:
            self.refused[said if " = " in said else f"{said} = {value}"] = problem
        elif self.values.get(key, value) != value:
            self.refused[said] = f"{key} is {self.values[key]} already, by another line"
        else:
            self.values[key] = value
            if said.split(" ")[0] != key:
                self.notes.append(f"{said} read as {key} = {value}")

    def put_default(self, key: str, value: Any) -> None:
        """Set what the program does when its file leaves the setting out."""
        if key not in self.values:
            self.put(key, value, f"default of {self.dialect}")

    def refuse(self, key: str, why: str) -> None:
        """Refuse a key that asks for something other than what oribi would do."""
        self.refused[f"{key} = {self.entries[key]}" if key in self.entries else key] = why


Handler = Callable[[Converted, str, Any], None]


@dataclass(frozen=True)
class Dialect:
    """How one program's config is read.

    Args:
        name: the program.
        handlers: key -> what to do with it; other keys are looked up among oribi's settings and their aliases.
        defaults: the program's defaults that differ from oribi's.
        prepare: runs before the keys are read one by one.
        finish: runs after them, and sets what several keys say together.
    """

    name: str
    handlers: Mapping[str, Handler]
    defaults: Mapping[str, Any]
    prepare: Callable[[Converted], None] = lambda found: None
    finish: Callable[[Converted], None] = lambda found: None


def is_off(value: Any) -> bool:
    """Whether a value switches its key off."""
    return value in (None, False, "", "none", "None", [], {}, 0)


def put_plain(found: Converted, key: str, value: Any) -> None:
    """A key that has the same name here, or a known alias."""
    name = ALIASES.get(key, key)
    if name in SETTINGS:
        found.put(name, None if value == "" else value, key)
    elif not is_off(value):
        found.unsupported[key] = "oribi has no such setting"


def renamed(name: str) -> Handler:
    """A key that has another name here."""

    def handle(found: Converted, key: str, value: Any) -> None:
        found.put(name, value, key)

    return handle


def inverted(name: str) -> Handler:
    """A key that means the opposite of a setting."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if value is not None:
            found.put(name, not value, f"{key} = {str(value).lower()}")

    return handle


def idle(keys: Iterable[str], why: str) -> dict[str, Handler]:
    """Keys that oribi does not need."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if value is not None:
            found.idle[key] = why

    return dict.fromkeys(keys, handle)


def lacking(keys: Iterable[str], why: str) -> dict[str, Handler]:
    """Keys that oribi ignores, although the model learns the same without them."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if not is_off(value):
            found.unsupported[key] = why

    return dict.fromkeys(keys, handle)


def refusing(keys: Iterable[str], why: str) -> dict[str, Handler]:
    """Keys that change what the model learns in a way that oribi's config cannot express."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if not is_off(value):
            found.refuse(key, why)

    return dict.fromkeys(keys, handle)


def only(allowed: Iterable[Any], why: str) -> Handler:
    """A key that is accepted only with values that oribi follows anyway."""
    allowed = list(allowed)

    def handle(found: Converted, key: str, value: Any) -> None:
        if value is None or value in allowed:
            found.idle[key] = "it is what oribi does"
        else:
            found.refuse(key, why)

    return handle


def read_together(found: Converted, key: str, value: Any) -> None:
    """A key that the dialect's `prepare` or `finish` reads beside others."""


def read_elsewhere(keys: Iterable[str]) -> dict[str, Handler]:
    """Keys that the dialect's `prepare` or `finish` reads."""
    return dict.fromkeys(keys, read_together)


def names_of(value: Any) -> list[str]:
    """The names of a list or of a comma-separated text."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def sources_of(value: list[Any] | None) -> list[dict[str, Any]]:
    """A list of data sets; an entry that is not a mapping is a path."""
    return [entry if isinstance(entry, dict) else {"path": entry} for entry in value or []]


def put_sources(found: Converted, key: str, sources: list[dict[str, Any]], said: str) -> None:
    """Set the data sets: what is said of all of them alike as settings of the run, the rest beside each.

    Args:
        found: the conversion.
        key: dataset or eval_dataset.
        sources: each with its path, and with any of the keys that a data set may have.
        said: the words of the file that they come from.
    """
    sources = [{name: value for name, value in one.items() if value} for one in sources]
    for name in ("columns", "role_aliases", "split", "text_field"):
        setting = "dataset_text_field" if name == "text_field" else name
        values = [one.get(name) or ("train" if name == "split" else None) for one in sources]
        if any(value != values[0] for value in values) or (key != "dataset" and name == "split"):
            continue
        if values[0] and found.values.get(setting, values[0]) == values[0]:
            for one in sources:
                one.pop(name, None)
            if values[0] != "train" or name != "split":
                found.put(setting, values[0], f"{said}: {name}")
    found.put(key, [one if len(one) > 1 else one["path"] for one in sources], said)


def names(setting: str) -> Handler:
    """A key that holds a list of names, or a comma-separated text."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if not is_off(value):
            found.put(setting, names_of(value), key)

    return handle
