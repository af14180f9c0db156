from unsloth import PatchDPOTrainer
PatchDPOTrainer()
from unsloth import FastLanguageModel, is_bfloat16_supported
from transformers import TrainingArguments
from trl import DPOTrainer, DPOConfig
from datasets import load_dataset
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 128, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 64, use_gradient_checkpointing = "unsloth", random_state = 3407)
dpo_trainer = DPOTrainer(
    model = model,
    ref_model = None,
    args = DPOConfig(per_device_train_batch_size = 2, gradient_accumulation_steps = 2, warmup_ratio = 0.1, max_steps = 2,
        learning_rate = 5e-6, logging_steps = 1, optim = "adamw_8bit", weight_decay = 0.0, lr_scheduler_type = "linear",
        seed = 42, output_dir = "outputs", report_to = "none"),
    beta = 0.1,
    train_dataset = load_dataset("json", data_files = "pairs.jsonl", split = "train"),
    tokenizer = tokenizer,
    max_length = 128,
    max_prompt_length = 64,
)
dpo_trainer.train()
