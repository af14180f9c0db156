"""Unsloth's two command lines: `unsloth train` with its YAML in sections, and the script unsloth-cli.py with its flags.

Checked against unslothai/unsloth (2026-11-25): unsloth_cli/config.py@10da22a0, options.py@007a781c,
commands/train.py@07d36caa, studio/backend/core/training/trainer.py@0013644c; unsloth-cli.py@066c2278 and @2682c9be.
"""

from typing import Any

from oribi.dialects import shared
from oribi.dialects.converted import (
    Converted,
    Dialect,
    Handler,
    idle,
    is_off,
    only,
    read_elsewhere,
    renamed,
)

SECTIONS = ("data", "training", "lora", "logging")


def _prepare(found: Converted) -> None:
    """Sections become one flat list; so do the flags of `unsloth train`, where --no-KEY says false."""
    flat: dict[str, Any] = {}
    for key, value in found.entries.items():
        if isinstance(value, dict) and key in SECTIONS:
            flat.update(value)
        elif key.startswith("no_") and value is True:
            flat[key.removeprefix("no_")] = False
        else:
            flat[key] = value
    found.entries = flat
    if flat.get("config"):
        found.refuse("config", "convert that file, and add the flags of the command to what comes out")
    kind = str(flat.get("training_type") or "lora").lower()
    if kind == "full":
        shared.put_full_finetuning(found, "training_type = full")
        flat.pop("load_in_4bit", None)
        flat.pop("target_modules", None)
    elif kind != "lora":
        found.refuse("training_type", "it is lora or full")
    if flat.get("dataset") and flat.get("local_dataset"):
        found.refuse("local_dataset", f"dataset is {flat['dataset']} already; name one of them")
    if flat.get("format_type") == "raw":
        found.put("train_on_responses_only", False, "format_type = raw")


def _dataset(found: Converted, key: str, value: Any) -> None:
    if not is_off(value):
        found.put("dataset", value if isinstance(value, list) else [value], key)


def _format_type(found: Converted, key: str, value: Any) -> None:
    found.idle[key] = "the rows' form is recognised"
    if str(value).lower() == "alpaca" and found.entries.get("train_on_completions"):
        found.differences.append(
            "train_on_completions: Unsloth leaves it out for alpaca rows; oribi trains on their outputs only"
        )


def _completions(found: Converted, key: str, value: Any) -> None:
    if found.entries.get("format_type") != "raw":
        found.put("train_on_responses_only", value, key)


HANDLERS: dict[str, Handler] = {
    **shared.HANDLERS,
    **read_elsewhere(("training_type", "config")),
    "dataset": _dataset,
    "local_dataset": _dataset,
    "format_type": _format_type,
    "train_on_completions": _completions,
    "target_modules": shared.targets,
    **shared.trackers(("enable_wandb", "enable_tensorboard")),
    **idle(("wandb_project",), "the tracker reads its own environment variables"),
    **idle(("finetune_vision_layers", "vision_all_linear", "dry_run"), "oribi trains language models"),
    **dict.fromkeys(("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"), only([True], "target_modules names the layers that get an adapter")),
}  # fmt: skip
DEFAULTS = {
    "lora_r": 64, "packing": False, "num_train_epochs": 3, "train_on_responses_only": False, "output_dir": "./outputs",
}  # fmt: skip
DIALECT = Dialect("Unsloth", HANDLERS, DEFAULTS, _prepare, shared.precision)

FLAGS = {
    "model_name", "max_seq_length", "dtype", "load_in_4bit", "dataset", "r", "lora_alpha", "lora_dropout", "bias",
    "use_gradient_checkpointing", "random_state", "use_rslora", "loftq_config", "per_device_train_batch_size",
    "gradient_accumulation_steps", "warmup_steps", "max_steps", "learning_rate", "optim", "weight_decay",
    "lr_scheduler_type", "seed", "report_to", "logging_steps", "adapter_file", "output_dir", "save_model", "save_method",
    "save_gguf", "save_path", "quantization", "push_model", "push_gguf", "hub_path", "hub_token",
}  # fmt: skip


def _prepare_script(found: Converted) -> None:
    for key in sorted(set(found.entries) - FLAGS):
        found.refuse(
            f"--{key}", "unsloth-cli.py has no such flag; if yours has, set it in the config that comes out"
        )
        del found.entries[key]


def _finish_script(found: Converted) -> None:
    entries = found.entries
    if entries.get("save_model") and entries.get("save_gguf"):
        methods = entries.get("quantization") or "q8_0"
        found.put("quantization_method", methods if isinstance(methods, list) else [methods], "save_gguf")
    elif entries.get("save_model"):
        found.put("save_method", [entries.get("save_method") or "merged_16bit"], "save_model")
    else:
        for key in ("save_gguf", "save_method", "quantization"):
            if key in entries:
                found.idle[key] = "without --save_model it does nothing there; oribi saves the adapter"
    drawn, start = entries.get("seed", 3407), entries.get("random_state", 3407)
    if drawn != start:
        found.differences.append(f"random_state = {start} left out: one seed is for all, {drawn}")
    found.differences.append(
        "rows are written in Alpaca's form; unsloth-cli.py indents its headings, and gives an input one of its own"
    )


SCRIPT_HANDLERS: dict[str, Handler] = {
    **shared.HANDLERS,
    **read_elsewhere(("random_state",)),
    "dataset": _dataset,
    "dtype": renamed("dtype"),
    **read_elsewhere(("save_model", "save_method", "save_gguf", "quantization")),
    **idle(("adapter_file", "save_path", "hub_path"), "what is saved lies in output_dir"),
}  # fmt: skip
SCRIPT_DEFAULTS = {
    "model": "unsloth/llama-3-8b", "dataset": ["yahma/alpaca-cleaned"], "load_in_4bit": False, "packing": False,
    "max_steps": 400, "train_on_responses_only": False, "chat_template": "alpaca", "report_to": ["tensorboard"],
    "output_dir": "outputs",
}  # fmt: skip
SCRIPT = Dialect("unsloth-cli.py", SCRIPT_HANDLERS, SCRIPT_DEFAULTS, _prepare_script, _finish_script)
