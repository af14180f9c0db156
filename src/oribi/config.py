"""A run's settings: one flat YAML file and flags, checked as a whole before anything is loaded.

Keys are Hugging Face's where they exist; the names that other trainers use are read too, and reported. Every problem of
a file is found before the first is told.
"""

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from oribi.config_hints import hint_for
from oribi.config_yaml import YamlReader, compose, read_text, value_of
from oribi.errors import ConfigError
from oribi.text import nearest, one_of, shown

MOST = 2**31 - 1  # of whole numbers without a limit of their own


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
    same: Mapping[str, str] | None = None,
) -> Any:
    """A field with its explanation and what it may be: from `low` to `high`, below `below`, one of `choices`.

    `same` has other words for some of the choices.
    """
    limits = {
        "help": help, "low": low, "high": high, "below": below, "choices": tuple(choices), "same": same or {}
    }  # fmt: skip
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
    max_seq_length: int = setting(2048, "Longest example in tokens", low=1, high=2**24)
    load_in_4bit: bool = setting(True, "Keep frozen weights in NF4 (QLoRA)")
    dtype: str = setting(
        "auto", "What the network computes in", choices=("auto", "bfloat16", "float16", "float32"),
        same={"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    )  # fmt: skip
    full_finetuning: bool = setting(False, "Train every weight instead of an adapter")
    # the adapter
    lora_r: int = setting(16, "Rank of the adapter", low=1, high=65536)
    lora_alpha: int = setting(16, "Scale of the adapter: alpha / r, with rsLoRA alpha / sqrt(r)", low=0)
    lora_dropout: float = setting(0.0, "Dropout before the adapter", low=0, below=1)
    target_modules: list[str] = setting(["all-linear"], "Layers that get an adapter, or all-linear")
    modules_to_save: list[str] = setting([], "Modules trained in full beside the adapter")
    use_rslora: bool = setting(False, "Scale by sqrt(r) instead of r")
    use_dora: bool = setting(False, "Weight-decomposed LoRA")
    gradient_checkpointing: str = setting(
        "oribi", "What is recomputed instead of kept: oribi chooses by free memory, memory as much as can be, false nothing",
        choices=("oribi", "memory", "balanced", "speed", "true", "false"), same={"auto": "oribi", "unsloth": "oribi"},
    )  # fmt: skip
    # the data
    dataset: list[str] = setting([], "Files or hub data sets to train on")
    split: str = setting("train", "Split of a hub data set")
    dataset_text_field: str | None = setting(
        None,
        "Column of plain text to train on, whatever else the rows hold; none takes text if they hold nothing better",
    )
    eval_dataset: list[str] = setting([], "Files or hub data sets to evaluate on")
    eval_split: str | None = setting(
        None, "Split of eval_dataset; none takes split, but validation or test of what is in dataset as well"
    )
    eval_fraction: float = setting(0.0, "Share of the training rows kept for evaluation", low=0, below=1)
    chat_template: str | None = setting(None, "Name of a chat template in place of the model's own")
    train_on_responses_only: bool = setting(True, "Train on the assistant's words only")
    overlong: str | None = setting(
        None, "Examples above max_seq_length; none splits text files and truncates otherwise",
        choices=("truncate", "drop", "split", "error"),
    )  # fmt: skip
    turns: str = setting(
        "whole", "Conversations as whole examples, or split into one example per assistant turn, each with its thought",
        choices=("whole", "split"),
    )  # fmt: skip
    columns: dict[str, str] | None = setting(
        None, "Your columns by oribi's names, e.g. {question: task, answer: solution}"
    )
    role_aliases: dict[str, str] | None = setting(
        None, "Further names of roles in messages, e.g. {coach: assistant}"
    )
    malformed: str = setting(
        "error", "Rows that cannot be read stop the run, or are left out and named", choices=("error", "drop")
    )
    packing: bool = setting(True, "Fill rows of max_seq_length with several examples each")
    dataset_num_proc: int | None = setting(None, "Processes that prepare the data", low=1, high=1024)
    # the training
    output_dir: str = setting("runs/latest", "Folder of the run")
    num_train_epochs: float = setting(1.0, "Passes over the data", low=0, high=1e6)
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
    resume: str = setting(
        "false", "Go on from the newest whole checkpoint in output_dir; weights takes its weights alone",
        choices=("true", "false", "weights"),
    )  # fmt: skip
    report_to: list[str] = setting(["none"], "Trackers", choices=TRACKERS)
    # what is saved
    save_method: list[str] = setting(
        ["lora"], "Forms in which the model is saved", choices=("lora", "merged_16bit", "merged_4bit"),
        same={"adapter": "lora", "merged": "merged_16bit"},
    )  # fmt: skip
    quantization_method: list[str] = setting([], "GGUF files to write, e.g. q8_0 or q4_k_m")

    report: bool = setting(True, "Measure the model before and after, and write report.html and report.md")

    def row_settings(self) -> dict[str, Any]:
        """What is said of the rows, by the names of `prepare_dataset`."""
        return {
            "max_seq_length": self.max_seq_length,
            "split": self.split,
            "train_on": "responses" if self.train_on_responses_only else "everything",
            "overlong": self.overlong,
            "turns": self.turns,
            "text_field": self.dataset_text_field,
            "columns": self.columns,
            "role_aliases": self.role_aliases,
            "malformed": self.malformed,
        }

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


@dataclass
class Given:
    """A setting as it was given: under which name, on which line of the file, and what."""

    name: str
    line: int | None
    value: Any


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
    for key, one in given.items():
        converted, expected = _checked(key, one.value)
        if expected is not None and one.value is True and one.line is None:
            problems.append(Problem(one.line, f"--{one.name}", f"its value is missing; {expected}"))
        elif expected is not None:
            problems.append(Problem(one.line, f"{one.name} = {shown(one.value)}", expected))
        else:
            setattr(config, key, converted)
    if config.full_finetuning:  # defaults of an adapter mean nothing
        config.load_in_4bit &= "load_in_4bit" in given
        config.save_method = config.save_method if "save_method" in given else ["merged_16bit"]
    problems += _contradictions(config, given)
    if problems:
        raise ConfigError(_report(origin, problems))
    return config, notes


def _read_file(path: Path, problems: list[Problem]) -> list[Given]:
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
    reader, node = compose(read_text(path), str(path))
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines of 'key: value', got a {node.id}")
    entries = []
    for key, value in node.value:
        name, line = (
            str(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}",
            key.start_mark.line + 1,
        )
        if name == "<<":
            problems.append(Problem(line, "<<", "merge keys are not read; write the settings out"))
        elif not isinstance(key, yaml.ScalarNode):
            problems.append(Problem(line, name, "a key is one word"))
        elif isinstance(value, yaml.MappingNode) and not _is_mapping(ALIASES.get(name, name)):
            problems.append(Problem(line, f"{name}: ...", "the file is flat; write its keys one level up"))
        else:
            entries.append(Given(name, line, _value(reader, value, name, str(path))))
    return entries


def _value(reader: YamlReader, node: yaml.Node, name: str, origin: str) -> Any:
    """A node's value; for settings that are words, the words as they are written, not what YAML makes of 1.0 or no."""
    if not _is_words(ALIASES.get(name, name)):
        return value_of(reader, node, origin)
    value = value_of(reader, node, origin)
    if isinstance(node, yaml.SequenceNode):
        return [_value(reader, child, name, origin) for child in node.value]
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        values = [_value(reader, child, name, origin) for _, child in node.value]
        return dict(zip((str(key.value) for key, _ in node.value), values))
    return value if value is None or not isinstance(node, yaml.ScalarNode) else node.value


def _is_mapping(key: str) -> bool:
    kind = get_type_hints(RunConfig).get(key)
    return any(get_origin(option) is dict for option in (kind, *get_args(kind)))


def _is_words(key: str) -> bool:
    """Whether a setting is a name or names; one that may be true or false as well is read as YAML."""
    kind = get_type_hints(RunConfig).get(key)
    words = kind is not None and any(str in (option, *get_args(option)) for option in (kind, *get_args(kind)))
    return words and "true" not in _limits(key)["choices"]


def _limits(key: str) -> Mapping[str, Any]:
    return next(f.metadata for f in fields(RunConfig) if f.name == key)


def _read_flags(flags: list[str], problems: list[Problem]) -> list[Given]:
    entries = []
    while flags:
        flag = flags.pop(0)
        if not flag.startswith("--"):
            problems.append(Problem(None, flag, "flags are written --key value"))
            continue
        key, equals, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        words = [text] if equals else []
        while not equals and flags and not flags[0].startswith("--"):
            words.append(flags.pop(0))
        values = [_flag_value(word, key) for word in words]
        entries.append(Given(key, None, True if not values else values[0] if len(values) == 1 else values))
    return entries


def _flag_value(word: str, name: str) -> Any:
    try:
        reader, node = compose(word, "flags")
        return None if node is None else _value(reader, node, name, "flags")
    except ConfigError:
        return word  # a name with braces, say; its setting says whether it will do


def _resolve(entries: list[Given], problems: list[Problem], notes: list[str]) -> dict[str, Given]:
    """Entries by their key; an entry without value counts as not given."""
    known = [f.name for f in fields(RunConfig)]
    found: dict[str, Given] = {}
    for one in entries:
        key = ALIASES.get(one.name, one.name)
        if key not in known:
            near = nearest(one.name, [*known, *ALIASES])
            advice = hint_for(one.name) or (f"did you mean {ALIASES.get(near, near)}?" if near else "")
            problems.append(Problem(one.line, one.name, f"unknown key{f'; {advice}' if advice else ''}"))
            continue
        if key in found and found[key].value != one.value:
            first = found[key]
            where = f" on line {first.line}" if first.line else ""
            why = "given twice" if first.name == one.name else f"means the same as {first.name}"
            problems.append(
                Problem(
                    one.line,
                    f"{one.name} = {shown(one.value)}",
                    f"{why}, {shown(first.value)}{where}; keep one",
                )
            )
            continue
        if one.name != key:
            notes.append(f"{one.name} read as {key}")
        if one.value is not None:
            found[key] = one
    return found


def setting_of(key: str, value: Any) -> Any:
    """A value as its setting's type.

    Raises:
        ConfigError: the setting may not be this.
    """
    converted, expected = _checked(key, value)
    if expected is not None:
        raise ConfigError(f"--{key} {shown(value)}: {expected}")
    return converted


def problem_with(key: str, value: Any) -> str | None:
    """What a setting may be, if it may not be this."""
    return _checked(key, value)[1]


def _checked(key: str, value: Any) -> tuple[Any, str | None]:
    """The value as its setting's type, and what is allowed if it is not."""
    limits = _limits(key)
    converted, expected = _convert(value, get_type_hints(RunConfig)[key], limits)
    expected = expected or _outside(converted, limits)
    if expected is not None and isinstance(value, str) and not _is_words(key):
        unquoted = _flag_value(value, key)
        if not isinstance(unquoted, str) and _checked(key, unquoted)[1] is None:
            expected += "; write it without the quotes"
    return converted, expected


def _convert(value: Any, kind: Any, limits: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The value as its field's type, or what was expected instead."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is dict:
        return _pairs(value)
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        found = [_convert(item, str, limits) for item in items]
        problem = next((problem for _, problem in found if problem), None)
        return [item for item, _ in found], problem and problem.replace(
            "one name", "a name or a list of names"
        )
    if kind is bool:
        return (value, None) if isinstance(value, bool) else (None, "must be true or false")
    if kind is str:
        if isinstance(value, bool):
            return (str(value).lower(), None) if "true" in limits["choices"] else (None, "must be one name")
        return (
            _word(str(value), limits) if isinstance(value, (str, int, float)) else (None, "must be one name")
        )
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        whole = number and (isinstance(value, int) or (math.isfinite(value) and value == int(value)))
        return (int(value), None) if whole else (None, "must be a whole number")
    finite = number and (isinstance(value, float) or value.bit_length() < 1000) and math.isfinite(value)
    return (float(value), None) if finite else (None, "must be a number")


def _pairs(value: Any) -> tuple[dict[str, str] | None, str | None]:
    """A mapping of names, which flags may write as name=name."""
    found: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and "=" in item:
            item = dict([item.split("=", 1)])
        if not isinstance(item, dict):
            return None, "must be pairs of names, {ours: yours}, or ours=yours as a flag"
        found |= item
    if not all(
        isinstance(name, str) and isinstance(other, str) and name and other for name, other in found.items()
    ):
        return None, "must be pairs of names, {ours: yours}, or ours=yours as a flag"
    return found or None, None


def _word(text: str, limits: Mapping[str, Any]) -> tuple[str | None, str | None]:
    if not text.strip():
        return None, "is empty; write one name, or leave the line out"
    if not text.isprintable():  # names of files with a NUL, say
        return None, "must be one name without control characters"
    return limits["same"].get(text.lower(), text), None


def _outside(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What is allowed, if the value is not."""
    if limits["choices"] and value is not None:
        wrong = [
            item for item in (value if isinstance(value, list) else [value]) if item not in limits["choices"]
        ]
        if wrong:
            return one_of(wrong[0], limits["choices"])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        high = MOST if limits["high"] is None and isinstance(value, int) else limits["high"]
        if limits["low"] is not None and not value >= limits["low"]:
            return f"must be at least {limits['low']:g}"
        if limits["below"] is not None and not value < limits["below"]:
            return f"must be below {limits['below']:g}"
        if high is not None and not value <= high:
            return f"must be at most {high:,}"
    return None


def _contradictions(config: RunConfig, given: dict[str, Given]) -> list[Problem]:
    found = [
        Problem(None, key, "missing; every run needs it") for key in ("model", "dataset") if key not in given
    ]

    def refuse(key: str, why: str) -> None:
        one = given.get(key, Given(key, None, getattr(config, key)))
        found.append(Problem(one.line, f"{one.name} = {shown(one.value)}", why))

    if config.full_finetuning and config.load_in_4bit:
        refuse("load_in_4bit", "4-bit weights cannot be trained; full_finetuning needs false")
    against = {
        "full_finetuning": config.full_finetuning,
        "lora_dropout": config.lora_dropout > 0,
        "use_dora": config.use_dora,
        "dtype": config.dtype in ("float16", "float32"),
    }
    if config.fp8 and any(against.values()):
        names = " and ".join(name for name, stands in against.items() if stands)
        refuse("fp8", f"takes plain LoRA without dropout in bfloat16; change {names}")
    if config.eval_dataset and config.eval_fraction:
        refuse("eval_fraction", "eval_dataset is given already")
    if config.eval_split is not None and not config.eval_dataset:
        refuse("eval_split", "needs eval_dataset")
    if config.eval_steps and not (config.eval_dataset or config.eval_fraction):
        refuse("eval_steps", "needs eval_dataset or eval_fraction")
    if config.num_train_epochs == 0 and config.max_steps < 1:
        refuse("num_train_epochs", "must be above 0")
    if config.max_steps == 0:
        refuse("max_steps", "must be positive, or -1 to train num_train_epochs")
    if config.full_finetuning and "lora" in config.save_method:
        refuse("save_method", "full_finetuning has no adapter; use merged_16bit")
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
