"""TRL's trainers and configs with the keywords of TRL 0.9 to 1.16 and transformers 4: each is translated, and one line says so.

Source: TRL's release notes and signatures, 0.9 to 1.16; transformers' migration guide to version 5.
"""

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import TrainingArguments

from oribi.chat.template import render_chat
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.models.unwrap import source_of
from oribi.text import did_you_mean, say_notes

# older keyword of training arguments -> today's
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "max_new_tokens": "max_completion_length",
}
# older keyword -> why it has no effect
RETIRED = {
    "overwrite_output_dir": "transformers 5 always writes into the folder",
    "logging_dir": "trackers take their folder from their own variables",
    "save_safetensors": "safetensors is the only format",
    "use_mps_device": "the device is found",
    "use_ipex": "the device is found",
    "fp16_backend": "there is one backend",
    "half_precision_backend": "there is one backend",
    "fp16_opt_level": "there is one backend",
    "include_inputs_for_metrics": "include_for_metrics names what metrics get",
    "include_tokens_per_second": "tokens are counted",
    "label_pad_token_id": "labels are padded with -100",
    "padding_value": "padding is masked",
    "is_encoder_decoder": "the model says what it is",
    "generate_during_eval": "this trainer draws no samples",
    "model_adapter_name": "the model's active adapter is trained",
    "ref_adapter_name": "the reference is the model without its adapter",
    "force_use_ref_model": "a ref_model that is given is used",
    "dataset_num_proc": "this trainer prepares its rows in one process",
    "max_completion_length": "max_length bounds prompt and completion together",
    "truncation_mode": "this trainer cuts the end",
    "unsloth_num_chunks": "the loss is computed in chunks",
    "unsloth_logit_chunk_multiplier": "the loss is computed in chunks",
    "unsloth_grpo_mini_batch": "the loss is computed in chunks",
}
# older keyword -> what to write instead; these change what is trained, so they are refused unless they say the default
REFUSED = {
    "rpo_alpha": (None, "write loss_type=['sigmoid', 'sft'] and loss_weights=[1.0, rpo_alpha]"),
    "reference_free": (False, "write loss_type of a trainer without a reference, such as ORPO"),
    "use_logits_to_keep": (False, "leave it out"),
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def trl_name(name: str) -> Any:
    """The object that one of TRL's names stands for in a script that runs on oribi.

    Args:
        name: as in `from trl import NAME`, of any release since 0.9.

    Raises:
        AttributeError: the installed TRL has no such name.
        ImportError: TRL is not installed.
    """
    if name == "TrainingArguments":
        return _translating_config(name, TrainingArguments)
    if name in ("SFTTrainer", "SFTConfig"):
        from oribi.train.arguments import SFTConfig
        from oribi.train.trainer import SFTTrainer

        return SFTTrainer if name == "SFTTrainer" else _translating_config(name, SFTConfig)
    found = _find(name)
    if name.endswith("Config") and isinstance(found, type) and issubclass(found, TrainingArguments):
        return _translating_config(name, found)
    if name.endswith("Trainer") and isinstance(found, type):
        return _translating_trainer(name, found)
    return found


def _find(name: str) -> Any:
    """TRL's object of a name, also where it moved to `trl.experimental`."""
    if find_spec("trl") is None:
        raise ImportError(f"oribi.trl.{name} needs TRL: pip install 'oribi[trl]'")
    trl = import_module("trl")
    if hasattr(trl, name):
        return getattr(trl, name)
    stem = re.sub(r"(Trainer|Config)$", "", name)
    folder = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem).lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that the place is experimental; scripts name older places
        if stem != name and find_spec(f"trl.experimental.{folder}") is not None:
            place = import_module(f"trl.experimental.{folder}")
            if hasattr(place, name):
                return getattr(place, name)
    raise AttributeError(f"TRL {trl.__version__} has no {name}{did_you_mean(name, dir(trl))}")


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
        if name in known:
            new, value = name, value
        elif name == "warmup_ratio":
            if not value or keywords.get("warmup_steps"):  # steps win, as they did when both were arguments
                continue
            new = "warmup_steps"
        elif name == "group_by_length":
            if not value:
                continue
            new, value = "train_sampling_strategy", "group_by_length"
        elif name in RENAMED and RENAMED[name] in known:
            new = RENAMED[name]
        elif name in RETIRED or name in REFUSED:
            if name in REFUSED and value != REFUSED[name][0]:
                raise ConfigError(
                    f"{config.__name__}: {name} = {value!r} is not taken any more: {REFUSED[name][1]}"
                )
            if name in RETIRED and value not in (None, False):
                notes.append(f"{config.__name__}: {name} has no effect: {RETIRED[name]}")
            continue
        else:
            raise ConfigError(
                f"{config.__name__}: unknown keyword {name}{did_you_mean(name, known | RENAMED.keys())}"
            )
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
    config_name = name.removesuffix("Trainer") + "Config"

    def __init__(self: Any, model: Any = None, *args: Any, **keywords: Any) -> None:
        if args:
            keywords |= dict(zip(taken[2:], args))
        if "tokenizer" in keywords:
            keywords["processing_class"] = keywords.pop("tokenizer")
            say_notes([f"{name}: tokenizer read as processing_class"])
        settings = {key: keywords.pop(key) for key in list(keywords) if key not in taken}
        arguments = _arguments(config_name, keywords.pop("args", None), settings)
        _leave_to_the_model(model, arguments)
        limit = getattr(arguments, "max_prompt_length", None)
        for key in ("train_dataset", "eval_dataset"):
            if limit is not None and keywords.get(key) is not None:
                keywords[key] = _short_prompts(
                    keywords[key], keywords.get("processing_class"), limit, f"{name}: {key}"
                )
        trainer.__init__(self, model, args=arguments, **keywords)

    body = {"__init__": __init__, "__doc__": trainer.__doc__, "__module__": "oribi.trl", "__qualname__": name}
    return type(name, (trainer,), body)


def _arguments(config_name: str, args: Any, settings: dict[str, Any]) -> Any:
    """The trainer's config with the settings that older scripts gave to the trainer itself."""
    config = getattr(import_module("oribi.trl"), config_name)
    if args is None:
        return config(**settings)
    if not settings and isinstance(args, config.__mro__[1]):
        return args
    known = {f.name for f in fields(config)}
    given = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    if settings:
        say_notes([f"{', '.join(settings)} read as part of {config_name}"])
    limit = getattr(args, "max_prompt_length", None)
    return config(**given | ({} if limit is None else {"max_prompt_length": limit}) | settings)


def _leave_to_the_model(model: Any, arguments: TrainingArguments) -> None:
    """Switch off what oribi's model decides itself: what its layers keep, and in which dtype it computes."""
    if isinstance(model, nn.Module) and source_of(model) is not None:
        arguments.gradient_checkpointing = False
        arguments.bf16 = arguments.fp16 = False


def _short_prompts(rows: Any, tokenizer: Any, limit: int, what: str) -> Any:
    """The rows whose prompt has at most `limit` tokens; TRL cuts prompts no more, and half a prompt asks something else."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        return rows
    if isinstance(rows, Mapping):
        return {k: _short_prompts(v, tokenizer, limit, f"{what} {k}") for k, v in rows.items()}

    def is_short(row: Mapping[str, Any]) -> bool:
        prompt = row.get("prompt")
        if prompt is None:
            return True
        if not isinstance(prompt, str):
            prompt = render_chat(tokenizer, prompt, add_generation_prompt=True)
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= limit

    kept = rows.filter(is_short)
    if hasattr(rows, "__len__") and len(kept) < len(rows):
        left_out = (
            f"{len(rows) - len(kept)} of {len(rows)} rows have a prompt above max_prompt_length = {limit}"
        )
        say_notes([f"{what}: {left_out} and are left out"])
    return kept
