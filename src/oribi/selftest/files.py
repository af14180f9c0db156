"""Saved files give the same results when they are loaded: adapters, merged models, and the checkpoints of a resumed run."""

import io
from collections.abc import Iterator
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
from oribi.selftest.comparison import Comparison, failed
from oribi.selftest.steps import LIMITS, relative_error
from oribi.selftest.subject import LONGEST, Subject, plain_model
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.setup import temporarily
from oribi.train.trainer import SFTTrainer

GROUP = "files"
STEPS, STOP = 6, 3


def compare_files(subject: Subject, folder: Path) -> Iterator[Comparison]:
    """Adapter, merge and resume; each loads the model anew."""
    yield from compare_saved(subject, folder)
    try:
        yield from _compare_resumed(subject, folder / "resume")
    except Exception as error:
        yield failed(GROUP, "resume", error)


def compare_saved(subject: Subject, folder: Path, group: str = GROUP) -> Iterator[Comparison]:
    """Adapter and merge; each loads the model anew."""
    for name, compare in {"adapter": _compare_adapter, "merge": _compare_merge}.items():
        try:
            for comparison in compare(subject, folder / name):
                yield replace(comparison, group=group)
        except Exception as error:
            yield failed(group, name, error)


@torch.no_grad()
def _logits(model: torch.nn.Module, rows: Dataset) -> torch.Tensor:
    """Float32 logits [T, V] of all rows."""
    device = next(model.parameters()).device
    model.eval()
    ids = [torch.tensor([row["input_ids"]], device=device) for row in rows]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in ids])


def _saved(
    subject: Subject, folder: Path, *how: str, **settings: Any
) -> tuple[PeftModel, Dataset, torch.Tensor]:
    """The model, after it was saved in a folder; rows; and its logits on them."""
    model, tokenizer = subject.load()
    rows = subject.rows(3, base_model(model).config.vocab_size)
    expected = _logits(model, rows)
    with redirect_stdout(io.StringIO()):
        save_merged(model, folder, tokenizer, *how, **settings)
    return model, rows, expected


def _compare_adapter(subject: Subject, folder: Path) -> Iterator[Comparison]:
    model, rows, expected = _saved(subject, folder, "lora")
    ours, _ = load_model(str(folder), dtype="float32", device_map=subject.device, max_seq_length=4 * LONGEST)
    difference = (_logits(ours, rows) - expected).abs().max().item()
    yield Comparison(GROUP, "adapter loaded by oribi", difference, 0.0, "largest difference of a logit")
    error = relative_error(_logits(PeftModel.from_pretrained(plain_model(model), folder), rows), expected)
    note = "on transformers, with the base's files"
    yield Comparison(GROUP, "adapter loaded by plain peft", error, LIMITS[model.device.type], note)


def _compare_merge(subject: Subject, folder: Path) -> Iterator[Comparison]:
    model, rows, expected = _saved(subject, folder, "merged_16bit", dtype=torch.float32, verify=False)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    error = relative_error(_logits(merged, rows), expected)
    yield Comparison(GROUP, "merged model loaded by transformers", error, LIMITS[model.device.type])


def _trainer(subject: Subject, folder: Path, loaded: tuple[PeftModel, Any] | None = None) -> SFTTrainer:
    """A trainer of STEPS steps with a checkpoint at STOP."""
    model, tokenizer = loaded or subject.load()
    args = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, save_strategy="steps", save_steps=STOP, learning_rate=1e-3, warmup_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, neftune_noise_alpha=5.0, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = subject.rows(11, base_model(model).config.vocab_size)
    trainer = SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    return trainer


def _final_state(trainer: SFTTrainer, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """Everything that a run must reproduce, after training from the start or from a checkpoint."""
    with redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = {f"weight {name}": p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for index, states in optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {name}": torch.as_tensor(value) for name, value in states.items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return state | {
        "rng": torch.get_rng_state(),
        "rate": torch.tensor(trainer.lr_scheduler.get_last_lr()),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def _compare_resumed(subject: Subject, folder: Path) -> Iterator[Comparison]:
    whole = _final_state(_trainer(subject, folder / "whole"))
    checkpoint = folder / "whole" / f"checkpoint-{STOP}"
    resumed = _final_state(_trainer(subject, folder / "resumed"), checkpoint)
    if whole.keys() != resumed.keys() or len(whole["losses"]) != STEPS:
        yield Comparison(GROUP, "resumed run", float("nan"), 0.0, "its state has other parts")
        return
    for part in ("losses", "weight", "optimizer", "rng", "rate"):
        names = [name for name in whole if name.split()[0] == part]
        worst = max((whole[name].double() - resumed[name].double()).abs().max().item() for name in names)
        yield Comparison(
            GROUP, f"resumed run: {part}", worst, 0.0, f"{len(names)} tensors, largest difference"
        )
    yield _compare_refusal(subject, folder / "other base", checkpoint)


def _compare_refusal(subject: Subject, folder: Path, checkpoint: Path) -> Comparison:
    """A run is not resumed on another base: here the hashes of the base's files differ."""
    model, tokenizer = subject.load()
    source = base_model(model).oribi
    files = {name: {**entry, "sample_sha256": "0" * 64} for name, entry in source.identity.files.items()}
    error, note = float("nan"), "it was not refused"
    with temporarily(source, identity=replace(source.identity, files=files)):
        trainer = _trainer(subject, folder, (model, tokenizer))
        try:
            trainer.find_checkpoint(str(checkpoint))
        except ConfigError as refusal:
            note = "refused before the first step"
            if any("base model" in line for line in str(refusal).splitlines()):
                error = 0.0
    return Comparison(GROUP, "resume on a changed base", error, 0.0, note)
