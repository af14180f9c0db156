"""Keywords of TRL 0.9 to 1.16 and of transformers 4, and what becomes of each: one table, which runs and `oribi convert` read.

Source: signatures of TRL 0.9.6, 0.12.2, 0.15.2, 0.17, 0.19.1, 0.22.2, 0.24, 0.27, 1.0, 1.8, 1.15 and 1.16, and of transformers'
TrainingArguments 4.44, 4.57 and 5.24.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from oribi.text import did_you_mean

# older keyword -> today's; the first that a config has
RENAMED: dict[str, tuple[str, ...]] = {
    "evaluation_strategy": ("eval_strategy",),
    "max_seq_length": ("max_length",),
    "no_cuda": ("use_cpu",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "push_to_hub_model_id": ("hub_model_id",),
    "push_to_hub_token": ("hub_token",),
    "max_new_tokens": ("max_completion_length",),
    "max_target_length": ("max_completion_length",),
    "response_length": ("max_completion_length",),
    "use_liger": ("use_liger_kernel",),
    "use_liger_loss": ("use_liger_kernel",),
    "wandb_log_unique_prompts": ("log_unique_prompts",),
    "vllm_guided_decoding_regex": ("vllm_structured_outputs_regex",),
    "vllm_max_model_len": ("vllm_max_model_length",),
    "kl_coef": ("beta",),
    "cliprange": ("epsilon",),
    "rloo_k": ("num_generations",),
    "num_ppo_epochs": ("num_iterations",),
    "num_mini_batches": ("steps_per_generation",),
    "normalize_reward": ("normalize_advantages",),
    "normalize_advantage": ("normalize_advantages",),
    "exp_name": ("run_name",),
}

_DEVICE = "the device is found"
_BACKEND = "there is one backend"
_CHUNKS = "the loss is computed in chunks"
_PADDING = "padding is masked"
_ENGINE = "there is no vLLM engine; the model's own generate answers"
_PACKS = "packing counts tokens, not characters"
_ADAPTER = "the reference is the adapter as it is when the trainer is made"
_NO_EMBEDDING = "this trainer trains without an embedding of prompts"
_NO_VALUES = "there is no model of values"
_TPU = "it is for another accelerator"
# older keyword -> why it has no effect
RETIRED = {
    "overwrite_output_dir": "transformers 5 always writes into the folder",
    "logging_dir": "trackers take their folder from their own variables",
    "save_safetensors": "safetensors is the only format",
    "use_mps_device": _DEVICE,
    "use_ipex": _DEVICE,
    "jit_mode_eval": "evaluation runs the model as it is",
    "fp16_backend": _BACKEND,
    "half_precision_backend": _BACKEND,
    "fp16_opt_level": _BACKEND,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "mp_parameters": _TPU,
    "ray_scope": "it belongs to a search for hyperparameters",
    "torchdynamo": "models are not compiled",
    "past_index": "causal language models need none",
    "use_legacy_prediction_loop": "there is one loop of prediction",
    "push_to_hub_organization": "hub_model_id names it",
    "include_inputs_for_metrics": "include_for_metrics names what metrics get",
    "include_tokens_per_second": "tokens are counted",
    "average_tokens_across_devices": "the loss counts the tokens of all devices",
    "label_pad_token_id": "labels are padded with -100",
    "padding_value": _PADDING,
    "is_encoder_decoder": "the model says what it is",
    "generate_during_eval": "this trainer draws no samples",
    "force_use_ref_model": "a ref_model that is given is used",
    "ref_model_init_kwargs": _ADAPTER,
    "base_model_attribute_name": "the loss takes the model as it is",
    "dataset_num_proc": "this trainer prepares its rows in one process",
    "dataset_batch_size": "rows are prepared in batches of their own",
    "chars_per_token": _PACKS,
    "num_of_sequences": _PACKS,
    "infinite": "max_steps bounds the training",
    "max_target_length": "max_length bounds prompt and completion together",
    "gamma": _NO_VALUES,
    "lam": _NO_VALUES,
    "vf_coef": _NO_VALUES,
    "cliprange_value": _NO_VALUES,
    "ref_policy": _ADAPTER,
    "max_completion_length": "max_length bounds prompt and completion together",
    "truncation_mode": "this trainer cuts the end",
    "min_density_ratio": _NO_EMBEDDING,
    "max_density_ratio": _NO_EMBEDDING,
    "prompt_sample_size": _NO_EMBEDDING,
    "use_logits_to_keep": "logits are computed where the loss needs them",
    "use_num_logits_to_keep": "logits are computed where the loss needs them",
    "vllm_device": _ENGINE,
    "vllm_dtype": _ENGINE,
    "vllm_enable_prefix_caching": _ENGINE,
    "local_rollout_forward_batch_size": "the batch of answers is the batch of the device",
    "num_sample_generations": "log_completions prints samples",
    "token_level_kl": "the divergence is that of whole answers",
    "sanity_check": "max_steps=1 does it",
    "world_size": "the launcher says it",
    "unsloth_num_chunks": _CHUNKS,
    "unsloth_logit_chunk_multiplier": _CHUNKS,
    "unsloth_grpo_mini_batch": _CHUNKS,
    "q_galore_config": "GaLore is not used",
}
_SIZES = "write per_device_train_batch_size and gradient_accumulation_steps"
_REWARDED = "give the reward as a function in reward_funcs"
# older keyword -> its default, and what to write instead; any other value changes what is trained
REFUSED: dict[str, tuple[Any, str]] = {
    "rpo_alpha": (None, "write loss_type=['sigmoid', 'sft'] and loss_weights=[1.0, rpo_alpha]"),
    "reference_free": (False, "write loss_type of a trainer without a reference, such as ORPO"),
    "model_adapter_name": (None, "name the adapter that is trained 'default'"),
    "ref_adapter_name": (None, "load the reference as a model of its own and give it as ref_model"),
    "tools": (None, "put the tools into a column `tools` of the rows"),
    "model_init": (None, "give the model itself"),
    "policy": (None, "give it as model"),
    "base_model": (None, "give the model to the trainer"),
    "config": (None, "give it as args"),
    "reward_model": (None, "give it in reward_funcs"),
    "data_collator": (None, "this trainer makes its batches itself: leave it out"),
    "optimizer_cls_and_kwargs": (None, "give optimizers=(optimizer, scheduler)"),
    "preprocess_logits_for_metrics": (None, "this trainer logs its own metrics: leave it out"),
    "embedding_func": (None, f"{_NO_EMBEDDING}: leave it out"),
    "embedding_tokenizer": (None, f"{_NO_EMBEDDING}: leave it out"),
    "adafactor": (False, "write optim='adafactor'"),
    "dispatch_batches": (None, "write accelerator_config={'dispatch_batches': ...}"),
    "split_batches": (None, "write accelerator_config={'split_batches': ...}"),
    "fsdp_min_num_params": (0, "write fsdp_config={'min_num_params': ...}"),
    "fsdp_transformer_layer_cls_to_wrap": (
        None,
        "write fsdp_config={'transformer_layer_cls_to_wrap': [...]}",
    ),
    "batch_size": (None, _SIZES),
    "local_batch_size": (None, _SIZES),
    "micro_batch_size": (None, _SIZES),
    "mini_batch_size": (None, _SIZES),
    "local_mini_batch_size": (None, _SIZES),
    "total_episodes": (None, "write max_steps"),
    "num_total_batches": (None, "write max_steps"),
    "num_updates": (None, "write max_steps"),
    "reward_model_path": (None, _REWARDED),
    "sft_model_path": (None, "give the model to the trainer"),
    "missing_eos_penalty": (None, "take it off in a function of reward_funcs, which gets completion_ids"),
    "non_eos_penalty": (False, "take it off in a function of reward_funcs, which gets completion_ids"),
    "penalty_reward_value": (-1, _REWARDED),
    "whiten_rewards": (False, "write normalize_advantages=True"),
    "stop_token": (None, "set tokenizer.eos_token"),
    "stop_token_id": (None, "set tokenizer.eos_token"),
}
# keywords that are read otherwise than under another name
READ_OTHERWISE = ("warmup_ratio", "group_by_length", "max_prompt_length", "vllm_sampling_params")


@dataclass(frozen=True)
class Fate:
    """What becomes of a keyword: `kept`, `renamed` (to `name`), `read` in another form, `retired` or `refused` (`why`), or `unknown`."""

    kind: Literal["kept", "renamed", "read", "retired", "refused", "unknown"]
    name: str
    why: str = ""


def fate_of(keyword: str, known: Collection[str]) -> Fate:
    """What becomes of a keyword.

    Args:
        keyword: as a script writes it.
        known: the fields of the config that takes it.
    """
    if keyword in known:
        return Fate("kept", keyword)
    if keyword in READ_OTHERWISE:
        return Fate("read", keyword)
    new = next((name for name in RENAMED.get(keyword, ()) if name in known), None)
    if new is not None:
        return Fate("renamed", new)
    if keyword in RETIRED:
        return Fate("retired", keyword, RETIRED[keyword])
    if keyword in REFUSED:
        return Fate("refused", keyword, REFUSED[keyword][1])
    return Fate("unknown", keyword, f"unknown keyword {keyword}{did_you_mean(keyword, {*known, *RENAMED})}")
