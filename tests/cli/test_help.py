"""What the command line says of its keys: in help, by `oribi help KEY`, and to shells that complete words."""

import pytest

from oribi.cli.help import keys_by_group
from oribi.config import SETTINGS


def test_help_of_train_lists_every_key_by_group(oribi):
    shown = oribi("train", "-h").out
    words = set(shown.replace(",", " ").split())
    assert set(SETTINGS) <= words
    assert keys_by_group().index("The adapter" if "The adapter" in shown else "Adapter") > 0


def test_help_cuts_no_summary_short(oribi):
    for words in ([], ["inspect"]):
        listed = oribi(*words, "--help").out.partition("Commands:")[2]
        assert listed
        assert "..." not in listed


@pytest.mark.parametrize("word", ["lr_scheduler_kwargs", "lr-scheduler-kwargs"])
def test_help_explains_a_key(oribi, word):
    shown = oribi("help", word)
    assert shown.code == 0
    assert "lr_scheduler_kwargs: Arguments of the schedule" in shown.out
    assert "allowed       pairs of a name and a value" in shown.out
    assert "With a schedule that takes arguments." in shown.out


def test_help_knows_other_names_and_near_ones(oribi):
    assert "learning_rate: Peak learning rate." in oribi("help", "lr").out
    assert "did you mean lora_r?" in oribi("help", "lora_rr").err
    assert "did you mean num_train_epochs?" in oribi("help", "epochs").err
    assert "Fine-tune a model." in oribi("help", "train").out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("oribi exp", {"export"}),
        ("oribi train --lora_a", {"--lora_alpha"}),
        ("oribi train run.yaml --init_lora_weights pi", {"pissa"}),
    ],
)
def test_a_shell_completes_commands_keys_and_values(oribi, monkeypatch, typed, expected):
    monkeypatch.setenv("_ORIBI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert set(oribi().out.split()) == expected
