"""Train tool calls: rows have `tools`, calls, tool results and final answers; calls and answers are trained."""

import argparse

from oribi import FastLanguageModel, SFTConfig, SFTTrainer, inspect_data

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="its chat template must know tools")
parser.add_argument("--data", default="examples/data/tools.jsonl")
parser.add_argument("--output", default="runs/tools")
parser.add_argument("--max_steps", type=int, default=30)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=2048)
inspect_data(options.data, tokenizer, max_seq_length=2048, rows=1)  # which tokens of a call are trained
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
trainer = SFTTrainer(
    model,
    SFTConfig(output_dir=options.output, max_steps=options.max_steps),
    train_dataset=options.data,
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained_merged(f"{options.output}/adapter", tokenizer, save_method="lora")
