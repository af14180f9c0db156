"""docs/settings.md shows the table of settings, and the Python calls have the defaults that the table says.

`python -m tests.docs.test_settings` writes the page anew, and docs/config.md.
"""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from oribi import FastLanguageModel, SFTConfig, prepare_dataset
from oribi.config import ALIASES, SETTINGS, STAGES
from oribi.config_file import GROUPS
from oribi.lora.attach import attach_lora

PAGE = Path(__file__).parent.parent.parent / "docs" / "settings.md"
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


def page() -> str:
    """What docs/settings.md has to say."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run: its default in a config file (or as a flag of `oribi train`), and in Python, where the",
        "calls keep the defaults that scripts for TRL and Unsloth expect. **Bold** marks where the two differ.",
        "`oribi init` writes a config with these explanations, `oribi train CONFIG --check` shows all values in force, and",
        "`oribi init --schema FILE` writes a JSON schema by which editors complete and check keys.",
    ]
    calls = python_calls()
    for name, setting in SETTINGS.items():
        if name in GROUPS:
            title = GROUPS[name].removeprefix("the ").capitalize()
            lines += [
                "",
                f"## {title}",
                "",
                "| setting | config file | Python | meaning |",
                "|---|---|---|---|",
            ]
        cells = []
        for one, call, argument, default in calls:
            if one != name:
                continue
            reason = OTHERWISE.get((call, name), (None, ""))[1]
            value = "" if default in NO_DEFAULT else f"={shown(default)}"
            cell = f"`{call}({argument}{value})`" + (f" ({reason})" if reason else "")
            differs = not reason and value and default != setting.default
            cells.append(f"**{cell}**" if differs and shown(default) != shown(setting.default) else cell)
        allowed = f" One of: {', '.join(setting.choices)}." if 0 < len(setting.choices) <= 7 else ""
        meaning = f"{setting.help}.{allowed}".replace("|", "\\|")
        default = f"`{shown(setting.default)}`" if "sft" in setting.used_by else "see below"
        lines.append(f"| `{name}` | {default} | {', '.join(cells) or '-'} | {meaning} |")
    lines += ["", "## Defaults of the stages", "", "Where a `stage` other than `sft` has a default of its own; `-` marks that it does not use the setting, which is then refused.",
              "", f"| setting | {' | '.join(f'`{stage}`' for stage in STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]  # fmt: skip
    for name, setting in SETTINGS.items():
        if setting.stages:
            used = [stage in setting.used_by or name == "packing" for stage in STAGES]
            values = [f"`{shown(setting.default_of(s))}`" if u else "-" for s, u in zip(STAGES, used)]
            lines.append(f"| `{name}` | {' | '.join(values)} |")
    others = {name: [alias for alias, key in ALIASES.items() if key == name] for name in SETTINGS}
    lines += ["", "## Other names", "", "A config file may use these names too; `oribi train` says how each was read.", "",
              "| setting | also read |", "|---|---|"]  # fmt: skip
    lines += [
        f"| `{name}` | {', '.join(f'`{a}`' for a in aliases)} |"
        for name, aliases in others.items()
        if aliases
    ]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A default as a table cell has it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)


def test_the_page_shows_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.docs.test_settings writes it anew"


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    subprocess.run([sys.executable, str(PAGE.parent / "generate.py"), "config.md"], check=True)
