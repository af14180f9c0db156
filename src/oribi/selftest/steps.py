"""A step's loss and gradients do not depend on how its rows are batched, packed, padded or spread over processes.

The reference is transformers' model with PEFT's adapter in float64: one document at a time, summed over the rows of the step and
divided once by the number of targets. The limit is at least twice the error of the same reference in float32, which grows with
the depth of the model.

`python -m oribi.selftest.steps MODEL FOLDER cpu|cuda`, with torchrun's variables set, is one of several processes that take a step
together.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from oribi.data.collate import PackCollator
from oribi.data.packing import pack
from oribi.errors import ConfigError
from oribi.models.fused_layer import POLICIES
from oribi.models.open import open_model
from oribi.models.unwrap import base_model
from oribi.selftest.comparison import Comparison, failed
from oribi.selftest.processes import run_together
from oribi.selftest.subject import LONGEST, Subject, reference_of
from oribi.train.arguments import SFTConfig
from oribi.train.context import require_shareable
from oribi.train.progress import Progress
from oribi.train.trainer import SFTTrainer

GROUP = "a step's gradients"
LIMITS = {"cpu": 1e-5, "cuda": 1e-4}  # relative, float32; a GPU sums in another order in every kernel
ROWS = 8


@dataclass
class Step(TrainerCallback):
    """Loss and gradients of an optimizer step, on the host; as a callback, of the last step of a training."""

    loss: float = float("nan")
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs: Any) -> None:
        self.gradients = gradients_of(model)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the trained parameters, copied to the host."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.grad.detach().to("cpu", copy=True) for name, p in trained}


def trained_step(model: PeftModel, tokenizer: Any, rows: Dataset, folder: Path, **settings: Any) -> Step:
    """The last step of one epoch through `SFTTrainer`, at learning rate 0."""
    args = SFTConfig(
        output_dir=str(folder), learning_rate=0.0, weight_decay=0.0, num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", warmup_steps=0, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    step = Step()
    trainer.add_callback(step)
    trainer.train()
    return step


def reference_step(reference: PeftModel, rows: Dataset) -> Step:
    """The same step by transformers and PEFT, one document at a time."""
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
    """Norm of the difference, relative to the norm of `expected` or to `floor`, whichever is larger."""
    scale = max(expected.double().norm().item(), floor, 1e-30)
    return (found.double() - expected.double()).norm().item() / scale


def step_error(found: Step, expected: Step) -> tuple[float, str]:
    """The largest relative error of loss and gradients, and where it is."""
    # a gradient a thousand times smaller than another is dominated by float32 rounding
    floor = 1e-3 * max(g.norm().item() for g in expected.gradients.values())
    errors = {
        name: relative_error(found.gradients[name], gradient, floor)
        for name, gradient in expected.gradients.items()
    }
    errors["loss"] = abs(found.loss - expected.loss) / abs(expected.loss)
    worst = max(errors, key=errors.get)
    where = worst.removesuffix(".weight").removesuffix(".default").rpartition("layers.")[2]
    return errors[worst], f"loss {found.loss:.6f}, expected {expected.loss:.6f}; worst in {where}"


def packed_batch(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """All rows as one pack on a device."""
    batch = PackCollator()(rows)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def expected_steps(
    model: PeftModel, rows: list[Dataset], group: str = GROUP
) -> tuple[list[Step], Comparison]:
    """The steps that rows must give, in float64, and how far the same reference in float32 is from the first of them."""
    reference = reference_of(model)
    plain = reference_step(reference, rows[0])
    reference.double()
    found = [reference_step(reference, one) for one in rows]
    error, note = step_error(plain, found[0])
    limit = max(LIMITS[model.device.type], 2 * error)
    return found, Comparison(group, "transformers and peft in float32", error, limit, note)


# name -> rows, expected step, batch size, accumulation, other settings
Ways = dict[str, tuple[Dataset, Step, int, int, dict[str, Any]]]


def compare_ways(
    model: PeftModel, tokenizer: Any, folder: Path, ways: Ways, limit: float, group: str = GROUP
) -> Iterator[Comparison]:
    """Each way to take one step in this process."""
    for name, (data, expected, batch, accumulation, settings) in ways.items():
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        try:
            error, note = step_error(
                trained_step(model, tokenizer, data, folder, **settings, **sizes), expected
            )
            yield Comparison(group, name, error, limit, note)
        except Exception as error:
            yield failed(group, name, error)


def compare_steps(subject: Subject, folder: Path) -> Iterator[Comparison]:
    """Every way to take one step, and every recompute policy."""
    model, tokenizer = subject.load()
    many = subject.rows(11, base_model(model).config.vocab_size)
    rows, tail = many.select(range(ROWS)), many.select(range(ROWS, 11))
    (whole, last), own = expected_steps(model, [rows, tail])
    yield own
    limit, packs = own.limit, pack(rows, 2 * LONGEST)
    ways: Ways = {
        "batch 8, accumulation 1": (rows, whole, 8, 1, {}),
        "batch 4, accumulation 2": (rows, whole, 4, 2, {}),
        "batch 1, accumulation 8": (rows, whole, 1, 8, {}),
        "ragged: micro-batches of 3, 3 and 2": (rows, whole, 3, 3, {}),
        f"packed: {len(packs)} packs": (packs, whole, 1, len(packs), {}),
        "padded to a rectangle": (rows, whole, 4, 2, {"padding_free": False}),
        "last, partial step: 3 of 4 rows": (many, last, 2, 2, {}),
        "optimizer of torch": (rows, whole, 2, 4, {"optim": "adamw_torch"}),
    }
    yield from compare_ways(model, tokenizer, folder / "steps", ways, limit)
    on_gpu = model.device.type == "cuda"
    yield from _compare_processes(subject, folder, rows, None if on_gpu else whole, limit)
    if on_gpu and torch.cuda.device_count() > 1:
        yield from _compare_processes(subject, folder, rows, whole, limit, on_gpus=True)
    yield from compare_model(model, rows)


def compare_model(model: PeftModel, rows: Dataset, group: str | None = None) -> Iterator[Comparison]:
    """What no step and no reference is needed for: recompute policies, and the documents of a pack."""
    yield from _compare_policies(model, rows, group or "recompute policies")
    yield replace(compare_documents(model, rows), **({"group": group} if group else {}))


def _compare_policies(model: PeftModel, rows: Dataset, group: str) -> Iterator[Comparison]:
    """Gradients of every recompute policy against those of the policy that keeps everything."""
    batch = packed_batch(list(rows), model.device)
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
        yield Comparison(group, f"{policy} as speed", worst, 0.0, "largest difference")


@torch.no_grad()
def compare_documents(model: PeftModel, rows: Dataset) -> Comparison:
    """The other documents of a pack get bit-equal logits when one document changes."""
    examples, changed = ([dict(row) for row in rows] for _ in range(2))
    vocabulary = base_model(model).config.vocab_size
    changed[2]["input_ids"] = [(i + 1) % vocabulary for i in changed[2]["input_ids"]]
    model.eval()
    logits = []
    for given in (examples, changed):
        batch = packed_batch(given, model.device)
        del batch["labels"]
        logits.append(model(**batch, use_cache=False).logits[0].float())
    apart = (logits[0] - logits[1]).abs().amax(-1).split([len(row["input_ids"]) for row in examples])
    error = max(document.max().item() for i, document in enumerate(apart) if i != 2)
    note = "largest change of another document's logit"
    if not apart[2].max() > 0:
        error, note = float("nan"), "the logits of the changed document did not change"
    return Comparison("documents of a pack", "documents of a pack are isolated", error, 0.0, note)


# how two processes take a step: half of the rows each, the frozen weights whole or sharded; or half of one row of all documents
HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SHARED = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "context_parallel": 2}
MODES = {"whole": HALVES, "sharded": {**HALVES, "fsdp": True}, "shared rows": SHARED}


def modes_of(config: Any) -> Iterator[str]:
    """The modes that a model can be trained in."""
    for mode, settings in MODES.items():
        try:
            require_shareable(config, settings.get("context_parallel", 1))
        except ConfigError:
            continue
        yield mode


def _compare_processes(
    subject: Subject, folder: Path, rows: Dataset, whole: Step | None, limit: float, on_gpus: bool = False
) -> Iterator[Comparison]:
    """Two processes in each mode: gloo on the CPU, NCCL on GPUs."""
    device, where = ("cuda", "2 GPUs") if on_gpus else ("cpu", "2 processes")
    names = {mode: f"{where}, {mode}" for mode in modes_of(open_model(subject.path).config)}
    try:
        if whole is None:  # on a CPU, bitsandbytes quantises some weights to other codes than on a GPU
            whole = reference_step(reference_of(Subject(subject.path, "cpu").load()[0]).double(), rows)
        run_together(["-m", "oribi.selftest.steps", subject.path, str(folder), device], on_gpus=on_gpus)
        for mode, name in names.items():
            saved = load_file(folder / f"{device}-{mode}.safetensors")
            error, note = step_error(Step(saved.pop("loss").item(), saved), whole)
            yield Comparison(GROUP, name, error, limit, note)
    except Exception as error:
        yield failed(GROUP, names["whole"], error)


def main(path: str, folder: Path, device: str) -> None:
    """Takes the step in each mode; the first process writes loss and gradients to DEVICE-MODE.safetensors."""
    on_cpu = {"use_cpu": True, "ddp_backend": "gloo"} if device == "cpu" else {}
    place = "cpu" if device == "cpu" else None  # on GPUs each process has its own
    for mode in modes_of(open_model(path).config):
        model, tokenizer = Subject(path, place).load()
        rows = Subject(path).rows(11, base_model(model).config.vocab_size).select(range(ROWS))
        step = trained_step(model, tokenizer, rows, folder / "processes", **on_cpu, **MODES[mode])
        if torch.distributed.get_rank() == 0:
            loss = torch.tensor(step.loss, dtype=torch.float64)
            save_file({**step.gradients, "loss": loss}, folder / f"{device}-{mode}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
