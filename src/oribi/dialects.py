"""Configs of Axolotl, LLaMA-Factory, Unsloth's command line and TRL, read as a run config of oribi's.

Every key of a foreign file ends in one of three lists: it became a setting, nothing comes of it and why, or it asks for
something that oribi does not do. Nothing is lost in silence.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from oribi.config import ALIASES, RunConfig, YamlReader
from oribi.errors import ConfigError

Handler = Callable[["Converted", str, Any, Path], None]
KNOWN = {f.name for f in fields(RunConfig)}
# key -> why nothing comes of it, in any dialect
WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("bf16", "fp16", "tf32", "float16", "bfloat16", "fp16_opt_level", "pure_bf16"),
        "the machine and the model's dtype decide the precision",
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "xformers_attention", "sdp_attention",
         "flash_attention_2", "sdpa_attention"),
        "the decoder chooses its attention backend",
    ),
    **dict.fromkeys(
        ("dataset_prepared_path", "overwrite_cache", "tokenized_path", "dataset_dir"),
        "prepared data is cached under a fingerprint of its content",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "liger_rope", "liger_rms_norm", "liger_glu_activation", "use_liger_kernel",
         "liger_fused_linear_cross_entropy", "liger_layer_norm", "plugins", "enable_liger_kernel", "use_unsloth",
         "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "torch_compile", "unsloth_force_compile"),
        "oribi's own kernels run",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "stage", "plot_loss", "overwrite_output_dir", "use_peft", "strict", "model_type",
         "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
         "finetuning_type", "adapter", "training_type", "pad_to_sequence_len", "group_by_length", "remove_unused_columns",
         "eval_sample_packing", "ddp_timeout", "dataloader_num_workers", "save_strategy", "eval_strategy",
         "evaluation_strategy", "save_only_model", "save_safetensors", "debug", "low_cpu_mem_usage", "padding_free",
         "include_tokens_per_second", "disable_tqdm", "logging_dir", "bias", "lora_bias", "double_quantization",
         "bnb_4bit_quant_type", "use_bnb_nested_quant", "loss_watchdog_threshold", "loss_watchdog_patience", "save_model"),
        "it is how oribi works, or what another setting says already",
    ),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_run_id", "run_name",
         "mlflow_tracking_uri", "mlflow_experiment_name", "comet_api_key", "comet_project_name"),
        "the tracker reads its own environment variables",
    ),
    **dict.fromkeys(
        ("hf_token", "hub_token", "wandb_token", "token"), "tokens do not belong in files; log in with the hub's own program"
    ),
}  # fmt: skip
# key -> what it would need, if it is set to anything but off
UNSUPPORTED = {
    "load_in_8bit": "weights are NF4 or 16 bit; load_in_4bit = false is exact",
    "deepspeed": "several GPUs work as plain data parallelism; start oribi with torchrun",
    "fsdp": "several GPUs work as plain data parallelism; start oribi with torchrun",
    "fsdp_config": "several GPUs work as plain data parallelism; start oribi with torchrun",
    "rl": "oribi train is supervised; use trl's trainers on oribi's model (examples/dpo.py)",
    "reward_model": "oribi train is supervised",
    "loftq_config": "in Python: FastLanguageModel.get_peft_model(loftq_config=...)",
    "use_loftq": "in Python: FastLanguageModel.get_peft_model(loftq_config=...)",
    "unfrozen_parameters": "use full_finetuning, or modules_to_save",
    "special_tokens": "in Python: oribi.add_new_tokens",
    "tokens": "in Python: oribi.add_new_tokens",
    "max_samples": "cut the data set before",
    "mix_strategy": "in Python: a list of sources with weights",
    "streaming": "in Python: pass a stream to SFTTrainer",
    "push_to_hub": "in Python: model.push_to_hub_merged",
    "push_model": "in Python: model.push_to_hub_merged",
    "push_gguf": "in Python: model.push_to_hub_gguf",
    "completion_only_loss": "train_on_responses_only does this",
}

# what each program does where its file says nothing and oribi would do something else
DEFAULTS: dict[str, dict[str, Any]] = {
    "Axolotl": {
        "load_in_4bit": False, "packing": False, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1,
        "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "weight_decay": 0.0, "warmup_steps": 0.03, "seed": 42,
    },
    "LLaMA-Factory": {
        "load_in_4bit": False, "packing": False, "lora_r": 8, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0, "warmup_steps": 0,
        "optim": "adamw_torch", "weight_decay": 0.0, "logging_steps": 500, "save_steps": 500, "seed": 42,
    },
    "TRL": {
        "load_in_4bit": False, "packing": False, "max_seq_length": 1024, "lora_alpha": 32, "lora_dropout": 0.05,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 2e-5,
        "num_train_epochs": 3.0, "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "train_on_responses_only": False, "seed": 42,
    },
    "Unsloth": {"lora_r": 64, "packing": False, "num_train_epochs": 3.0, "train_on_responses_only": False},
    "unsloth-cli.py": {"packing": False, "max_steps": 400, "train_on_responses_only": False},
}  # fmt: skip


@dataclass
class Converted:
    """A foreign config in oribi's words.

    Args:
        dialect: whose it was.
        values: settings.
        notes: one line for each key that was read under another name or in another sense.
        idle: key -> why nothing comes of it.
        unsupported: key -> what to do instead.
    """

    dialect: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, said: str) -> None:
        """A setting, and the words of the file that it comes from."""
        if value is None:
            return
        if key in self.values and self.values[key] != value:
            self.notes.append(f"{said} left out: {key} is {self.values[key]} already")
            return
        self.values[key] = value
        if said.split(" ")[0] != key:
            self.notes.append(f"{said} read as {key} = {value}")


def convert_file(path: str | Path) -> Converted:
    """Read another program's config.

    Args:
        path: YAML or JSON, or a shell script with the program's flags.

    Raises:
        ConfigError: the file cannot be read, or is no config of a program that is known here.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    entries = _read_flags(text) if path.suffix == ".sh" else _read_mapping(path, text)
    dialect = _dialect_of(entries)
    if dialect is None:
        raise ConfigError(
            f"{path}: neither Axolotl's, LLaMA-Factory's, TRL's nor Unsloth's; it has the keys "
            f"{', '.join(list(entries)[:8])}. A config of oribi's own needs no conversion"
        )
    found = Converted(dialect)
    if dialect == "Unsloth":
        entries = _flattened(entries)
    handlers = HANDLERS[dialect]
    for key, value in entries.items():
        if key in handlers:
            handlers[key](found, key, value, path)
        else:
            _put_plain(found, key, value)
    _put_defaults(found, entries)
    return found


def _put_defaults(found: Converted, entries: dict[str, Any]) -> None:
    if found.dialect == "LLaMA-Factory" and "lora_alpha" not in found.values:
        found.put("lora_alpha", 2 * found.values.get("lora_r", 8), "default of LLaMA-Factory")
    if found.dialect == "TRL" and not entries.get("use_peft") and "lora_r" not in found.values:
        found.put("full_finetuning", True, "use_peft unset")
    defaults = DEFAULTS[found.dialect]
    if found.values.get("full_finetuning"):
        found.values.pop("load_in_4bit", None)
        defaults = {**defaults, "load_in_4bit": False}
    for key, value in defaults.items():
        if key not in found.values:
            found.put(key, value, f"default of {found.dialect}")


def _dialect_of(entries: dict[str, Any]) -> str | None:
    keys = set(entries)
    if keys & {"training", "lora"} and isinstance(entries.get("training", {}), dict):
        return "Unsloth"
    if {"base_model"} & keys:
        return "Axolotl"
    if keys & {"finetuning_type", "cutoff_len", "lora_rank", "stage", "lora_target"}:
        return "LLaMA-Factory"
    if keys & {"dataset_name", "lora_target_modules", "use_peft"} and "model_name_or_path" in keys:
        return "TRL"
    if "model_name" in keys:
        return "unsloth-cli.py"
    return "TRL" if "model_name_or_path" in keys else None


def _read_mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        entries = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=YamlReader)  # noqa: S506
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else getattr(error, "lineno", None)
        raise ConfigError(f"{path}{f':{line}' if line else ''}: no valid YAML or JSON") from error
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path}: expected lines of 'key: value'")
    return {str(key): value for key, value in entries.items()}


def _read_flags(text: str) -> dict[str, Any]:
    """Flags of the one command in a shell script; comments and line ends with a backslash are understood."""
    words = shlex.split(re.sub(r"\\\n", " ", text), comments=True)
    entries: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            entries[key] = yaml.load(value, Loader=YamlReader) if equals else True  # noqa: S506
        elif key is not None:
            value = yaml.load(word, Loader=YamlReader)  # noqa: S506
            before = entries[key]
            entries[key] = (
                value if before is True else [*(before if isinstance(before, list) else [before]), value]
            )
    return entries


def _flattened(entries: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _put_plain(found: Converted, key: str, value: Any) -> None:
    name = ALIASES.get(key, key)
    if value is None or value == "":
        return
    if key in WITHOUT_EFFECT:
        found.idle[key] = WITHOUT_EFFECT[key]
    elif key in UNSUPPORTED:
        if value not in (False, [], {}):
            found.unsupported[key] = UNSUPPORTED[key]
    elif name not in KNOWN:
        found.unsupported[key] = "oribi has no such setting"
    else:
        found.put(name, value, key)


def _inverted(name: str) -> Handler:
    def handle(found: Converted, key: str, value: Any, path: Path) -> None:
        found.put(name, not value, f"{key} = {str(value).lower()}")

    return handle


def _renamed(name: str) -> Handler:
    def handle(found: Converted, key: str, value: Any, path: Path) -> None:
        found.put(name, value, key)

    return handle


def _axolotl_datasets(found: Converted, key: str, value: Any, path: Path) -> None:
    entries = value if isinstance(value, list) else [value]
    sources, splits = [], set()
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        files = entry.get("data_files")
        sources += files if isinstance(files, list) else [files or entry.get("path")]
        if entry.get("split"):
            splits.add(entry["split"])
        if entry.get("type") == "completion":
            found.put("train_on_responses_only", False, "datasets: type completion")
            if entry.get("field"):
                found.put("dataset_text_field", entry["field"], "datasets: field")
        known = {"path", "type", "split", "data_files", "ds_type", "field", "shards"}
        for name in sorted(set(entry) - known):
            found.idle[f"datasets: {name}"] = (
                "the rows' own format is recognised; check with oribi inspect data"
            )
    found.put("dataset", [str(source) for source in sources if source], "datasets")
    if len(splits) > 1:
        found.unsupported["datasets: split"] = f"one split for all: {', '.join(sorted(splits))} are several"
    elif splits:
        found.put("split", splits.pop(), "datasets: split")


def _axolotl_test_datasets(found: Converted, key: str, value: Any, path: Path) -> None:
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in value or []]
    found.put("eval_dataset", [str(e.get("data_files") or e.get("path")) for e in entries], "test_datasets")


def _axolotl_adapter(found: Converted, key: str, value: Any, path: Path) -> None:
    if value == "qlora":
        found.put("load_in_4bit", True, "adapter = qlora")
    elif not value:
        found.put("full_finetuning", True, "adapter unset")


def _all_linear(found: Converted, key: str, value: Any, path: Path) -> None:
    if value is True or value in ("all", "all-linear", ["all-linear"], ["all"]):
        found.put("target_modules", ["all-linear"], f"{key} = {value}")
    elif value:
        names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
        found.put("target_modules", names, key)


def _per_epoch(found: Converted, key: str, value: Any, path: Path) -> None:
    found.idle["evals_per_epoch / saves_per_epoch"] = (
        "set eval_steps and save_steps; evaluation is once an epoch"
    )


def _factory_dataset(found: Converted, key: str, value: Any, path: Path) -> None:
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    found.put("dataset", [_factory_source(name, path) for name in names], "dataset")


def _factory_source(name: str, path: Path) -> str:
    """The file or hub name behind a name of LLaMA-Factory's dataset_info.json, where that file is near."""
    for folder in (path.parent, path.parent / "data", Path(), Path("data")):
        table = folder / "dataset_info.json"
        if table.is_file():
            entry = json.loads(table.read_text(encoding="utf-8")).get(name)
            if entry:
                return (
                    str(folder / entry["file_name"])
                    if "file_name" in entry
                    else entry.get("hf_hub_url", name)
                )
    return name


def _factory_bits(found: Converted, key: str, value: Any, path: Path) -> None:
    if value in (4, None):
        found.put("load_in_4bit", value == 4, f"quantization_bit = {value}")
    else:
        found.unsupported["quantization_bit"] = UNSUPPORTED["load_in_8bit"]


def _full(found: Converted, key: str, value: Any, path: Path) -> None:
    if value == "full":
        found.put("full_finetuning", True, f"{key} = full")
        found.put("load_in_4bit", False, f"{key} = full")
    elif value in ("lora", "qlora"):
        found.idle[key] = "oribi trains LoRA unless full_finetuning is set"
    else:
        found.unsupported[key] = f"{value} is not supported; oribi trains LoRA or every weight"


def _steps_or_none(name: str) -> Handler:
    def handle(found: Converted, key: str, value: Any, path: Path) -> None:
        if value:  # 0 means never there
            found.put(name, value, key)

    return handle


def _gguf(found: Converted, key: str, value: Any, path: Path) -> None:
    found.put("quantization_method", value if isinstance(value, list) else [value], "quantization")


def _ignored(found: Converted, key: str, value: Any, path: Path) -> None:
    found.idle[key] = "the other flags say it"


def _resume(found: Converted, key: str, value: Any, path: Path) -> None:
    found.put("resume", bool(value), key)


SHARED = {"resume_from_checkpoint": _resume, "auto_resume_from_checkpoints": _resume}
HANDLERS: dict[str, dict[str, Handler]] = {
    "Axolotl": {
        **SHARED,
        "datasets": _axolotl_datasets,
        "test_datasets": _axolotl_test_datasets,
        "adapter": _axolotl_adapter,
        "lora_target_linear": _all_linear,
        "lora_target_modules": _all_linear,
        "train_on_inputs": _inverted("train_on_responses_only"),
        "evals_per_epoch": _per_epoch,
        "saves_per_epoch": _per_epoch,
        "revision_of_model": _renamed("revision"),
    },
    "LLaMA-Factory": {
        **SHARED,
        "dataset": _factory_dataset,
        "eval_dataset": lambda found, key, value, path: found.put(
            "eval_dataset", [_factory_source(name.strip(), path) for name in str(value).split(",")], "eval_dataset"
        ),
        "lora_target": _all_linear,
        "quantization_bit": _factory_bits,
        "quantization_method": _ignored,
        "finetuning_type": _full,
        "train_on_prompt": _inverted("train_on_responses_only"),
        "additional_target": _renamed("modules_to_save"),
        "warmup_ratio": _renamed("warmup_steps"),
    },
    "TRL": {
        **SHARED,
        "lora_target_modules": _all_linear,
        "dataset_train_split": _renamed("split"),
        "dataset_test_split": _ignored,
    },
    "Unsloth": {
        **SHARED,
        "training_type": _full,
        "max_steps": _steps_or_none("max_steps"),
        "save_steps": _steps_or_none("save_steps"),
        "quantization": _gguf,
        "save_gguf": _ignored,
        "save_path": _ignored,
        "raw_text_file": _renamed("dataset"),
        "format_type": _ignored,
        "target_modules": _all_linear,
    },
}  # fmt: skip
HANDLERS["unsloth-cli.py"] = HANDLERS["Unsloth"]
