"""Runs of the small model that tests stop, kill and resume; as a script, trains in a folder and prints its losses.

python -m tests.trust.runs MODEL FOLDER [key=value ...] [-- FOLDER [key=value ...]] ...: settings of the trainer, and resume,
device, dtype, packs, count, evaluates, evaluates_first; several trainings share one start, and print a line each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from oribi.data.packing import pack
from oribi.selftest.subject import LONGEST, Subject
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.trainer import SFTTrainer

ROWS = 40
SETTINGS = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "neftune_noise_alpha": 5.0,
    "disable_tqdm": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


def trainer_in(
    subject: Subject,
    folder: Path | str,
    evaluates: int = 0,
    dtype: str = "float32",
    packs: bool = False,
    count: int = ROWS,
    rows: Any = None,
    held_out: Any = None,
    loaded: Any = None,
    **settings: Any,
) -> SFTTrainer:
    """A trainer of the small model on so many random rows, or packs of them; some of them are evaluated on, too.

    `rows`, `held_out` and `loaded` (model and tokenizer) take the place of the usual ones.
    """
    model, tokenizer = loaded or subject.load(dtype)
    args = SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    rows = subject.rows(count, model.get_base_model().config.vocab_size) if rows is None else rows
    held_out = rows.select(range(evaluates)) if evaluates else held_out
    if packs:
        rows = pack(rows, 2 * LONGEST)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=held_out, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    return trainer


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def main(model: str, *words: str) -> None:
    while words:
        end = words.index("--") if "--" in words else len(words)
        (folder, *settings), words = words[:end], words[end + 1 :]
        train(model, folder, *settings)


def train(model: str, folder: str, *settings: str) -> None:
    given = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in settings)}
    resume, device = given.pop("resume", None), given.pop("device", "cpu")
    evaluates_first = given.pop("evaluates_first", False)
    trainer = trainer_in(Subject(model, device), folder, **given)
    if evaluates_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.args.process_index == 0:
        print("losses", json.dumps(losses_of(trainer)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
