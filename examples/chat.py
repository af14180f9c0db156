"""Train a chat model on conversations, and ask it a question."""

import argparse

from oribi import FastLanguageModel, SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct")
parser.add_argument("--data", default="examples/data/chat.jsonl")
parser.add_argument("--output", default="runs/chat")
parser.add_argument("--max_steps", type=int, default=30)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
trainer = SFTTrainer(
    model,
    SFTConfig(output_dir=options.output, max_steps=options.max_steps, learning_rate=2e-4, warmup_steps=3),
    train_dataset=options.data,
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained_merged(f"{options.output}/adapter", tokenizer, save_method="lora")

FastLanguageModel.for_inference(model)
question = [{"role": "user", "content": "How can I tell whether an egg is fresh?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt").to(
    model.device
)
answer = model.generate(**inputs, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
