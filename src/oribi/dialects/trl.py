"""The YAML and flags of `trl sft`, `trl dpo`, `trl kto`, `trl orpo`, `trl reward` and `trl grpo`.

Checked against huggingface/trl 1.15.0 (2026-11-25): scripts/*.py, scripts/utils.py, trainer/sft_config.py, base_config.py,
model_config.py, utils.py; transformers 5.17's TrainingArguments; PEFT 0.21.2's utils/constants.py.
"""

import re
from pathlib import Path
from typing import Any

from oribi.config_setting import STAGES
from oribi.dialects import preferences, shared
from oribi.dialects.converted import (
    Converted,
    Dialect,
    Handler,
    idle,
    is_off,
    lacking,
    names_of,
    only,
    read_elsewhere,
    refusing,
    renamed,
    sources_of,
)

# commands and scripts of trl that oribi has no stage for
OTHER_TRAINERS = {
    "cpo",
    "rloo",
    "ppo",
    "bco",
    "gkd",
    "prm",
    "online_dpo",
    "nash_md",
    "xpo",
    "gold",
    "distillation",
}
STAGE_WORDS = {**{stage: stage for stage in STAGES}, "reward_modeling": "reward"}
# keys that one trainer alone has
SIGNS = {
    **dict.fromkeys(("reward_funcs", "num_generations", "scale_rewards"), "grpo"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), "kto"), "center_rewards_coefficient": "reward",
    **dict.fromkeys(("loss_weights", "label_smoothing", "f_divergence_type"), "dpo"),
}  # fmt: skip
# keys that several trainers have, and sft has not
SHARED_SIGNS = (
    "beta",
    "max_prompt_length",
    "precompute_ref_log_probs",
    "use_vllm",
    "ref_model_init_kwargs",
    "max_completion_length",
)
UNNAMED = (
    "the file does not say which of TRL's trainers it is for; name the file after it, as dpo.yaml, or write a shell script with "
    "`trl dpo` and its flags"
)
# the trainers' own learning rate and longest example
STAGE_DEFAULTS = {"reward": 1e-4}
PREFERENCE_RATE = 1e-6


def _put_stage(found: Converted) -> None:
    """The stage: of a shell script its command; of a YAML file keys that one trainer has, or the file's name."""
    # `accelerate launch --config_file x.yaml dpo.py` leaves the script among the values of a flag
    given = [
        one for value in found.entries.values() for one in (value if isinstance(value, list) else [value])
    ]
    scripts = [one for one in given if isinstance(one, str) and one.endswith(".py")]
    words = [Path(word).name.removesuffix(".py").replace("-", "_") for word in (*found.command, *scripts)]
    for word in words:
        if word in OTHER_TRAINERS:
            found.refuse(word, preferences.NO_STAGE)
    by_command = {STAGE_WORDS[word] for word in words if word in STAGE_WORDS}
    by_keys = {stage for key, stage in SIGNS.items() if found.entries.get(key) is not None}
    by_name = {
        STAGE_WORDS[word] for word in re.split(r"[^a-z]+", found.path.stem.lower()) if word in STAGE_WORDS
    }
    stages = by_command or by_keys or by_name
    shared_keys = [key for key in SHARED_SIGNS if not is_off(found.entries.get(key))]
    if len(stages) == 1:
        stage = stages.pop()
        if stage != "sft":
            said = (
                "its command"
                if by_command
                else "its keys"
                if by_keys
                else f"the file's name, {found.path.name},"
            )
            found.put("stage", stage, said)
    elif not by_command:
        found.notes.append(
            "read as a config of trl sft: neither its keys nor its name are those of another trainer"
        )
        for key in [*shared_keys, *(key for key in SIGNS if key in found.entries)]:
            found.refuse(key, UNNAMED)


def _prepare(found: Converted) -> None:
    entries = found.entries
    _put_stage(found)
    if entries.get("config"):
        found.refuse("config", "convert that file, and add the flags of the command to what comes out")
    if entries.get("use_peft"):
        return
    for key in ("load_in_4bit", "load_in_8bit"):
        if entries.get(key):
            found.refuse(key, "quantised weights cannot be trained without use_peft")
        entries.pop(key, None)
    shared.put_full_finetuning(found, "use_peft unset")
    found.differences.append(shared.MASTER_WEIGHTS)


def _finish(found: Converted) -> None:
    entries = found.entries
    if not found.values.get("full_finetuning") and "target_modules" not in found.values:
        # PEFT knows these from the model's kind, which a config does not say
        qkv = ["qkv_proj"] if "phi-3" in str(found.values.get("model", "")).lower() else ["q_proj", "v_proj"]
        found.put("target_modules", qkv, "default of PEFT")
    if "max_length" in entries and entries["max_length"] is None:
        found.refuse("max_length", "without it trl cuts nothing; give the length of the longest example")
    stage = preferences.stage_of(found)
    if stage == "sft":
        _masking(found)
    else:
        found.put_default("learning_rate", STAGE_DEFAULTS.get(stage, PREFERENCE_RATE))
    shared.put_strategies(found, "steps")
    if shared.evaluation(found) != "no" and "eval_fraction" not in found.values:
        found.unsupported["dataset_test_split"] = (
            "no evaluation; eval_fraction takes a share of the training rows, eval_dataset files, or data sets of the same split"
        )
    _precision(found)
    if not found.values.get("full_finetuning"):
        found.put_default("lora_alpha", 32)
        found.put_default("lora_dropout", 0.05)


def _masking(found: Converted) -> None:
    entries = found.entries
    asked = [key for key in ("assistant_only_loss", "completion_only_loss") if entries.get(key)]
    if asked:
        found.put("train_on_responses_only", True, asked[0])
    elif entries.get("completion_only_loss") is None:
        found.differences.append(
            "trl trains on everything in messages and text, but not on the prompt of prompt + completion rows: for these set "
            "train_on_responses_only: true"
        )


def _precision(found: Converted) -> None:
    shared.precision(found)
    entries = found.entries
    dtype = entries.get("dtype") or entries.get("torch_dtype")
    if "dtype" not in found.values and entries.get("bf16") is False:
        found.put("dtype", "float32" if dtype in (None, "auto") else dtype, "bf16 = false")
    elif "dtype" not in found.values and dtype in ("bfloat16", "float16"):
        found.put("dtype", dtype, f"dtype = {dtype}")


def _datasets(found: Converted, key: str, value: Any) -> None:
    """A mixture; its entries may name a path, a split, and files of a local kind."""
    entries = sources_of(value)
    splits = {str(entry.get("split") or "train") for entry in entries}
    for entry in entries:
        for name, said in entry.items():
            if name not in ("path", "split") and said is not None:
                found.refuse(
                    f"datasets: {name} = {said}",
                    "oribi's config names files and data sets; save what is meant as a file",
                )
    if len(splits) > 1:
        found.refuse(
            "datasets: split", f"one split for all data sets; {', '.join(sorted(splits))} are several"
        )
    if entries:
        found.put("dataset", [str(entry.get("path")) for entry in entries], "datasets")
        found.put("split", splits.pop(), "datasets: split")


def _packing_strategy(found: Converted, key: str, value: Any) -> None:
    if value in ("bfd_split", "bfd-requeue", "wrapped") and found.entries.get("packing"):
        found.put("overlong", "split", f"{key} = {value}")
    elif value:
        found.idle[key] = "packs are filled by best fit; examples above max_seq_length are cut"


def _loss_type(found: Converted, key: str, value: Any) -> None:
    if preferences.stage_of(found) != "sft":
        preferences.loss_types(found, key, value)
    elif value in (None, "nll", "chunked_nll"):
        found.idle[key] = "it is oribi's loss"
    else:
        found.refuse(key, "the loss is plain cross-entropy" if value == "dft" else UNNAMED)


def _task(found: Converted, key: str, value: Any) -> None:
    allowed = ["CAUSAL_LM"] if preferences.stage_of(found) != "reward" else ["SEQ_CLS"]
    only(allowed, "the stage says what is trained")(found, key, value)


def _modules(found: Converted, key: str, value: Any) -> None:
    """Beside a reward model's adapter its score is trained in any case."""
    others = [name for name in names_of(value or []) if name != "score"]
    if preferences.stage_of(found) == "reward" and value:
        found.idle[key] = "the score is trained beside the adapter"
    if others:
        found.put("modules_to_save", others, key)


HANDLERS: dict[str, Handler] = {
    **shared.HANDLERS,
    **preferences.HANDLERS,
    **read_elsewhere(("use_peft", "config", "dtype", "torch_dtype", "assistant_only_loss", "completion_only_loss")),
    "max_length": renamed("max_seq_length"),
    "max_seq_length": renamed("max_seq_length"),
    "datasets": _datasets,
    "dataset_name": lambda found, key, value: found.put("dataset", [value] if value and not found.entries.get("datasets") else None, key),
    "dataset_train_split": renamed("split"),
    "test_split_size": renamed("eval_fraction"),
    "packing_strategy": _packing_strategy,
    "loss_type": _loss_type,
    "truncation_mode": only(["keep_start"], "examples are cut at their end"),
    "lora_task_type": _task,
    "lora_modules_to_save": _modules,
    **shared.CHECKPOINTS,
    **idle(("dataset_test_split", "eval_packing", "shuffle_dataset", "ignore_bias_buffers", "report_to_hub", "pad_token", "dataset_batch_size"), "it is how oribi works, or what another setting says already"),
    **lacking(("env",), "set environment variables in the shell"),
    **lacking(("config_file", "num_processes", "num_machines", "mixed_precision", "main_process_port"), "it is accelerate's; start oribi with torchrun for several GPUs"),
    **refusing(("dataset_config",), "oribi's config cannot name a configuration of a data set; save it as a file"),
    **refusing(("chat_template_path",), "in Python: oribi.get_chat_template(tokenizer, (jinja, end of a turn))"),
    **refusing(("eos_token",), "the end of a turn is the chat template's; in Python: tokenizer.eos_token = ..."),
    **refusing(("model_init_kwargs", "dataset_kwargs", "router_aux_loss_coef"), "oribi's config has nothing like it; in Python: FastLanguageModel.from_pretrained(...)"),
    **refusing(("teacher_model_name_or_path", "num_ppo_epochs", "simpo_gamma", "cpo_alpha"), preferences.NO_STAGE),
}  # fmt: skip

DEFAULTS = {
    "load_in_4bit": False, "packing": False, "max_seq_length": 1024, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "learning_rate": 2e-5, "num_train_epochs": 3.0, "warmup_steps": 0,
    "optim": "adamw_torch_fused", "weight_decay": 0.0, "train_on_responses_only": False, "logging_steps": 10, "seed": 42,
}  # fmt: skip
DIALECT = Dialect("TRL", HANDLERS, DEFAULTS, _prepare, _finish)
