"""Configs of four other programs, as their documentation prints them, become configs of oribi's with nothing lost."""

import json

import pytest

from oribi.config import read_config
from oribi.dialects import convert_file
from oribi.errors import ConfigError

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train[:90%]
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: true
bf16: auto
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
use_peft: true
load_in_4bit: true
learning_rate: 2.0e-4
packing: true
lora_target_modules: all-linear
max_length: 1024
"""
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
UNSLOTH_SCRIPT = """#!/bin/sh
# comment
python unsloth-cli.py --model_name unsloth/llama-3-8b --max_seq_length 2048 --load_in_4bit \\
  --dataset yahma/alpaca-cleaned --r 16 --learning_rate 2e-4 --report_to tensorboard \\
  --save_gguf --quantization q8_0 q4_k_m --use_dora --push_gguf
"""
FILES = {
    "axolotl.yml": (
        AXOLOTL, "Axolotl",
        {"model": "NousResearch/Llama-3.2-1B", "dataset": ["teknium/GPT4-LLM-Cleaned"], "split": "train[:90%]",
         "eval_fraction": 0.1, "load_in_4bit": True, "max_seq_length": 2048, "packing": True, "lora_r": 32,
         "target_modules": ["all-linear"], "per_device_train_batch_size": 2, "num_train_epochs": 1,
         "learning_rate": 2e-4, "train_on_responses_only": False, "warmup_steps": 0.1, "seed": 42},
        {"special_tokens"},
    ),
    "factory.yaml": (
        LLAMA_FACTORY, "LLaMA-Factory",
        {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "dataset": ["identity", "alpaca_en_demo"],
         "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
         "chat_template": "llama3", "warmup_steps": 0.1, "packing": False, "optim": "adamw_torch",
         "max_grad_norm": None},
        {"max_samples"},
    ),
    "trl.yaml": (
        TRL, "TRL",
        {"model": "Qwen/Qwen2.5-0.5B", "dataset": "trl-lib/Capybara", "lora_alpha": 32, "lora_dropout": 0.05,
         "max_seq_length": 1024, "packing": True, "train_on_responses_only": False,
         "per_device_train_batch_size": 8},
        set(),
    ),
    "unsloth.yaml": (
        UNSLOTH, "Unsloth",
        {"model": "unsloth/Qwen3-4B", "dataset": "yahma/alpaca-cleaned", "lora_r": 64, "lora_alpha": 16,
         "max_steps": None, "save_steps": None, "train_on_responses_only": True, "num_train_epochs": 3},
        set(),
    ),
    "unsloth.sh": (
        UNSLOTH_SCRIPT, "unsloth-cli.py",
        {"model": "unsloth/llama-3-8b", "lora_r": 16, "learning_rate": 2e-4, "max_steps": 400, "use_dora": True,
         "quantization_method": ["q8_0", "q4_k_m"], "train_on_responses_only": False},
        {"push_gguf"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_config_means_the_same_here(oribi, tmp_path, name):
    text, dialect, expected, unsupported = FILES[name]
    path, written = tmp_path / name, tmp_path / "config.yaml"
    path.write_text(text)
    result = oribi("convert", path, "--output", written, "--json")
    assert result.code == 0, result.err
    (record,) = result.records
    assert record["dialect"] == dialect
    assert {key: record["values"].get(key) for key in expected} == expected
    assert set(record["unsupported"]) == unsupported
    config, notes = read_config(written)
    assert notes == []
    assert config.model == expected["model"]
    for key in record["unsupported"]:
        assert f"not taken over: {key}" in written.read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for(tmp_path, name):
    text = FILES[name][0]
    path = tmp_path / name
    path.write_text(text)
    found = convert_file(path)
    told = " ".join([*found.notes, *found.idle, *found.unsupported, *found.values])
    for line in text.splitlines():
        key, colon, value = line.strip().partition(":")
        if (
            colon
            and value.strip()
            and not line.startswith((" ", "-"))
            and value.strip() not in ("false", "0")
        ):
            assert key in told, key


def test_names_of_llama_factorys_table_become_files(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"hf_hub_url": "x/alpaca"}})
    )
    path = tmp_path / "sft.yaml"
    path.write_text(LLAMA_FACTORY)
    assert convert_file(path).values["dataset"] == [str(tmp_path / "identity.json"), "x/alpaca"]


def test_full_finetuning_stays_full(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text("model_name_or_path: m/n\nfinetuning_type: full\ndataset: d\ncutoff_len: 64\n")
    values = convert_file(path).values
    assert values["full_finetuning"] is True
    assert values["load_in_4bit"] is False
    path.write_text("model_name_or_path: m/n\ndataset_name: d\n")
    assert convert_file(path).values["full_finetuning"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: blue\n", "neither Axolotl's"),
        ("- a\n- b\n", "expected lines of 'key: value'"),
        ("a: [1\n", ":2: no valid YAML"),
        ("", "expected lines"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        convert_file(tmp_path / "absent.yaml")


def test_a_config_without_data_is_written_and_said(oribi, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model_name_or_path: m/n\nfinetuning_type: lora\n")
    result = oribi("convert", path, "-o", tmp_path / "out.yaml")
    assert result.code == 1
    assert "names no dataset" in result.err
    assert (tmp_path / "out.yaml").is_file()
