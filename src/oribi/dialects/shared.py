"""Keys that several programs share, most of them from transformers' TrainingArguments and PEFT's LoraConfig."""

import re
from collections.abc import Iterable
from typing import Any

from oribi.config import OPTIMIZERS, SCHEDULES, TRACKERS
from oribi.dialects import learning
from oribi.dialects.converted import (
    Converted,
    Handler,
    idle,
    is_off,
    lacking,
    names,
    names_of,
    only,
    read_elsewhere,
    refusing,
)

# other names of the same optimizer
SAME_OPTIMIZER = {
    "adamw_hf": "adamw_torch", "optimi_adamw": "adamw_torch", "ao_adamw_8bit": "adamw_8bit",
    "ao_adamw_4bit": "adamw_torch_4bit", "paged_adamw": "paged_adamw_32bit",
}  # fmt: skip


def schedule(found: Converted, key: str, value: Any) -> None:
    """The learning rate's schedule."""
    if key == "lr_scheduler" and found.entries.get("cosine_min_lr_ratio") and value == "cosine":
        return  # `learning.least_rate` names the schedule of both
    if value in SCHEDULES:
        found.put("lr_scheduler_type", value, key)
    elif not is_off(value):
        found.refuse(key, f"oribi's config has {', '.join(SCHEDULES)}")


def optimizer(found: Converted, key: str, value: Any) -> None:
    """The optimizer."""
    name = SAME_OPTIMIZER.get(str(value), value)
    if name in OPTIMIZERS:
        found.put("optim", name, key if name == value else f"{key} = {value}")
    elif not is_off(value):
        found.refuse(
            key, "another optimizer than oribi's config has; adamw_torch and adamw_8bit are the usual ones"
        )


def report_to(found: Converted, key: str, value: Any) -> None:
    """Trackers; those that oribi does not support are named and left out."""
    asked = names_of(value or "none")
    for name in asked:
        if name not in TRACKERS:
            found.unsupported[f"{key}: {name}"] = (
                f"a run is reported to {', '.join(TRACKERS[1:])}, and log.jsonl has it all"
            )
    found.put("report_to", [name for name in asked if name in TRACKERS] or ["none"], key)


def trackers(keys: Iterable[str]) -> dict[str, Handler]:
    """Keys that turn on the tracker whose name is a part of theirs."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if not is_off(value):
            name = next(name for name in TRACKERS if name in key)
            others = [other for other in found.values.get("report_to", []) if other not in ("none", name)]
            found.values["report_to"] = [*others, name]
            found.notes.append(
                f"{key} read as report_to = {found.values['report_to']}; {name} reads its own environment variables"
            )

    return dict.fromkeys(keys, handle)


def warmup(found: Converted, key: str, value: Any) -> None:
    """Warm-up; steps win over a ratio if both are given."""
    steps = found.entries.get("warmup_steps")
    if key == "warmup_steps" and (value or is_off(found.entries.get("warmup_ratio"))):
        found.put("warmup_steps", value, key)
    elif key == "warmup_ratio" and value is not None:
        if steps:
            found.idle[key] = "warmup_steps wins"
        else:
            found.put("warmup_steps", value, key)


def steps(setting: str) -> Handler:
    """Steps between two events; no value, 0 and -1 mean never."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if value is None or (isinstance(value, (int, float)) and value <= 0):
            return
        if isinstance(value, float) and value < 1:
            found.unsupported[key] = f"{value} of all steps; {setting} is a whole number of steps"
        else:
            found.put(setting, value, key)

    return handle


def resume(found: Converted, key: str, value: Any) -> None:
    """Resuming: only from oribi's own checkpoints."""
    if value is True:
        found.put("resume", True, key)
    elif not is_off(value):
        found.unsupported[key] = "resume: true continues from oribi's newest checkpoint in output_dir"


def context_parallel(found: Converted, key: str, value: Any) -> None:
    """GPUs that share each row."""
    if value in (None, 0, 1):
        found.idle[key] = "each GPU has rows of its own unless context_parallel is set"
    else:
        found.put("context_parallel", value, key)


def targets(found: Converted, key: str, value: Any) -> None:
    """The layers that get an adapter."""
    if value is True or value in ("all", "all-linear", ["all-linear"], ["all"]):
        found.put("target_modules", ["all-linear"], f"{key} = {value}")
    elif not is_off(value):
        listed = names_of(value)
        if all(re.fullmatch(r"[\w.]+", name) for name in listed):
            found.put("target_modules", listed, key)
        else:
            found.refuse(key, "a pattern; oribi's config takes the layers' names, or all-linear")


def evaluation_share(found: Converted, key: str, value: Any) -> None:
    """Rows for evaluation, as a share of the training rows."""
    if value and value >= 1:
        found.unsupported[key] = f"{value} rows; eval_fraction is a share of the rows"
    elif value:
        found.put("eval_fraction", value, key)


def evaluation(found: Converted) -> str:
    """eval_strategy of TrainingArguments, by its newer or its older name."""
    return found.entries.get("eval_strategy") or found.entries.get("evaluation_strategy") or "no"


def put_strategies(found: Converted, default: str) -> None:
    """save_strategy, save_steps, eval_strategy and eval_steps of TrainingArguments, together."""
    entries = found.entries
    saving = entries.get("save_strategy") or default
    if saving == "steps":
        steps("save_steps")(found, "save_steps", entries.get("save_steps", 500))
    elif saving in ("epoch", "best"):
        found.put("save_strategy", saving, "save_strategy")
    evaluating = evaluation(found)
    if evaluating == "steps":
        every = entries.get("eval_steps") or entries.get("logging_steps") or found.values.get("logging_steps")
        steps("eval_steps")(found, "eval_steps", every)
    elif "eval_steps" in entries and not is_off(entries["eval_steps"]):
        found.idle["eval_steps"] = f"eval_strategy is {evaluating}"


def precision(found: Converted) -> None:
    """bf16 and fp16; without them the machine decides."""
    entries = found.entries
    if any(entries.get(name) in (True, "full") for name in ("bf16", "bfloat16", "pure_bf16")):
        found.put("dtype", "bfloat16", "bf16 = true")
    elif any(entries.get(name) is True for name in ("fp16", "float16")):
        found.put("dtype", "float16", "fp16 = true")


def put_full_finetuning(found: Converted, why: str) -> None:
    """Full fine-tuning: settings of an adapter have no effect in that program either, and are dropped."""
    found.put("full_finetuning", True, why)
    for key in list(found.entries):
        if key.startswith(("lora_", "peft_", "loraplus_")) or key in ("use_rslora", "use_dora", "r"):
            value = found.entries.pop(key)
            if not is_off(value):
                found.idle[key] = "every weight is trained"


MASTER_WEIGHTS = (
    "trained weights are float32 there, and arithmetic bf16; oribi trains them in the dtype that it computes in: dtype: float32 "
    "is exact, and slower"
)
EIGHT_BITS = "weights are NF4 or 16 bit; 16 bit is taken, which is exact and needs more memory"
NEW_ADAPTER = "oribi starts a new adapter; in Python an adapter can be loaded and trained on: FastLanguageModel.from_pretrained(ADAPTER)"
# `put_strategies` reads them
CHECKPOINTS = read_elsewhere(
    ("save_strategy", "save_steps", "eval_strategy", "evaluation_strategy", "eval_steps")
)
HANDLERS: dict[str, Handler] = {
    **learning.HANDLERS,
    "lr_scheduler_type": schedule,
    "lr_scheduler": schedule,
    "optim": optimizer,
    "optimizer": optimizer,
    "report_to": report_to,
    "warmup_steps": warmup,
    "warmup_ratio": warmup,
    "max_steps": steps("max_steps"),
    "val_size": evaluation_share,
    "val_set_size": evaluation_share,
    "save_steps": steps("save_steps"),
    "eval_steps": steps("eval_steps"),
    "logging_steps": steps("logging_steps"),
    "resume_from_checkpoint": resume,
    "lora_modules_to_save": names("modules_to_save"),
    "lora_target_modules": targets,
    "bias": only(["none"], "an adapter trains no biases here"),
    "lora_bias": only(["none", False], "an adapter trains no biases here"),
    "bnb_4bit_quant_type": only(["nf4"], "4-bit weights are NF4"),
    **read_elsewhere(("bf16", "fp16", "bfloat16", "float16", "pure_bf16")),
    **idle(("tf32", "float32", "fp16_opt_level", "bf16_full_eval", "fp16_full_eval"), "the model's dtype decides the precision"),
    **idle(
        ("flash_attention", "flash_attn", "attn_implementation", "xformers_attention", "sdp_attention", "flex_attention",
         "eager_attention", "sage_attention", "flash_attention_2", "flash_optimum"),
        "the decoder chooses its attention backend",
    ),
    **idle(
        ("dataset_prepared_path", "overwrite_cache", "tokenized_path", "preprocessing_batch_size", "dataset_keep_in_memory",
         "skip_prepare_dataset"),
        "prepared data is cached under a fingerprint of its content",
    ),
    **idle(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_gradient_checkpointing", "activation_offloading",
         "activation_checkpointing", "disable_gradient_checkpointing", "use_reentrant_gc", "use_unsloth_gc", "max_memory",
         "gpu_memory_limit", "device_map", "lora_on_cpu", "low_cpu_mem_usage", "auto_find_batch_size",
         "torch_empty_cache_steps", "gc_steps"),
        "oribi keeps and recomputes by the memory that is free; gradient_checkpointing sets it by hand",
    ),
    **idle(
        ("liger_rope", "liger_rms_norm", "liger_glu_activation", "use_liger_kernel", "liger_fused_linear_cross_entropy",
         "liger_layer_norm", "liger_cross_entropy", "enable_liger_kernel", "use_unsloth", "lora_mlp_kernel", "lora_qkv_kernel",
         "lora_o_kernel", "lora_embedding_kernel", "torch_compile", "torch_compile_backend", "torch_compile_mode",
         "cut_cross_entropy", "use_kernels", "unsloth_force_compile", "use_v1_kernels"),
        "oribi's own kernels run",
    ),
    **idle(
        ("do_eval", "do_predict", "plot_loss", "overwrite_output_dir", "strict", "model_type", "tokenizer_type", "debug",
         "group_by_length", "train_sampling_strategy", "remove_unused_columns", "padding_free", "pad_to_multiple_of",
         "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "dataloader_num_workers", "dataloader_pin_memory",
         "dataloader_prefetch_factor", "dataloader_drop_last", "dataloader_persistent_workers", "save_only_model",
         "save_safetensors", "include_tokens_per_second", "include_num_input_tokens_seen", "include_tkps", "disable_tqdm",
         "logging_dir", "logging_first_step", "logging_strategy", "log_level", "double_quantization", "use_bnb_nested_quant",
         "bnb_4bit_quant_storage", "average_tokens_across_devices", "label_names", "metric_for_best_model",
         "greater_is_better", "eval_on_start", "eval_accumulation_steps", "local_rank", "world_size", "ddp", "data_seed",
         "eval_do_concat_batches", "save_on_each_node"),
        "it is how oribi works, or what another setting says already",
    ),
    **idle(
        ("wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_run_id", "wandb_mode", "run_name",
         "mlflow_tracking_uri", "mlflow_run_name", "hf_mlflow_log_artifacts", "comet_api_key", "comet_project_name",
         "trackio_run_name", "trackio_space_id", "tensorboard_dir"),
        "a run is reported under the name of output_dir; the tracker reads its own environment variables",
    ),
    **idle(
        ("hf_token", "hub_token", "wandb_token", "token", "hf_hub_token", "hf_use_auth_token"),
        "tokens do not belong in files; log in with the hub's own program",
    ),
    **lacking(("load_in_8bit",), EIGHT_BITS),
    **lacking(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type"),
        "several GPUs work as plain data parallelism, each with the whole model; start oribi with torchrun",
    ),
    **lacking(
        ("push_to_hub", "hub_model_id", "hub_strategy", "push_model", "push_gguf", "push_dataset_to_hub"),
        "in Python: model.push_to_hub_merged, model.push_to_hub_gguf",
    ),
    **lacking(("streaming", "dataset_streaming"), "data is prepared whole before training; in Python a stream can be passed to SFTTrainer"),
    **refusing(("optim_target_modules",), "optimizers run on all that is trained"),
    **refusing(("rope_scaling",), "in Python: FastLanguageModel.from_pretrained(rope_scaling=...)"),
}  # fmt: skip
