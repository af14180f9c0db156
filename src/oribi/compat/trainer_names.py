"""The trainer's names in scripts written for other libraries; only the import line of such a script changes."""

from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from oribi.compat.trl import trl_name

UnslothTrainer = trl_name("SFTTrainer")
UnslothTrainingArguments = trl_name("SFTConfig")


def unsloth_train(trainer: Trainer, *args: Any, **kwargs: Any) -> TrainOutput:
    """`trainer.train()`: the loss is divided by the targets of the whole optimizer step there already."""
    return trainer.train(*args, **kwargs)
