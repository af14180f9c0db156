"""Every key of a run config reaches something: with another value, the seven steps are called differently.

What the steps then do with it is in test_config_effects.py.
"""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

import oribi.run
import oribi.run_arguments
from oribi.config import SETTINGS, RunConfig
from oribi.config_file import read_run_config
from oribi.data.prepare import PreparedData
from oribi.data.report import DataReport
from oribi.errors import ConfigError
from oribi.preflight import Start

# key -> another value than the default, and what has to be set with it
OTHER: dict[str, dict[str, Any]] = {
    "model": {"model": "other"},
    "revision": {"revision": "v2"},
    "trust_remote_code": {"trust_remote_code": True},
    "max_seq_length": {"max_seq_length": 77},
    "load_in_4bit": {"load_in_4bit": False},
    "keep_in_16bit": {"keep_in_16bit": ["down_proj"]},
    "train_for": {"train_for": "q4_k_m"},
    "dtype": {"dtype": "float32"},
    "full_finetuning": {"full_finetuning": True},
    "lora_r": {"lora_r": 7},
    "lora_alpha": {"lora_alpha": 7},
    "lora_dropout": {"lora_dropout": 0.1},
    "target_modules": {"target_modules": ["q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3.0}},
    "layers_to_transform": {"layers_to_transform": [0]},
    "finetune_last_n_layers": {"finetune_last_n_layers": 1},
    "exclude_modules": {"exclude_modules": ["o_proj"]},
    "target_parameters": {"target_parameters": ["experts.down_proj"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "new_tokens": {"new_tokens": ["<a>"]},
    "trainable_tokens": {"trainable_tokens": ["<b>"]},
    "gradient_checkpointing": {"gradient_checkpointing": "off"},
    "dataset": {"dataset": ["other.jsonl"]},
    "split": {"split": "test"},
    "dataset_text_field": {"dataset_text_field": "body"},
    "eval_dataset": {"eval_dataset": ["held_out.jsonl"]},
    "eval_split": {"eval_split": "test", "eval_dataset": ["held_out.jsonl"]},
    "eval_fraction": {"eval_fraction": 0.5},
    "chat_template": {"chat_template": "chatml"},
    "train_on_responses_only": {"train_on_responses_only": False},
    "overlong": {"overlong": "drop"},
    "turns": {"turns": "split"},
    "columns": {"columns": {"question": "task"}},
    "role_aliases": {"role_aliases": {"coach": "assistant"}},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
    "malformed": {"malformed": "drop"},
    "packing": {"packing": False},
    "dataset_num_proc": {"dataset_num_proc": 3},
    "output_dir": {"output_dir": "elsewhere"},
    "num_train_epochs": {"num_train_epochs": 2.0},
    "max_steps": {"max_steps": 9},
    "per_device_train_batch_size": {"per_device_train_batch_size": 5},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 5},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 5},
    "total_batch_size": {"total_batch_size": 6},
    "learning_rate": {"learning_rate": 1e-5},
    "embedding_learning_rate": {"embedding_learning_rate": 1e-6},
    "loraplus_lr_ratio": {"loraplus_lr_ratio": 8.0},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine_with_restarts"},
    "optim_args": {"optim_args": {"momentum": 0.9}, "optim": "sgd"},
    "adam_beta1": {"adam_beta1": 0.8},
    "adam_beta2": {"adam_beta2": 0.95},
    "adam_epsilon": {"adam_epsilon": 1e-6},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "warmup_steps": {"warmup_steps": 11},
    "optim": {"optim": "adamw_torch"},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.3},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "seed": {"seed": 1},
    "fp8": {"fp8": True},
    "deterministic": {"deterministic": True},
    "fsdp": {"fsdp": True},
    "context_parallel": {"context_parallel": 2},
    "ddp_timeout": {"ddp_timeout": 60},
    "logging_steps": {"logging_steps": 10},
    "eval_steps": {"eval_steps": 3, "eval_fraction": 0.5},
    "sample_prompts": {"sample_prompts": "held_out", "eval_fraction": 0.5},
    "sample_tokens": {"sample_tokens": 5, "sample_prompts": "held_out", "eval_fraction": 0.5},
    "save_steps": {"save_steps": 3},
    "save_strategy": {"save_strategy": "epoch"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_fraction": 0.5},
    "early_stopping_patience": {"early_stopping_patience": 2, "eval_fraction": 0.5},
    "save_total_limit": {"save_total_limit": 2},
    "resume": {"resume": "true"},
    "report_to": {"report_to": ["tensorboard"]},
    "save_method": {"save_method": ["merged_16bit"]},
    "quantization_method": {"quantization_method": ["q8_0"]},
    "report": {"report": False},
}  # fmt: skip


def calls_of(config: RunConfig, monkeypatch, tmp_path: Path) -> list[str]:
    """What `run` calls for a config, with everything that takes time replaced by a recorder."""
    seen: list[str] = []

    def record(name: str, result: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            seen.append(f"{name}{arguments[1:] if name != 'load' else arguments}{sorted(keywords.items())}")
            return result

        return call

    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 8, "labels": [[1, 2]] * 8})
    prepared = PreparedData(rows, DataReport("rows"))
    model, tokenizer = (
        SimpleNamespace(oribi=SimpleNamespace(notes=[]), dtype=torch.float32),
        SimpleNamespace(),
    )
    trained = SimpleNamespace(
        model=model,
        state=SimpleNamespace(global_step=1),
        args=SimpleNamespace(output_dir=config.output_dir),
        find_checkpoint=lambda resume, weights_only: None,
        train=lambda **keywords: seen.append(f"train {keywords}"),
        is_world_process_zero=lambda: True,
        add_callback=lambda callback: seen.append(f"answers {callback.prompts} {callback.max_new_tokens}"),
    )

    def make_trainer(model, arguments, **keywords):
        settings = {k: v for k, v in arguments.to_dict().items() if k != "logging_dir"}
        seen.append(f"trainer {sorted(settings.items(), key=str)} {keywords['eval_dataset'] is None}")
        return trained

    def prepare(sources, tokenizer, **keywords):
        seen.append(f"prepare {sources} {sorted(keywords.items())}")
        return prepared

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(oribi.run, "load_model", record("load", (model, tokenizer)))
    monkeypatch.setattr(oribi.run, "attach_lora", record("attach", model))
    monkeypatch.setattr(oribi.run, "add_new_tokens", record("tokens", None))
    monkeypatch.setattr(oribi.run_arguments, "is_tied", lambda model: True)
    monkeypatch.setattr(oribi.run_arguments, "token_ids", lambda tokens, tokenizer: tokens)
    monkeypatch.setattr(oribi.run, "set_checkpointing", record("checkpointing", None))
    monkeypatch.setattr(oribi.run, "get_chat_template", record("template", tokenizer))
    monkeypatch.setattr(oribi.run, "prepare_dataset", prepare)
    monkeypatch.setattr(
        oribi.run, "check_before_loading", lambda config, *rest: Start(config.resume == "true")
    )
    monkeypatch.setattr(oribi.run, "SFTTrainer", make_trainer)
    monkeypatch.setattr(oribi.run, "checkpoint_trained", lambda trainer: None)
    monkeypatch.setattr(oribi.run, "save_merged", record("merged", None))
    monkeypatch.setattr(oribi.run, "save_gguf", record("gguf", {"gguf_files": ["file"]}))
    monkeypatch.setattr(
        oribi.run,
        "sample_prompts",
        lambda config, *rest: [config.sample_prompts] if config.sample_prompts else [],
    )
    monkeypatch.setattr(oribi.run, "measure", record("measure", None))
    monkeypatch.setattr(oribi.run, "_report", record("report", Path("report.html")))
    oribi.run.run(config)
    return seen


def test_every_key_is_here():
    # tests/train/test_stages.py has those of the stages that are not supervised
    of_stages = {"stage"} | {name for name, setting in SETTINGS.items() if "sft" not in setting.used_by}
    at_the_command_line = {"gpus"}  # tests/cli/test_train_gpus.py
    assert set(OTHER) | of_stages | at_the_command_line == {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize("key", OTHER)
def test_a_key_changes_what_is_called(key, monkeypatch, tmp_path):
    beside = {name: value for name, value in OTHER[key].items() if name != key}
    usual = replace(RunConfig(), model="model", dataset=["rows.jsonl"], output_dir="run", **beside)
    before = calls_of(usual, monkeypatch, tmp_path)
    after = calls_of(replace(usual, **{key: OTHER[key][key]}), monkeypatch, tmp_path)
    assert before != after
    assert before == calls_of(usual, monkeypatch, tmp_path)  # nothing else makes the difference


@pytest.mark.parametrize("key", OTHER)
def test_a_key_refuses_what_it_cannot_be(key):
    wrong = "[1]" if key.endswith(("_kwargs", "_args")) else "{a: [1]}"
    with pytest.raises(ConfigError, match=key):
        read_run_config(None, ["--model", "m", "--dataset", "d", f"--{key}", wrong])
