"""Train a model to think in <think> tags before it answers, then export it as GGUF."""

import argparse

from oribi import FastLanguageModel, SFTConfig, SFTTrainer, save_gguf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct")
parser.add_argument("--data", default="examples/data/reasoning.jsonl")
parser.add_argument("--output", default="runs/reasoning")
parser.add_argument("--max_steps", type=int, default=60)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=1024)
model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64, target_modules="all-linear")
trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir=options.output, max_steps=options.max_steps, learning_rate=2e-4, lr_scheduler_type="cosine"
    ),
    train_dataset=options.data,
    processing_class=tokenizer,
)
trainer.train()
save_gguf(model, f"{options.output}/gguf", tokenizer, "q8_0")
