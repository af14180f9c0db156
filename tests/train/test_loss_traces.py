"""Twenty steps of QLoRA have the losses of transformers with PEFT and bitsandbytes: the families of docs/benchmarks.md's table."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer
from tests.models.tiny_checkpoint import checkpoint

STEPS, TOLERANCE = 20, 0.003
SETTINGS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 5e-3,
    "optim": "adamw_torch", "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.01, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "seed": 3407, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def rows() -> Dataset:
    """Rows of several lengths, whose first tokens are not trained, each seen some times."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (12 + 5 * (i % 4),), generator=generator).tolist() for i in range(8)]
    return Dataset.from_dict({
        "input_ids": ids, "labels": [[-100] * 4 + one[4:] for one in ids], "attention_mask": [[1] * len(one) for one in ids],
    })  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "gemma4_unified_text", "gemma4_text", "ministral3"])
def test_twenty_steps_have_the_losses_of_transformers_with_peft(model_type, tmp_path):
    checkpoint(tmp_path / "base", model_type, vocab_size_per_layer_input=384)
    ours, tokenizer = load_model(str(tmp_path / "base"), dtype=torch.float32, max_seq_length=64)
    kept = [name for name, module in ours.named_modules() if type(module) is nn.Linear]
    ours = attach_lora(ours, r=8, lora_alpha=16, target_modules="all-linear")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    ours.save_pretrained(str(tmp_path / "adapter"))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=kept,
        ),
    )  # fmt: skip
    for module in theirs.modules():
        if type(module).__name__ == "Linear4bit":  # an eval forward would repack it
            module.support_avx512bf16_for_cpu = False
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    mine = losses(
        SFTTrainer(
            model=ours, processing_class=tokenizer, train_dataset=rows(),
            args=SFTConfig(output_dir=str(tmp_path / "ours"), max_length=64, **SETTINGS),
        )
    )  # fmt: skip
    # at the left, padding would move the positions that transformers scales Ministral 3's queries by
    tokenizer.padding_side = "right"
    reference = losses(
        Trainer(
            model=theirs, train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(tokenizer),
            args=TrainingArguments(output_dir=str(tmp_path / "theirs"), **SETTINGS),
        )
    )  # fmt: skip
    assert len(mine) == len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.3  # something was learnt, which a wrong gradient would show in
    assert max(abs(a - b) for a, b in zip(mine, reference)) < TOLERANCE, list(zip(mine, reference))
