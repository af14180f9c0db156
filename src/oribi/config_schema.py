"""The run config as a JSON schema, by which editors complete keys and mark mistakes."""

from typing import Any

from oribi.config import ALIASES, SETTINGS, Setting

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """The schema: every key with its meaning, type, limits and default; other programs' names are allowed, too."""
    shapes = {name: _shape(setting) for name, setting in SETTINGS.items()}
    properties = {
        name: {"description": f"{setting.help}.", **shapes[name], "default": setting.default}
        for name, setting in SETTINGS.items()
    }
    aliases = {
        alias: {"description": f"Read as {name}.", "deprecated": True, **shapes[name]}
        for alias, name in ALIASES.items()
        if alias not in properties
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "oribi run config",
        "type": "object",
        "properties": {**properties, **aliases},
        "additionalProperties": False,
    }


def _shape(setting: Setting) -> dict[str, Any]:
    """What a value may be."""
    bounds = {"minimum": setting.low, "maximum": setting.high, "exclusiveMaximum": setting.below}
    choices: list[Any] = [*setting.choices, *setting.same]
    if setting.container is list:
        item = {"enum": choices} if choices else {"type": "string"}
        shape: dict[str, Any] = {
            "anyOf": [{"type": "array", "items": item}, item]
        }  # one name may stand alone
    elif setting.container is dict:
        shape = {"type": "object", "additionalProperties": {"type": "string"}}
    elif choices:
        booleans = {"true": True, "false": False}
        shape = {"enum": [*choices, *(booleans[choice] for choice in choices if choice in booleans)]}
    else:
        limits = {name: bound for name, bound in bounds.items() if bound is not None}
        shape = {"type": TYPES[setting.kind], **limits}
    return {"anyOf": [shape, {"type": "null"}]} if setting.optional else shape
