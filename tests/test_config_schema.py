"""The JSON schema says what `read_run_config` accepts."""

from dataclasses import fields

from oribi.config import ALIASES, RunConfig
from oribi.config_schema import json_schema


def test_every_key_and_every_alias_is_in_the_schema():
    schema = json_schema()
    assert set(schema["properties"]) == {f.name for f in fields(RunConfig)} | set(ALIASES)
    assert schema["additionalProperties"] is False


def test_limits_choices_and_defaults_are_the_configs():
    properties = json_schema()["properties"]
    assert properties["lora_r"] == {
        "description": "Rank of the adapter.", "type": "integer", "minimum": 1, "maximum": 65536,
        "default": 16,
    }  # fmt: skip
    assert properties["learning_rate"]["exclusiveMaximum"] == 1
    assert properties["overlong"]["anyOf"][0]["enum"] == ["truncate", "drop", "split", "error"]
    assert True in properties["gradient_checkpointing"]["enum"]
    assert properties["eval_steps"]["anyOf"][1] == {"type": "null"}
    assert properties["dataset"]["anyOf"] == [
        {"type": "array", "items": {"type": "string"}},
        {"type": "string"},
    ]
    assert properties["sequence_len"]["deprecated"]
    assert properties["sequence_len"]["type"] == "integer"
