from unsloth import FastModel, is_bfloat16_supported
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, DataCollatorWithPadding
from datasets import load_dataset
import torch
NUM_CLASSES = 3
id2label = {0: "calm", 1: "glad", 2: "cross"}
label2id = {v: k for k, v in id2label.items()}
model, tokenizer = FastModel.from_pretrained(
    model_name = "tiny",
    load_in_4bit = True,
    max_seq_length = 128,
    dtype = None,
    auto_model = AutoModelForSequenceClassification,
    num_labels = NUM_CLASSES,
    gpu_memory_utilization = 0.8,
    id2label = id2label,
    label2id = label2id,
)
model = FastModel.get_peft_model(model, r = 8, target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"], lora_alpha = 8,
    lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407, task_type = "SEQ_CLS")
print("trainable:", sum(p.numel() for p in model.parameters() if p.requires_grad))
dataset = load_dataset("json", data_files = "labelled.jsonl", split = "train")
dataset = dataset.map(lambda x: tokenizer(x["text"], truncation = True, max_length = 128), batched = True)
split = dataset.train_test_split(test_size = 0.25, seed = 0)
trainer = Trainer(
    model = model,
    processing_class = tokenizer,
    train_dataset = split["train"],
    eval_dataset = split["test"],
    data_collator = DataCollatorWithPadding(tokenizer),
    args = TrainingArguments(
        per_device_train_batch_size = 4, gradient_accumulation_steps = 1, warmup_steps = 1, max_steps = 3,
        fp16 = False, bf16 = False, use_cpu = True, optim = "adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        learning_rate = 5e-4, weight_decay = 0.001, lr_scheduler_type = "cosine", seed = 3407, output_dir = "outputs",
        report_to = "none", logging_steps = 1, eval_strategy = "steps", eval_steps = 3, save_strategy = "no",
    ),
)
stats = trainer.train()
assert "eval_loss" in trainer.state.log_history[-2]
FastModel.for_inference(model)
inputs = tokenizer(["the red fox"], return_tensors = "pt").to(model.device)
with torch.no_grad():
    print(id2label[model(**inputs).logits.argmax(-1).item()])
model.save_pretrained("classifier_lora")
tokenizer.save_pretrained("classifier_lora")
model, tokenizer = FastModel.from_pretrained("classifier_lora", auto_model = AutoModelForSequenceClassification, num_labels = 3)
if False: model.push_to_hub("hf/classifier", token = "")
