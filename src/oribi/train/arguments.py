"""STEP 5: how to train. `SFTConfig` has the fields of TRL's `SFTConfig`, with defaults for LoRA."""

import logging
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from oribi.config import SETTINGS
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.launch import processes_here
from oribi.train.best import require_early_stopping
from oribi.train.optimizer_settings import optimizer_text, require_optimizer
from oribi.train.schedules import require_schedule

logger = logging.getLogger(__name__)

# TRL's own default, with which messages go before text; whether a script wrote it cannot be seen
TRL_TEXT_FIELD = "text"


def from_table(name: str, choices: bool = False) -> Any:
    """A field with the default and the meaning that the table of settings has for Python.

    Args:
        choices: whether a command line allows the table's choices alone; transformers checks other fields itself.
    """
    setting = SETTINGS[name]
    metadata = {"help": f"{setting.help}."} | ({"choices": list(setting.choices)} if choices else {})
    return field(default=setting.python, metadata=metadata)


@dataclass
class SFTConfig(TrainingArguments):
    """Training arguments: those of `transformers.TrainingArguments`, the fields of `trl.SFTConfig` (1.15 and 1.16) with
    the same meaning, and the ones below.

    Defaults differ from TRL's where LoRA needs another value: learning_rate 2e-4, batches of 2 x 4, adamw_8bit, one log
    line per step, no tracker, no gradient checkpointing beyond what `get_peft_model` set up. The model's dtype decides
    the precision; bf16 and fp16 only state what it should be. `NOT_HONOURED` in `train/setup.py` lists TRL's fields that
    oribi refuses, each with what to do instead.

    Args:
        max_length: longest example in tokens; None takes the model's max_seq_length.
        dataset_text_field: column of plain text to train on, whatever else the rows hold; None takes `text` where they hold
            nothing better. A `trl.SFTConfig` that says "text" says TRL's default, which asks for nothing.
        padding_free: None and True join the examples of a batch into one row; False pads them into a rectangle.
        assistant_only_loss: rows of messages or instructions: False trains on all of them; None and True on the assistant's
            part only.
        completion_only_loss: rows of prompt and completion: False trains on prompts too; None and True on completions only.
        overlong: what happens to an example longer than max_length: "truncate", "drop", "split" or "error"; None splits
            text files and truncates otherwise.
        turns: "whole" makes one example of a conversation; "split" makes one per assistant turn, with its thought.
        embedding_learning_rate: learning rate of embeddings and head that are trained whole, and of rows of added tokens;
            None takes learning_rate, which LoRA on a head always has.
        loraplus_lr_ratio: LoRA+: the matrices B learn this many times faster than A; None trains all alike.
        early_stopping_patience: stop when this many evaluations in a row are no better than the best; with
            load_best_model_at_end the best weights are kept.
        fp8: approximate: the products of frozen weights are computed in 8-bit floating point while training; evaluation
            and exports stay exact. Needs a model in bfloat16 on an NVIDIA GPU of compute capability 8.9 or higher.
        context_parallel: processes that share each row, for rows that are too long for one GPU; they divide all processes.
        merges_codes: the model, loaded with `train_for`, is trained for one merged GGUF file: in the last quarter of the steps
            forward sees checkpoint and adapter quantised together, anew every eight steps.
        deterministic: two runs are equal to the bit, on a GPU too, where it is slower; full_determinism is the same.

    The public `oribi.SFTConfig` also takes the older names of these fields (`compat/trl_keywords.py`).

    Raises:
        ConfigError: a value is out of range, would have no effect, or names a tracker or an optimizer that is not installed.
    """

    # the command line may give these as JSON
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]

    output_dir: str | None = from_table("output_dir")
    learning_rate: float = from_table("learning_rate")
    per_device_train_batch_size: int = from_table("per_device_train_batch_size")
    gradient_accumulation_steps: int = from_table("gradient_accumulation_steps")
    optim: str = from_table("optim")
    logging_steps: float = from_table("logging_steps")
    # the filter reads the loss back after every micro-batch, which stalls the device; the guard reads it once per log line
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave nan losses out of the log."})
    report_to: None | str | list[str] = from_table("report_to")
    seed: int = from_table("seed")
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute whole layers."})
    max_length: int | None = field(default=None, metadata={"help": "Longest example in tokens."})
    dataset_text_field: str | None = from_table("dataset_text_field")
    padding_free: bool | None = field(
        default=None, metadata={"help": "Join a batch's examples into one row."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "skip_prepare_dataset: true takes the rows as they are."}
    )
    dataset_num_proc: int | None = from_table("dataset_num_proc")
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle the prepared rows once."})
    packing: bool = from_table("packing")
    packing_strategy: str = field(default="bfd", metadata={"help": "Only 'bfd': whole examples, best fit."})
    eval_packing: bool | None = field(
        default=None, metadata={"help": "Pack evaluation rows; None: as packing."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this many tokens."}
    )
    truncation_mode: str = field(default="keep_start", metadata={"help": "Only 'keep_start'; see overlong."})
    completion_only_loss: bool | None = field(default=None, metadata={"help": "Train on completions only."})
    loss_type: str = field(default="nll", metadata={"help": "Only 'nll'."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options for loading a model that is given by its name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with a model given by its name may run."}
    )
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Not supported."})
    chat_template_path: str | None = field(default=None, metadata={"help": "Not supported."})
    eos_token: str | None = field(default=None, metadata={"help": "Not supported."})
    pad_token: str | None = field(default=None, metadata={"help": "Not supported."})
    activation_offloading: bool = field(default=False, metadata={"help": "Not supported."})
    assistant_only_loss: bool | None = field(default=None, metadata={"help": "Train on answers only."})
    overlong: str | None = from_table("overlong", choices=True)
    turns: str = from_table("turns", choices=True)
    embedding_learning_rate: float | None = from_table("embedding_learning_rate")
    loraplus_lr_ratio: float | None = from_table("loraplus_lr_ratio")
    early_stopping_patience: int | None = from_table("early_stopping_patience")
    fp8: bool = from_table("fp8")
    deterministic: bool = from_table("deterministic")
    context_parallel: int = from_table("context_parallel")
    merges_codes: bool = field(default=False, metadata={"help": "Train for one merged GGUF file."})

    def __post_init__(self) -> None:
        require_trackers(self.report_to)
        require_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        self.optim_args = optimizer_text(self.optim_args)
        require_optimizer(self)
        require_early_stopping(self)
        # transformers' own way changes variables that CUDA has read by then, and waits for every kernel
        self.deterministic |= self.full_determinism
        self.full_determinism = False
        if isinstance(self.pad_to_multiple_of, str):  # TRL's "auto" pads for AWS Trainium only
            given = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = None if given in ("auto", "none", "null") else int(given)
        if self.loss_type == "chunked_nll":  # an older name of TRL's
            self.loss_type = "nll"
        for name in ("checkpointing", "checkpointing_kwargs"):
            # from 5.23 on transformers has a new name, and warns where only the older one is set, as it is here
            if getattr(self, f"activation_{name}", self) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        if detect().device.type == "cpu":
            # without this, processes of torchrun on a machine without GPUs would each train alone
            self.use_cpu = True
            if processes_here() > 1:
                self.ddp_backend = self.ddp_backend or "gloo"
        # transformers refuses bf16 where it finds no GPU; here the loaded model's dtype says whether it can
        bf16, self.bf16 = bool(self.bf16), False
        super().__post_init__()
        self.bf16 = bf16
        if bf16:
            self.mixed_precision = "bf16"

    @property
    def place_model_on_device(self) -> bool | None:
        # what is sharded moves there in parts; whole, it may not fit
        return False if self.fsdp else None


def row_readers(args: TrainingArguments) -> int:
    """Processes that read different rows, those that share each row counted as one."""
    return args.world_size // getattr(args, "context_parallel", 1)


def adopt(args: TrainingArguments | dict[str, Any] | None) -> SFTConfig:
    """An `SFTConfig` with the values of any training arguments; an `SFTConfig` is returned as it is.

    `assistant_only_loss = False`, TRL's default, counts as not given: answers are trained, as with `SFTConfig`. A setting
    that `SFTConfig` has no field for is named in a warning.
    """
    if isinstance(args, SFTConfig):
        return args
    if args is None or isinstance(args, dict):
        return SFTConfig(**(args or {}))
    known = {f.name for f in fields(SFTConfig) if f.init}
    values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    unknown = [
        f"{f.name} = {getattr(args, f.name)!r}"
        for f in fields(args)
        if f.init and f.name not in known and f.default is not MISSING and getattr(args, f.name) != f.default
    ]
    if unknown:
        logger.warning("%s has settings that oribi does not use: %s", type(args).__name__, ", ".join(unknown))
    if values.get("assistant_only_loss") is False:
        # TRL's default, which nobody can tell from the user's word; oribi.SFTConfig takes False at its word
        values["assistant_only_loss"] = None
    if values.get("dataset_text_field") == TRL_TEXT_FIELD:
        values["dataset_text_field"] = None
    return SFTConfig(**values)


# packages of which one has to be there, where the tracker's name alone does not say it
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",),
            "kubeflow": ("kubernetes",)}  # fmt: skip


def require_trackers(names: str | Sequence[str] | None) -> None:
    """Find what is wrong with `report_to` before anything is loaded.

    Args:
        names: trackers; "none" and "all" (of those that are installed) stand alone.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
    """
    names = [names] if isinstance(names, str) else list(names or [])
    if names in (["none"], ["all"]):
        return
    known = sorted(INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to = {name!r}; it can be none, all, or some of {', '.join(known)}")
        packages = PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise ConfigError(
                f"report_to = {name!r}: the package is not installed; pip install {packages[0]}, or leave it out: "
                "log.jsonl has every figure, too"
            )
