"""What users of other programs write: each key of a run file's neighbours is a setting, its name, or has an answer."""

from dataclasses import fields

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from oribi.config import ALIASES, SETTINGS
from oribi.config_advice import INSTEAD, OTHER_NAMES, WHEN_TO_CHANGE
from oribi.config_file import read_run_config
from oribi.errors import ConfigError


def known_to(kind: type) -> set[str]:
    return {one.name for one in fields(kind) if one.init}


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig, LoraConfig])
def test_every_key_of_another_config_is_a_setting_or_has_an_answer(kind):
    names = known_to(kind)
    assert names <= {*SETTINGS, *ALIASES, *INSTEAD}
    for name in names - {*SETTINGS, *ALIASES}:
        with pytest.raises(ConfigError) as error:
            read_run_config(None, ["--model", "m", "--dataset", "d", f"--{name}", "1"])
        assert INSTEAD[name] in str(error.value) or "dtype" in str(error.value)


def test_no_answer_is_for_a_setting():
    assert not set(INSTEAD) & {*SETTINGS, *ALIASES}
    assert set(OTHER_NAMES) <= set(SETTINGS) == set(WHEN_TO_CHANGE)
