"""SFTTrainer: what it trains on, what it divides by, and what it leaves as it found it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from oribi.data.responses_only import train_on_responses_only
from oribi.errors import ConfigError, DataError, OribiError
from oribi.kernels.adamw import FlatAdamW
from oribi.train.arguments import SFTConfig, adopt
from oribi.train.trainer import SFTTrainer


@pytest.fixture
def train(load, tmp_path):
    """A trainer on the tiny model; keywords go to SFTConfig, `trainer_arguments` to SFTTrainer."""

    def make(dataset, trainer_arguments=None, model=None, folder="run", **settings) -> SFTTrainer:
        loaded, tokenizer = load() if model is None else model
        settings = {"max_steps": 3, "learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", **settings}
        args = SFTConfig(output_dir=str(tmp_path / folder), **settings)
        return SFTTrainer(loaded, args, train_dataset=dataset, tokenizer=tokenizer, **(trainer_arguments or {}))

    return make


def test_training_lowers_the_loss_and_reports_it(train, conversations, tmp_path):
    trainer = train(conversations, max_steps=20, learning_rate=5e-3)
    stats = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    assert stats.metrics["train_runtime"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:20]] == list(range(1, 21))
    assert {"loss", "learning_rate", "tokens_per_second", "grad_norm", "num_tokens"} <= lines[0].keys()
