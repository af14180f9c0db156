"""A step's loss and gradients do not depend on how its rows are cut, packed, padded or spread over processes.

The reference is transformers' model with PEFT's adapter, one document at a time, summed over the rows of the step and
divided by its targets once; in float64, and what it errs in float32 itself is the measure where that is the larger limit
(deep models).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from oribi.data.collate import PackCollator
from oribi.data.packing import pack
from oribi.models.fused_layer import POLICIES
from oribi.models.unwrap import base_model
from oribi.selftest.check import Check, broken
from oribi.selftest.processes import run_together
from oribi.selftest.subject import LONGEST, Subject, reference_of
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.trainer import SFTTrainer

GROUP = "a step's gradients"
LIMITS = {"cpu": 1e-5, "cuda": 1e-4}  # relative, float32; a GPU sums in another order in every kernel
ROWS = 8


@dataclass
class Step:
    """Loss of an optimizer step and the gradients it was taken with, on the host."""

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass
class StepProbe(TrainerCallback):
    """Keeps the last optimizer step of a training."""

    loss: float = float("nan")
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs: Any) -> None:
        self.gradients = gradients_of(model)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of what is trained, copied to the host."""
    return {
        name: p.grad.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad
    }


def trained_step(model: PeftModel, tokenizer: Any, rows: Dataset, folder: Path, **settings: Any) -> Step:
    """The last step of one epoch through `SFTTrainer`, at learning rate 0."""
    args = SFTConfig(
        output_dir=str(folder), learning_rate=0.0, weight_decay=0.0, num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", warmup_steps=0, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    probe = StepProbe()
    trainer.add_callback(probe)
    trainer.train()
    return Step(probe.loss, probe.gradients)


def reference_step(reference: PeftModel, rows: Dataset) -> Step:
    """The same step by transformers and PEFT, a document at a time."""
    reference.zero_grad(set_to_none=True)
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    total = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=reference.device) for key in ("input_ids", "labels"))
        logits = reference(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100) / targets
        loss.backward()
        total += loss.item()
    return Step(total, gradients_of(reference))


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what was expected, at least `floor`."""
    scale = max(expected.double().norm().item(), floor, 1e-30)
    return (found.double() - expected.double()).norm().item() / scale


def step_error(found: Step, expected: Step) -> tuple[float, str]:
    """The worst relative error of loss and gradients, and where it is."""
    # a tensor whose gradient is a thousand times smaller than another's is float32 noise against that one
    floor = 1e-3 * max(g.norm().item() for g in expected.gradients.values())
    errors = {
        name: relative_error(found.gradients[name], gradient, floor)
        for name, gradient in expected.gradients.items()
    }
    errors["loss"] = abs(found.loss - expected.loss) / abs(expected.loss)
    worst = max(errors, key=errors.get)
    where = worst.removesuffix(".weight").removesuffix(".default").rpartition("layers.")[2]
    return errors[worst], f"loss {found.loss:.6f}, expected {expected.loss:.6f}; worst in {where}"


def check_steps(subject: Subject, folder: Path) -> Iterator[Check]:
    """Every way to take one step, and every recompute policy."""
    model, tokenizer = subject.load()
    vocabulary = base_model(model).config.vocab_size
    limit = LIMITS[model.device.type]
    many = subject.rows(11, vocabulary)
    rows, tail = many.select(range(ROWS)), many.select(range(8, 11))
    reference = reference_of(model)
    plain = reference_step(reference, rows)
    reference.double()
    whole, last = reference_step(reference, rows), reference_step(reference, tail)
    del reference
    error, note = step_error(plain, whole)
    limit = max(limit, 2 * error)
    yield Check(GROUP, "transformers and peft in float32", error, limit, note)
    packs = pack(rows, 2 * LONGEST)
    sizes = "per_device_train_batch_size", "gradient_accumulation_steps"
    ways = {
        "batch 8, accumulation 1": (rows, whole, dict(zip(sizes, (8, 1)))),
        "batch 4, accumulation 2": (rows, whole, dict(zip(sizes, (4, 2)))),
        "batch 1, accumulation 8": (rows, whole, dict(zip(sizes, (1, 8)))),
        "ragged: micro-batches of 3, 3 and 2": (rows, whole, dict(zip(sizes, (3, 3)))),
        f"packed: {len(packs)} packs": (packs, whole, dict(zip(sizes, (1, len(packs))))),
        "padded to a rectangle": (rows, whole, {**dict(zip(sizes, (4, 2))), "padding_free": False}),
        "last, partial step: 3 of 4 rows": (many, last, dict(zip(sizes, (2, 2)))),
        "optimizer of torch": (rows, whole, {**dict(zip(sizes, (2, 4))), "optim": "adamw_torch"}),
    }
    for name, (data, expected, settings) in ways.items():
        try:
            step = trained_step(model, tokenizer, data, folder / "steps", **settings)
            error, note = step_error(step, expected)
            yield Check(GROUP, name, error, limit, note)
        except Exception as failure:  # the table shows what broke, and the other lines are still worth having
            yield broken(GROUP, name, failure)
    yield _check_ranks(subject, folder, rows, whole if model.device.type == "cpu" else None, limit)
    yield from _check_policies(model, rows)
    yield _check_isolation(model, rows)


def _check_policies(model: PeftModel, rows: Dataset) -> Iterator[Check]:
    batch = {
        name: value.to(model.device) if torch.is_tensor(value) else value
        for name, value in PackCollator()(list(rows)).items()
    }
    decoder = base_model(model)
    model.train()
    found = {}
    for policy in POLICIES:
        decoder.set_recompute_policy(policy)
        model.zero_grad(set_to_none=True)
        model(**batch, num_items_in_batch=100).loss.backward()
        found[policy] = gradients_of(model)
    decoder.gradient_checkpointing_disable()
    kept = found.pop("speed")
    for policy, gradients in found.items():
        worst = max((gradients[name] - kept[name]).abs().max().item() for name in kept)
        yield Check("recompute policies", f"{policy} as speed", worst, 0.0, "largest difference")


def _check_isolation(model: PeftModel, rows: Dataset) -> Check:
    """Other documents of a pack say exactly the same when one document changes."""
    examples = [dict(row) for row in rows]
    changed = [dict(row) for row in rows]
    vocabulary = base_model(model).config.vocab_size
    changed[2]["input_ids"] = [(i + 1) % vocabulary for i in changed[2]["input_ids"]]
    model.eval()
    logits = []
    with torch.no_grad():
        for given in (examples, changed):
            batch = PackCollator()(given)
            batch = {n: v.to(model.device) if torch.is_tensor(v) else v for n, v in batch.items()}
            batch.pop("labels")
            logits.append(model(**batch, use_cache=False).logits[0].float())
    lengths = [len(row["input_ids"]) for row in examples]
    start = sum(lengths[:2])
    apart = (logits[0] - logits[1]).abs().amax(-1)
    touched = slice(start, start + lengths[2])
    if not apart[touched].max() > 0:
        return Check(
            "documents of a pack", "isolated", float("nan"), 0.0, "the changed document says the same"
        )
    apart[touched] = 0
    return Check(
        "documents of a pack", "isolated", apart.max().item(), 0.0, "largest change of another's logit"
    )


def _check_ranks(subject: Subject, folder: Path, rows: Dataset, whole: Step | None, limit: float) -> Check:
    """Two gloo processes with half of the rows each, on the CPU whatever the machine has."""
    name = "2 processes: batch 2, accumulation 2"
    try:
        if whole is None:  # on a CPU bitsandbytes quantises some weights to other codes than on a GPU
            whole = reference_step(reference_of(Subject(subject.path, "cpu").load()[0]).double(), rows)
        error, note = step_error(steps_of_ranks(subject, folder / "ranks"), whole)
        return Check(GROUP, name, error, limit, note)
    except Exception as failure:
        return broken(GROUP, name, failure)


def steps_of_ranks(subject: Subject, folder: Path, ranks: int = 2) -> Step:
    """Loss and gradients of one step that `ranks` processes take together.

    Raises:
        RuntimeError: a process failed; the message ends with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_together(["-m", "oribi.selftest.rank", subject.path, str(folder)], ranks)
    saved = load_file(folder / "step.safetensors")
    return Step(saved.pop("loss").item(), saved)
