from unsloth import *
from trl import *
from datasets import load_dataset
model, processor = FastModel.from_pretrained("tiny", max_seq_length = 256, load_in_4bit = True)
model = FastModel.get_peft_model(model, finetune_vision_layers = False, r = 8, lora_alpha = 8)
processor = get_chat_template(processor, chat_template = "gemma-3")
ds = standardize_data_formats(load_dataset("json", data_files = "sharegpt.jsonl", split = "train"))
ds = ds.map(lambda e: {"text": [processor.apply_chat_template(c, tokenize = False).removeprefix("<bos>") for c in e["conversations"]]}, batched = True)
trainer = SFTTrainer(model = model, train_dataset = ds, processing_class = processor.tokenizer,
    args = SFTConfig(dataset_text_field = "text", max_steps = 2, report_to = "none", output_dir = "outputs"))
unsloth_train(train_on_responses_only(trainer))
processor.decode([processor.pad_token_id if x == -100 else x for x in trainer.train_dataset[0]["labels"]]).replace(processor.tokenizer.pad_token, " ")
messages = [{"role": "user", "content": [{"type": "text", "text": "the red fox"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt = True)
out = model.generate(**processor(text = [text], return_tensors = "pt").to(model.device), max_new_tokens = 4)
inputs = processor.apply_chat_template(messages, add_generation_prompt = True, tokenize = True, return_dict = True, return_tensors = "pt")
out = model.generate(**inputs.to(model.device), max_new_tokens = 4)
