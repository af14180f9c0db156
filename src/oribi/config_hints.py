"""Keys that people know from other programs, and what says the same in a run config."""

_GPUS = "several GPUs: `torchrun --nproc-per-node 2 -m oribi train CONFIG`"
_ATTENTION = "the machine chooses, and `oribi doctor` says what; leave the line out"
_EVALUATION = "eval_steps says when; without it each epoch ends with an evaluation"
_SAVING = "save_steps says when; without it only the end is saved"
_HUB = "push the saved folder with `hf upload` or push_to_hub in Python"
_KNOWN = {
    ("bf16", "bfloat16"): "dtype: bfloat16 says it, and auto chooses it where the machine has it",
    ("fp16", "float16", "half"): "dtype: float16 says it",
    ("fp32", "float32", "tf32", "mixed_precision"): "dtype: bfloat16, float16, float32 or auto says it",
    ("load_in_8bit", "quantization_bit", "bits"): "load_in_4bit: true (NF4) or false (16 bits)",
    ("adapter", "finetuning_type", "use_peft", "use_lora", "peft_type"): (
        "LoRA is what is trained; full_finetuning: true trains every weight"
    ),
    ("lora_target_linear", "lora_on_all_linear"): "target_modules: all-linear says it, and is the default",
    ("flash_attention", "flash_attn", "flash_attn_2", "use_flash_attention_2", "attn_implementation",
     "xformers_attention", "sdp_attention"): _ATTENTION,
    ("deepspeed", "fsdp", "fsdp_config", "ddp", "device_map", "accelerate"): _GPUS,
    ("epochs", "epoch", "num_epoch"): "did you mean num_train_epochs?",
    ("steps", "num_steps", "max_train_steps", "total_steps"): "did you mean max_steps?",
    ("wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "use_wandb"): (
        "report_to: wandb; the project and names come from wandb's own WANDB_PROJECT and WANDB_NAME"
    ),
    ("run_name",): "the last part of output_dir is the run's name",
    ("datasets", "data", "data_files", "data_path", "dataset_path", "train_dataset", "dataset_dir"): (
        "did you mean dataset? It takes a name or a list of names"
    ),
    ("test_datasets", "eval_file", "validation_dataset"): "did you mean eval_dataset?",
    ("eval_strategy", "evaluation_strategy", "do_eval", "evals_per_epoch"): _EVALUATION,
    ("save_strategy", "saves_per_epoch"): _SAVING,
    ("do_train", "stage"): "supervised fine-tuning is what is done; leave the line out",
    ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"): _HUB,
    ("overwrite_output_dir",): "leave the line out",
    ("gradient_checkpointing_kwargs", "use_reentrant"): "gradient_checkpointing alone chooses; leave the line out",
    ("train_on_inputs", "mask_prompt"): "train_on_responses_only says the opposite",
    ("group_by_length", "length_column_name", "dataloader_num_workers", "remove_unused_columns", "pad_to_sequence_len",
     "dataset_prepared_path", "tokenizer_type", "model_type", "special_tokens"): "nothing here needs it; leave the line out",
}  # fmt: skip
HINTS = {name: advice for names, advice in _KNOWN.items() for name in names}


def hint_for(key: str) -> str | None:
    """What to write instead of a key of another program, if it is a known one."""
    return HINTS.get(key.casefold().replace("-", "_"))
