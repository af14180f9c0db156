"""One of several processes that take a step together: `python -m oribi.selftest.rank MODEL FOLDER`, torchrun's variables set."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from oribi.models.unwrap import base_model
from oribi.selftest.invariance import ROWS, trained_step
from oribi.selftest.subject import Subject


def main(path: str, folder: Path) -> None:
    """Take the step; the first process writes loss and gradients to step.safetensors."""
    subject = Subject(path, "cpu")
    model, tokenizer = subject.load()
    rows = subject.rows(11, base_model(model).config.vocab_size).select(range(ROWS))
    step = trained_step(
        model, tokenizer, rows, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, ddp_backend="gloo",
    )  # fmt: skip
    if torch.distributed.get_rank() == 0:
        save_file(
            {**step.gradients, "loss": torch.tensor(step.loss, dtype=torch.float64)},
            folder / "step.safetensors",
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
