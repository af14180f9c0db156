from unsloth import FastLanguageModel, add_new_tokens
from unsloth import is_bfloat16_supported, UnslothTrainer, UnslothTrainingArguments
from datasets import load_dataset
max_seq_length = 128
for name in ("tiny", "tiny_tied"): # one model with a head of its own, one whose head is its embeddings
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = name, max_seq_length = max_seq_length, dtype = None, load_in_4bit = True,
    )
    add_new_tokens(model, tokenizer, new_tokens = ["<hills>", "<lake>"])
    model = FastLanguageModel.get_peft_model(
        model,
        r = 8, # Choose any number > 0 ! Suggested 8, 16, 32, 64, 128
        target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                          "gate_proj", "up_proj", "down_proj",

                          "embed_tokens", "lm_head",], # Add for continual pretraining
        lora_alpha = 32,
        lora_dropout = 0, # Supports any, but = 0 is optimized
        bias = "none",    # Supports any, but = "none" is optimized
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
        use_rslora = True,
        loftq_config = None,
    )
    EOS_TOKEN = tokenizer.eos_token # Must add EOS_TOKEN
    wiki = """Article
### Text:
<hills> {} <lake>"""
    def formatting_prompts_func(examples):
        return { "text" : [wiki.format(text) + EOS_TOKEN for text in examples["text"]], }
    dataset = load_dataset("json", data_files = "texts.jsonl", split = "train")
    dataset = dataset.train_test_split(train_size = 0.5, seed = 3407)["train"]
    dataset = dataset.map(formatting_prompts_func, batched = True,)
    def arguments():
        return UnslothTrainingArguments(
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 2,
            max_steps = 2,
            warmup_ratio = 0.1,
            learning_rate = 5e-3,
            embedding_learning_rate = 1e-3, # 2-10x smaller than learning_rate
            fp16 = not is_bfloat16_supported(),
            bf16 = is_bfloat16_supported(),
            logging_steps = 1,
            optim = "adamw_8bit",
            weight_decay = 0.00,
            lr_scheduler_type = "cosine",
            seed = 3407,
            output_dir = "outputs",
            report_to = "none",
        )
    trainer = UnslothTrainer(
        model = model,
        tokenizer = tokenizer,
        train_dataset = dataset,
        dataset_text_field = "text",
        max_seq_length = max_seq_length,
        dataset_num_proc = 2,
        args = arguments(),
    )
    trainer_stats = trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {5e-3, 1e-3}

    # The second phase: instructions, on the same model
    alpaca = """### Instruction:
{}

### Response:
{}"""
    def formatting_instructions(conversations):
        texts = [alpaca.format(a, b) + EOS_TOKEN for a, b in zip(conversations["instruction"], conversations["output"])]
        return { "text" : texts, }
    alpaca_dataset = load_dataset("json", data_files = "alpaca.jsonl", split = "train")
    alpaca_dataset = alpaca_dataset.map(formatting_instructions, batched = True,)
    trainer = UnslothTrainer(
        model = model,
        tokenizer = tokenizer,
        train_dataset = alpaca_dataset,
        dataset_text_field = "text",
        max_seq_length = max_seq_length,
        dataset_num_proc = 2,
        args = arguments(),
    )
    trainer_stats = trainer.train()
    FastLanguageModel.for_inference(model)
    inputs = tokenizer([alpaca.format("<hills>", "")] * 1, return_tensors = "pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens = 4, use_cache = True)
    expected = model(**inputs).logits
    model.save_pretrained("cpt_lora")
    tokenizer.save_pretrained("cpt_lora")
    again, tokenizer = FastLanguageModel.from_pretrained("cpt_lora", max_seq_length = max_seq_length, load_in_4bit = True)
    FastLanguageModel.for_inference(again)
    assert (again(**inputs).logits == expected).all()
    if True: model.save_pretrained_merged("cpt_model", tokenizer, save_method = "merged_16bit",)
    if False: model.push_to_hub_merged("hf/model", tokenizer, save_method = "merged_16bit", token = "")
    if True: model.save_pretrained_gguf("cpt_model", tokenizer, quantization_method = "Q8_0")
