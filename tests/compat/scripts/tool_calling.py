from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, train_on_responses_only
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
import json
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 1024, load_in_4bit = False, load_in_16bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 16)
tokenizer = get_chat_template(tokenizer, chat_template = "qwen-2.5")
rows = load_dataset("json", data_files = "tools.jsonl", split = "train")
def render(row):
    tools = json.loads(row["tools"])
    return { "text": tokenizer.apply_chat_template(row["messages"], tools = tools, tokenize = False) }
rows = rows.map(render, remove_columns = rows.column_names)
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = rows, args = SFTConfig(
    dataset_text_field = "text", per_device_train_batch_size = 1, gradient_accumulation_steps = 1, max_steps = 2,
    warmup_ratio = 0.03, max_grad_norm = 0.3, learning_rate = 2e-4, logging_steps = 1, report_to = "none"))
trainer = train_on_responses_only(trainer)
trainer.train()
