from unsloth import FastSentenceTransformer, is_bf16_supported
model = FastSentenceTransformer.from_pretrained(
    model_name = "encoder",
    max_seq_length = 64,
    full_finetuning = False,
)
model = FastSentenceTransformer.get_peft_model(
    model,
    r = 32,
    target_modules = ["query", "key", "value", "dense"],
    lora_alpha = 64,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
    task_type = "FEATURE_EXTRACTION",
)
from datasets import load_dataset
dataset = load_dataset("json", data_files = "anchors.jsonl", split = "train")
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses
from sentence_transformers.training_args import BatchSamplers
loss = losses.MultipleNegativesRankingLoss(model)
trainer = SentenceTransformerTrainer(
    model = model,
    train_dataset = dataset,
    loss = loss,
    args = SentenceTransformerTrainingArguments(
        output_dir = "embedding_outputs", num_train_epochs = 1, max_steps = 2, per_device_train_batch_size = 4,
        gradient_accumulation_steps = 2, learning_rate = 3e-5, fp16 = False, bf16 = False, use_cpu = True, logging_steps = 1,
        warmup_ratio = 0.03, report_to = "none", lr_scheduler_type = "constant_with_warmup", batch_sampler = BatchSamplers.NO_DUPLICATES,
    ),
)
stats = trainer.train()
query = model.encode("the red fox", convert_to_tensor = True)
documents = model.encode(["a red fox", "some lake"], convert_to_tensor = True)
print(model.similarity(query, documents))
model.save_pretrained("embedder_lora")
model.tokenizer.save_pretrained("embedder_lora")
model.save_pretrained_merged("embedder_merged", tokenizer = model.tokenizer, save_method = "merged_16bit")
model = FastSentenceTransformer.from_pretrained("embedder_lora", max_seq_length = 64, load_in_4bit = False)
if False: model.push_to_hub_merged("hf/embedder", tokenizer = model.tokenizer, save_method = "merged_16bit", token = "")
