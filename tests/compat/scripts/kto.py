from unsloth import FastLanguageModel
from trl import KTOConfig, KTOTrainer
from datasets import load_dataset
model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 128, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 16)
trainer = KTOTrainer(model = model, processing_class = tokenizer, train_dataset = load_dataset("json", data_files = "judged.jsonl", split = "train"),
    args = KTOConfig(per_device_train_batch_size = 2, gradient_accumulation_steps = 1, max_steps = 2, learning_rate = 5e-7,
        max_length = 128, max_prompt_length = 64, logging_steps = 1, output_dir = "outputs", report_to = "none"))
trainer.train()
