"""What identifies a training, and what a resumed run may change: base, rows, settings.

`ON_RESUME` is the one table of it. Rows are compared by hashes of their ids and labels, so files may move and be renamed.
"""

import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import datasets
import numpy as np
import peft
import pyarrow as pa
import torch
from torch import nn

from oribi.models.identity import BaseIdentity
from oribi.models.unwrap import base_model, source_of
from oribi.run_record import RunRecord
from oribi.train.arguments import SFTConfig, row_readers

BASE = "compared by the base's files"
ROWS = "compared by the prepared rows"
FIXED = "refused if it changed"
APPLIED = "acts from the checkpoint on, and is said"
FREE = "does not touch what is learned"

# keys of a run's config, and the trainer's arguments beside them; an adapter's settings that are not here are FIXED
ON_RESUME = {
    "model": BASE, "revision": BASE, "trust_remote_code": FREE, "load_in_4bit": FIXED, "keep_in_16bit": FIXED, "train_for": BASE, "merges_codes": FIXED, "dtype": FIXED,
    "full_finetuning": FIXED, "max_seq_length": FIXED,
    "lora_r": FIXED, "lora_alpha": FIXED, "lora_dropout": APPLIED, "target_modules": FIXED, "modules_to_save": FIXED,
    "use_rslora": FIXED, "use_dora": FIXED, "rank_pattern": FIXED, "alpha_pattern": FIXED, "layers_to_transform": FIXED,
    "finetune_last_n_layers": FIXED,
    "exclude_modules": FIXED, "target_parameters": FIXED, "init_lora_weights": FIXED, "new_tokens": FIXED,
    "trainable_tokens": FIXED, "gradient_checkpointing": FREE,
    "dataset": ROWS, "split": ROWS, "dataset_text_field": ROWS, "eval_dataset": FREE, "eval_split": FREE,
    "eval_fraction": ROWS,
    "chat_template": FIXED, "train_on_responses_only": ROWS, "overlong": ROWS, "turns": ROWS,
    "columns": ROWS, "role_aliases": ROWS, "malformed": ROWS, "chat_template_kwargs": ROWS, "packing": FIXED,
    "dataset_num_proc": FREE, "output_dir": FREE,
    "num_train_epochs": APPLIED, "max_steps": APPLIED, "per_device_train_batch_size": APPLIED,
    "per_device_eval_batch_size": FREE, "gradient_accumulation_steps": APPLIED, "processes": APPLIED,
    "total_batch_size": FREE,
    "learning_rate": APPLIED, "embedding_learning_rate": APPLIED, "loraplus_lr_ratio": FIXED, "lr_scheduler_type": APPLIED,
    "lr_scheduler_kwargs": APPLIED, "warmup_steps": APPLIED,
    "optim": FIXED, "optim_args": FIXED, "adam_beta1": FIXED, "adam_beta2": FIXED, "adam_epsilon": FIXED,
    "weight_decay": APPLIED, "max_grad_norm": APPLIED, "neftune_noise_alpha": APPLIED, "label_smoothing_factor": FIXED,
    "loss_type": FIXED, "seed": FIXED, "data_seed": FIXED, "train_sampling_strategy": FIXED,
    "dataloader_drop_last": FIXED, "fp8": APPLIED, "deterministic": APPLIED,
    "gpus": FREE, "fsdp": FREE, "context_parallel": FREE, "ddp_timeout": FREE,
    "logging_steps": FREE, "eval_steps": FREE, "sample_prompts": FREE, "sample_tokens": FREE, "save_steps": FREE,
    "save_strategy": FREE, "save_total_limit": FREE, "load_best_model_at_end": FREE, "early_stopping_patience": APPLIED,
    "resume": FREE,
    "stage": FIXED, "beta": FIXED, "loss_weights": FIXED, "label_smoothing": FIXED, "desirable_weight": FIXED,
    "undesirable_weight": FIXED, "center_rewards_coefficient": FIXED, "reward_funcs": APPLIED, "reward_weights": APPLIED,
    "num_generations": FIXED, "max_prompt_length": ROWS, "max_completion_length": FIXED, "temperature": APPLIED,
    "top_p": APPLIED, "top_k": APPLIED, "min_p": APPLIED, "epsilon": APPLIED, "scale_rewards": FIXED,
    "mask_truncated_completions": FIXED,
    "report_to": FREE, "save_method": FREE, "quantization_method": FREE, "report": FREE,
}  # fmt: skip
# other names of these in the trainer's arguments and in an adapter's config
_ARGUMENTS = {"max_seq_length": "max_length", "reward_funcs": "reward_sources"}
# stages whose rows are prepared or drawn for one layout of batches, which a resumed run keeps
LAYOUT_BOUND = ("kto", "grpo")
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
_ADAPTER_NAMES = {"r": "lora_r"}
# fields of an adapter's config that say nothing about what is trained, or only how it began
_NOT_COMPARED = {
    "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "task_type", "auto_mapping", "peft_version", "runtime_config", "megatron_config",
    "megatron_core",
}  # fmt: skip
# these schedules find their rate themselves and keep it in the checkpoint
OWN_RATE = ("reduce_lr_on_plateau", "greedy")
RATES = (
    "learning_rate",
    "embedding_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
)
BLOCKS = 64  # hashes kept of a data set's rows, so that a difference can be placed


def settings_of(args: SFTConfig, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The settings of a training that a resumed run is compared by, as JSON keeps them."""
    names = [name for name, kind in ON_RESUME.items() if kind in (FIXED, APPLIED)]
    found = {name: getattr(args, _ARGUMENTS.get(name, name), None) for name in names}
    found["processes"] = row_readers(args)
    found["merges_codes"] = found["merges_codes"] or None  # which earlier versions did not have
    base = base_model(model)
    found["dtype"] = str(base.dtype).removeprefix("torch.")
    template = getattr(tokenizer, "chat_template", None)
    found["chat_template"] = template and hashlib.sha256(str(template).encode()).hexdigest()[:16]
    adapter = isinstance(model, peft.PeftModel)
    found["full_finetuning"] = not adapter
    if adapter:
        found |= adapter_settings(model.peft_config[model.active_adapter].to_dict())
    if getattr(base, "oribi", None) is None:
        found["base_weights"] = _sampled(model)
    return {name: _plain(value) for name, value in found.items() if _plain(value) is not None}


def adapter_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What is compared of an adapter's config, as `adapter_config.json` has it; what is off or empty is left out."""
    how = str(config.get("init_lora_weights"))
    moved = {"init_lora_weights": how} if how.startswith(("pissa", "olora")) else {}
    return moved | {
        _ADAPTER_NAMES.get(name, name): _plain(value)
        for name, value in config.items()
        if name not in _NOT_COMPARED and value not in (None, False, "none") and _plain(value) not in ([], {})
    }


def identity_of(model: nn.Module) -> BaseIdentity | None:
    """What the base is, where oribi loaded it."""
    return getattr(source_of(model), "identity", None)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; sets and lists of names in order, since theirs means nothing."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ):
        return sorted(value)
    return json.loads(json.dumps(value, default=str))


def _sampled(model: nn.Module) -> str:
    """A hash of a few frozen weights of each tensor: what the base is, where its files are not known."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.numel() and parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Changes:
    """The differences from the run to be resumed, one line each."""

    refused: list[str] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)


def compare_settings(record: RunRecord, now: dict[str, Any], only_known: bool = False) -> Changes:
    """Differences of settings, with both values.

    Args:
        record: of the checkpoint.
        now: as `settings_of` gives them.
        only_known: compare the names of `now` alone: some are not known before the model is loaded.
    """
    changes = Changes()
    applied = {name for name, kind in ON_RESUME.items() if kind == APPLIED}
    if now.get("lr_scheduler_type") in OWN_RATE or record.settings.get("lr_scheduler_type") in OWN_RATE:
        applied -= set(RATES)
    if now.get("stage") in LAYOUT_BOUND:
        applied -= set(LAYOUT)
    for name in dict.fromkeys([*now] if only_known else [*record.settings, *now]):
        then, given = record.settings.get(name), now.get(name)
        if then == given or ON_RESUME.get(name) == FREE:
            continue
        if name in ("chat_template", "base_weights"):
            then, given = (value and f"text {value}" for value in (then, given))
        line = f"{name}: {_shown(then)} in the run, {_shown(given)} now"
        (changes.applied if name in applied else changes.refused).append(line)
    return changes


def compare_base(record: RunRecord, now: BaseIdentity | None) -> list[str]:
    """What differs of the base, a line each; this model's value stands first."""
    if record.base is None or now is None:
        return []
    return [f"base model: {line}" for line in now.differences(BaseIdentity.from_dict(record.base))]


def _shown(value: Any) -> str:
    return "not set" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


def data_record(rows: Any, started: list[dict[str, int]] | None = None) -> dict[str, Any]:
    """Rows of a training, with hashes of them at up to `BLOCKS` places.

    Args:
        rows: prepared examples, before packing.
        started: the parts that rows joined the run in, as {"rows": number, "epoch": pass}; None is one part.
    """
    if not isinstance(rows, datasets.Dataset):
        return {"rows": len(rows) if hasattr(rows, "__len__") else None}
    block = max(1, -(-len(rows) // BLOCKS))
    parts = started or [{"rows": len(rows), "epoch": 0}]
    return {"rows": len(rows), "block": block, "hashes": row_hashes(rows, block), "parts": parts}


def row_hashes(rows: datasets.Dataset, block: int) -> list[str] | None:
    """The hash of all rows so far after each block of them; None for rows without columns."""
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    if "input_ids" not in columns:
        return _hashes_of_values(rows, block)
    table, digest, found = rows.select_columns(columns).with_format("arrow"), hashlib.blake2b(), []
    for first in range(0, len(rows), block):
        part = table[first : min(first + block, len(rows))]
        for name in columns:
            for chunk in part[name].chunks:
                lengths = pa.compute.list_value_length(chunk).to_numpy(zero_copy_only=False)
                values = chunk.flatten().to_numpy(zero_copy_only=False)
                digest.update(lengths.astype(np.int32).tobytes() + values.astype(np.int32).tobytes())
        found.append(digest.hexdigest()[:16])
    return found


def _hashes_of_values(rows: datasets.Dataset, block: int) -> list[str] | None:
    """`row_hashes` of rows that hold prompts and answers: of all their columns but the names of the rows."""
    columns = sorted(set(rows.column_names) - {"origin"})
    if not columns:
        return None
    digest, found = hashlib.blake2b(), []
    for first in range(0, len(rows), block):
        part = rows[first : min(first + block, len(rows))]
        digest.update(json.dumps({name: part[name] for name in columns}, default=str).encode())
        found.append(digest.hexdigest()[:16])
    return found


def compare_rows(record: RunRecord, rows: Any) -> tuple[str | None, int]:
    """How the rows of a resumed run differ, and how many were added at the end.

    Returns:
        A line if the run's rows are not the first of these, else None; rows that were added.
    """
    then = record.data or {}
    if not then.get("hashes") or not isinstance(rows, datasets.Dataset):
        return None, 0
    count, block = then["rows"], then["block"]
    now = row_hashes(rows.select(range(min(count, len(rows)))), block)
    same = next(
        (i for i, (a, b) in enumerate(zip(then["hashes"], now)) if a != b), min(len(now), len(then["hashes"]))
    )
    if same == len(then["hashes"]) and len(rows) >= count:
        return None, len(rows) - count
    first = same * block
    if first >= len(rows):
        return f"rows: {count:,} in the run, and only the first {len(rows):,} of them now", 0
    where = f" ({rows[first]['origin']})" if "origin" in rows.column_names else ""
    last = min(first + block, count, len(rows))
    span = f"row {first + 1:,}" if block == 1 else f"rows {first + 1:,} to {last:,}"
    return f"rows: {count:,} in the run, {len(rows):,} now; the first difference is in {span}{where}", 0
