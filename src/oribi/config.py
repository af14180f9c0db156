"""A run's settings: one flat YAML file and flags, checked as a whole before anything is loaded.

Keys are Hugging Face's where they exist; the names that other trainers use are read too, and reported. Every problem of
a file is found before the first is told.
"""

import difflib
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from oribi.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A field with its explanation and what it may be: at least `low`, below `below`, one of `choices`."""
    limits = {"help": help, "low": low, "below": below, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


# of transformers 5.17: schedules and optimizers that need no arguments of their own
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "schedule_free_adamw",
    "schedule_free_radam", "schedule_free_sgd", "stable_adamw", "grokadamw",
)  # fmt: skip
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
# what a run is trained on and by, and no config
OTHER_FILES = (".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".gguf", ".safetensors")


@dataclass
class RunConfig:
    """Every setting of a run. `read_config` makes one from a file and flags."""

    # the model
    model: str = setting("", "Hub name, local folder or GGUF file of the model")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub")
    trust_remote_code: bool = setting(False, "Run code that the model's repository ships")
    max_seq_length: int = setting(2048, "Longest example in tokens", low=1)
    load_in_4bit: bool = setting(True, "Keep frozen weights in NF4 (QLoRA)")
    dtype: str = setting(
        "auto", "What the network computes in", choices=("auto", "bfloat16", "float16", "float32")
    )
    full_finetuning: bool = setting(False, "Train every weight instead of an adapter")
    # the adapter
    lora_r: int = setting(16, "Rank of the adapter", low=1)
    lora_alpha: int = setting(16, "Scale of the adapter: alpha / r, with rsLoRA alpha / sqrt(r)", low=0)
    lora_dropout: float = setting(0.0, "Dropout before the adapter", low=0, below=1)
    target_modules: list[str] = setting(["all-linear"], "Layers that get an adapter, or all-linear")
    modules_to_save: list[str] = setting([], "Modules trained in full beside the adapter")
    use_rslora: bool = setting(False, "Scale by sqrt(r) instead of r")
    use_dora: bool = setting(False, "Weight-decomposed LoRA")
    gradient_checkpointing: str = setting(
        "oribi", "What is recomputed instead of kept: oribi chooses by free memory, memory as much as can be, false nothing",
        choices=("oribi", "memory", "balanced", "speed", "true", "false"),
    )  # fmt: skip
    # the data
    dataset: list[str] = setting([], "Files or hub data sets to train on")
    split: str = setting("train", "Split of a hub data set")
    dataset_text_field: str | None = setting(
        None,
        "Column of plain text to train on, whatever else the rows hold; none takes text if they hold nothing better",
    )
    eval_dataset: list[str] = setting([], "Files or hub data sets to evaluate on")
    eval_fraction: float = setting(0.0, "Share of the training rows kept for evaluation", low=0, below=1)
    chat_template: str | None = setting(None, "Name of a chat template in place of the model's own")
    train_on_responses_only: bool = setting(True, "Train on the assistant's words only")
    overlong: str | None = setting(
        None, "Examples above max_seq_length; none splits text files and truncates otherwise",
        choices=("truncate", "drop", "split", "error"),
    )  # fmt: skip
    packing: bool = setting(True, "Fill rows of max_seq_length with several examples each")
    dataset_num_proc: int | None = setting(None, "Processes that prepare the data", low=1)
    # the training
    output_dir: str = setting("runs/latest", "Folder of the run")
    num_train_epochs: float = setting(1.0, "Passes over the data", low=0)
    max_steps: int = setting(-1, "Optimizer steps; overrides num_train_epochs if positive", low=-1)
    per_device_train_batch_size: int = setting(2, "Rows a micro-batch", low=1)
    per_device_eval_batch_size: int = setting(8, "Rows a batch of evaluation", low=1)
    gradient_accumulation_steps: int = setting(4, "Micro-batches an optimizer step", low=1)
    learning_rate: float = setting(2e-4, "Peak learning rate", low=0, below=1)
    embedding_learning_rate: float | None = setting(
        None, "Learning rate of trained embeddings", low=0, below=1
    )
    lr_scheduler_type: str = setting(
        "linear", "How the learning rate falls, e.g. linear or cosine", choices=SCHEDULES
    )
    warmup_steps: float = setting(5, "Steps of warm-up; below 1 a share of all steps", low=0)
    optim: str = setting("adamw_8bit", "Optimizer", choices=OPTIMIZERS)
    weight_decay: float = setting(0.01, "Weight decay", low=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 never", low=0)
    neftune_noise_alpha: float | None = setting(None, "NEFTune noise on the embeddings", low=0)
    seed: int = setting(3407, "Seed of data order, dropout and adapter", low=0)
    fp8: bool = setting(
        False,
        "Approximate: products of frozen weights in 8-bit floating point while training; NVIDIA GPUs from 8.9 on",
    )
    deterministic: bool = setting(False, "Two runs are equal to the bit; slower on a GPU")
    logging_steps: int = setting(1, "Steps between two log lines", low=1)
    eval_steps: int | None = setting(
        None, "Steps between two evaluations; none evaluates at each epoch", low=1
    )
    save_steps: int | None = setting(None, "Steps between two checkpoints; none saves only at the end", low=1)
    save_total_limit: int | None = setting(None, "Checkpoints kept", low=1)
    resume: bool = setting(False, "Go on from the newest checkpoint in output_dir")
    report_to: list[str] = setting(["none"], "Trackers", choices=TRACKERS)
    # what is saved
    save_method: list[str] = setting(
        ["lora"], "Forms in which the model is saved", choices=("lora", "merged_16bit", "merged_4bit")
    )
    quantization_method: list[str] = setting([], "GGUF files to write, e.g. q8_0 or q4_k_m")

    report: bool = setting(True, "Measure the model before and after, and write report.html and report.md")

    def to_yaml(self) -> str:
        """The settings as a file that `read_config` reads back."""
        return as_yaml({f.name: getattr(self, f.name) for f in fields(self)})


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as a file that `read_config` reads back."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


# names of Axolotl, LLaMA-Factory, TRL and Unsloth
ALIASES = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "sequence_len": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "torch_dtype": "dtype",
    "r": "lora_r",
    "lora_rank": "lora_r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "dataset_name": "dataset",
    "local_dataset": "dataset",
    "train_file": "dataset",
    "validation_file": "eval_dataset",
    "val_size": "eval_fraction",
    "val_set_size": "eval_fraction",
    "template": "chat_template",
    "train_on_completions": "train_on_responses_only",
    "assistant_only_loss": "train_on_responses_only",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "dataset_processes": "dataset_num_proc",
    "preprocessing_num_workers": "dataset_num_proc",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "embedding_lr": "embedding_learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "random_seed": "seed",
    "random_state": "seed",
    "full_determinism": "deterministic",
    "resume_from_checkpoint": "resume",
    "quantization": "quantization_method",
}


@dataclass
class Problem:
    """One thing that is wrong: where it stands, what stands there, and what is allowed."""

    line: int | None
    what: str
    allowed: str


class YamlReader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.1 asks for 2.0e-4)."""


YamlReader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: str | Path | None, flags: Iterable[str] = ()) -> tuple[RunConfig, list[str]]:
    """A checked config from a YAML file and command-line flags; a flag overrides its line in the file.

    Args:
        path: the file, or None for flags alone.
        flags: `--key value`, `--key=value`, or `--key` alone for true; dashes within a key may be underscores.

    Returns:
        The config, and a sentence for each name that was read as another.

    Raises:
        ConfigError: naming every problem of the file and the flags, with its line.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    origin = "flags" if path is None else str(path)
    given = _resolve([] if path is None else _read_file(Path(path), problems), problems, notes)
    given |= _resolve(_read_flags(list(flags), problems), problems, notes)
    config = RunConfig()
    for key, (line, value) in given.items():
        converted, expected = _checked(key, value)
        if expected is not None and value is True and line is None:
            problems.append(Problem(line, f"--{key}", f"its value is missing; {expected}"))
        elif expected is not None:
            problems.append(Problem(line, f"{key} = {value}", expected))
        else:
            setattr(config, key, converted)
    problems += _contradictions(config, given)
    if problems:
        raise ConfigError(_report(origin, problems))
    return config, notes


def _read_file(path: Path, problems: list[Problem]) -> list[tuple[str, int, Any]]:
    if path.is_dir():
        own = path / "config.yaml"
        raise ConfigError(
            f"{path} is a folder, and a config is a YAML file"
            + (f", such as its own {own}" if own.is_file() else "; oribi init writes one")
        )
    if path.suffix in OTHER_FILES:
        raise ConfigError(
            f"{path} is no config: a config is a YAML file, and `oribi init MODEL DATA` writes one"
        )
    try:
        text = path.read_text(encoding="utf-8")
        loader = YamlReader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return []
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{path}: expected lines of 'key: value', got a {node.id}")
            entries = []
            for key, value in node.value:
                name, line = str(loader.construct_object(key)), key.start_mark.line + 1
                if isinstance(value, yaml.MappingNode):
                    problems.append(
                        Problem(line, f"{name}: ...", "the file is flat; write its keys one level up")
                    )
                    continue
                entries.append((name, line, loader.construct_object(value, deep=True)))
            return entries
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: no valid YAML: {getattr(error, 'problem', error)}") from error


def _read_flags(flags: list[str], problems: list[Problem]) -> list[tuple[str, None, Any]]:
    entries = []
    while flags:
        flag = flags.pop(0)
        if not flag.startswith("--"):
            problems.append(Problem(None, flag, "flags are written --key value"))
            continue
        key, equals, text = flag[2:].partition("=")
        if not equals:
            values = []
            while flags and not flags[0].startswith("--"):
                values.append(flags.pop(0))
            text = "true" if not values else values[0] if len(values) == 1 else f"[{', '.join(values)}]"
        try:
            value = yaml.load(text, Loader=YamlReader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError:
            value = text  # a name with braces, say; its setting says whether it will do
        entries.append((key.replace("-", "_"), None, value))
    return entries


def _resolve(
    entries: list[tuple[str, int | None, Any]], problems: list[Problem], notes: list[str]
) -> dict[str, tuple[int | None, Any]]:
    """Entries by their name here; an entry without value counts as not given."""
    known = [f.name for f in fields(RunConfig)]
    found: dict[str, tuple[int | None, Any]] = {}
    written: dict[str, str] = {}
    for name, line, value in entries:
        key = ALIASES.get(name, name)
        if key not in known:
            near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(Problem(line, name, f"unknown key{hint}"))
            continue
        if key in found and found[key][1] != value:
            other = written[key]
            why = "given twice" if other == name else f"means the same as {other}"
            problems.append(Problem(line, f"{name} = {value}", f"{why}, which is {found[key][1]}; keep one"))
            continue
        if name != key:
            notes.append(f"{name} read as {key}")
        if value is not None:
            found[key] = (line, value)
            written[key] = name
    return found


def problem_with(key: str, value: Any) -> str | None:
    """What a setting may be, if it may not be this."""
    return _checked(key, value)[1]


def _checked(key: str, value: Any) -> tuple[Any, str | None]:
    """The value as its setting's type, and what is allowed if it is not."""
    converted, expected = _convert(value, get_type_hints(RunConfig)[key])
    limits = next(f.metadata for f in fields(RunConfig) if f.name == key)
    return converted, expected or _outside(converted, limits)


def _convert(value: Any, kind: Any) -> tuple[Any, str | None]:
    """The value as its field's type, or what was expected instead."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return (
            ([str(item) for item in items], None)
            if _plain(items)
            else (None, "must be a name or a list of names")
        )
    if kind is bool:
        return (value, None) if isinstance(value, bool) else (None, "must be true or false")
    if kind is str:
        text = str(value).lower() if isinstance(value, bool) else value
        return (str(text), None) if _plain([value]) else (None, "must be one name")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return (int(value), None) if number and value == int(value) else (None, "must be a whole number")
    return (float(value), None) if number else (None, "must be a number")


def _plain(items: list[Any]) -> bool:
    return all(isinstance(item, (str, int, float)) for item in items)


def _outside(value: Any, limits: Any) -> str | None:
    """What is allowed, if the value is not."""
    if limits["choices"]:
        items = value if isinstance(value, list) else [value]
        if any(item not in limits["choices"] for item in items):
            allowed = limits["choices"]
            return (
                f"must be one of {', '.join(allowed)}"
                if len(allowed) > 2
                else f"must be {' or '.join(allowed)}"
            )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if limits["low"] is not None and not value >= limits["low"]:
            return f"must be at least {limits['low']:g}"
        if limits["below"] is not None and not value < limits["below"]:
            return f"must be below {limits['below']:g}"
    return None


def _contradictions(config: RunConfig, given: dict[str, tuple[int | None, Any]]) -> list[Problem]:
    def at(key: str) -> int | None:
        return given[key][0] if key in given else None

    found = [
        Problem(None, name, "missing; every run needs it")
        for name in ("model", "dataset")
        if name not in given
    ]
    if config.full_finetuning and config.load_in_4bit and "load_in_4bit" in given:
        found.append(
            Problem(
                at("load_in_4bit"),
                "load_in_4bit = true",
                "4-bit weights cannot be trained; full_finetuning needs false",
            )
        )
    against = {
        "full_finetuning": config.full_finetuning,
        "lora_dropout": config.lora_dropout > 0,
        "use_dora": config.use_dora,
        "dtype": config.dtype in ("float16", "float32"),
    }
    if config.fp8 and any(against.values()):
        names = " and ".join(name for name, stands in against.items() if stands)
        found.append(
            Problem(at("fp8"), "fp8 = true", f"takes plain LoRA without dropout in bfloat16; change {names}")
        )
    if config.eval_dataset and config.eval_fraction:
        found.append(
            Problem(
                at("eval_fraction"),
                f"eval_fraction = {config.eval_fraction}",
                "eval_dataset is given already",
            )
        )
    if config.eval_steps and not (config.eval_dataset or config.eval_fraction):
        found.append(
            Problem(
                at("eval_steps"), f"eval_steps = {config.eval_steps}", "needs eval_dataset or eval_fraction"
            )
        )
    if config.num_train_epochs == 0 and config.max_steps < 1:
        found.append(Problem(at("num_train_epochs"), "num_train_epochs = 0", "must be above 0"))
    if config.max_steps == 0:
        found.append(
            Problem(at("max_steps"), "max_steps = 0", "must be positive, or -1 to train num_train_epochs")
        )
    if config.full_finetuning and "lora" in config.save_method and "save_method" in given:
        found.append(
            Problem(
                at("save_method"), "save_method = lora", "full_finetuning has no adapter; use merged_16bit"
            )
        )
    return found


def _report(origin: str, problems: list[Problem]) -> str:
    problems = sorted(problems, key=lambda problem: problem.line or 0)
    width = max(len(problem.what) for problem in problems) + 2
    lines = [
        f"  {f'line {problem.line}:' if problem.line else '-':<10}{problem.what:<{width}}{problem.allowed}"
        for problem in problems
    ]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{origin}: {count}", *lines])
