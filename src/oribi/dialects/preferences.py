"""Preference and reward training in other programs' configs: the stage, the keys of TRL's trainers, and what a stage leaves out.

Checked against huggingface/trl 1.16: trainer/{dpo,kto,reward,grpo}_config.py, experimental/orpo, scripts/*.py, rewards/.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from oribi.config import SETTINGS, RunConfig
from oribi.config_checks import contradictions_of_stage
from oribi.dialects.converted import (
    Converted,
    Handler,
    idle,
    is_off,
    lacking,
    names_of,
    only,
    read_elsewhere,
    refusing,
    renamed,
)

REFERENCE = "the reference is the model without its adapter, as it is at the start"
NO_REFERENCE = (
    "oribi's losses without a reference are those of stage: orpo; write that stage, or train in Python"
)
NO_STAGE = "oribi's stages are sft, dpo, orpo, kto, reward and grpo; in Python oribi.trl has CPO and RLOO trainers, too"
ENGINE = "there is no vLLM engine; oribi's own generation answers"
PROMPT = 2048  # tokens of a prompt of grpo where the program bounds none
REWARDS_OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def stage_of(found: Converted) -> str:
    """The stage that a config was found to ask for."""
    return found.values.get("stage", "sft")


def of_stage(setting: str) -> Handler:
    """A key that the stages which have the setting use, and others do not."""
    return _in_stages(SETTINGS[setting].used_by, renamed(setting))


def _in_stages(stages: Collection[str], handler: Handler) -> Handler:
    """A key that matters in these stages only."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if stage_of(found) in stages:
            handler(found, key, value)
        elif not is_off(value):
            found.idle[key] = f"stage = {stage_of(found)} does not use it"

    return handle


def loss_types(found: Converted, key: str, value: Any) -> None:
    """One loss or several, by TRL's names."""
    if not is_off(value):
        of_stage("loss_type")(found, key, value if isinstance(value, list) else [value])


def add_supervised_loss(found: Converted, key: str, value: Any) -> None:
    """A weight of the supervised loss on the better answer, beside the loss of dpo."""
    if is_off(value):
        return
    if stage_of(found) != "dpo":
        found.refuse(key, f"stage = {stage_of(found)} has one loss; stage = dpo adds several")
        return
    kinds = found.values.pop("loss_type", ["sigmoid"])
    found.put("loss_type", [*kinds, "sft"], f"{key} = {value}")
    found.put("loss_weights", [*[1.0] * len(kinds), float(value)], f"{key} = {value}")


def _scale_rewards(found: Converted, key: str, value: Any) -> None:
    words = {True: "group", False: "none"}
    of_stage("scale_rewards")(found, key, words.get(value, value) if value is not None else None)


def _rewards(found: Converted, key: str, value: Any) -> None:
    """Dotted names of functions, which both programs import from the folder that they are started in."""
    functions = []
    for name in names_of(value or []):
        module, _, function = name.rpartition(".")
        if ":" in name:
            functions.append(name)
        elif name in REWARDS_OF_TRL:
            functions.append(f"trl.rewards:{name}")
        elif not module or "/" in name:
            found.refuse(
                f"{key}: {name}",
                "neither module.function nor a reward of TRL's that needs no arguments; write a function that scores answers, and "
                "name it file.py:function",
            )
        else:
            file = Path(*module.split(".")).with_suffix(".py")
            places = [folder / file for folder in (found.path.parent, Path()) if (folder / file).is_file()]
            functions.append(f"{places[0].resolve() if places else module}:{function}")
    if functions:
        of_stage("reward_funcs")(found, key, functions)


def _steps_per_generation(found: Converted, key: str, value: Any) -> None:
    steps = found.entries.get("gradient_accumulation_steps") or 1
    size = found.entries.get("per_device_train_batch_size") or found.entries.get("micro_batch_size")
    usual = steps if key == "steps_per_generation" else steps * (size or 8)
    if value in (None, usual):
        found.idle[key] = "it is what oribi does"
    else:
        found.refuse(
            key, "each step draws its own answers: per_device_train_batch_size x gradient_accumulation_steps"
        )


def _prompt_length(found: Converted, key: str, value: Any) -> None:
    if stage_of(found) == "grpo":
        found.put("max_prompt_length", value, key)
    elif value is not None:
        found.unsupported[key] = "prompts are never cut; max_seq_length bounds a prompt with its answer"


def settle_stage(found: Converted) -> None:
    """What the stage leaves out of the settings, and what it needs beside them."""
    stage, values = stage_of(found), found.values
    if stage == "sft":
        return
    for key in [key for key in values if stage not in SETTINGS[key].used_by]:
        value = values.pop(key)
        found.notes = [note for note in found.notes if f" read as {key} = " not in note]
        if key == "neftune_noise_alpha":
            found.refused[f"{key} = {value}"] = f"stage = {stage} trains without noise"
        elif value != SETTINGS[key].default_of(stage):
            found.idle[key] = f"stage = {stage} does not use it"
    _leave_dropout_out(found)
    if stage == "grpo":
        _put_lengths(found)
    if stage == "kto":
        _pair_rows(found)
    _refuse_contradictions(found)


def _leave_dropout_out(found: Converted) -> None:
    """TRL's trainers switch the adapter's dropout off as well, unless they are told otherwise; LLaMA-Factory's use TRL's."""
    stage, asked = stage_of(found), found.entries.get("disable_dropout")
    kept = stage == "grpo" or (found.dialect == "LLaMA-Factory" and stage == "reward")
    if asked is True or (asked is None and not kept):
        found.notes = [note for note in found.notes if " read as lora_dropout = " not in note]
        if found.values.pop("lora_dropout", 0):
            found.idle["lora_dropout"] = f"{found.dialect} switches dropout off in this training"


def _put_lengths(found: Converted) -> None:
    """A prompt and an answer have to fit; TRL takes prompts of any length."""
    values = found.values
    if "max_prompt_length" not in values:
        found.put("max_prompt_length", PROMPT, "no length of prompts")
        found.differences.append(
            f"prompts above max_prompt_length = {PROMPT} tokens are left out, and counted; {found.dialect} takes all"
        )
    answer = values.get("max_completion_length", SETTINGS["max_completion_length"].default_of("grpo"))
    whole = values["max_prompt_length"] + answer
    if values.get("max_seq_length", 0) < whole:
        found.notes = [note for note in found.notes if " read as max_seq_length = " not in note]
        found.notes.append(f"max_prompt_length + max_completion_length read as max_seq_length = {whole}")
        values["max_seq_length"] = whole


def _pair_rows(found: Converted) -> None:
    """oribi compares the rows of a micro-batch, which needs two."""
    values = found.values
    size, steps = (
        values.get(key, SETTINGS[key].default_of("kto"))
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if size == 1 and steps % 2 == 0:
        values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps // 2}
        found.differences.append(
            f"per_device_train_batch_size = 1 became 2, and gradient_accumulation_steps {steps // 2}: kto compares the rows of a "
            "batch; a step has as many rows as before"
        )


def _refuse_contradictions(found: Converted) -> None:
    config = RunConfig()
    for key, setting in SETTINGS.items():
        given = found.values.get(key, setting.default_of(stage_of(found)))
        setattr(config, key, given if given is None else setting.check(given)[0])
    for key, why in contradictions_of_stage(config):
        if not any(said.partition(":")[0].partition(" = ")[0] == key for said in found.refused):
            found.refused[f"{key} = {getattr(config, key)}"] = why


_ANSWERS_DRAWN = "answers are drawn with temperature, top_p, top_k and min_p alone"
_ONE_OBJECTIVE = "oribi's config has nothing like it; in Python: oribi.trl.GRPOConfig"
_PLAIN_PAIRS = "oribi's config has nothing like it; in Python: oribi.trl.DPOConfig"
# keys of TRL's trainers, which Axolotl and `trl` share
HANDLERS: dict[str, Handler] = {
    **{
        name: of_stage(name)
        for name in (
            "beta", "loss_weights", "label_smoothing", "desirable_weight", "undesirable_weight", "center_rewards_coefficient",
            "reward_weights", "num_generations", "temperature", "top_p", "top_k", "min_p", "epsilon",
            "mask_truncated_completions", "max_completion_length",
        )
    },
    "loss_type": loss_types,
    "scale_rewards": _scale_rewards,
    "reward_funcs": _rewards,
    "rpo_alpha": add_supervised_loss,
    "max_prompt_length": _prompt_length,
    "max_prompt_len": _prompt_length,
    "steps_per_generation": _in_stages(("grpo",), _steps_per_generation),
    "generation_batch_size": _in_stages(("grpo",), _steps_per_generation),
    "num_iterations": _in_stages(("grpo",), only([1], _ONE_OBJECTIVE)),
    "repetition_penalty": _in_stages(("grpo",), only([1.0], _ANSWERS_DRAWN)),
    "importance_sampling_level": _in_stages(("grpo",), only(["token"], _ONE_OBJECTIVE)),
    "multi_objective_aggregation": _in_stages(("grpo",), only(["sum_then_normalize"], _ONE_OBJECTIVE)),
    "top_entropy_quantile": _in_stages(("grpo",), only([1.0], _ONE_OBJECTIVE)),
    "use_bias_correction_kl": _in_stages(("grpo",), only([True], _ONE_OBJECTIVE)),
    "f_divergence_type": _in_stages(("dpo",), only(["reverse_kl"], _PLAIN_PAIRS)),
    "discopop_tau": _in_stages(("dpo",), only([0.05], _PLAIN_PAIRS)),
    **read_elsewhere(("disable_dropout",)),
    **refusing(("epsilon_high", "delta", "entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold", "rollout_func"), _ONE_OBJECTIVE),
    **refusing(("generation_kwargs",), _ANSWERS_DRAWN),
    **refusing(("use_weighting", "ld_alpha"), _PLAIN_PAIRS),
    **refusing(("reference_free",), NO_REFERENCE),
    **refusing(("sync_ref_model", "ref_model", "ref_adapter_name", "ref_model_adapters"), REFERENCE),
    **refusing(("reward_model_name_or_path", "reward_model_path"), "write a function that asks that model, and name it in reward_funcs as file.py:function"),
    **idle(("precompute_ref_log_probs", "precompute_ref_batch_size", "ref_model_init_kwargs", "force_use_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), REFERENCE),
    **idle(
        ("use_vllm", "vllm_mode", "vllm_device", "vllm_dtype", "vllm_gpu_memory_utilization", "vllm_max_model_len",
         "vllm_max_model_length", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_enable_prefix_caching",
         "vllm_tensor_parallel_size", "vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_server_timeout",
         "vllm_group_port", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
         "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
         "use_transformers_paged", "use_transformers_continuous_batching", "cache_implementation", "ds3_gather_for_generation"),
        ENGINE,
    ),
    **idle(("log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal"), "the report shows answers and what they earned"),
    **idle(
        ("generate_during_eval", "label_pad_token_id", "padding_value", "is_encoder_decoder", "use_liger_loss", "use_logits_to_keep",
         "cast_lm_head_to_fp32", "num_generations_eval", "f_alpha_divergence_coef", "entropy_coef_min", "entropy_coef_max",
         "entropy_coef_delta", "entropy_target", "sapo_temperature_neg", "sapo_temperature_pos"),
        "it is how oribi works, or what another setting says already",
    ),
    **lacking(("max_tool_calling_iterations", "log_completions_hub_repo"), _ONE_OBJECTIVE),
}  # fmt: skip
