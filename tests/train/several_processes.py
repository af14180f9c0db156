"""What two processes do together, for test_exchange.py: `python -m tests.train.several_processes MODEL FOLDER`.

Each process writes what it found into FOLDER/RANK.json, and gradients into FOLDER/NAME-RANK.pt.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oribi.models import layer_shards
from oribi.selftest.subject import Subject
from oribi.train.trainer import SFTTrainer
from tests.trust.runs import losses_of, trainer_in

RANK = int(os.environ.get("RANK", "0"))
# of one process; two halve the accumulation. Rows have different numbers of targets
USUAL = {
    "max_steps": 3, "save_strategy": "no", "neftune_noise_alpha": None, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "optim": "paged_adamw_32bit", "adam_epsilon": 1e-3,
}  # fmt: skip
OPTIMIZERS = {"flat": "paged_adamw_32bit", "torch": "adamw_torch"}


class Look(TrainerCallback):
    """Keeps the gradients with which the first optimizer step is taken."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def first_gradients(trainer: SFTTrainer) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Gradients of a training's first step, and all of its losses."""
    look = Look()
    trainer.add_callback(look)
    trainer.train()
    return look.gradients, losses_of(trainer)


class AtStep(TrainerCallback):
    """Calls a function when a step begins."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.act()


class OwnStep(SFTTrainer):
    """A trainer whose step knows nothing of other processes."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


def runner(change: Callable[[torch.Tensor], torch.Tensor], step: int) -> Callable:
    """Runs micro-batches, and changes the loss of the first one of a step, once."""
    done = []

    def run(model, inputs, targets):
        loss = model(**inputs, num_items_in_batch=targets / 2).loss
        loss.backward()
        done.append(loss)
        return change(loss) if RANK == 1 and len(done) == 2 * step + 1 else loss.detach()

    return run


def broken(loss: torch.Tensor) -> torch.Tensor:
    for parameter in PARAMETERS:
        parameter.grad.mul_(float("nan"))
    return loss.detach() * float("nan")


def short_of_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def fails(loss: torch.Tensor) -> torch.Tensor:
    raise ValueError("these rows are not what they seem\nat all")


def run_short(trainer: SFTTrainer, where: str) -> None:
    """The second process is short of memory in the middle of its third micro-batch, or from there on always."""
    calls = []

    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def before(*given: Any) -> None:
        calls.append(where)
        if where == "forward" and len(calls) == 3 or where == "always" and len(calls) > 2:
            fail()

    def after(layer: torch.nn.Module, given: tuple, output: torch.Tensor) -> None:
        if where == "backward" and len(calls) == 3:
            output.register_hook(fail)

    layer = trainer.model.get_base_model().model.layers[1 if where == "forward" else 0]
    if RANK == 1:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


PARAMETERS: list[torch.nn.Parameter] = []


def main(path: str, folder: str) -> None:
    subject, out = Subject(path, "cpu"), Path(folder)
    found: dict[str, Any] = {}

    def trainer(name: str, **settings: Any) -> SFTTrainer:
        made = trainer_in(
            subject, out / name, **{**USUAL, "use_cpu": True, "gradient_accumulation_steps": 2, **settings}
        )
        PARAMETERS[:] = [p for p in made.model.parameters() if p.requires_grad]
        return made

    def ends(name: str, made: SFTTrainer) -> None:
        try:
            made.train()
            found[name] = ["ended"]
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            found[name] = [type(error).__name__, str(error), made.state.global_step]

    for name, optimizer in OPTIMIZERS.items():
        made = trainer(name, optim=optimizer)
        if RANK == 1:  # the first process decides how training begins
            with torch.no_grad():
                PARAMETERS[0].add_(1)
        assert made.model_wrapped is made.model
        gradients, found[name] = first_gradients(made)
        assert made.model_wrapped is made.model
        torch.save(gradients, out / f"{name}-{RANK}.pt")

    made = trainer("short")
    made.step_runner = runner(short_of_memory, 1)
    gradients, found["short"] = first_gradients(made)
    found["parts"] = made._smaller.parts

    reads = layer_shards.peer_memory
    for where in ("alone", "forward", "backward"):
        if where != "alone":  # all gather each layer together
            layer_shards.peer_memory = lambda size, device, group: None
        made = trainer(f"sharded {where}", fsdp=True)
        run_short(made, "forward" if where == "alone" else where)
        gradients, found[f"sharded {where}"] = first_gradients(made)
        torch.save(gradients, out / f"sharded {where}-{RANK}.pt")
        found[f"parts {where}"] = made._smaller.parts
    made = trainer("sharded always", fsdp=True)
    run_short(made, "always")
    ends("sharded always", made)
    layer_shards.peer_memory = reads

    made = trainer("broken")
    made.step_runner = runner(broken, 1)
    ends("broken", made)

    made = trainer("stopped", max_steps=9)
    if RANK == 1:
        made.add_callback(AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    ends("stopped", made)
    found["saved"] = sorted(path.name for path in (out / "stopped").glob("checkpoint-*"))

    made = trainer("other")
    if RANK == 1:
        weight = made.model.get_base_model().model.norm.weight
        weight.data[3] += 1
    ends("other", made)

    model, tokenizer = subject.load("float32")
    made = trainer("own", loaded=(model, tokenizer))
    made.__class__ = OwnStep
    ends("own", made)

    # the last: the first process is left with a sum that nobody completes
    made = trainer("failed")
    made.step_runner = runner(fails, 1)
    ends("failed", made)
    (out / f"{RANK}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
