"""The Python calls have the defaults that the table of settings says, which docs/config.md shows."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest

from oribi import FastLanguageModel, SFTConfig, prepare_dataset
from oribi.config import SETTINGS
from oribi.lora.attach import attach_lora

NO_DEFAULT = (MISSING, inspect.Parameter.empty)
# setting -> its name in a Python call, where that is another one
NAMES = {
    "from_pretrained": {"model": "model_name"},
    "get_peft_model": {
        "lora_r": "r", "seed": "random_state", "gradient_checkpointing": "use_gradient_checkpointing",
    },
    "SFTConfig": {"max_seq_length": "max_length", "train_on_responses_only": "assistant_only_loss"},
    "prepare_dataset": {
        "dataset": "source", "dataset_text_field": "text_field", "dataset_num_proc": "num_proc",
        "train_on_responses_only": "train_on",
    },
}  # fmt: skip
# arguments of the same name that mean something else, or nothing
NOT_ITS = {("get_peft_model", "max_seq_length"), ("get_peft_model", "model"), ("SFTConfig", "loss_type")}
# (call, setting) -> the default there, and why it says the same as the table or is not the table's
OTHERWISE = {
    ("from_pretrained", "load_in_4bit"): (None, "NF4, unless an adapter was trained otherwise"),
    ("from_pretrained", "dtype"): (None, "the machine's"),
    ("SFTConfig", "max_seq_length"): (None, "the model's"),
    ("SFTConfig", "train_on_responses_only"): (None, "answers only"),
    ("SFTConfig", "fsdp"): (None, "off"),
    ("SFTConfig", "gradient_checkpointing"): (False, "get_peft_model set it up"),
    ("prepare_dataset", "train_on_responses_only"): ("responses", "answers only"),
}


def defaults_of(call: str) -> dict[str, Any]:
    """Every argument of a call with its default."""
    if call == "SFTConfig":
        return {
            f.name: f.default if f.default is not MISSING else f.default_factory()
            for f in fields(SFTConfig)
            if f.default is not MISSING or f.default_factory is not MISSING
        }
    function = prepare_dataset if call == "prepare_dataset" else getattr(FastLanguageModel, call)
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def python_calls() -> list[tuple[str, str, str, Any]]:
    """(setting, call, its argument there, default there) of every Python call that takes a setting."""
    return [
        (setting, call, name, defaults[name])
        for setting in SETTINGS
        for call in NAMES
        for defaults in [defaults_of(call)]
        for name in [NAMES[call].get(setting, setting)]
        if name in defaults and (call, setting) not in NOT_ITS
    ]


def shown(value: Any) -> str:
    """A default as a table cell has it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {one}" for name, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(("setting", "call", "argument", "default"), python_calls())
def test_a_python_call_has_the_default_of_the_table(setting, call, argument, default):
    if default in NO_DEFAULT:
        return
    expected = OTHERWISE.get((call, setting), (SETTINGS[setting].python, ""))[0]
    assert default == expected or not (default or expected), f"{call}({argument})"


def test_attach_lora_has_the_defaults_of_get_peft_model():
    ours, theirs = (inspect.signature(f).parameters for f in (attach_lora, FastLanguageModel.get_peft_model))
    shared = [name for name, one in ours.items() if one.kind is not one.VAR_KEYWORD]
    assert [ours[name].default for name in shared] == [theirs[name].default for name in shared]
