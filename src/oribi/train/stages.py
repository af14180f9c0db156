"""STEPS 5 and 6 of a run whose stage is not supervised: which of TRL's trainers it takes, with which arguments.

A stage is a row of `STAGE_TRAINERS`. Its trainer is TRL's own class with what every run of oribi has: see `stage_trainer`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from oribi.config import SETTINGS, RunConfig
from oribi.data.prepare import PreparedData
from oribi.environment import Environment, detect
from oribi.errors import ConfigError
from oribi.launch import is_launched
from oribi.models.unwrap import base_model, is_classifier
from oribi.train.best import saving_arguments
from oribi.train.optimizer_settings import optimizer_text
from oribi.train.rewards import RewardFunction
from oribi.train.stage_trainer import StageTrainer, mixin_of

PACKAGE = "pip install 'trl>=1.15,<1.17'"
SUPPORTED = ((1, 15), (1, 17))
# a stage -> the stem of its trainer's and config's names, as in trl.DPOTrainer and trl.DPOConfig
STAGE_TRAINERS = {"dpo": "DPO", "orpo": "ORPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}
# settings of a run that TRL's configs take under the same names
SAME_NAMES = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "seed", "logging_steps", "report_to",
    "eval_steps", "ddp_timeout",
)  # fmt: skip


def trl_place(name: str) -> Any:
    """TRL's object of a name, also where it moved to `trl.experimental`.

    Raises:
        ImportError: TRL is not installed.
        AttributeError: the installed TRL has no such name.
    """
    trl = import_module("trl")
    if hasattr(trl, name):
        return getattr(trl, name)
    stem = name.removesuffix("Trainer").removesuffix("Config")
    folder = "".join(
        f"_{letter}" if i and letter.isupper() and stem[i - 1].islower() else letter
        for i, letter in enumerate(stem)
    ).lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that the place is experimental
        if stem != name and find_spec(f"trl.experimental.{folder}") is not None:
            place = import_module(f"trl.experimental.{folder}")
            if hasattr(place, name):
                return getattr(place, name)
    raise AttributeError(f"TRL {trl.__version__} has no {name}")


def require_trl(stage: str, environment: Environment) -> None:
    """Before anything is loaded: whether the trainer of a stage is here and runs on this machine.

    Raises:
        ConfigError: TRL is missing or of another release, or needs a GPU.
    """
    if stage == "sft":
        return
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ConfigError(f"stage = {stage} trains with TRL, which is not installed: {PACKAGE}") from None
    release = tuple(int(part) for part in installed.split(".")[:2])
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        raise ConfigError(
            f"stage = {stage} trains with TRL 1.15 or 1.16, and {installed} is installed: {PACKAGE}"
        )
    on_triton = stage in ("dpo", "kto", "grpo") and release < (1, 16) and find_spec("triton") is not None
    if on_triton and environment.device.type == "cpu":
        raise ConfigError(
            f"stage = {stage}: TRL {installed} computes log-probabilities on GPUs only where Triton is installed; "
            "pip install 'trl>=1.16,<1.17'"
        )


@lru_cache
def trainer_class(stage: str) -> type[StageTrainer]:
    """TRL's trainer of a stage with what every run of oribi has."""
    stem = STAGE_TRAINERS[stage]
    name = f"{stem}Trainer"
    return type(name, (mixin_of(stage), trl_place(name)), {"stage": stage, "__module__": __name__})


def stage_arguments(config: RunConfig, evaluates: bool) -> TrainingArguments:
    """A run's settings as its trainer's arguments, under TRL's names.

    Args:
        config: of a run whose stage is not sft. evaluates: whether it has held-out rows.
    """
    kind = trl_place(f"{STAGE_TRAINERS[config.stage]}Config")
    known = {one.name for one in fields(kind)}
    values = {name: getattr(config, name) for name in SAME_NAMES}
    own = [name for name, setting in SETTINGS.items() if config.stage in setting.stages and name in known]
    values |= {name: getattr(config, name) for name in own}
    values["optim_args"] = optimizer_text(config.optim_args)
    if "loss_type" in values and config.stage != "dpo":
        values["loss_type"] = values["loss_type"][0]
    on_cpu = detect().device.type == "cpu"
    values |= {
        "max_length": config.max_seq_length,
        **saving_arguments(config, evaluates),
        "run_name": Path(config.output_dir).name,
        "disable_dropout": not config.lora_dropout,
        # a full model would need a second one beside it: its own first state is read once, before training
        "precompute_ref_log_probs": config.full_finetuning,
        # what the model decides: what its layers keep, and in which precision they compute
        **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), False),
        "bf16": False,
        "logging_nan_inf_filter": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "ddp_backend": "gloo" if on_cpu and is_launched() else None,
    }
    if values.get("center_rewards_coefficient") == 0:
        values["center_rewards_coefficient"] = None
    try:
        arguments = kind(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"stage = {config.stage}: TRL refuses these settings: {error}") from error
    # what oribi's part of the trainer reads beside them
    for name in (
        "embedding_learning_rate",
        "loraplus_lr_ratio",
        "early_stopping_patience",
        "deterministic",
        "stage",
        "packing",
    ):
        setattr(arguments, name, getattr(config, name))
    arguments.max_length = config.max_seq_length
    return arguments


@dataclass(frozen=True)
class RunData:
    """What a run trains on, what it is evaluated on (None: nothing), and of grpo the functions that score answers."""

    rows: PreparedData
    held_out: PreparedData | None = None
    rewards: Sequence[RewardFunction] = ()


def make_stage_trainer(config: RunConfig, model: Any, tokenizer: Any, data: RunData) -> StageTrainer:
    """The trainer of a run whose stage is not sft.

    Args:
        config: of the run. model, tokenizer: loaded, the model with its adapter.
        data: its rows as `oribi.data.preferences.prepare_preferences` returns them.

    Raises:
        ConfigError: TRL refuses what it is given.
    """
    if config.stage != "reward" and is_classifier(model):
        raise ConfigError(
            f"model = {config.model}: it scores labels, and stage = {config.stage} trains models that continue texts; only stage = "
            "reward trains such a model"
        )
    arguments = stage_arguments(config, data.held_out is not None)
    # float16's gradient scaler, as in supervised training; accelerate's launcher may say otherwise
    arguments.mixed_precision = "fp16" if base_model(model).config.dtype is torch.float16 else "no"
    arguments.reward_sources = [one.fingerprint for one in data.rewards] or None
    keywords = {"reward_funcs": list(data.rewards)} if config.stage == "grpo" else {}
    try:
        held_out = None if data.held_out is None else data.held_out.dataset
        return trainer_class(config.stage)(
            model, arguments, data.rows.dataset, held_out, tokenizer, **keywords
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"stage = {config.stage}: TRL refuses this training: {error}") from error
