"""Train on preferences with TRL's DPOTrainer; the model without its adapter is the reference.

Needs a GPU and `pip install "oribi[trl]"`.
"""

import argparse

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from oribi import FastLanguageModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct")
parser.add_argument("--data", default="examples/data/preferences.jsonl")
parser.add_argument("--output", default="runs/dpo")
parser.add_argument("--max_steps", type=int, default=30)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir=options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-5,
        beta=0.1,
        max_length=512,
        gradient_checkpointing=False,  # oribi decides what its layers keep
        bf16=False,  # and in which precision they compute
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained_merged(f"{options.output}/adapter", tokenizer, save_method="lora")
