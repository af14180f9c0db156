"""What is saved says the same when it is read: adapters, merged models, checkpoints of a run that goes on."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oribi.errors import ConfigError
from oribi.models.load import load_model
from oribi.models.unwrap import base_model
from oribi.save import save_merged
from oribi.save.adapter_check import plain_base
from oribi.save.base import locate_here
from oribi.selftest.check import Check, broken
from oribi.selftest.invariance import LIMITS, relative_error
from oribi.selftest.subject import LONGEST, Subject
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.setup import temporarily
from oribi.train.trainer import SFTTrainer

GROUP = "files"
STEPS, STOP = 6, 3


def check_files(subject: Subject, folder: Path) -> Iterator[Check]:
    """Adapter, merge and resume; every check loads the model anew."""
    checks: dict[str, Callable[[Subject, Path], Iterator[Check]]] = {
        "adapter": _check_adapter,
        "merge": _check_merge,
        "resume": _check_resume,
    }
    for name, check in checks.items():
        try:
            yield from check(subject, folder / name)
        except Exception as failure:  # the other files are still worth checking
            yield broken(GROUP, name, failure)


@torch.no_grad()
def _logits(model: torch.nn.Module, rows: Dataset) -> torch.Tensor:
    device = next(model.parameters()).device
    model.eval()
    return torch.cat(
        [
            model(input_ids=torch.tensor([row["input_ids"]], device=device), use_cache=False)
            .logits[0]
            .float()
            for row in rows
        ]
    )


def _loaded(subject: Subject) -> tuple[PeftModel, Any, Dataset]:
    model, tokenizer = subject.load()
    return model, tokenizer, subject.rows(3, base_model(model).config.vocab_size)


def _check_adapter(subject: Subject, folder: Path) -> Iterator[Check]:
    model, tokenizer, rows = _loaded(subject)
    expected, limit = _logits(model, rows), LIMITS[model.device.type]
    with redirect_stdout(io.StringIO()):
        save_merged(model, folder, tokenizer, "lora")
    ours, _ = load_model(str(folder), dtype="float32", device_map=subject.device, max_seq_length=4 * LONGEST)
    difference = (_logits(ours, rows) - expected).abs().max().item()
    yield Check(GROUP, "adapter loaded by oribi", difference, 0.0, "largest difference of a logit")
    location, _ = locate_here(model, model.oribi.name_or_path)
    theirs = plain_base(model, location, model.oribi, torch.float32, model.device)
    theirs = PeftModel.from_pretrained(theirs, folder)
    error = relative_error(_logits(theirs, rows), expected)
    yield Check(
        GROUP, "adapter read back by plain peft", error, limit, "on transformers, with the base's files"
    )


def _check_merge(subject: Subject, folder: Path) -> Iterator[Check]:
    model, tokenizer, rows = _loaded(subject)
    expected, limit = _logits(model, rows), LIMITS[model.device.type]
    with redirect_stdout(io.StringIO()):
        save_merged(model, folder, tokenizer, "merged_16bit", dtype=torch.float32, verify=False)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    yield Check(
        GROUP, "merged model loaded by transformers", relative_error(_logits(merged, rows), expected), limit
    )


def _run(
    subject: Subject, folder: Path, checkpoint: Path | None
) -> tuple[SFTTrainer, dict[str, torch.Tensor]]:
    """STEPS steps with a checkpoint at STOP, from the start or from a checkpoint; everything that must come out alike."""
    model, tokenizer = subject.load()
    trainer = _trainer(subject, folder, model, tokenizer)
    with redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = {f"weight {name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for index, states in optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {name}": torch.as_tensor(value) for name, value in states.items()}
    state["rng"] = torch.get_rng_state()
    state["rate"] = torch.tensor(trainer.lr_scheduler.get_last_lr())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state["losses"] = torch.tensor(losses, dtype=torch.float64)
    return trainer, state


def _trainer(subject: Subject, folder: Path, model: Any, tokenizer: Any) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, save_strategy="steps", save_steps=STOP, learning_rate=1e-3, warmup_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, neftune_noise_alpha=5.0, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = subject.rows(11, base_model(model).config.vocab_size)
    trainer = SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    return trainer


def _check_resume(subject: Subject, folder: Path) -> Iterator[Check]:
    _, whole = _run(subject, folder / "whole", None)
    _, resumed = _run(subject, folder / "resumed", folder / "whole" / f"checkpoint-{STOP}")
    if whole.keys() != resumed.keys() or len(whole["losses"]) != STEPS:
        yield Check(GROUP, "resumed run", float("nan"), 0.0, "its state has other parts")
        return
    for part in ("losses", "weight", "optimizer", "rng", "rate"):
        names = [name for name in whole if name.split()[0] == part]
        worst = max((whole[name].double() - resumed[name].double()).abs().max().item() for name in names)
        yield Check(GROUP, f"resumed run: {part}", worst, 0.0, f"{len(names)} tensors, largest difference")
    yield _check_refusal(subject, folder)


def _check_refusal(subject: Subject, folder: Path) -> Check:
    """A run is not gone on with on another base: one whose configuration differs in a byte."""
    model, tokenizer = subject.load()
    source = base_model(model).oribi
    files = {name: {**entry, "sample_sha256": "0" * 64} for name, entry in source.identity.files.items()}
    with temporarily(source, identity=replace(source.identity, files=files)):
        trainer = _trainer(subject, folder / "other base", model, tokenizer)
        try:
            trainer.find_checkpoint(str(folder / "whole" / f"checkpoint-{STOP}"))
            return Check(GROUP, "resume on a changed base", float("nan"), 0.0, "it was not refused")
        except ConfigError as error:
            told = [line for line in str(error).splitlines() if "base model" in line]
    return Check(
        GROUP, "resume on a changed base", 0.0 if told else float("nan"), 0.0, "refused before the first step"
    )
