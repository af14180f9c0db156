from unsloth import FastModel
import pandas as pd
from datasets import Dataset, load_dataset
model, tokenizer = FastModel.from_pretrained(model_name = "tiny", max_seq_length = 128, load_in_4bit = True,
                                             load_in_8bit = False, full_finetuning = False)
model = FastModel.get_peft_model(model, finetune_vision_layers = False, finetune_language_layers = True,
    finetune_attention_modules = True, finetune_mlp_modules = True, r = 8, lora_alpha = 8, lora_dropout = 0, bias = "none",
    random_state = 3407)
reasoning = load_dataset("json", data_files = "reasoning.jsonl", split = "train")
def generate_conversation(examples):
    return { "conversations": [[{"role" : "user", "content" : p}, {"role" : "assistant", "content" : f"<think>{t}</think>{s}"}]
             for p, t, s in zip(examples["problem"], examples["thinking"], examples["solution"])] }
texts = [tokenizer.apply_chat_template(c, tokenize = False)
         for c in reasoning.map(generate_conversation, batched = True)["conversations"]]
data = pd.Series(texts)
data.name = "text"
combined_dataset = Dataset.from_pandas(pd.DataFrame(data)).shuffle(seed = 3407)
from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = combined_dataset, eval_dataset = None,
    args = SFTConfig(dataset_text_field = "text", per_device_train_batch_size = 2, gradient_accumulation_steps = 2,
        warmup_steps = 1, max_steps = 2, learning_rate = 2e-4, logging_steps = 1, optim = "adamw_8bit",
        weight_decay = 0.001, lr_scheduler_type = "linear", seed = 3407, report_to = "none"))
trainer_stats = trainer.train()
text = tokenizer.apply_chat_template([{"role" : "user", "content" : "the red fox"}], tokenize = False,
    add_generation_prompt = True, enable_thinking = False)
_ = model.generate(**tokenizer(text, return_tensors = "pt").to(model.device), max_new_tokens = 4, temperature = 0.7, top_p = 0.8, top_k = 20)
