import unsloth
import transformers as tf
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback, Trainer
from datasets import load_dataset
model, tokenizer = unsloth.FastLanguageModel.from_pretrained("tiny", 256, None, True)
model = unsloth.FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=True)
ds = load_dataset("json", data_files="texts.jsonl", split="train")
ds = ds.map(lambda b: tokenizer(b["text"], truncation=True, max_length=64), batched=True, remove_columns=["text"]).train_test_split(test_size=0.25, seed=0)
args = tf.TrainingArguments(output_dir="o_tr", per_device_train_batch_size=2, num_train_epochs=2, evaluation_strategy="epoch",
    save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2, logging_steps=1,
    warmup_ratio=0.1, group_by_length=True, report_to="none", optim="paged_adamw_8bit", overwrite_output_dir=True)
tr = Trainer(model=model, args=args, train_dataset=ds["train"], eval_dataset=ds["test"], tokenizer=tokenizer,
             data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), callbacks=[EarlyStoppingCallback(1)])
tr.train()
assert tr.evaluate()["eval_loss"] > 0
