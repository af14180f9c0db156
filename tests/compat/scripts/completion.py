from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported
from datasets import load_dataset
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 128, dtype = None, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",],
    lora_alpha = 32, lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407, use_rslora = True,
    loftq_config = None)
dataset = load_dataset("json", data_files = "texts.jsonl", split = "train")
EOS_TOKEN = tokenizer.eos_token
dataset = dataset.map(lambda examples: { "text" : [t + EOS_TOKEN for t in examples["text"]] }, batched = True)
trainer = UnslothTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text",
    max_seq_length = 128, dataset_num_proc = 2,
    args = UnslothTrainingArguments(per_device_train_batch_size = 2, gradient_accumulation_steps = 2, max_steps = 2,
        warmup_steps = 1, learning_rate = 5e-5, embedding_learning_rate = 1e-5, fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(), logging_steps = 1, optim = "adamw_8bit", weight_decay = 0.0,
        lr_scheduler_type = "linear", seed = 3407, output_dir = "outputs", report_to = "none"))
trainer_stats = trainer.train()
