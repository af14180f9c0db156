"""TRL's trainers and configs with the keywords of TRL 0.9 to 1.16 and transformers 4: each is translated, and one line says so.

Source: TRL's release notes and signatures, 0.9 to 1.16; transformers' migration guide to version 5.
"""

import inspect
import pkgutil
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import transformers
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from oribi.compat.prompts import short_prompts, template_columns
from oribi.compat.trl_keywords import REFUSED, fate_of
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.models.unwrap import source_of
from oribi.text import did_you_mean, say_notes
from oribi.train.setup import keep_dtype_in_evaluation
from oribi.train.several import forget_preparation
from oribi.train.stages import trl_place

# trainers that add a copy of the adapter, named "ref", to the model
_COPYING = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


# modules in which TRL's helpers have been; some are in another one today
_PLACES = (
    "data_utils",
    "trainer.utils",
    "trainer.callbacks",
    "experimental.utils",
    "models.utils",
    "rewards",
    "import_utils",
)
# names that TRL has no more, and what does their work
_GONE = {
    "DataCollatorForCompletionOnlyLM": "call oribi.train_on_responses_only(trainer, instruction_part=..., response_part=...)",
    "ConstantLengthDataset": "write packing=True in SFTConfig",
    "setup_chat_format": "call oribi.get_chat_template(tokenizer, 'chatml')",
    "AutoModelForCausalLMWithValueHead": "GRPO and RLOO train without a value head",
    "PPOTrainer": "GRPO and RLOO train on rewards without a value model",
    "PPOConfig": "GRPO and RLOO train on rewards without a value model",
    "PPOv2Trainer": "GRPO and RLOO train on rewards without a value model",
    "PPOv2Config": "GRPO and RLOO train on rewards without a value model",
}


@cache
def trl_name(name: str) -> Any:
    """The object that one of TRL's names stands for in a script that runs on oribi.

    Args:
        name: as in `from trl import NAME`, of any release since 0.9; also transformers' `Trainer` and `TrainingArguments`.

    Raises:
        AttributeError: the installed TRL has no such name.
        ImportError: TRL is not installed.
    """
    if name == "__version__":
        return version("trl")
    if name in ("Trainer", "TrainingArguments"):
        found = getattr(transformers, name)
    elif name in ("SFTTrainer", "SFTConfig"):
        from oribi.train.arguments import SFTConfig
        from oribi.train.trainer import SFTTrainer

        found = SFTTrainer if name == "SFTTrainer" else SFTConfig
    else:
        found = _find(name)
    if isinstance(found, type) and issubclass(found, TrainingArguments):
        return _translating_config(name, found)
    if isinstance(found, type) and issubclass(found, transformers.Trainer):
        return _translating_trainer(name, found)
    return found


def _find(name: str) -> Any:
    """TRL's object of a name, also where it moved within TRL."""
    if find_spec("trl") is None:
        raise ImportError(f"oribi.trl.{name} needs TRL: pip install 'oribi[trl]'")
    try:
        return trl_place(name)
    except AttributeError as error:
        for place in (*_PLACES, *_trainers()):
            if has_name(f"trl.{place}", name):
                return getattr(import_module(f"trl.{place}"), name)
        why = f"; {_GONE[name]}" if name in _GONE else did_you_mean(name, dir(import_module("trl")))
        raise AttributeError(f"{error}{why}") from None


def _trainers() -> list[str]:
    """TRL's modules of trainers, which hold some of their helpers."""
    return [
        f"trainer.{module.name}" for module in pkgutil.iter_modules(import_module("trl.trainer").__path__)
    ]


def has_name(module: str, name: str) -> bool:
    """Whether a module of TRL's exists and has a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that a place is experimental; scripts name older places
        try:
            return hasattr(import_module(module), name)
        except ImportError:
            return False


def trainer_keywords(name: str) -> list[str]:
    """Keywords that a trainer of `oribi.trl` takes itself; all others are those of its config."""
    taken = trl_name(name).__mro__[1]
    keywords = [*inspect.signature(taken.__init__).parameters]
    if taken.__module__.startswith("oribi."):  # passes on what it does not name
        from oribi.train.trainer import MOVED_KEYWORDS

        keywords += [*inspect.signature(transformers.Trainer.__init__).parameters, *MOVED_KEYWORDS]
    return [keyword for keyword in keywords if keyword != "kwargs"]


def translated(keywords: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Keywords of training arguments in today's names.

    Args:
        keywords: as a script gives them.
        config: the dataclass that will take them.

    Returns:
        What `config` takes; what became of each other keyword is said in one line.

    Raises:
        ConfigError: a keyword that would change the training has no counterpart, or two names of one setting differ.
    """
    known = {f.name for f in fields(config)}
    taken: dict[str, Any] = {}
    notes = []
    for name, value in keywords.items():
        fate = fate_of(name, known)
        new = fate.name
        if name == "warmup_ratio" and fate.kind == "read":
            if not value or keywords.get("warmup_steps"):  # steps win, as they did when both were arguments
                continue
            if not 0 <= value < 1:
                raise ConfigError(
                    f"{config.__name__}: warmup_ratio = {value}; must be at least 0 and below 1"
                )
            new = "warmup_steps"
        elif name == "group_by_length" and fate.kind == "read":
            if not value:
                continue
            new, value = "train_sampling_strategy", "group_by_length"
        elif fate.kind in ("retired", "refused"):
            if fate.kind == "refused" and value != REFUSED[name][0]:
                raise ConfigError(f"{config.__name__}: {name} = {value!r} is not taken any more: {fate.why}")
            if fate.kind == "retired" and value not in (None, False):
                notes.append(f"{config.__name__}: {name} has no effect: {fate.why}")
            continue
        elif fate.kind in ("read", "unknown"):
            raise ConfigError(f"{config.__name__}: {fate.why or f'{name} is for trainers that generate'}")
        if new != name:
            notes.append(f"{config.__name__}: {name} read as {new} = {value!r}")
        if new in taken and taken[new] != value:
            raise ConfigError(
                f"{config.__name__}: {name} and {new} name one setting and differ; give one of them"
            )
        taken[new] = value
    say_notes(notes)
    return taken


def _translating_config(name: str, config: type) -> type:
    """The config whose constructor takes older keywords too."""

    known = {f.name for f in fields(config)}

    def __init__(self: Any, *args: Any, **keywords: Any) -> None:
        limit = keywords.pop("max_prompt_length", None)
        sampling = keywords.pop("vllm_sampling_params", None)
        keywords = translated(keywords, config)
        if sampling is not None:
            keywords |= _sampling_values(sampling, keywords, known)
        if keywords.get("top_k", 1) in (-1, None):
            keywords["top_k"] = 0
        if keywords.get("use_vllm") and find_spec("vllm") is None:
            keywords["use_vllm"] = False
            say_notes([f"{name}: use_vllm is off: vLLM is not installed; the model's own generate answers"])
        if "num_generations" in known:
            _fill_batches(name, keywords)
        # transformers refuses bf16 where it is not told that no GPU is there
        if detect().device.type == "cpu":
            keywords.setdefault("use_cpu", True)
        config.__init__(self, *args, **keywords)
        self.max_prompt_length = limit  # no field, so it is in no file of settings

    body = {"__init__": __init__, "__doc__": config.__doc__, "__module__": "oribi.trl", "__qualname__": name}
    return type(name, (config,), body)


def _sampling_values(sampling: Any, keywords: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The values of vLLM's SamplingParams that the config has a field for and the script has not set."""
    values = {key: getattr(sampling, key, None) for key in SAMPLING}
    if (values["top_k"] or 0) < 1:  # vLLM's word for all tokens
        values["top_k"] = None
    stops = getattr(sampling, "stop", None)
    if stops:
        values["generation_kwargs"] = {"stop_strings": list(stops) if not isinstance(stops, str) else [stops]}
    found = {k: v for k, v in values.items() if v is not None and k in known and k not in keywords}
    if found:
        say_notes([f"vllm_sampling_params read as {', '.join(f'{k} = {v!r}' for k, v in found.items())}"])
    return found


def _fill_batches(name: str, keywords: dict[str, Any]) -> None:
    """Raise the batch to whole groups of answers: scripts for Unsloth give one prompt per batch and several answers to it."""
    answers = keywords.get("num_generations", 8)
    batch = keywords.get("per_device_train_batch_size", 8)
    steps = keywords.get("steps_per_generation") or keywords.get("gradient_accumulation_steps", 1)
    if keywords.get("generation_batch_size") is None and (batch * steps) % answers:
        keywords["per_device_train_batch_size"] = answers
        why = "a batch holds whole groups of num_generations answers"
        say_notes([f"{name}: per_device_train_batch_size = {batch} read as {answers}: {why}"])
    evaluated = keywords.get("num_generations_eval") or answers
    evaluates = keywords.get("eval_strategy", "no") != "no"
    if evaluates and keywords.get("per_device_eval_batch_size", 8) % evaluated:
        keywords["per_device_eval_batch_size"] = evaluated


def _translating_trainer(name: str, trainer: type) -> type:
    """The trainer whose constructor takes older keywords too."""
    taken = list(inspect.signature(trainer.__init__).parameters)
    config_name = "TrainingArguments" if name == "Trainer" else name.removesuffix("Trainer") + "Config"

    def __init__(self: Any, model: Any = None, *args: Any, **keywords: Any) -> None:
        if args:
            keywords |= dict(zip(taken[2:], args))
        if "tokenizer" in keywords and "tokenizer" not in taken:
            keywords["processing_class"] = keywords.pop("tokenizer")
            say_notes([f"{name}: tokenizer read as processing_class"])
        known = trainer_keywords(name)
        settings = {key: keywords.pop(key) for key in list(keywords) if key not in known}
        arguments = _arguments(config_name, keywords.pop("args", None), settings)
        if name != "SFTTrainer":
            _leave_to_the_model(model, arguments)
        elif _lacks_labels(keywords, arguments):
            arguments.dataset_kwargs = None
            say_notes(
                [
                    "skip_prepare_dataset has no effect: the rows have input_ids but no labels; every token is trained"
                ]
            )
        _leave_out_compilers(model, arguments)
        limit = getattr(arguments, "max_prompt_length", None)
        tokenizer = keywords.get("processing_class")
        for key in ("train_dataset", "eval_dataset"):
            if limit is not None and keywords.get(key) is not None:
                keywords[key] = short_prompts(keywords[key], tokenizer, limit, f"{name}: {key}")
        if hasattr(arguments, "chat_template_kwargs") and not arguments.chat_template_kwargs:
            arguments.chat_template_kwargs = template_columns(keywords.get("train_dataset"), tokenizer, name)
        if name in _COPYING:
            _forget_reference(model)
        trainer.__init__(self, model, args=arguments, **keywords)

    def _prepare_for_training(self: Any, *args: Any, **keywords: Any) -> Any:
        forget_preparation(self.model)  # an earlier trainer's
        return trainer._prepare_for_training(self, *args, **keywords)

    body = {
        "__init__": __init__, "_prepare_for_training": _prepare_for_training, "__doc__": trainer.__doc__,
        "__module__": "oribi.trl", "__qualname__": name,
    }  # fmt: skip
    return type(name, (trainer,), body)


def _arguments(config_name: str, args: Any, settings: dict[str, Any]) -> Any:
    """The trainer's config with the settings that older scripts gave to the trainer itself."""
    config = getattr(import_module("oribi.trl"), config_name)
    if args is None:
        return config(**settings)
    if not settings and isinstance(args, config.__mro__[1]):
        return args
    if config_name == "SFTConfig":
        from oribi.train.arguments import adopt

        adopted = adopt(args)
        for name, value in translated(settings, type(adopted)).items():
            if value is not None:
                setattr(adopted, name, value)
        return adopted
    known = {f.name for f in fields(config)}
    given = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    if settings:
        say_notes([f"{', '.join(settings)} read as part of {config_name}"])
    limit = getattr(args, "max_prompt_length", None)
    return config(**given | ({} if limit is None else {"max_prompt_length": limit}) | settings)


def _forget_reference(model: Any) -> None:
    """Remove the copy of the adapter that an earlier trainer took as its reference; a second one is an error in TRL."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config and model.active_adapter != "ref":
        model.delete_adapter("ref")


def _leave_to_the_model(model: Any, arguments: TrainingArguments) -> None:
    """Switch off what oribi's model decides itself: what its layers keep, and in which dtype it computes."""
    if isinstance(model, nn.Module) and source_of(model) is not None:
        arguments.gradient_checkpointing = False
        arguments.bf16 = arguments.fp16 = False
        keep_dtype_in_evaluation(arguments)


def _lacks_labels(keywords: Mapping[str, Any], arguments: TrainingArguments) -> bool:
    """Whether rows that the trainer is to take as they are have token ids and no labels, and no collator makes some."""
    skips = (arguments.dataset_kwargs or {}).get("skip_prepare_dataset")
    columns = getattr(keywords.get("train_dataset"), "column_names", None) or []
    return (
        bool(skips)
        and "input_ids" in columns
        and "labels" not in columns
        and not keywords.get("data_collator")
    )


def _leave_out_compilers(model: Any, arguments: TrainingArguments) -> None:
    """Switch off what would put other kernels under oribi's layers; the result is the same without."""
    if not isinstance(model, nn.Module) or source_of(model) is None:
        return
    for name in ("use_liger_kernel", "torch_compile"):
        if getattr(arguments, name, False):
            setattr(arguments, name, False)
            say_notes([f"{name} has no effect: the model's layers have kernels of their own"])
