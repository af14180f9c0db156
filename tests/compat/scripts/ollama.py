from unsloth import FastLanguageModel, to_sharegpt, standardize_sharegpt, apply_chat_template
from datasets import load_dataset
from trl import SFTTrainer, SFTConfig
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 256, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 8)
dataset = load_dataset("json", data_files = "alpaca.jsonl", split = "train")
dataset = to_sharegpt(dataset, merged_prompt = "{instruction}[[\nYour input is:\n{input}]]", output_column_name = "output",
                      conversation_extension = 2)
dataset = standardize_sharegpt(dataset)
chat_template = """Below are some instructions that describe some tasks. Write responses that appropriately complete each request.

### Instruction:
{INPUT}

### Response:
{OUTPUT}

### Instruction:
{INPUT}

### Response:
{OUTPUT}"""
dataset = apply_chat_template(dataset, tokenizer = tokenizer, chat_template = chat_template)
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset, args = SFTConfig(
    dataset_text_field = "text", max_seq_length = 256, per_device_train_batch_size = 2, gradient_accumulation_steps = 1, max_steps = 2,
    optim = "adamw_8bit", output_dir = "outputs", report_to = "none"))
trainer.train()
if True: model.save_pretrained_gguf("model", tokenizer, quantization_method = "Q8_0")
print(tokenizer._ollama_modelfile)
