"""One model and the same batches in four training loops; as a script, prints a loop's losses as JSON."""

import json
import sys

import torch
import transformers
import trl
from datasets import Dataset, load_from_disk
from transformers import TrainingArguments

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.kernels.dispatch import reference_only
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer

STEPS, BATCH, ACCUMULATION = 3, 2, 2
# the rows make two full steps and a last one of a single micro-batch
ROWS = BATCH * (ACCUMULATION * (STEPS - 1) + 1)
SETTINGS = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 1,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "bf16": False,
}


def load(folder: str) -> tuple[torch.nn.Module, object]:
    """The tiny model in NF4 with LoRA away from its start."""
    model, tokenizer = load_model(folder, dtype="float32", device_map="cpu", max_seq_length=128)
    model = attach_lora(model, r=4, lora_alpha=8, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model, tokenizer


def logged(trainer: transformers.Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def oribi_losses(model, tokenizer, rows: Dataset, output: str) -> list[float]:
    args = SFTConfig(output_dir=output, **SETTINGS)
    return logged(SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer))


def trl_losses(model, tokenizer, rows: Dataset, output: str) -> list[float]:
    # TRL would round the LoRA weights of a 4-bit model to bfloat16
    model.get_base_model().is_loaded_in_4bit = False
    args = trl.SFTConfig(output_dir=output, gradient_checkpointing=False, **SETTINGS)
    return logged(trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer))


def transformers_losses(model, tokenizer, rows: Dataset, output: str) -> list[float]:
    args = TrainingArguments(output_dir=output, **SETTINGS)
    collator = PaddedCollator(tokenizer.pad_token_id)
    return logged(transformers.Trainer(model, args, train_dataset=rows, data_collator=collator))


def bare_losses(model, tokenizer, rows: Dataset, output: str) -> list[float]:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    collate, examples, losses = PackCollator(), list(rows), []
    batches = [collate(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]
    model.train()
    for first in range(0, len(batches), ACCUMULATION):
        window = batches[first : first + ACCUMULATION]
        targets = sum(int((batch["labels"] != -100).sum()) for batch in window)
        total = 0.0
        for batch in window:
            loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


LOOPS = {"oribi": oribi_losses, "trl": trl_losses, "transformers": transformers_losses, "bare": bare_losses}

if __name__ == "__main__":
    loop, folder, rows, output = sys.argv[1:]
    with (
        reference_only()
    ):  # where Triton's interpreter is on for TRL's sake, oribi's own kernels need not take part
        print(json.dumps(LOOPS[loop](*load(folder), load_from_disk(rows), output)))
