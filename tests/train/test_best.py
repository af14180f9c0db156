"""The best weights are kept, a training that no longer improves ends, and both go on rightly when it is resumed."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from oribi.config_file import read_run_config
from oribi.errors import ConfigError
from oribi.run import run, state_of
from oribi.train.arguments import SFTConfig
from oribi.train.schedules import require_schedule
from tests.train.conftest import some_conversations


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """Trains the tiny model at a rate at which the second evaluation is worse than the first."""
    some_conversations(24).to_json(tmp_path / "rows.jsonl")

    def call(**settings):
        usual = {
            "model": str(tiny_folder), "dataset": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"),
            "dtype": "float32", "lora_r": 4, "max_steps": 4, "warmup_steps": 0, "learning_rate": 0.9, "report": False,
            "gradient_accumulation_steps": 1, "max_seq_length": 128, "eval_fraction": 0.25, "eval_steps": 1,
        }  # fmt: skip
        flags = [f"--{name}={json.dumps(value)}" for name, value in {**usual, **settings}.items()]
        return run(read_run_config(None, flags)[0])

    return call


def weights(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def test_an_early_stop_keeps_the_best_weights_and_is_a_finished_run(train, tmp_path, capsys):
    folder = tmp_path / "run"
    train(early_stopping_patience=1, save_steps=1)
    said = capsys.readouterr()
    assert "stopping at step 2: the last evaluation brought no improvement" in said.out + said.err
    assert "the weights of step 1 are kept, the best evaluation (eval_loss" in said.out + said.err
    assert state_of(folder).finished
    saved, best = weights(folder / "adapter"), weights(folder / "checkpoint-1")
    assert all((saved[name] == best[name]).all() for name in best)
    train(early_stopping_patience=1, save_steps=1, resume="true")  # as clusters restart finished jobs
    assert "nothing left to train" in "".join(capsys.readouterr())
    assert not (folder / "checkpoint-3").exists()


def test_a_resumed_training_goes_on_counting_evaluations(train, tmp_path, monkeypatch):
    # step 2 is worse than step 1; stopped there, the resumed run ends where the whole one would
    folder = tmp_path / "run"
    flat = {
        "learning_rate": 1e-9,
        "save_steps": 1,
        "early_stopping_patience": 3,
        "load_best_model_at_end": False,
    }
    train(**flat, max_steps=3)
    counted = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"][
        "EarlyStop"
    ]
    assert isinstance(EarlyStoppingCallback.from_state(counted), EarlyStoppingCallback)
    before = counted["attributes"]["early_stopping_patience_counter"]
    train(**flat, max_steps=9, resume="true")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert before > 0
    assert max(line["step"] for line in log if "eval_loss" in line) == 3 + 3 - before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"early_stopping_patience": 0, "eval_strategy": "steps"}, "at least 1"),
        ({"early_stopping_patience": 2}, "needs evaluations"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}}, "has no 'num_cycle'; must be num_cycles"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "linear has no 'min_lr'; it takes no arguments"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "2"}}, "power = '2': must be a number"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused_in_python_too(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(output_dir=str(tmp_path), **given)


def test_every_schedule_of_the_table_is_known():
    from oribi.config import SCHEDULES
    from oribi.train.schedules import _NEEDED

    for name in SCHEDULES:
        require_schedule(name, {_NEEDED[name][0]: 1} if name in _NEEDED else None)
