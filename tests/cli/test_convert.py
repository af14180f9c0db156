"""Configs of four other programs, as their repositories print them, become configs that mean the same, or are refused."""

import json

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from oribi.chat.named_templates import NAMES
from oribi.config import OPTIMIZERS, SCHEDULES, SETTINGS
from oribi.config_file import read_run_config
from oribi.dialects import axolotl, convert_file, llama_factory, shared, trl, unsloth
from oribi.dialects.converted import is_off, read_together
from oribi.errors import ConfigError

HANDLERS = {
    dialect.name: dialect.handlers
    for dialect in (axolotl.DIALECT, llama_factory.DIALECT, trl.DIALECT, unsloth.DIALECT, unsloth.SCRIPT)
}
# examples/llama-3/qlora-1b.yml
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - down_proj
  - up_proj
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
loss_watchdog_threshold: 5.0
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
# examples/train_qlora/llama3_lora_sft_otfq.yaml
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bitsandbytes  # choices: [bitsandbytes (4/8), hqq (2/3/4/5/6/8), eetq (8)]
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
# the LoRA command of trl/scripts/sft.py
TRL = """
python trl/scripts/sft.py \\
    --model_name_or_path Qwen/Qwen2-0.5B \\
    --dataset_name trl-lib/Capybara \\
    --learning_rate 2.0e-4 \\
    --num_train_epochs 1 \\
    --packing \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 8 \\
    --eval_strategy steps \\
    --eval_steps 100 \\
    --use_peft \\
    --lora_r 32 \\
    --lora_alpha 16 \\
    --output_dir Qwen2-0.5B-SFT \\
    --push_to_hub
"""
# unsloth_cli/config.py, in sections
UNSLOTH = """
model: unsloth/Qwen3-4B
data:
  dataset: yahma/alpaca-cleaned
  format_type: auto
training:
  training_type: lora
  max_seq_length: 2048
  num_epochs: 3
  learning_rate: 0.0002
  batch_size: 2
  max_steps: 0
  save_steps: 0
  train_on_completions: true
lora:
  lora_r: 64
  lora_alpha: 16
logging:
  hf_token: abc
"""
# the example in unsloth-cli.py, with --save_gguf
UNSLOTH_SCRIPT = """#!/bin/sh
# comment
python unsloth-cli.py --model_name "unsloth/llama-3-8b" --max_seq_length 8192 --dtype None --load_in_4bit \\
    --r 64 --lora_alpha 32 --lora_dropout 0.1 --bias "none" --use_gradient_checkpointing "unsloth" \\
    --random_state 3407 --use_rslora --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
    --warmup_steps 5 --max_steps 400 --learning_rate 2e-6 --logging_steps 1 --optim "adamw_8bit" \\
    --weight_decay 0.005 --lr_scheduler_type "linear" --seed 3407 --output_dir "outputs" \\
    --report_to "tensorboard" --save_model --save_path "model" --save_gguf \\
    --push_model --hub_path "hf/model" --hub_token "your_hf_token"
"""
# file name -> its text, whose it is, all settings that must come of it, and what must be named as not taken over
FILES = {
    "axolotl.yml": (
        AXOLOTL, "Axolotl",
        {"model": "NousResearch/Llama-3.2-1B", "dataset": ["teknium/GPT4-LLM-Cleaned"], "eval_fraction": 0.1,
         "load_in_4bit": True, "max_seq_length": 2048, "overlong": "drop", "packing": True, "lora_r": 32, "lora_alpha": 16,
         "lora_dropout": 0.05, "target_modules": ["gate_proj", "down_proj", "up_proj"], "chat_template": "alpaca",
         "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 4,
         "num_train_epochs": 1, "optim": "adamw_bnb_8bit", "lr_scheduler_type": "cosine", "learning_rate": 2e-4,
         "warmup_steps": 0.1, "weight_decay": 0.0, "seed": 42, "logging_steps": 1, "output_dir": "./outputs/qlora-out"},
        {"evals_per_epoch", "saves_per_epoch"},
    ),
    "factory.yaml": (
        LLAMA_FACTORY, "LLaMA-Factory",
        {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "dataset": [{"path": "identity", "max_rows": 1000}, {"path": "alpaca_en_demo", "max_rows": 1000}], "load_in_4bit": True,
         "max_seq_length": 2048, "dtype": "bfloat16", "lora_r": 8, "lora_alpha": 16, "target_modules": ["all-linear"],
         "chat_template": "llama3", "packing": False, "dataset_num_proc": 16, "eval_fraction": 0.1,
         "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 8,
         "learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
         "optim": "adamw_torch_fused", "weight_decay": 0.0, "seed": 42, "logging_steps": 10, "eval_steps": 500,
         "save_steps": 500, "output_dir": "saves/llama3-8b/lora/sft"},
        {"dataset: identity", "dataset: alpaca_en_demo"},
    ),
    "trl.sh": (
        TRL, "TRL",
        {"model": "Qwen/Qwen2-0.5B", "dataset": ["trl-lib/Capybara"], "load_in_4bit": False, "max_seq_length": 1024,
         "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "packing": True,
         "train_on_responses_only": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
         "learning_rate": 2e-4, "num_train_epochs": 1, "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0,
         "seed": 42, "logging_steps": 10, "save_steps": 500, "output_dir": "Qwen2-0.5B-SFT"},
        {"push_to_hub", "dataset_test_split"},
    ),
    "unsloth.yaml": (
        UNSLOTH, "Unsloth",
        {"model": "unsloth/Qwen3-4B", "dataset": ["yahma/alpaca-cleaned"], "max_seq_length": 2048, "num_train_epochs": 3,
         "learning_rate": 2e-4, "per_device_train_batch_size": 2, "train_on_responses_only": True, "packing": False,
         "lora_r": 64, "lora_alpha": 16, "output_dir": "./outputs"},
        set(),
    ),
    "unsloth.sh": (
        UNSLOTH_SCRIPT, "unsloth-cli.py",
        {"model": "unsloth/llama-3-8b", "dataset": ["yahma/alpaca-cleaned"], "max_seq_length": 8192, "load_in_4bit": True,
         "lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.1, "use_rslora": True, "chat_template": "alpaca",
         "train_on_responses_only": False, "packing": False, "per_device_train_batch_size": 4,
         "gradient_accumulation_steps": 8, "warmup_steps": 5, "max_steps": 400, "learning_rate": 2e-6, "logging_steps": 1,
         "optim": "adamw_8bit", "weight_decay": 0.005, "lr_scheduler_type": "linear", "seed": 3407, "output_dir": "outputs",
         "report_to": ["tensorboard"], "quantization_method": ["q8_0"]},
        {"push_model"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_config_means_the_same_here(oribi, tmp_path, monkeypatch, name):
    text, dialect, expected, unsupported = FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    result = oribi("convert", name, "--output", "config.yaml", "--json")
    assert result.code == 0, result.err
    (record,) = result.records
    assert record["dialect"] == dialect
    assert record["values"] == expected
    assert set(record["unsupported"]) == unsupported
    config, notes = read_run_config("config.yaml")
    assert notes == []
    assert {key: getattr(config, key) for key in expected} == expected
    written = (tmp_path / "config.yaml").read_text()
    for line in [*(f"not taken over: {key}" for key in unsupported), *record["differences"]]:
        assert f"# {line}" in written


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for(tmp_path, name):
    (tmp_path / name).write_text(FILES[name][0])
    found = convert_file(tmp_path / name)
    told = " ".join([*found.notes, *found.idle, *found.unsupported, *found.values])
    together = {key for key, handler in HANDLERS[found.dialect].items() if handler is read_together}
    asked = {key for key, value in found.entries.items() if not is_off(value)}
    assert {key for key in asked - together if key not in told} == set()


def convert(tmp_path, text: str, name: str = "config.yml"):
    """What becomes of a file."""
    path = tmp_path / name
    path.write_text(text)
    return convert_file(path)


AXOLOTL_LEAST = """
base_model: m/n
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
learning_rate: 1e-4
micro_batch_size: 4
datasets: [{path: d/e, type: chat_template}]
"""
FACTORY_LEAST = "model_name_or_path: m/n\ndataset: rows.jsonl\ndataset_dir: ONLINE\nfinetuning_type: lora\n"
TRL_LEAST = "model_name_or_path: m/n\ndataset_name: d/e\nuse_peft: true\n"
TRL_FULL = "model_name_or_path: m/n\ndataset_name: d/e\n"
UNSLOTH_LEAST = "model: m/n\ndata: {dataset: d/e}\n"
SCRIPT_LEAST = "python unsloth-cli.py --model_name m/n"
LEAST = {
    "axolotl": AXOLOTL_LEAST,
    "factory": FACTORY_LEAST,
    "trl": TRL_LEAST,
    "trl full": TRL_FULL,
    "unsloth": UNSLOTH_LEAST,
}
ABSENT = "absent"
# program, lines that are added to its shortest config, settings that come of it (ABSENT: none)
MEANINGS = [
    # what each program does where its file says nothing
    ("axolotl", "", {
        "max_seq_length": 512, "overlong": "drop", "load_in_4bit": False, "packing": False, "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": ABSENT, "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "weight_decay": 0.0,
        "warmup_steps": 0.03, "seed": 42, "output_dir": "./model-out", "target_modules": ["all-linear"], "chat_template": ABSENT}),
    ("factory", "", {
        "load_in_4bit": False, "packing": False, "lora_r": 8, "lora_alpha": 16, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0, "warmup_steps": 0,
        "optim": "adamw_torch_fused", "weight_decay": 0.0, "logging_steps": 500, "save_steps": 500, "seed": 42}),
    ("trl", "", {
        "load_in_4bit": False, "packing": False, "max_seq_length": 1024, "lora_alpha": 32, "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"], "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "learning_rate": 2e-5, "num_train_epochs": 3.0, "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "train_on_responses_only": False, "logging_steps": 10, "save_steps": 500, "seed": 42}),
    ("unsloth", "", {
        "lora_r": 64, "packing": False, "num_train_epochs": 3, "train_on_responses_only": False, "output_dir": "./outputs"}),
    # every weight
    ("trl full", "lora_r: 8\nlora_target_modules: all-linear", {"full_finetuning": True, "load_in_4bit": False, "lora_r": ABSENT, "target_modules": ABSENT, "lora_alpha": ABSENT}),
    ("factory", "finetuning_type: full\nlora_rank: 8", {"full_finetuning": True, "load_in_4bit": False, "lora_r": ABSENT, "lora_alpha": ABSENT}),
    ("axolotl", "adapter:", {"full_finetuning": True, "load_in_4bit": False, "lora_r": ABSENT, "target_modules": ABSENT}),
    ("unsloth", "training: {training_type: full, load_in_4bit: true}", {"full_finetuning": True, "load_in_4bit": False, "lora_r": ABSENT}),
    # which adapter
    ("axolotl", "adapter: qlora\nload_in_4bit: true", {"load_in_4bit": True, "full_finetuning": ABSENT}),
    ("axolotl", "load_in_4bit: true", {"load_in_4bit": True}),
    ("axolotl", "peft: {backend: bnb, weight_dtype: nf4}", {"load_in_4bit": True}),
    ("factory", "additional_target: embed_tokens,lm_head", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("factory", "lora_target: q_proj, v_proj", {"target_modules": ["q_proj", "v_proj"]}),
    ("factory", "quantization_bit: 4\nquantization_method: bnb", {"load_in_4bit": True}),
    # batches
    ("axolotl", "batch_size: 32", {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 4}),
    ("unsloth", "training: {batch_size: 8}", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": ABSENT}),
    # data
    ("axolotl", "datasets: [{path: book.jsonl, ds_type: json, type: completion, field: body}]", {"dataset": ["book.jsonl"], "overlong": "split", "dataset_text_field": "body", "chat_template": ABSENT}),
    ("axolotl", "datasets: [{path: json, data_files: [a.jsonl, b.jsonl], type: chat_template}]", {"dataset": ["a.jsonl", "b.jsonl"]}),
    ("axolotl", "datasets: [{path: d/e, type: chat_template, split: 'train[:20%]', field_messages: conversations, message_property_mappings: {role: from, content: value}}]", {"split": "train[:20%]"}),
    ("axolotl", "datasets: [{path: a, type: chat_template, field_messages: talk, field_tools: kit, message_field_training: training}]", {"columns": {"messages": "talk", "tools": "kit"}}),
    ("axolotl", "datasets: [{path: a, type: chat_template, roles: {user: [human, client], assistant: [gpt, agent]}}]", {"role_aliases": {"client": "user", "agent": "assistant"}, "columns": ABSENT}),
    ("axolotl", "datasets: [{path: d/e, type: chat_template}]\ntest_datasets: [{path: d/e, split: test, type: chat_template}]", {"eval_dataset": ["d/e"], "eval_split": "test"}),
    ("axolotl", "datasets: [{path: book.jsonl, type: completion}]", {"dataset_text_field": "text", "overlong": "split"}),
    ("axolotl", "chat_template: chatml", {"chat_template": "chatml"}),
    ("axolotl", "datasets: [{path: a, type: chat_template, field_messages: talk}, {path: d/b, split: dev, type: chat_template}]", {
        "dataset": [{"path": "a", "columns": {"messages": "talk"}, "split": "train"}, {"path": "d/b", "split": "dev"}], "columns": ABSENT}),
    ("axolotl", "test_datasets: [{path: d/e, split: test}, {path: d/f, split: dev}]", {
        "eval_dataset": [{"path": "d/e", "split": "test"}, {"path": "d/f", "split": "dev"}]}),
    ("axolotl", "cosine_min_lr_ratio: 0.1", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
    ("axolotl", "val_set_size: 0.1\nearly_stopping_patience: 3", {"early_stopping_patience": 3, "save_strategy": ABSENT}),
    ("axolotl", "save_strategy: best\nval_set_size: 0.1", {"save_strategy": "best"}),
    ("axolotl", "peft: {loftq_config: {loftq_bits: 4}}", {"init_lora_weights": "loftq", "load_in_4bit": True}),
    ("axolotl", "peft_init_lora_weights: pissa_niter_16\nadapter: lora\nload_in_4bit: false", {"init_lora_weights": "pissa_niter_16"}),
    ("axolotl", "tokens: ['<a>', '<b>']\nlora_exclude_modules: [lm_head]\npeft_layers_to_transform: [0, 1]", {
        "new_tokens": ["<a>", "<b>"], "exclude_modules": ["lm_head"], "layers_to_transform": [0, 1]}),
    ("axolotl", "chat_template_kwargs: {enable_thinking: false}\nloraplus_lr_ratio: 16\nadam_beta2: 0.95", {
        "chat_template_kwargs": {"enable_thinking": False}, "loraplus_lr_ratio": 16, "adam_beta2": 0.95}),
    ("axolotl", "peft_init_lora_weights: eva\noptim_args: {alpha: 4}\noptimizer: ademamix_8bit", {
        "init_lora_weights": "eva", "optim_args": {"alpha": 4}}),
    ("trl", "optim: sgd\noptim_args: momentum=0.9,nesterov=true\nlabel_smoothing_factor: 0.1", {
        "optim_args": {"momentum": 0.9, "nesterov": True}, "label_smoothing_factor": 0.1}),
    ("factory", "pissa_init: true", {"init_lora_weights": "pissa_niter_16"}),
    ("factory", "pissa_init: true\npissa_iter: -1\npissa_convert: true", {"init_lora_weights": "pissa"}),
    ("factory", "loraplus_lr_ratio: 16.0\nmax_samples: 1000\nsave_strategy: epoch\nadd_tokens: <x>,<y>", {
        "loraplus_lr_ratio": 16.0, "dataset": [{"path": "rows.jsonl", "max_rows": 1000}], "save_strategy": "epoch", "new_tokens": ["<x>", "<y>"]}),
    ("factory", "val_size: 0.1\neval_strategy: steps\neval_steps: 100\nload_best_model_at_end: true\nearly_stopping_steps: 2", {"load_best_model_at_end": True, "early_stopping_patience": 2}),
    ("factory", "dataset: a, b\nmix_strategy: interleave_under\ninterleave_probs: 0.7,0.3", {
        "dataset": [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]}),
    ("trl", "adam_beta1: 0.95\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-6}", {
        "adam_beta1": 0.95, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}),
    ("axolotl", "chat_template: tokenizer_default", {"chat_template": ABSENT}),
    ("axolotl", "excess_length_strategy: truncate", {"overlong": "truncate"}),
    ("axolotl", "excess_length_strategy: raise", {"overlong": "error"}),
    ("axolotl", "train_on_inputs: true", {"train_on_responses_only": False}),
    ("axolotl", "val_set_size: 0.05\neval_steps: 20\nsave_steps: 40", {"eval_fraction": 0.05, "eval_steps": 20, "save_steps": 40}),
    ("axolotl", "test_datasets: [{path: held_out.jsonl, split: train, type: chat_template}]", {"eval_dataset": ["held_out.jsonl"]}),
    ("factory", "stage: pt", {"train_on_responses_only": False, "overlong": "split", "packing": True, "chat_template": ABSENT}),
    ("factory", "stage: pt\npacking: false", {"packing": False}),
    ("factory", "neat_packing: true", {"packing": True}),
    ("factory", "mix_strategy: concat\nval_size: 0.1\neval_strategy: epoch", {"eval_fraction": 0.1, "eval_steps": ABSENT}),
    ("factory", "template: some_new_model", {"chat_template": ABSENT}),
    ("trl", "assistant_only_loss: true", {"train_on_responses_only": True}),
    ("trl", "completion_only_loss: true", {"train_on_responses_only": True}),
    ("trl", "packing: true\npacking_strategy: wrapped", {"overlong": "split"}),
    ("trl", "test_split_size: 0.1\neval_strategy: steps\neval_steps: 50", {"eval_fraction": 0.1, "eval_steps": 50}),
    ("unsloth", "data: {local_dataset: [a.jsonl, b.jsonl]}", {"dataset": ["a.jsonl", "b.jsonl"]}),
    # precision, schedule, steps, trackers
    ("axolotl", "bf16: true", {"dtype": "bfloat16"}),
    ("axolotl", "bf16: false\nfp16: true", {"dtype": "float16"}),
    ("axolotl", "bf16: false", {"dtype": "float32"}),
    ("trl", "bf16: false", {"dtype": "float32"}),
    ("trl", "dtype: bfloat16", {"dtype": "bfloat16"}),
    ("trl", "dtype: auto", {"dtype": ABSENT}),
    ("factory", "fp16: true", {"dtype": "float16"}),
    ("trl", "warmup_ratio: 0.1", {"warmup_steps": 0.1}),
    ("trl", "warmup_ratio: 0.1\nwarmup_steps: 20", {"warmup_steps": 20}),
    ("trl", "warmup_ratio: 0.1\nwarmup_steps: 0", {"warmup_steps": 0.1}),
    ("trl", "max_steps: -1\nsave_strategy: 'no'\neval_steps: 50", {"max_steps": ABSENT, "save_steps": ABSENT, "eval_steps": ABSENT}),
    ("unsloth", "training: {max_steps: 0, save_steps: 0, gradient_checkpointing: unsloth}", {"max_steps": ABSENT, "save_steps": ABSENT, "gradient_checkpointing": ABSENT}),
    ("axolotl", "optimizer: optimi_adamw", {"optim": "adamw_torch"}),
    ("axolotl", "wandb_project: mine", {"report_to": ["wandb"]}),
    ("unsloth", "logging: {enable_wandb: true, enable_tensorboard: true}", {"report_to": ["wandb", "tensorboard"]}),
    ("trl", "report_to: [neptune, wandb]", {"report_to": ["wandb"]}),
    ("trl", "report_to: all", {"report_to": ["none"]}),
    ("factory", "report_to: swanlab", {"report_to": ["none"]}),
]  # fmt: skip


def least_with(program: str, lines: str) -> str:
    """The shortest config of a program, with these lines in place of those of the same keys."""
    given = [line.partition(":")[0] for line in lines.splitlines()]
    kept = [line for line in LEAST[program].splitlines() if line.partition(":")[0] not in given]
    return "\n".join([*kept, lines, ""])


@pytest.mark.parametrize(("program", "lines", "expected"), MEANINGS)
def test_a_line_means_this(tmp_path, program, lines, expected):
    found = convert(tmp_path, least_with(program, lines))
    assert {key: found.values.get(key, ABSENT) for key in expected} == expected
    path = tmp_path / "converted.yaml"
    path.write_text(json.dumps(found.values))
    if "dataset" in found.values:
        read_run_config(path)


REFUSED = [
    ("factory", "stage: ppo", "stage = ppo .*oribi's stages are"),
    ("factory", "finetuning_type: freeze", "finetuning_type = freeze .*LoRA adapters, or every weight"),
    ("factory", "finetuning_type: oft", "finetuning_type = oft"),
    ("factory", "use_galore: true", "use_galore = True"),
    ("factory", "mask_history: true", "mask_history"),
    ("factory", "adapter_name_or_path: saves/x", "adapter_name_or_path"),
    ("factory", "quantization_bit: 4\nquantization_method: hqq", "quantization_bit = 4 .*by hqq"),
    ("factory", "mix_strategy: interleave_over", "mix_strategy"),
    ("factory", "dataset: a, b\nmix_strategy: interleave_under\ninterleave_probs: 0.7", "1 of them for 2 data sets"),
    ("axolotl", "peft: {loftq_config: {loftq_iter: 5}}", "one iteration over NF4"),
    ("axolotl", "peft_init_lora_weights: corda", "oribi starts no pairs so"),
    ("factory", "template: default", "template = default"),
    ("factory", "do_train: false", "do_train"),
    ("factory", "learning_rate: high", "learning_rate = high .*must be a number"),
    ("axolotl", "adapter: llama-adapter", "adapter = llama-adapter .*LoRA adapters"),
    ("axolotl", "adapter:\nload_in_4bit: true", "adapter = None .*quantised weights cannot be trained"),
    ("axolotl", "lora_target_linear: false", "must say which layers"),
    ("axolotl", "relora: true", "relora"),
    ("axolotl", "optimizer: muon", "optimizer = muon"),
    ("axolotl", "lr_scheduler: rex", "lr_scheduler = rex"),
    ("axolotl", "lora_model_dir: out", "lora_model_dir"),
    ("axolotl", "plugins: [axolotl.integrations.kd.KDPlugin]", "plugins = axolotl.integrations.kd"),
    ("axolotl", "datasets: [{path: d, type: {field_instruction: q, format: '{instruction}'}}]", "datasets: type .*prompt format"),
    ("axolotl", "datasets: [{path: d, type: orcamini}]", "type = orcamini"),
    ("axolotl", "datasets: [{path: d, type: sharegpt}]", "type = sharegpt .*chat_template"),
    ("axolotl", "datasets: [{path: a, type: alpaca}, {path: b, type: chat_template}]", "different prompts"),
    ("axolotl", "datasets: [{path: a, type: chat_template, roles_to_train: [assistant, user]}]", "roles_to_train"),
    ("axolotl", "datasets: [{path: a, type: chat_template, roles_to_train: []}]", "roles_to_train"),
    ("axolotl", "datasets: [{path: a, type: chat_template, message_property_mappings: {role: who}}]", "message_property_mappings"),
    ("axolotl", "datasets: [{path: a/b, name: subset, type: chat_template}]", "datasets: name = subset"),
    ("axolotl", "datasets: [{path: a/b, data_files: x.jsonl, type: chat_template}]", "single files of the hub's a/b"),
    ("axolotl", "datasets: [{path: a.jsonl, split: 'train[:10%]', type: chat_template}]", "a part of the file a.jsonl"),
    ("axolotl", "datasets: [{path: a, shards: 10, type: chat_template}]", "shards = 10"),
    ("axolotl", "chat_template: alpaca", "chat_template = alpaca"),
    ("axolotl", "pretraining_dataset: [{path: c4}]", "pretraining_dataset"),
    ("trl", "use_peft: false\nload_in_4bit: true", "load_in_4bit = True .*without use_peft"),
    ("trl", "loss_type: dft", "loss_type = dft"),
    ("trl", "beta: 0.1", "beta = 0.1 .*does not say which of TRL's trainers"),
    ("trl", "max_length:", "max_length .*longest example"),
    ("trl", "dataset_config: en", "dataset_config"),
    ("trl", "lora_task_type: SEQ_CLS", "lora_task_type"),
    ("trl", "lora_target_modules: '.*attn.*proj'", "a pattern"),
    ("unsloth", "lora: {finetune_mlp_modules: false}", "finetune_mlp_modules"),
    ("unsloth", "data: {dataset: d, local_dataset: [a.jsonl]}", "local_dataset"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "lines", "message"), REFUSED)
def test_another_training_is_refused(tmp_path, program, lines, message):
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path, least_with(program, lines))


def test_all_reasons_are_told_at_once_and_nothing_is_written(oribi, tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text(FACTORY_LEAST + "stage: ppo\nuse_muon: true\n")
    result = oribi("convert", path, "-o", tmp_path / "out.yaml")
    assert result.code == 1
    assert "2 lines ask for a training" in result.err
    assert "stage = ppo" in result.err
    assert "use_muon = True" in result.err
    assert not (tmp_path / "out.yaml").exists()


NOT_TAKEN_OVER = [
    ("axolotl", "load_in_8bit: true", "load_in_8bit"),
    ("axolotl", "val_set_size: 500", "val_set_size"),
    ("axolotl", "eval_steps: 0.05\nval_set_size: 0.1", "eval_steps"),
    ("axolotl", "special_tokens: {eos_token: '<|im_end|>'}", "special_tokens"),
    ("axolotl", "datasets: [{path: a, type: chat_template}, {path: b, type: completion}]", "datasets: type = completion"),
    ("axolotl", "deepspeed: zero2.json", "deepspeed"),
    ("factory", "val_size: 100", "val_size"),
    ("factory", "template: deepseek3", "template"),
    ("factory", "quantization_bit: 8", "quantization_bit"),
    ("trl", "report_to: neptune", "report_to: neptune"),
    ("trl", "resume_from_checkpoint: out/checkpoint-10", "resume_from_checkpoint"),
    ("trl", "colour: blue", "colour"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "lines", "key"), NOT_TAKEN_OVER)
def test_what_is_not_taken_over_is_named(tmp_path, program, lines, key):
    assert key in convert(tmp_path, least_with(program, lines)).unsupported


def test_the_flags_of_unsloths_script(tmp_path):
    alone = convert(tmp_path, "python unsloth-cli.py --r 16", "a.sh").values
    assert alone["model"] == "unsloth/llama-3-8b"
    assert alone["dataset"] == ["yahma/alpaca-cleaned"]
    assert alone["load_in_4bit"] is False
    assert alone["max_steps"] == 400
    assert alone["report_to"] == ["tensorboard"]
    assert alone["output_dir"] == "outputs"
    assert (
        "quantization_method"
        not in convert(tmp_path, f"{SCRIPT_LEAST} --save_gguf --quantization q4_k_m", "b.sh").values
    )
    several = convert(
        tmp_path, f"{SCRIPT_LEAST} --save_model --save_gguf --quantization f16 q4_k_m", "c.sh"
    ).values
    assert several["quantization_method"] == ["f16", "q4_k_m"]
    assert convert(tmp_path, f"{SCRIPT_LEAST} --save_model", "d.sh").values["save_method"] == ["merged_16bit"]
    seeds = convert(tmp_path, f"{SCRIPT_LEAST} --seed 1 --random_state 2", "e.sh")
    assert seeds.values["seed"] == 1
    assert any("random_state = 2 left out" in line for line in seeds.differences)
    with pytest.raises(ConfigError, match="--use_dora .*no such flag"):
        convert(tmp_path, f"{SCRIPT_LEAST} --use_dora", "f.sh")


def test_the_flags_of_unsloth_train(tmp_path):
    found = convert(
        tmp_path,
        "unsloth train --model m/n --dataset d/e --lora-r 8 --no-load-in-4bit --batch-size 4",
        "a.sh",
    )
    assert found.dialect == "Unsloth"
    expected = {"lora_r": 8, "load_in_4bit": False, "per_device_train_batch_size": 4, "num_train_epochs": 3}
    assert {key: found.values[key] for key in expected} == expected
    with pytest.raises(ConfigError, match="convert that file"):
        convert(tmp_path, "unsloth train --config c.yaml --lora-r 8", "b.sh")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trl rloo --model_name_or_path m --dataset_name d", "oribi's stages are"),
        (
            "python trl/scripts/grpo.py --model_name_or_path m --dataset_name d",
            "reward_funcs = None .*at least one",
        ),
        ("trl sft --config c.yaml --model_name_or_path m", "convert that file"),
        ("trl sft --model_name_or_path $MODEL --dataset_name d", "--model_name_or_path: a shell variable"),
        ("llamafactory-cli train config.yaml", "no flags"),
        ("trl sft --model_name_or_path 'm", "No closing quotation"),
    ],
)
def test_a_script_that_cannot_be_read_is_refused(tmp_path, command, message):
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path, command, "run.sh")


def test_names_of_llama_factorys_table_become_files(tmp_path):
    (tmp_path / "data").mkdir()
    table = tmp_path / "data" / "dataset_info.json"
    plain = {"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"hf_hub_url": "x/alpaca"}}
    table.write_text(json.dumps(plain))
    assert convert(tmp_path, LLAMA_FACTORY).values["dataset"] == [
        {"path": str(tmp_path / "data" / "identity.json"), "max_rows": 1000},
        {"path": "x/alpaca", "max_rows": 1000},
    ]
    text = FACTORY_LEAST.replace("ONLINE", "data").replace("rows.jsonl", "NAME")
    for entry, message in [
        ({"file_name": "a.json", "ranking": True}, "ranking"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"role_tag": "who"}}, "role_tag = who"),
        ({"file_name": "a.json", "subset": "en"}, "subset = en"),
        ({"file_name": "a.json", "columns": {"messages": "messages", "images": "images"}}, "images = images"),
    ]:
        table.write_text(json.dumps({"mine": entry}))
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path, text.replace("NAME", "mine"))
    with pytest.raises(ConfigError, match="has no such name"):
        convert(tmp_path, text.replace("NAME", "yours"))
    table.write_text(json.dumps({"book": {"file_name": "book.json", "columns": {"prompt": "body"}}}))
    assert (
        convert(tmp_path, text.replace("NAME", "book") + "stage: pt\n").values["dataset_text_field"] == "body"
    )
    table.write_text("[")
    with pytest.raises(ConfigError, match="no valid table of data sets"):
        convert(tmp_path, text)


def test_columns_and_tags_of_llama_factorys_table_become_columns_and_role_aliases(tmp_path):
    table = {
        "pairs": {"file_name": "a.json", "columns": {"prompt": "ask", "query": "about", "response": "output"}},
        "talks": {"file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
                  "tags": {"user_tag": "client", "assistant_tag": "agent", "role_tag": "from", "content_tag": "value"}},
        "usual": {"file_name": "c.json", "columns": {"prompt": "question", "response": "answer"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(table))
    text = FACTORY_LEAST.replace("ONLINE", ".").replace("rows.jsonl", "NAME")
    pairs, talks, usual = (
        convert(tmp_path, text.replace("NAME", name)).values for name in ("pairs", "talks", "usual")
    )
    assert pairs["columns"] == {"instruction": "ask", "input": "about", "output": "output"}
    assert talks["columns"] == {"messages": "talk"}
    assert talks["role_aliases"] == {"client": "user", "agent": "assistant"}
    assert "columns" not in usual
    assert "role_aliases" not in {**pairs, **usual}
    several = convert(tmp_path, text.replace("NAME", "pairs, usual")).values
    assert several["dataset"][0] == {"path": str(tmp_path / "a.json"), "columns": pairs["columns"]}
    assert several["dataset"][1] == str(tmp_path / "c.json")


def test_a_converted_config_trains(oribi, tiny_folder, tmp_path, monkeypatch):
    """Long texts of a column of their own, cut into pieces, as `stage: pt` asks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.jsonl").write_text(
        "".join(json.dumps({"body": "once upon a time " * 60}) + "\n" for _ in range(3))
    )
    table = {"book": {"file_name": "book.jsonl", "columns": {"prompt": "body"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(table))
    (tmp_path / "pt.yaml").write_text(
        f"model_name_or_path: {tiny_folder}\nstage: pt\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
        "dataset: book\ndataset_dir: .\ncutoff_len: 64\nlearning_rate: 1.0e-3\nmax_steps: 2\n"
        "per_device_train_batch_size: 1\nlogging_steps: 1\nsave_strategy: 'no'\noutput_dir: out\n"
    )
    assert oribi("convert", "pt.yaml", "-o", "config.yaml").code == 0
    looked = oribi("inspect", "data", "config.yaml", "--json")
    assert looked.code == 0, looked.err
    counted = looked.records[-1]
    assert counted["rows_cut"] == 3
    assert counted["tokens_cut"] == 0
    assert counted["examples"] > 3
    trained = oribi("train", "config.yaml", "--dtype", "float32", "--report", "false")
    assert trained.code == 0, trained.err
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2]


def test_rows_of_alpaca_with_a_column_of_text_train_on_their_outputs(
    oribi, tiny_folder, tmp_path, monkeypatch
):
    """tatsu-lab/alpaca has both; its `text` holds the prompt, too."""
    monkeypatch.chdir(tmp_path)
    row = {
        "instruction": "Add.",
        "input": "",
        "output": "It is four.",
        "text": "### Instruction: Add. ### Response: It is four.",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    text = AXOLOTL_LEAST.replace("m/n", str(tiny_folder)).replace(
        "{path: d/e, type: chat_template}", "{path: rows.jsonl, type: alpaca}"
    )
    (tmp_path / "axolotl.yml").write_text(text)
    assert oribi("convert", "axolotl.yml", "-o", "config.yaml").code == 0
    counted = oribi("inspect", "data", "config.yaml", "--json").records[-1]
    assert counted["format"] == "instruction (Alpaca) + output"
    assert counted["trained_tokens"] < counted["tokens"] / 2


def test_the_names_that_are_written_are_known_here():
    assert set(axolotl.TEMPLATES.values()) | set(llama_factory.TEMPLATES.values()) <= set(NAMES)
    known = {name.value for name in OptimizerNames}
    assert set(OPTIMIZERS) | set(shared.SAME_OPTIMIZER.values()) <= known
    assert {name.value for name in SchedulerType} >= set(SCHEDULES)
    assert set(shared.TRACKERS) == set(SETTINGS["report_to"].choices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: blue\n", "not a config of Axolotl"),
        ("- a\n- b\n", "expected lines of 'key: value'"),
        ("a: [1\n", ":2: no valid YAML"),
        ("", "expected lines"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        convert_file(tmp_path / "absent.yaml")


def test_a_config_without_data_is_written_and_said(oribi, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: m/n\nfinetuning_type: lora\n")
    result = oribi("convert", path, "-o", tmp_path / "out.yaml")
    assert result.code == 1
    assert "names no dataset" in result.err
    assert (tmp_path / "out.yaml").is_file()
