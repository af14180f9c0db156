"""LLaMA-Factory's YAML, and the flags of `llamafactory-cli train`.

Checked against hiyouga/LLaMA-Factory (2026-11-25): hparams/data_args.py@072bfe29, finetuning_args.py@00577a85,
model_args.py@00577a85, training_args.py@00577a85, parser.py@f74d33f7; data/parser.py@01d3ac67, data_utils.py@0a97c776,
template.py@00577a85, processor/supervised.py@0b3022bb, processor/pretrain.py@4c2aff46; transformers 5.17's TrainingArguments.
"""

import json
from pathlib import Path
from typing import Any

from oribi.dialects import learning, preferences, shared
from oribi.dialects.converted import (
    Converted,
    Dialect,
    Handler,
    idle,
    inverted,
    is_off,
    lacking,
    names,
    names_of,
    only,
    put_sources,
    read_elsewhere,
    refusing,
)
from oribi.errors import ConfigError

# keys that only LLaMA-Factory has, of the programs that call their model model_name_or_path
SIGNS = {
    "finetuning_type",
    "cutoff_len",
    "lora_rank",
    "stage",
    "lora_target",
    "template",
    "dataset",
    "quantization_bit",
}
# name there -> name of the same template here; most others are a model's own
TEMPLATES = {
    "alpaca": "alpaca", "chatml": "chatml", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "granite3": "granite",
    "llama3": "llama3", "phi": "phi-3", "phi4": "phi-4", "qwen": "qwen-2.5", "qwen3": "qwen3",
    "yi": "chatml",
}  # fmt: skip
# columns that rows may have under these names, for oribi to know them by itself
COLUMNS = {
    "prompt": {"instruction", "prompt", "question", "query", "problem"}, "query": {"input"},
    "response": {"output", "response", "answer", "completion", "solution"}, "history": {"history"},
    "system": {"system"}, "tools": {"tools"}, "messages": {"messages", "conversations", "conversation", "chat", "dialogue"},
    "chosen": {"chosen"}, "rejected": {"rejected"}, "kto_tag": {"kto_tag", "label"},
}  # fmt: skip
# name of a column there -> oribi's
COLUMN_NAMES = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "tools": "tools", "messages": "messages", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip
TAGGED_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system",
}  # fmt: skip
TAGS = {
    "role_tag": {"role", "from"}, "content_tag": {"content", "value"}, "user_tag": {"user", "human"},
    "assistant_tag": {"assistant", "gpt", "model"}, "observation_tag": {"tool", "observation"}, "system_tag": {"system"},
    "function_tag": {"function_call"},
}  # fmt: skip
# stage there -> here
STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
LOSSES = ("sigmoid", "hinge", "ipo")  # of dpo, by the same names
RANKED = ("dpo", "orpo", "reward")


def _prepare(found: Converted) -> None:
    entries = found.entries
    kind = entries.get("finetuning_type") or "lora"
    if kind == "full":
        shared.put_full_finetuning(found, "finetuning_type = full")
        if not entries.get("pure_bf16"):
            found.differences.append(shared.MASTER_WEIGHTS)
    elif kind != "lora":
        found.refuse("finetuning_type", "oribi trains LoRA adapters, or every weight")
    stage = entries.get("stage") or "sft"
    if stage == "pt":
        found.put("train_on_responses_only", False, "stage = pt")
        found.put("overlong", "split", "stage = pt")
        found.differences.append(
            "texts are cut into pieces of max_seq_length and packed apart from each other; LLaMA-Factory runs them together"
        )
    elif stage not in STAGES:
        found.refuse("stage", preferences.NO_STAGE)
    elif stage != "sft":
        _put_stage(found, stage)


def _put_stage(found: Converted, stage: str) -> None:
    """The stage, of which orpo is a loss of dpo there."""
    loss = found.entries.get("pref_loss") or "sigmoid"
    if stage != "dpo":
        found.put("stage", STAGES[stage], f"stage = {stage}")
    elif loss == "orpo":
        found.put("stage", "orpo", "pref_loss = orpo")
        found.differences.append(
            "the prompt of the better answer is trained, too, as TRL's ORPO does; there its answer alone"
        )
    elif loss in LOSSES:
        found.put("stage", "dpo", "stage = dpo")
        found.put("loss_type", [loss], f"pref_loss = {loss}")
    elif loss == "kto_pair":
        found.refuse("pref_loss", "no such loss on pairs; stage: kto makes two judged rows of each pair")
    else:
        found.refuse("pref_loss", preferences.NO_REFERENCE)
    if stage == "rm":
        found.differences.append("the score has no bias, as in TRL; LLaMA-Factory's has one")
    elif stage == "dpo":
        found.differences.append(
            "prompts are never cut; LLaMA-Factory cuts prompt and answer to fit cutoff_len"
        )


def _finish(found: Converted) -> None:
    entries = found.entries
    packing, plain_text = entries.get("packing"), entries.get("stage") == "pt"
    if entries.get("neat_packing") or (plain_text if packing is None else packing):
        found.put(
            "packing",
            True,
            "neat_packing" if entries.get("neat_packing") else "packing" if packing else "stage = pt",
        )
        if not entries.get("neat_packing"):
            found.differences.append("packing: oribi's packs keep their examples apart, as neat_packing does")
    if not found.values.get("full_finetuning"):
        found.put_default("lora_r", 8)
        found.put_default("lora_alpha", 2 * found.values["lora_r"])
    shared.put_strategies(found, "steps")
    shared.precision(found)


def _dataset(found: Converted, key: str, value: Any) -> None:
    if is_off(value):
        return
    sources = [_source(found, name) for name in names_of(value)]
    entries = [{"path": path, **rows} for path, rows in sources]
    most, shares = found.entries.get("max_samples"), found.entries.get("interleave_probs")
    if most:
        entries = [{**one, "max_rows": min(most, one.get("max_rows", most))} for one in entries]
    if found.entries.get("mix_strategy") == "interleave_under" and key == "dataset":
        weights = [float(share) for share in names_of(shares)] if shares else [1.0] * len(entries)
        if len(weights) != len(entries):
            found.refuse("interleave_probs", f"{len(weights)} of them for {len(entries)} data sets")
        entries = [{**one, "weight": weight} for one, weight in zip(entries, weights)]
        found.differences.append(
            "dataset: rows are taken in the shares of the weights in turn, where LLaMA-Factory draws them at random"
        )
    put_sources(found, key, entries, key)


def _source(found: Converted, name: str) -> tuple[str, dict[str, Any]]:
    """The file or hub name behind a name of dataset_info.json, and what that table says of its columns and roles."""
    folder = found.entries.get("dataset_dir") or "data"
    if folder == "ONLINE":
        return name, {}
    beside = found.path.parent
    for place in (
        Path(folder),
        beside / folder,
        beside,
        beside.parent / folder,
        beside.parent.parent / folder,
    ):
        if (place / "dataset_info.json").is_file():
            return _listed(found, name, place)
    found.unsupported[f"dataset: {name}"] = (
        f"a name of dataset_info.json, which is not in {folder}; write the file's or the hub's name in its place"
    )
    return name, {}


def _listed(found: Converted, name: str, place: Path) -> tuple[str, dict[str, Any]]:
    table = place / "dataset_info.json"
    try:
        entry = json.loads(table.read_text(encoding="utf-8")).get(name)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{table}: no valid table of data sets: {error}") from error
    if not isinstance(entry, dict):
        found.refuse(f"dataset = {name}", f"{table} has no such name")
        return name, {}
    rows = _row_keys(found, name, entry)
    if "hf_hub_url" in entry:
        return entry["hf_hub_url"], rows
    if "file_name" in entry:
        return str(place / entry["file_name"]), rows
    found.refuse(f"dataset = {name}", f"{table} names neither file_name nor hf_hub_url for it")
    return name, rows


def _row_keys(found: Converted, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry says of its rows, as `columns` and `role_aliases` where oribi does not know the names by itself."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if found.entries.get("stage") == "pt":
        text = columns.get("prompt", "instruction")
        return {"text_field": text}
    rows: dict[str, Any] = {}
    if any(there not in COLUMNS.get(part, ()) for part, there in columns.items()):
        rows["columns"] = {
            COLUMN_NAMES[part]: there for part, there in columns.items() if part in COLUMN_NAMES
        }
        found.differences.append(
            f"{name}: oribi also reads other columns that it knows, such as input or system; look at oribi inspect data"
        )
    rows["role_aliases"] = {
        there: TAGGED_ROLES[part]
        for part, there in tags.items()
        if part in TAGGED_ROLES and there not in TAGS[part]
    }
    for what, known, homes in ((columns, COLUMNS, COLUMN_NAMES), (tags, TAGS, TAGGED_ROLES)):
        for part, there in what.items():
            if part not in homes and there not in known.get(part, ()):
                found.refuse(
                    f"{name}: {part} = {there}",
                    "oribi's config cannot say this of rows; rename it in the file (docs/data-formats.md)",
                )
    if "hf_hub_url" in entry:
        rows["name"] = entry.get("subset")
    for part in ("ranking", "subset", "folder"):
        if (
            entry.get(part)
            and not (part == "subset" and "name" in rows)
            and not (part == "ranking" and preferences.stage_of(found) in RANKED)
        ):
            found.refuse(
                f"{name}: {part} = {entry[part]}",
                "oribi's config cannot say this of a data set; save what is meant as a file",
            )
    if entry.get("num_samples"):
        rows["max_rows"] = entry["num_samples"]
    if entry.get("split", "train") != "train":
        rows["split"] = entry["split"]
    return rows


def _template(found: Converted, key: str, value: Any) -> None:
    if found.entries.get("stage") == "pt":
        found.idle[key] = "plain text has no turns"
    elif value in TEMPLATES:
        found.put("chat_template", TEMPLATES[value], f"{key} = {value}")
        if value == "qwen3":
            found.differences.append(
                "LLaMA-Factory writes an empty <think> block into every answer without reasoning; oribi, as Qwen3's own "
                "template does, into the last answer only"
            )
    elif value in ("empty", "default", "fewshot"):
        found.refuse(key, "no template of this form here; write the rows as prompt + completion")
    elif not is_off(value):
        found.unsupported[key] = (
            f"{value}: the model's own chat template is taken; look at oribi inspect data"
        )


def _bits(found: Converted, key: str, value: Any) -> None:
    method = found.entries.get("quantization_method") or "bnb"
    if value == 8 and method in ("bnb", "bitsandbytes"):
        found.unsupported[key] = shared.EIGHT_BITS
    elif value is not None and (value != 4 or method not in ("bnb", "bitsandbytes")):
        found.refuse(key, f"by {method}; oribi's weights are bitsandbytes' NF4 (4), or 16 bit")
    elif value == 4:
        found.put("load_in_4bit", True, "quantization_bit = 4")


NO_TRAINING = "oribi has no such training"
HANDLERS: dict[str, Handler] = {
    **shared.HANDLERS,
    **read_elsewhere(("stage", "finetuning_type", "dataset_dir", "quantization_method", "packing", "neat_packing")),
    "dataset": _dataset,
    "eval_dataset": _dataset,
    "template": _template,
    "quantization_bit": _bits,
    "pref_beta": preferences.of_stage("beta"),
    "pref_ftx": preferences.add_supervised_loss,
    "dpo_label_smoothing": preferences.of_stage("label_smoothing"),
    "kto_chosen_weight": preferences.of_stage("desirable_weight"),
    "kto_rejected_weight": preferences.of_stage("undesirable_weight"),
    **read_elsewhere(("pref_loss",)),
    **refusing(("pref_bco_weight",), "in the run file: loss_type: [sigmoid, bco_pair] with loss_weights"),
    **refusing(("ld_alpha",), NO_TRAINING),
    **refusing(("ref_model", "ref_model_adapters"), preferences.REFERENCE),
    **idle(("ref_model_quantization_bit",), preferences.REFERENCE),
    **idle(
        ("simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target", "ppo_whiten_rewards", "reward_model",
         "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type"),
        "this stage does not use it",
    ),
    **idle(
        ("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty",
         "length_penalty", "skip_special_tokens"),
        "training draws no answers",
    ),
    "quantization_type": only(["nf4"], "4-bit weights are NF4"),
    "lora_target": shared.targets,
    "additional_target": names("modules_to_save"),
    "train_on_prompt": inverted("train_on_responses_only"),
    **shared.CHECKPOINTS,
    "do_train": only([True], "it asks for no training"),
    "mix_strategy": only(["concat", "interleave_under"], "a mixture ends with the first data set that is exhausted; oribi draws no row twice"),
    "ignore_pad_token_for_loss": only([True], "padding is never trained"),
    **lacking(("use_swanlab",), "a run is reported to tensorboard, wandb, mlflow, trackio"),
    **idle(
        ("media_dir", "eval_on_each_dataset", "eval_num_beams", "buffer_size", "loraplus_lr_embedding", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "freeze_vision_tower",
         "freeze_multi_modal_projector", "freeze_language_model", "compute_accuracy", "predict_with_generate",
         "include_effective_tokens_per_second", "use_fast_tokenizer", "upcast_layernorm", "upcast_lmhead_output",
         "print_param_status", "use_kv_cache", "infer_backend", "infer_dtype", "cache_dir", "offload_folder",
         "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "export_dir", "export_size",
         "export_device", "export_legacy_format", "swanlab_project", "swanlab_run_name", "swanlab_mode", "swanlab_workspace",
         "ray_run_name", "ray_storage_path", "ray_num_workers", "resources_per_worker", "placement_strategy"),
        "it is how oribi works, or what another setting says already",
    ),
    **read_elsewhere(("max_samples", "interleave_probs")),
    **lacking(("disable_shuffling",), "rows come in random order"),
    **lacking(("tool_format",), "tools are written as the chat template writes them"),
    **lacking(("enable_thinking", "preserve_thinking"), "reasoning is written as the chat template writes it"),
    **refusing(("mask_history",), "every answer of a conversation is trained; in Python: prepare_dataset(train_on='last_response')"),
    **refusing(("default_system",), "write the system message into the rows"),
    **refusing(("adapter_name_or_path", "adapter_folder"), shared.NEW_ADAPTER),
    "add_tokens": learning.new_tokens,
    **refusing(("add_special_tokens", "new_special_tokens_config", "resize_vocab"), "in Python: oribi.add_new_tokens"),
    "pissa_init": learning.pissa,
    **read_elsewhere(("pissa_iter", "pissa_convert")),
    **refusing(("use_llama_pro", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_dft_loss", "use_asft_loss", "use_eaft_loss", "shift_attn", "mixture_of_depths", "moe_aux_loss_coef", "train_from_scratch", "use_mca", "use_kt", "fp8"), NO_TRAINING),
}  # fmt: skip

DEFAULTS = {
    "load_in_4bit": False, "packing": False, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0,
    "logging_steps": 500, "seed": 42,
}  # fmt: skip
DIALECT = Dialect("LLaMA-Factory", HANDLERS, DEFAULTS, _prepare, _finish)
