"""The run config as a JSON schema, by which editors complete keys and mark mistakes."""

import types
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from oribi.config import ALIASES, RunConfig

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """The schema: every key with its meaning, type, limits and default; other programs' names are allowed, too."""
    kinds, properties = get_type_hints(RunConfig), {}
    for setting in fields(RunConfig):
        properties[setting.name] = _property(kinds[setting.name], setting.metadata)
        default = setting.default if setting.default is not MISSING else setting.default_factory()
        properties[setting.name]["default"] = default
    aliases = {
        alias: {"description": f"Read as {name}.", "deprecated": True, **_shape(properties[name])}
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


def _property(kind: Any, limits: Any) -> dict[str, Any]:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    optional = type(None) in options
    kind = next(option for option in options if option is not type(None))
    bounds = {}
    if limits["low"] is not None:
        bounds["minimum"] = limits["low"]
    if limits["high"] is not None:
        bounds["maximum"] = limits["high"]
    if limits["below"] is not None:
        bounds["exclusiveMaximum"] = limits["below"]
    choices = [*limits["choices"], *limits["same"]]
    if get_origin(kind) is list:
        item = {"enum": choices} if choices else {"type": "string"}
        shape: dict[str, Any] = {
            "anyOf": [{"type": "array", "items": item}, item]
        }  # one name may stand alone
    elif get_origin(kind) is dict:
        shape = {"type": "object", "additionalProperties": {"type": "string"}}
    elif choices:
        allowed = [*choices, *({"true": True, "false": False}[c] for c in choices if c in ("true", "false"))]
        shape = {"enum": allowed}
    else:
        shape = {"type": TYPES[kind], **bounds}
    if optional:
        shape = {"anyOf": [shape, {"type": "null"}]}
    return {"description": limits["help"] + ".", **shape}


def _shape(described: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key not in ("description", "default")}
