"""A run's settings: what each means, what it may be, and its default in a config file and in Python.

This is the one table of defaults: files and flags (`config_file.py`), `SFTConfig`, `get_peft_model`, `prepare_dataset` and
docs/settings.md read it. Keys are Hugging Face's where they exist.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from oribi.config_yaml import parse_word
from oribi.text import one_of

MOST = 2**31 - 1  # of whole numbers without a limit of their own
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A field of `RunConfig`: its default in a config file, what it means, and further fields of `Setting`."""
    metadata = {"help": help, "python": default, **limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


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
# what layers keep between forward and backward, and older names for it; YAML writes true and false in several ways
CHECKPOINTING = ("auto", "memory", "balanced", "speed", "off")
OLDER_CHECKPOINTING = {
    **dict.fromkeys(("oribi", "unsloth", "true", "yes", "on"), "auto"), **dict.fromkeys(("false", "no"), "off"),
}  # fmt: skip
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class RunConfig:
    """Every setting of a run; `read_run_config` makes one from a file and flags."""

    # the model
    model: str = setting("", "Hub name, local folder or GGUF file of the model")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub")
    trust_remote_code: bool = setting(False, "Run code that the model's repository ships")
    max_seq_length: int = setting(2048, "Longest example in tokens", low=1, high=2**24)
    load_in_4bit: bool = setting(True, "Keep frozen weights in NF4 (QLoRA)")
    dtype: str = setting(
        "auto", "Data type of the computation", choices=("auto", "bfloat16", "float16", "float32"),
        same={"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    )  # fmt: skip
    full_finetuning: bool = setting(False, "Train every weight instead of an adapter")
    # the adapter
    lora_r: int = setting(16, "Rank of the adapter", low=1, high=65536)
    lora_alpha: int = setting(16, "Scale of the adapter: alpha / r, with rsLoRA alpha / sqrt(r)", low=0)
    lora_dropout: float = setting(0.0, "Dropout before the adapter", low=0, below=1)
    target_modules: list[str] = setting(
        ["all-linear"], "Layers that get an adapter, or all-linear", python=PROJECTIONS
    )
    modules_to_save: list[str] = setting([], "Modules trained in full beside the adapter")
    use_rslora: bool = setting(False, "Scale by sqrt(r) instead of r")
    use_dora: bool = setting(False, "Weight-decomposed LoRA")
    gradient_checkpointing: str = setting(
        "auto", "Activations: auto keeps what fits in free memory, memory the least, speed and off all of them",
        choices=CHECKPOINTING, same=OLDER_CHECKPOINTING,
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
    eval_fraction: float = setting(0.0, "Fraction of the training rows kept for evaluation", low=0, below=1)
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
    packing: bool = setting(True, "Fill rows of max_seq_length with several examples each", python=False)
    dataset_num_proc: int | None = setting(None, "Processes that prepare the data", low=1, high=1024)
    # the training
    output_dir: str = setting("runs/latest", "Folder of the run", python="outputs")
    num_train_epochs: float = setting(1.0, "Passes over the data", python=3.0, low=0, high=1e6)
    max_steps: int = setting(-1, "Optimizer steps; overrides num_train_epochs if positive", low=-1)
    per_device_train_batch_size: int = setting(2, "Batch size per device", low=1)
    per_device_eval_batch_size: int = setting(8, "Batch size of evaluation per device", low=1)
    gradient_accumulation_steps: int = setting(4, "Micro-batches per optimizer step", low=1)
    learning_rate: float = setting(2e-4, "Peak learning rate", low=0, below=1)
    embedding_learning_rate: float | None = setting(
        None, "Learning rate of embeddings and head trained whole", low=0, below=1
    )
    lr_scheduler_type: str = setting(
        "linear", "How the learning rate falls, such as linear or cosine", choices=SCHEDULES
    )
    warmup_steps: float = setting(
        5, "Warm-up steps; a value below 1 is a fraction of all steps", python=0, low=0
    )
    optim: str = setting("adamw_8bit", "Optimizer", choices=OPTIMIZERS)
    weight_decay: float = setting(0.01, "Weight decay", python=0.0, low=0)
    max_grad_norm: float = setting(1.0, "Maximum gradient norm; 0 disables clipping", low=0)
    neftune_noise_alpha: float | None = setting(None, "NEFTune noise on the embeddings", low=0)
    seed: int = setting(3407, "Seed of the data order, dropout and the adapter's start", low=0)
    fp8: bool = setting(
        False,
        "Compute products of frozen weights in 8-bit floating point while training (approximate; NVIDIA GPUs from 8.9 on)",
    )
    deterministic: bool = setting(False, "Make two runs bit-equal; slower on a GPU")
    logging_steps: int = setting(1, "Steps between two log lines", low=1)
    eval_steps: int | None = setting(
        None, "Steps between two evaluations; none evaluates at each epoch", low=1
    )
    save_steps: int | None = setting(
        None, "Steps between two checkpoints; none saves only at the end", python=500, low=1
    )
    save_total_limit: int | None = setting(None, "Checkpoints kept", low=1)
    resume: str = setting(
        "false", "Go on from the newest whole checkpoint in output_dir; weights takes its weights alone",
        choices=("true", "false", "weights"),
    )  # fmt: skip
    report_to: list[str] = setting(["none"], "Trackers", python="none", choices=TRACKERS)
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


@dataclass(frozen=True)
class Setting:
    """One field of `RunConfig`.

    Args:
        kind: bool, int, float or str, of one item. container: list or dict where it holds several, else None.
        optional: whether it may be left open (None).
        default: in a config file. python: of the Python calls that take it, where TRL's or Unsloth's value is kept.
        help: what it means, on one line.
        low, high: the least and the most that it may be. below: what it must stay below.
        choices: the words that it may be. same: other words -> the choice that they mean.
    """

    name: str
    kind: type
    container: type | None
    optional: bool
    default: Any
    python: Any
    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_words(self) -> bool:
        """Whether it is a name or names, read as written; one that may be true or false as well is read as YAML."""
        return self.kind is str and "true" not in self.choices

    def check(self, value: Any) -> tuple[Any, str | None]:
        """A value as the setting's type, and what is allowed if the setting may not be this."""
        converted, expected = self._convert(value)
        expected = expected or self._outside(converted)
        if expected is not None and isinstance(value, str) and not self.is_words:
            unquoted = parse_word(value)
            if not isinstance(unquoted, str) and self.check(unquoted)[1] is None:
                expected += "; write it without the quotes"
        return converted, expected

    def _convert(self, value: Any) -> tuple[Any, str | None]:
        if self.container is dict:
            return _pairs(value)
        if self.container is list:
            found = [self._word(item) for item in (value if isinstance(value, list) else [value])]
            problem = next((problem for _, problem in found if problem), None)
            return [item for item, _ in found], problem and problem.replace(
                "one name", "a name or a list of names"
            )
        if self.kind is bool:
            return (value, None) if isinstance(value, bool) else (None, "must be true or false")
        if self.kind is str:
            return self._word(value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # a whole number of hundreds of digits is no float
        finite = number and (isinstance(value, float) or value.bit_length() < 1000) and math.isfinite(value)
        if self.kind is float:
            return (float(value), None) if finite else (None, "must be a number")
        whole = number and (isinstance(value, int) or (finite and value == int(value)))
        return (int(value), None) if whole else (None, "must be a whole number")

    def _word(self, value: Any) -> tuple[str | None, str | None]:
        if isinstance(value, bool) and "true" in (*self.choices, *self.same):
            value = str(value).lower()
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return None, "must be one name"
        text = str(value)
        if not text.strip():
            return None, "is empty; write one name, or leave the line out"
        if not text.isprintable():  # names of files with a NUL, say
            return None, "must be one name without control characters"
        return self.same.get(text.lower(), text), None

    def _outside(self, value: Any) -> str | None:
        if self.choices and value is not None:
            items = value if isinstance(value, list) else [value]
            wrong = [item for item in items if item not in self.choices]
            if wrong:
                return one_of(wrong[0], self.choices)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            high = MOST if self.high is None and isinstance(value, int) else self.high
            if self.low is not None and not value >= self.low:
                return f"must be at least {self.low:g}"
            if self.below is not None and not value < self.below:
                return f"must be below {self.below:g}"
            if high is not None and not value <= high:
                return f"must be at most {high:,}"
        return None

    def schema(self) -> dict[str, Any]:
        """What a value may be, as JSON schema."""
        bounds = {"minimum": self.low, "maximum": self.high, "exclusiveMaximum": self.below}
        choices: list[Any] = [*self.choices, *self.same]
        if self.container is list:
            item = {"enum": choices} if choices else {"type": "string"}
            shape: dict[str, Any] = {
                "anyOf": [{"type": "array", "items": item}, item]
            }  # one name may stand alone
        elif self.container is dict:
            shape = {"type": "object", "additionalProperties": {"type": "string"}}
        elif choices:
            booleans = {"true": True, "false": False}
            shape = {"enum": [*choices, *(booleans[choice] for choice in choices if choice in booleans)]}
        else:
            limits = {name: bound for name, bound in bounds.items() if bound is not None}
            shape = {"type": _JSON_TYPES[self.kind], **limits}
        return {"anyOf": [shape, {"type": "null"}]} if self.optional else shape


def _pairs(value: Any) -> tuple[dict[str, str] | None, str | None]:
    """A mapping of names, which flags may write as name=name."""
    found: dict[Any, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and "=" in item:
            item = dict([item.split("=", 1)])
        found |= item if isinstance(item, dict) else {None: None}
    if not all(isinstance(name, str) and name for pair in found.items() for name in pair):
        return None, "must be pairs of names, {ours: yours}, or ours=yours as a flag"
    return found or None, None


def _settings() -> dict[str, Setting]:
    kinds, found = get_type_hints(RunConfig), {}
    for one in fields(RunConfig):
        kind = kinds[one.name]
        optional = type(None) in get_args(kind)
        kind = get_args(kind)[0] if optional else kind
        container = get_origin(kind)
        default = one.default if one.default is not MISSING else one.default_factory()
        found[one.name] = Setting(
            one.name, get_args(kind)[0] if container else kind, container, optional, default, **one.metadata
        )
    return found


SETTINGS = _settings()


# setting -> its names in Axolotl, LLaMA-Factory, TRL and Unsloth
_OTHER_NAMES = {
    "model": "base_model model_name model_name_or_path",
    "revision": "model_revision",
    "max_seq_length": "sequence_len cutoff_len max_length",
    "dtype": "torch_dtype",
    "lora_r": "r lora_rank",
    "target_modules": "lora_target lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "dataset": "dataset_name local_dataset train_file",
    "eval_dataset": "validation_file",
    "eval_fraction": "val_size val_set_size",
    "chat_template": "template",
    "train_on_responses_only": "train_on_completions assistant_only_loss",
    "packing": "sample_packing neat_packing",
    "dataset_num_proc": "dataset_processes preprocessing_num_workers",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "micro_batch_size batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "learning_rate": "lr",
    "embedding_learning_rate": "embedding_lr",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_ratio",
    "optim": "optimizer",
    "seed": "random_seed random_state",
    "deterministic": "full_determinism",
    "resume": "resume_from_checkpoint",
    "quantization_method": "quantization",
}
ALIASES = {alias: name for name, aliases in _OTHER_NAMES.items() for alias in aliases.split()}


def json_schema() -> dict[str, Any]:
    """The settings as a JSON schema, by which editors complete keys and mark mistakes; aliases are allowed too."""
    shapes = {name: setting.schema() for name, setting in SETTINGS.items()}
    properties = {
        name: {"description": f"{setting.help}.", **shapes[name], "default": setting.default}
        for name, setting in SETTINGS.items()
    }
    aliases = {
        alias: {"description": f"Read as {name}.", "deprecated": True, **shapes[name]}
        for alias, name in ALIASES.items()
        if alias not in properties
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "oribi run config",
        "type": "object",
        "properties": {**properties, **aliases},
        "additionalProperties": False,
    }
