from unsloth import FastLanguageModel
from trl import SFTConfig, SFTTrainer
from datasets import load_dataset
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 128, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 8)
dataset = load_dataset("json", data_files = "sharegpt.jsonl", split = "train")
def formatting_func(example):
    return "".join(turn["from"] + ": " + turn["value"] + "\n" for turn in example["conversations"]) + tokenizer.eos_token
split_dataset = dataset.train_test_split(test_size = 0.2, seed = 1)
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = split_dataset["train"], eval_dataset = split_dataset["test"],
    formatting_func = formatting_func, max_seq_length = 128, packing = True,
    args = SFTConfig(per_device_train_batch_size = 1, gradient_accumulation_steps = 1, max_steps = 2, warmup_steps = 1, optim = "adamw_8bit",
                     eval_strategy = "steps", eval_steps = 1, output_dir = "outputs", report_to = "none"))
print(trainer.train().metrics["train_loss"], trainer.evaluate()["eval_loss"])
