"""A tiny model with a ChatML tokenizer, and rows to train it on."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from oribi import SFTConfig, SFTTrainer
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from tests.data.tokenizers_small import CHATML, byte_level
from tests.models.tiny import tiny_config, tiny_pair

VOCABULARY = 512
WORDS = [
    "the",
    "red",
    "fox",
    "runs",
    "over",
    "old",
    "hills",
    "and",
    "sees",
    "a",
    "blue",
    "bird",
    "near",
    "some",
    "deep",
    "lake",
]


def chatml_tokenizer():
    tokenizer = copy.deepcopy(byte_level(("<|endoftext|>", "<|im_start|>")))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def write_tiny_model(folder: Path, **changes: object) -> Path:
    """Writes a random two-layer llama with a ChatML tokenizer, its config changed; returns its folder."""
    tokenizer = chatml_tokenizer()
    config = tiny_config(
        "llama",
        vocab_size=VOCABULARY,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"num_hidden_layers": 2, **changes},
    )
    tiny_pair(config)[1].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load(tiny_folder):
    """Loads the tiny model with LoRA whose B is not zero, so that every gradient is seen."""

    def load_with_lora(r: int = 4, lora: bool = True, **arguments) -> tuple[PeftModel, object]:
        settings = {"dtype": "float32", "device_map": "cpu", "max_seq_length": 128, **arguments}
        model, tokenizer = load_model(str(tiny_folder), **settings)
        if not lora:
            return model, tokenizer
        model = attach_lora(model, r=r, lora_alpha=r, use_gradient_checkpointing=False)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
        return model, tokenizer

    return load_with_lora


def some_conversations(count: int) -> Dataset:
    """Conversations of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words(2 + i % 5)},
                    {"role": "assistant", "content": words(1 + i % 7)},
                ]
            }
            for i in range(count)
        ]
    )


@pytest.fixture
def conversations() -> Dataset:
    return some_conversations(24)


@pytest.fixture
def make(load, tmp_path):
    """A trainer on the tiny model; keywords go to SFTConfig, `extra` to the class."""

    def make_trainer(rows=None, extra=None, cls=SFTTrainer, model=None, config=SFTConfig, **settings):
        model, tokenizer = load() if model is None else model
        usual = {
            "max_steps": 2,
            "disable_tqdm": True,
            "save_strategy": "no",
            "output_dir": str(tmp_path / "run"),
        }
        rows = some_conversations(8) if rows is None else rows
        return cls(
            model, config(**{**usual, **settings}), train_dataset=rows, tokenizer=tokenizer, **(extra or {})
        )

    return make_trainer
