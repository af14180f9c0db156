"""Axolotl's YAML.

Checked against axolotl-ai-cloud/axolotl (2026-11-25): utils/schemas/config.py@002a637c and @70be5461, training.py@002a637c,
peft.py@00564c8f, datasets.py@07e83ab8, enums.py@002a637c, model.py@04980d49, deprecated.py@1377ccc3;
core/builders/base.py@ceda25b6, causal.py@03ad8389; utils/config/__init__.py@00ce8882; loaders/adapter.py@01883e35;
prompt_strategies/chat_template.py@01f6a5c1, completion.py@01528e78; prompters.py@00482020;
utils/chat_templates/templates/*.jinja@1377ccc3, @3d67dfc0.
"""

from pathlib import Path
from typing import Any

from oribi.config import PROJECTIONS
from oribi.dialects import axolotl_preferences, learning, preferences, shared
from oribi.dialects.converted import (
    Converted,
    Dialect,
    Handler,
    idle,
    inverted,
    is_off,
    lacking,
    names,
    only,
    put_sources,
    read_elsewhere,
    refusing,
    renamed,
    sources_of,
)

# name there -> name of the same template here
TEMPLATES = {
    "chatml": "chatml", "gemma": "gemma", "gemma3": "gemma3", "llama3": "llama3", "phi_35": "phi-3.5",
    "qwen_25": "qwen-2.5", "qwen3": "qwen3", "mistral_v3_tekken": "mistral-tekken", "cohere": "command-r",
}  # fmt: skip
MESSAGE_COLUMNS = {"messages", "conversations", "conversation", "chat", "dialogue"}
# role -> its names that oribi knows by itself
ROLES = {
    "user": {"user", "human", "input"}, "assistant": {"assistant", "gpt", "model", "bot", "chatgpt", "output"},
    "system": {"system"}, "tool": {"tool", "observation"},
}  # fmt: skip
MARKS = ("train", "training", "trainable", "loss")  # by which oribi reads whether a message is trained
HARMLESS_PLUGINS = ("liger", "cut_cross_entropy")
BUILDERS = {"json", "csv", "parquet", "text"}
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz")


def _prepare(found: Converted) -> None:
    """Which of LoRA, QLoRA and full fine-tuning it is."""
    entries, adapter = found.entries, found.entries.get("adapter")
    peft = entries.get("peft") or {}
    four_bits = entries.get("load_in_4bit") or (isinstance(peft, dict) and peft.get("weight_dtype") == "nf4")
    if is_off(adapter):
        if four_bits or entries.get("load_in_8bit"):
            found.refuse(
                "adapter",
                "quantised weights cannot be trained; set adapter to qlora or lora, or load_in_4bit to false",
            )
        shared.put_full_finetuning(found, "no adapter")
    elif adapter not in ("lora", "qlora"):
        found.refuse("adapter", "oribi trains LoRA adapters (lora, qlora), or every weight")
    elif adapter == "qlora" or four_bits:
        found.put("load_in_4bit", True, f"adapter = {adapter}")
    axolotl_preferences.put_stage(found)
    if is_off(entries.get("load_in_4bit")):
        entries.pop("load_in_4bit", None)  # adapter and peft say it


def _finish(found: Converted) -> None:
    entries, values = found.entries, found.values
    micro = entries.get("micro_batch_size") or 1
    if entries.get("batch_size"):
        total = entries["batch_size"]
        said = f"batch_size = {total} in micro-batches of {micro}"
        found.put("gradient_accumulation_steps", max(1, int(total) // int(micro)), said)
    if values.get("eval_dataset") or values.get("eval_fraction"):
        found.put_default("per_device_eval_batch_size", micro)
    if not values.get("full_finetuning"):
        if "target_modules" not in values:
            found.refuse("adapter", "lora_target_linear or lora_target_modules must say which layers get it")
        for key in ("lora_r", "lora_alpha"):
            if key not in values:
                found.refuse(key, "missing, and Axolotl has no default for it")
    if "overlong" not in values and entries.get("excess_length_strategy"):
        asked = entries["excess_length_strategy"]
        found.put("overlong", {"raise": "error"}.get(asked, asked), f"excess_length_strategy = {asked}")
    if not (
        entries.get("save_steps") or entries.get("save_strategy") or entries.get("saves_per_epoch")
    ) and not (values.get("load_best_model_at_end") or values.get("early_stopping_patience")):
        found.put("save_strategy", "epoch", "default of Axolotl")
    _precision(found)


def _precision(found: Converted) -> None:
    shared.precision(found)
    entries = found.entries
    asked_for_none = entries.get("bf16", "auto") in (False, None) and "bf16" in entries
    if asked_for_none and "dtype" not in found.values:
        found.put("dtype", "float32", "bf16 = false")


def _datasets(found: Converted, key: str, value: Any) -> None:
    entries = sources_of(value if isinstance(value, list) else [value])
    sources: list[dict[str, Any]] = []
    kinds: list[str] = []
    supervised = preferences.stage_of(found) == "sft"
    for entry in entries:
        named: dict[str, str] = {}
        if not supervised:
            entry, named = axolotl_preferences.row_entry(found, entry)
        _check_entry(found, entry)
        files, split = _files(found, entry), str(entry.get("split") or "train")
        if "[" in split and any(name.endswith(SUFFIXES) for name in files):
            found.refuse(
                "datasets: split", f"a part of the file {files[0]} cannot be named; cut the file before"
            )
        kind = _kind(found, entry) if supervised else None
        kinds += [kind] if kind else []
        rows = _row_keys(entry)[0]
        rows["columns"] |= named
        text = {"text_field": entry.get("field") or "text"} if kind == "completion" else {}
        sources += [{"path": name, "split": split, **rows, **text} for name in files]
    put_sources(found, "dataset", sources, "datasets")
    _put_format(found, set(kinds), entries)


def _files(found: Converted, entry: dict[str, Any]) -> list[str]:
    """Files or the hub name behind an entry."""
    path, files = entry.get("path"), entry.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    if files and path and path not in BUILDERS:
        if not Path(path).is_dir():
            found.refuse(
                "datasets: data_files",
                f"single files of the hub's {path} cannot be named; download them and name them",
            )
        files = [str(Path(path) / name) for name in files]
    return [str(name) for name in files] or ([str(path)] if path else [])


def _kind(found: Converted, entry: dict[str, Any]) -> str:
    kind = entry.get("type")
    if isinstance(kind, dict):
        found.refuse("datasets: type", "a prompt format of its own; write the rows as prompt + completion")
    elif str(kind).startswith("sharegpt"):
        found.refuse(
            f"datasets: type = {kind}",
            "no longer Axolotl's; type: chat_template with field_messages: conversations is",
        )
    elif kind not in (None, "alpaca", "chat_template", "completion"):
        found.refuse(
            f"datasets: type = {kind}",
            "oribi reads alpaca, chat_template, completion and tokenised rows; write the rows as messages, or as prompt + "
            "completion",
        )
    return "tokens" if kind is None else str(kind)


def _put_format(found: Converted, kinds: set[str], entries: list[dict[str, Any]]) -> None:
    """The form of the prompts, and what happens to long rows."""
    asked = {entry.get("chat_template") for entry in entries if not is_off(entry.get("chat_template"))}
    asked |= {found.entries.get("chat_template")} if not is_off(found.entries.get("chat_template")) else set()
    if found.values.get("chat_template"):
        found.idle |= {"chat_template": "the type of the data set says it"} if asked else {}
    elif "alpaca" in kinds:
        if kinds - {"alpaca", "completion", "tokens"}:
            found.refuse(
                "datasets: type", "alpaca and chat_template have different prompts; a run has one template"
            )
        found.put("chat_template", "alpaca", "datasets: type = alpaca")
        found.differences.append(
            "rows with an input: oribi writes it below the instruction, without Axolotl's heading '### Input:'"
        )
    elif len(asked) > 1:
        found.refuse(
            "datasets: chat_template",
            f"one template for all; {', '.join(sorted(map(str, asked)))} are several",
        )
    elif asked:
        _put_template(found, str(asked.pop()))
    if kinds == {"completion"}:
        found.put("overlong", "split", "datasets: type = completion")
    elif "completion" in kinds:
        found.unsupported["datasets: type = completion"] = (
            "beside other rows, its long texts are dropped as those are, where Axolotl would cut them into pieces"
        )


def _put_template(found: Converted, name: str) -> None:
    if name == "tokenizer_default":
        found.idle["chat_template"] = "the model's own template is used"
    elif name.startswith("tokenizer_default_fallback_"):
        found.unsupported["chat_template"] = (
            "the model's own template is used; a model without one is refused, unless chat_template names one"
        )
    elif name in TEMPLATES:
        found.put("chat_template", TEMPLATES[name], f"chat_template = {name}")
    else:
        found.refuse(
            f"chat_template = {name}",
            "no template of this name here; tokenizer_default takes the model's own",
        )


def _check_entry(found: Converted, entry: dict[str, Any]) -> None:
    """What an entry says of its rows beyond their place and form."""
    # value -> whether it is what oribi does anyway
    accepted = {
        "field_messages": lambda v: isinstance(v, str),
        "message_property_mappings": lambda v: set(v.items()) <= {("role", "role"), ("content", "content"), ("role", "from"), ("content", "value")},
        "message_field_role": lambda v: v in ("role", "from"),
        "message_field_content": lambda v: v in ("content", "value"),
        "message_field_training": lambda v: v in MARKS,
        "message_field_training_detail": lambda v: v == "train_detail",
        "roles": lambda v: set(v) <= set(ROLES),
        "roles_to_train": lambda v: set(v) <= {"assistant", "gpt"} and v != [],
        "train_on_eos": lambda v: v == "turn",
        "train_on_eot": lambda v: v == "turn",
        "field_tools": lambda v: isinstance(v, str),
        "field_thinking": lambda v: v in ("reasoning_content", "reasoning", "thinking"),
        "template_thinking_key": lambda v: v == "reasoning_content",
        "trust_remote_code": lambda v: False,
        "shards": lambda v: v == 1,
        "preprocess_shards": lambda v: True,
        "ds_type": lambda v: True,
    }  # fmt: skip
    read = {"path", "type", "split", "data_files", "field", "chat_template"}
    for name, value in entry.items():
        if name in read or value is None or value is False or (is_off(value) and name != "roles_to_train"):
            continue
        if name in accepted and accepted[name](value):
            if name in _row_keys(entry)[1]:
                continue
            found.idle[f"datasets: {name}"] = "it is how oribi reads rows"
        else:
            found.refuse(f"datasets: {name} = {value}", "oribi's config cannot say this of a data set; bring the rows into a form of docs/data-formats.md")  # fmt: skip


def _row_keys(entry: dict[str, Any]) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Columns and role_aliases of an entry, where oribi does not know its names by itself; and the keys that say so."""
    columns = {}
    if entry.get("field_messages") not in (None, *MESSAGE_COLUMNS):
        columns["messages"] = entry["field_messages"]
    if entry.get("field_tools") not in (None, "tools"):
        columns["tools"] = entry["field_tools"]
    roles = {
        name: role
        for role, names in (entry.get("roles") or {}).items()
        for name in names
        if name not in ROLES.get(role, ())
    }
    said = {f"field_{name}" for name in columns} | ({"roles"} if roles else set())
    return {"columns": columns, "role_aliases": roles}, said


def _test_datasets(found: Converted, key: str, value: Any) -> None:
    entries = sources_of(value)
    train = found.entries.get("datasets") or [{}]
    split = (train[0] if isinstance(train[0], dict) else {}).get("split") or "train"
    files = [name for entry in entries for name in _files(found, entry)]
    splits = {str(entry.get("split") or "train") for entry in entries}
    if splits == {split} or all(name.endswith(SUFFIXES) for name in files):
        found.put("eval_dataset", files, key)
    elif len(splits) == 1:
        found.put("eval_dataset", files, key)
        found.put("eval_split", *splits, f"{key}: split")
    else:
        several = [(name, entry) for entry in entries for name in _files(found, entry)]
        put_sources(
            found, "eval_dataset", [{"path": n, "split": e.get("split") or "train"} for n, e in several], key
        )


def _targets(found: Converted, key: str, value: Any) -> None:
    linear, listed = found.entries.get("lora_target_linear"), found.entries.get("lora_target_modules")
    if not linear or key == "lora_target_linear":
        shared.targets(found, key, value)
    elif set(listed or []) - set(PROJECTIONS):
        found.refuse(
            key, "all linear layers and further ones; list them all and leave lora_target_linear out"
        )


def _plugins(found: Converted, key: str, value: Any) -> None:
    others = [name for name in value or [] if not any(word in name.lower() for word in HARMLESS_PLUGINS)]
    if others:
        found.refuse(f"plugins = {', '.join(others)}", "a plugin may change the training in any way")
    elif value:
        found.idle[key] = "oribi's own kernels run"


def _peft(found: Converted, key: str, value: Any) -> None:
    learning.loftq(found, "peft: loftq_config", (value or {}).get("loftq_config"))
    rest = {
        k: v
        for k, v in (value or {}).items()
        if v and k != "loftq_config" and (k, v) not in (("backend", "bnb"), ("weight_dtype", "nf4"))
    }
    if rest:
        found.refuse(
            f"peft = {rest}",
            "4-bit weights are bitsandbytes' NF4",
        )


def _special_tokens(found: Converted, key: str, value: Any) -> None:
    rest = {
        name: token
        for name, token in (value or {}).items()
        if token and name not in ("pad_token", "unk_token", "bos_token")
    }
    if rest:
        found.unsupported[key] = (
            f"{rest}: the end of a turn is the chat template's; new tokens in Python: oribi.add_new_tokens"
        )
    elif value:
        found.idle[key] = "padding is left out by its place, whatever the token"


def _strategy(found: Converted, key: str, value: Any) -> None:
    if key == "save_strategy" and value in ("epoch", "best"):
        found.put(key, value, key)
    elif value not in (None, False, "no", "steps", "epoch"):
        found.unsupported[key] = "oribi evaluates every eval_steps or once an epoch"
    elif value:
        found.idle[key] = "save_steps and eval_steps say it"


HANDLERS: dict[str, Handler] = {
    **shared.HANDLERS,
    **axolotl_preferences.HANDLERS,
    **read_elsewhere(("adapter", "batch_size", "chat_template", "excess_length_strategy")),
    **lacking(("evals_per_epoch",), "oribi evaluates every eval_steps, or once an epoch"),
    **lacking(("saves_per_epoch",), "oribi saves every save_steps, or at the end only"),
    "datasets": _datasets,
    "test_datasets": _test_datasets,
    "lora_target_linear": _targets,
    "lora_target_modules": _targets,
    "train_on_inputs": inverted("train_on_responses_only"),
    "save_strategy": _strategy,
    "eval_strategy": _strategy,
    "evaluation_strategy": _strategy,
    "revision_of_model": renamed("revision"),
    "noisy_embedding_alpha": renamed("neftune_noise_alpha"),
    "auto_resume_from_checkpoints": shared.resume,
    "plugins": _plugins,
    "peft": _peft,
    "special_tokens": _special_tokens,
    "peft_init_lora_weights": learning.start_of_pairs,
    "tokens": learning.new_tokens,
    "peft_layers_to_transform": renamed("layers_to_transform"),
    "lora_exclude_modules": names("exclude_modules"),
    **shared.trackers(("use_wandb", "wandb_project", "use_mlflow", "mlflow_experiment_name", "use_tensorboard", "use_trackio", "trackio_project_name")),
    **lacking(("use_comet", "use_swanlab"), "a run is reported to tensorboard, wandb, mlflow, trackio"),
    **idle(
        ("pad_to_sequence_len", "eval_sample_packing", "sample_packing_group_size", "sample_packing_bin_size",
         "sample_packing_sequentially", "sample_packing_eff_est", "multipack_real_batches", "batch_flattening",
         "pretrain_multipack_buffer_size", "pretrain_multipack_attn", "shuffle_merged_datasets", "loss_watchdog_threshold",
         "loss_watchdog_patience", "is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model",
         "is_qwen_derived_model", "tokenizer_use_fast", "tokenizer_legacy", "tokenizer_save_jinja_files", "processor_type",
         "resize_token_embeddings_to_32x", "mean_resizing_embeddings", "shrink_embeddings", "embeddings_skip_upcast",
         "lora_fan_in_fan_out", "loraplus_lr_embedding", "eval_sequence_len", "eval_table_size",
         "eval_max_new_tokens", "save_first_step", "profiler_steps", "eot_tokens", "peft_autocast_adapter_dtype",
         "merge_lora", "merge_method", "use_ray", "flash_attn_cross_entropy", "flash_attn_rms_norm", "unsloth_rms_norm",
         "unsloth_rope", "unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o",
         "qlora_sharded_model_loading", "experimental_skip_move_to_device"),
        "it is how oribi works, or what another setting says already",
    ),
    **lacking(("bnb_config_kwargs",), "4-bit weights are NF4 with double quantisation"),
    **lacking(("min_sample_len",), "short rows are kept; take them out of the data before"),
    **lacking(("dataset_exact_deduplication",), "equal rows are all kept; take them out of the data before"),
    **lacking(("do_bench_eval", "do_causal_lm_eval", "bench_dataset", "eval_causal_lm_metrics"), "oribi eval measures held-out rows and any file"),
    **refusing(("pretraining_dataset",), "a stream; name its files or data set under datasets, with type: completion"),
    **refusing(("lora_model_dir",), shared.NEW_ADAPTER),
    **refusing(("unfrozen_parameters",), "oribi trains an adapter with modules_to_save, or every weight"),
    **refusing(("relora", "relora_steps", "jagged_restart_steps", "lisa_step_interval", "lisa_n_layers", "qat", "quantization", "fp8", "gptq", "use_pose", "s2_attention", "curriculum_sampling", "trainer_cls", "diffusion"), "oribi has no such training"),
    **refusing(("peft_layers_pattern", "peft_layer_replication"), "layers are named by layers_to_transform and target_modules"),
    **refusing(("peft_trainable_token_indices",), "trainable_tokens names tokens by their texts"),
    **refusing(("added_tokens_overrides",), "new_tokens adds tokens; in Python: oribi.add_new_tokens"),
    **refusing(("tokenizer_config", "base_model_config", "overrides_of_model_config", "model_config", "tokenizer_use_mistral_common"), "the model is read with its own config and tokenizer"),
    **refusing(("chat_template_jinja", "default_system_message"), "in Python: oribi.get_chat_template(tokenizer, (jinja, end of a turn))"),
    **refusing(("dataset_shard_num", "dataset_shard_idx"), "a part of the rows cannot be named; cut the data before"),
    **dict.fromkeys(("sequence_parallel_degree", "context_parallel_size"), shared.context_parallel), "tensor_parallel_size": only([1, 0], "each GPU holds whole layers"),
}  # fmt: skip

DEFAULTS = {
    "max_seq_length": 512, "overlong": "drop", "load_in_4bit": False, "packing": False, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1, "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "weight_decay": 0.0,
    "warmup_steps": 0.03, "seed": 42, "output_dir": "./model-out",
}  # fmt: skip
DIALECT = Dialect("Axolotl", HANDLERS, DEFAULTS, _prepare, _finish)
