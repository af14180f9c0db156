from unsloth import FastLanguageModel, is_bfloat16_supported, PatchDPOTrainer
from datasets import load_dataset
from trl import ORPOConfig, ORPOTrainer
PatchDPOTrainer()
model, tokenizer = FastLanguageModel.from_pretrained(model_name = "tiny", max_seq_length = 128, dtype = None, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 16)
orpo_trainer = ORPOTrainer(
    model = model, train_dataset = load_dataset("json", data_files = "pairs.jsonl", split = "train"), tokenizer = tokenizer,
    args = ORPOConfig(max_length = 128, max_prompt_length = 64, max_completion_length = 64, per_device_train_batch_size = 2,
        gradient_accumulation_steps = 1, beta = 0.1, logging_steps = 1, optim = "adamw_8bit", lr_scheduler_type = "linear",
        max_steps = 2, fp16 = not is_bfloat16_supported(), bf16 = is_bfloat16_supported(), output_dir = "outputs", report_to = "none"),
)
orpo_trainer.train()
