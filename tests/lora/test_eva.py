"""Pairs that begin with the rows: PEFT's own values, ordinary files, and the same ranks where a training is resumed."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import AutoModelForCausalLM

from oribi.config import PROJECTIONS
from oribi.errors import ConfigError
from oribi.lora.attach import attach_lora
from oribi.lora.eva import directions_wanted, start_from_rows, waits_for_rows
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.rows import batches_for_start
from oribi.train.trainer import SFTTrainer
from tests.train.conftest import some_conversations

IDS = torch.arange(3, 43)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def make(tiny_folder, tmp_path):
    """A trainer of the tiny model whose pairs begin with EVA."""

    def trainer(load_in_4bit: bool, max_steps: int = 2, **settings) -> SFTTrainer:
        model, tokenizer = load_model(
            str(tiny_folder), dtype="float32", device_map="cpu", max_seq_length=128, load_in_4bit=load_in_4bit
        )
        model = attach_lora(model, **{"r": 4, "lora_alpha": 4, "init_lora_weights": "eva", **settings})
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=max_steps, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=2, disable_tqdm=True,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        return SFTTrainer(model, args, train_dataset=some_conversations(24), processing_class=tokenizer)

    return trainer


def test_pairs_begin_as_pefts_on_the_same_rows(make, tiny_folder):
    trainer = make(load_in_4bit=False)
    model = trainer.model
    assert waits_for_rows(model)
    batches = batches_for_start(trainer._all_rows(), directions_wanted(model), 3407)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="eva",
        eva_config=EvaConfig(),
        target_modules=list(PROJECTIONS),
    )
    reference = get_peft_model(reference, config)
    initialize_lora_eva_weights(reference, batches, show_progress_bar=False)
    said = start_from_rows(model, batches)
    assert not waits_for_rows(model)
    ranks = reference.peft_config["default"].rank_pattern
    assert model.peft_config["default"].rank_pattern == ranks
    assert f"ranks of {min(ranks.values())} to {max(ranks.values())}" in said
    wanted = {name: p for name, p in reference.named_parameters() if "lora_A" in name}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            # a direction is the same as its opposite
            torch.testing.assert_close(parameter.abs(), wanted[name].abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_trained_adapter_is_an_ordinary_one_and_a_resumed_training_has_its_ranks(
    make, tiny_folder, tmp_path
):
    trainer = make(load_in_4bit=True)
    trainer.train()
    tuned, config = logits(trainer.model), trainer.model.peft_config["default"]
    assert config.rank_pattern
    base = load_model(str(tiny_folder), dtype="float32", device_map="cpu", max_seq_length=128)[0]
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint-2")
    assert again.peft_config["default"].init_lora_weights is True
    assert torch.equal(logits(again), tuned)
    resumed = make(load_in_4bit=True, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.model.peft_config["default"].rank_pattern == config.rank_pattern
    through = make(load_in_4bit=True, max_steps=4)
    through.train()
    steps = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (resumed, through)]
    assert steps[0][-2:] == pytest.approx(steps[1][-2:], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 64}, "has 64 inputs, and rank 64 at rho = 2 may ask for 128"),
        ({"target_modules": ["q_proj", "lm_head"]}, "there is a pair on the head"),
    ],
)
def test_pairs_that_cannot_begin_with_rows_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(load_in_4bit=False, **settings).train()


def test_too_few_trained_tokens_are_refused(make):
    trainer = make(load_in_4bit=False)
    with pytest.raises(ConfigError, match="the rows have .* trained tokens, and its pairs need 9,*999"):
        batches_for_start(trainer._all_rows(), 9999, 0)
