"""Settings of a run that are right alone and cannot be together, each with the reason."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oribi.config import LOSSES, SETTINGS, RunConfig, as_source
from oribi.config_setting import OTHER_CODES, SFT_ONLY
from oribi.text import one_of, shown

# settings that act on an adapter alone, and came after full_finetuning refused to have one
OF_ADAPTER = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "finetune_last_n_layers", "exclude_modules", "target_parameters", "init_lora_weights",
    "loraplus_lr_ratio", "trainable_tokens",
)  # fmt: skip

# older ones, which configs have beside full_finetuning
SHAPE_OF_ADAPTER = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip


@dataclass
class Given:
    """A setting as it was given: under which name, on which line of the file (None for a flag), and what."""

    name: str
    line: int | None
    value: Any


@dataclass
class Problem:
    """One thing that is wrong: where it stands, what stands there, and what is allowed."""

    line: int | None
    what: str
    allowed: str


def contradictions(config: RunConfig, given: Mapping[str, Given]) -> list[Problem]:
    """What is missing, or cannot be beside what else is set.

    Args:
        config: every value of it may be, taken alone.
        given: the settings that a file or flags name.
    """
    found = [
        Problem(None, key, "missing; every run needs it") for key in ("model", "dataset") if key not in given
    ]

    def refuse(key: str, why: str) -> None:
        one = given.get(key, Given(key, None, getattr(config, key)))
        found.append(Problem(one.line, f"{one.name} = {shown(one.value)}", why))

    found += _unused(config, given)
    if config.full_finetuning and config.load_in_4bit:
        refuse("load_in_4bit", "4-bit weights cannot be trained; full_finetuning needs false")
    if config.keep_in_16bit and not config.load_in_4bit:
        refuse("keep_in_16bit", "without load_in_4bit every weight is in 16 bits; leave it out")
    if config.train_for is not None:
        _refuse_of_codes(config, refuse)
    if "auto" in config.keep_in_16bit and len(config.keep_in_16bit) > 1:
        refuse("keep_in_16bit", "auto chooses by itself; give auto or names")
    against = {
        "full_finetuning": config.full_finetuning,
        "lora_dropout": config.lora_dropout > 0,
        "use_dora": config.use_dora,
        "dtype": config.dtype in ("float16", "float32"),
    }
    _refuse_of_adapter(config, refuse)
    if config.fp8 and any(against.values()):
        names = " and ".join(name for name, stands in against.items() if stands)
        refuse("fp8", f"takes plain LoRA without dropout in bfloat16; change {names}")
    if config.eval_dataset and config.eval_fraction:
        refuse("eval_fraction", "eval_dataset is given already")
    if config.eval_split is not None and not config.eval_dataset:
        refuse("eval_split", "needs eval_dataset")
    evaluates = bool(config.eval_dataset or config.eval_fraction)
    if config.eval_steps and not (evaluates or config.sample_prompts):
        refuse("eval_steps", "needs eval_dataset, eval_fraction or sample_prompts")
    if config.sample_prompts == "held_out" and not evaluates:
        refuse("sample_prompts", "held_out needs eval_dataset or eval_fraction; or name a file of prompts")
    _refuse_of_search(config, evaluates, refuse)
    weights = [as_source(one).get("weight") is not None for one in config.dataset]
    if any(weights) and not all(weights):
        refuse("dataset", f"{sum(weights)} of {len(weights)} have a weight; give all of them one, or none")
    if any(as_source(one).get("weight") is not None for one in config.eval_dataset):
        refuse("eval_dataset", "all of its rows are evaluated; leave the weights out")
    if config.num_train_epochs == 0 and config.max_steps < 1:
        refuse("num_train_epochs", "must be above 0")
    steps = SETTINGS["gradient_accumulation_steps"].default_of(config.stage)
    if config.total_batch_size is not None and config.gradient_accumulation_steps != steps:
        refuse("gradient_accumulation_steps", "it follows from total_batch_size; leave one of them out")
    if config.max_steps == 0:
        refuse("max_steps", "must be positive, or -1 to train num_train_epochs")
    if config.full_finetuning and {"lora", "lora_per_expert", "gguf-adapter"} & set(config.save_method):
        refuse("save_method", "full_finetuning has no adapter; use merged_16bit")
    for key, why in contradictions_of_stage(config):
        refuse(key, why)
    return found


def without_effect(config: RunConfig, given: Mapping[str, Given]) -> list[str]:
    """A sentence for each setting that was given a value of its own, and that another one leaves without effect."""
    evaluates = bool(config.eval_dataset or config.eval_fraction)
    saves = config.save_steps or config.save_strategy not in (None, "no") or config.load_best_model_at_end
    reasons = {
        **dict.fromkeys(SHAPE_OF_ADAPTER, "full_finetuning has no adapter" if config.full_finetuning else ""),
        "sample_tokens": "" if config.sample_prompts else "it is the length of the answers to sample_prompts",
        "save_total_limit": "" if saves else "no checkpoints are written; save_steps or save_strategy writes them",
        "per_device_eval_batch_size": "" if evaluates else "nothing is evaluated",
        "num_train_epochs": "max_steps ends the training" if config.max_steps > 0 else "",
        "warmup_steps": "constant has no warm-up; constant_with_warmup has one" if config.lr_scheduler_type == "constant" else "",
    }  # fmt: skip
    return [
        f"{given[key].name} = {shown(given[key].value)} is not used: {why}"
        for key, why in reasons.items()
        if why and key in given and getattr(config, key) != SETTINGS[key].default_of(config.stage)
    ]


def _refuse_of_adapter(config: RunConfig, refuse: Callable[[str, str], None]) -> None:
    """Settings of the adapter that contradict others."""
    start = config.init_lora_weights
    if config.full_finetuning:
        for key in OF_ADAPTER:
            if getattr(config, key) != SETTINGS[key].default_of(config.stage):
                refuse(key, "full_finetuning has no adapter; leave it out")
        return
    pissa = start.startswith("pissa")
    if start in ("olora", "orthogonal") and config.load_in_4bit:
        refuse(
            "init_lora_weights",
            f"{start} is computed on 16-bit weights; take load_in_4bit: false, or pissa or loftq, which leave NF4 weights as they are",
        )
    if start == "loftq" and not config.load_in_4bit:
        refuse(
            "init_lora_weights",
            "loftq makes up for what NF4 rounds off; without load_in_4bit take true or pissa",
        )
    if config.use_dora and (start == "loftq" or (pissa and config.load_in_4bit)):
        refuse("init_lora_weights", f"{start} and use_dora each set how layers begin; leave one of them out")
    if config.target_parameters and pissa:
        refuse("init_lora_weights", f"{start} is for layers, and target_parameters names others; take true")
    if config.fsdp and (start in ("loftq", "eva") or pissa):
        refuse(
            "init_lora_weights", f"{start} reads whole layers, and with fsdp a process holds parts of them"
        )
    if start == "eva" and config.stage != "sft":
        refuse("init_lora_weights", f"eva begins with the rows of stage = sft; with {config.stage} take true")
    if start == "eva" and config.context_parallel > 1:
        refuse("init_lora_weights", "eva reads whole rows, and with context_parallel processes share them")
    if config.fsdp and config.new_tokens:
        refuse(
            "new_tokens",
            "adds rows to embeddings that fsdp keeps in parts; add them on one GPU and save the model first",
        )
    if config.finetune_last_n_layers is not None and config.layers_to_transform is not None:
        refuse("finetune_last_n_layers", "layers_to_transform says which layers; leave one of them out")
    if config.target_parameters and config.lora_dropout:
        refuse(
            "target_parameters",
            "PEFT has no dropout for parameters that are no layers; lora_dropout must be 0",
        )
    whole = {name.rpartition(".")[2] for name in [*config.modules_to_save, *config.target_modules]}
    if config.trainable_tokens and "embed_tokens" in whole:
        refuse("trainable_tokens", "embed_tokens is trained whole already; leave one of them out")


def _refuse_of_codes(config: RunConfig, refuse: Callable[[str, str], None]) -> None:
    """What cannot be beside frozen weights in a GGUF file's codes."""
    if config.full_finetuning:
        refuse("train_for", "full_finetuning has no frozen weights; leave one of them out")
    if config.stage == "reward":
        refuse("train_for", "llama.cpp reads no scores, so a reward model has no GGUF file")
    if config.fsdp:
        refuse(
            "train_for",
            "with fsdp no process holds the layers whole; train on one GPU, or on several without fsdp",
        )
    if config.keep_in_16bit:
        refuse("keep_in_16bit", f"train_for gives every layer the type that {config.train_for} files have")
    if config.load_in_4bit:
        for key, asked in {
            "use_dora": config.use_dora,
            "init_lora_weights": config.init_lora_weights == "loftq",
        }.items():
            if asked:
                refuse(
                    key,
                    "PEFT does not read the codes that train_for keeps; load_in_4bit: false trains on their values",
                )
    if config.train_for in (OTHER_CODES.get(one.lower(), one.lower()) for one in config.quantization_method):
        _refuse_of_merged_codes(config, refuse)
    if "gguf-adapter" in config.save_method:
        whole = {
            "new_tokens": config.new_tokens,
            "trainable_tokens": config.trainable_tokens,
            "modules_to_save": config.modules_to_save,
        }
        for key in (key for key, asked in whole.items() if asked):
            refuse(key, "llama.cpp applies LoRA updates alone; save_method: gguf-adapter holds nothing else")


def _refuse_of_merged_codes(config: RunConfig, refuse: Callable[[str, str], None]) -> None:
    """What cannot be beside a training for one merged file, which quantises base and adapter together."""
    both = (
        f"quantization_method names {config.train_for} of train_for, so the training is for one merged file"
    )
    against = {
        "save_method": "gguf-adapter" in config.save_method, "quantization_method": len(config.quantization_method) > 1,
        "load_in_4bit": not config.load_in_4bit, "fp8": config.fp8, "use_dora": config.use_dora, "stage": config.stage != "sft",
        "new_tokens": config.new_tokens, "trainable_tokens": config.trainable_tokens, "modules_to_save": config.modules_to_save,
        "context_parallel": config.context_parallel > 1,
    }  # fmt: skip
    for key in (key for key, asked in against.items() if asked):
        refuse(key, f"{both}, which it cannot be for; leave one of them out")


def _refuse_of_search(config: RunConfig, evaluates: bool, refuse: Callable[[str, str], None]) -> None:
    """Settings of saving, and of the search for the best weights, that contradict others."""
    strategy = config.save_strategy
    searches = {
        "load_best_model_at_end": config.load_best_model_at_end and config.early_stopping_patience is None,
        "early_stopping_patience": config.early_stopping_patience is not None,
        "save_strategy": strategy == "best",
        "lr_scheduler_type": config.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    for key, asked in searches.items():
        if asked and not evaluates:
            refuse(key, "needs evaluations: eval_dataset or eval_fraction")
    if strategy == "steps" and config.save_steps is None:
        refuse("save_strategy", "needs save_steps")
    if config.save_steps is not None and strategy not in (None, "steps"):
        refuse("save_steps", f"save_strategy = {strategy} does not use it; leave one of them out")
    if not config.load_best_model_at_end:
        return
    if strategy == "no":
        refuse("save_strategy", "load_best_model_at_end needs checkpoints: best, or as often as evaluations")
    if strategy == "epoch" and config.eval_steps is not None:
        refuse(
            "save_strategy",
            "load_best_model_at_end needs a checkpoint of each evaluation: best, or save_steps",
        )
    if config.save_steps is not None and config.eval_steps is None:
        refuse(
            "save_steps",
            "load_best_model_at_end needs a checkpoint of evaluations, and these are at epochs: set eval_steps, or save_strategy: best",
        )
    elif config.save_steps is not None and config.save_steps % config.eval_steps:
        refuse("save_steps", f"load_best_model_at_end needs a multiple of eval_steps = {config.eval_steps}")


def _unused(config: RunConfig, given: Mapping[str, Given]) -> list[Problem]:
    """Settings that were given a value of their own although the stage does not use them."""
    found = []
    for key, one in given.items():
        setting = SETTINGS[key]
        if config.stage in setting.used_by or getattr(config, key) == setting.default_of(config.stage):
            continue
        users = (
            "only sft uses it" if setting.used_by == SFT_ONLY else f"for stage {', '.join(setting.used_by)}"
        )
        found.append(
            Problem(
                one.line,
                f"{one.name} = {shown(one.value)}",
                f"stage = {config.stage} does not use it; {users}",
            )
        )
    return found


def contradictions_of_stage(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of a stage that cannot be together, each with the reason."""
    answers, kinds = config.num_generations or 0, config.loss_type or []
    if config.stage == "grpo":
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if not config.reward_funcs:
            yield (
                "reward_funcs",
                "missing; stage = grpo needs at least one, as file.py:function or module:function",
            )
        elif config.reward_weights and len(config.reward_weights) != len(config.reward_funcs):
            yield "reward_weights", f"one for each of the {len(config.reward_funcs)} reward_funcs"
        if rows % answers:
            yield (
                "num_generations",
                f"a step's {rows} answers (per_device_train_batch_size x gradient_accumulation_steps) must be whole groups of it",
            )
        if (config.eval_dataset or config.eval_fraction) and config.per_device_eval_batch_size % answers:
            yield "per_device_eval_batch_size", f"must be whole groups of num_generations = {answers}"
        if config.full_finetuning and config.beta:
            yield "beta", "above 0, the reference is the model without its adapter; full_finetuning has none"
    if config.stage in ("dpo", "kto", "grpo") and any(
        name.rpartition(".")[2] == "lm_head" for name in config.target_modules
    ):
        yield (
            "target_modules",
            f"lm_head among them; stage = {config.stage} computes probabilities from the head's own weight, past a LoRA pair: leave it "
            "out, or train the head whole by modules_to_save",
        )
    if config.stage == "kto" and config.per_device_train_batch_size < 2 and kinds == ["kto"]:
        yield "per_device_train_batch_size", "must be at least 2: kto compares the rows of a batch"
    unknown = [kind for kind in kinds if kind not in LOSSES.get(config.stage, kinds)]
    if unknown:
        yield "loss_type", one_of(unknown[0], LOSSES[config.stage])
    if len(kinds) > 1 and config.stage != "dpo":
        yield "loss_type", "stage = dpo alone adds several losses"
    if config.loss_weights and len(config.loss_weights) != len(kinds):
        yield "loss_weights", f"one for each of the {len(kinds)} loss_type"
    if config.stage != "sft" and config.overlong == "split":
        yield "overlong", f"stage = {config.stage} compares whole answers; take truncate, drop or error"
