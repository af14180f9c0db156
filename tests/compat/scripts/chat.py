import unsloth
from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from datasets import load_dataset
from trl import SFTTrainer, SFTConfig
from transformers import DataCollatorForSeq2Seq, TextStreamer

model, tokenizer = FastLanguageModel.from_pretrained("tiny", max_seq_length = 128, load_in_4bit = True)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 16, use_gradient_checkpointing = "unsloth")
tokenizer = get_chat_template(tokenizer, chat_template = "chatml",
    mapping = {"role" : "from", "content" : "value", "user" : "human", "assistant" : "gpt"}, map_eos_token = True)
def formatting_prompts_func(examples):
    convos = examples["conversations"]
    return { "text" : [tokenizer.apply_chat_template(c, tokenize = False, add_generation_prompt = False) for c in convos] }
dataset = load_dataset("json", data_files = "sharegpt.jsonl", split = "train")
dataset = standardize_sharegpt(dataset)
tokenizer = get_chat_template(tokenizer, chat_template = "chatml")
dataset = dataset.map(formatting_prompts_func, batched = True)
trainer = SFTTrainer(
    model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text", max_seq_length = 128,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer), packing = False,
    args = SFTConfig(per_device_train_batch_size = 2, gradient_accumulation_steps = 1, warmup_steps = 1, max_steps = 2,
        learning_rate = 2e-4, logging_steps = 1, optim = "adamw_8bit", seed = 3407, output_dir = "outputs", report_to = "none"),
)
trainer = train_on_responses_only(
    trainer, instruction_part = "<|im_start|>user\n", response_part = "<|im_start|>assistant\n",
)
tokenizer.decode(trainer.train_dataset[0]["input_ids"])
space = tokenizer(" ", add_special_tokens = False).input_ids[0]
tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[0]["labels"]])
trainer_stats = trainer.train()
FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "the red fox"}]
inputs = tokenizer.apply_chat_template(
    messages,
    tokenize = True,
    add_generation_prompt = True, # Must add for generation
    return_tensors = "pt",
).to(model.device)
outputs = model.generate(input_ids = inputs, streamer = TextStreamer(tokenizer, skip_prompt = True), max_new_tokens = 4,
                         use_cache = True, temperature = 1.5, min_p = 0.1)
assert outputs.shape[1] > inputs.shape[1]
lengths = [len(tokenizer.apply_chat_template(c, tokenize = True)) for c in dataset["conversations"]]
assert max(lengths) > 5
