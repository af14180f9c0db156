"""Train a model to complete prompts without a chat template; only the completion is trained."""

import argparse

from oribi import FastLanguageModel, SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
parser.add_argument("--data", default="examples/data/completion.jsonl")
parser.add_argument("--output", default="runs/completion")
parser.add_argument("--max_steps", type=int, default=30)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
trainer = SFTTrainer(
    model,
    SFTConfig(output_dir=options.output, max_steps=options.max_steps, packing=True),
    train_dataset=options.data,
    processing_class=tokenizer,
)
trainer.train()
print(f"{trainer.data_reports['train'].trained_tokens} tokens of completions were trained per epoch")
model.save_pretrained_merged(f"{options.output}/adapter", tokenizer, save_method="lora")
