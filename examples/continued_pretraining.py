"""Continue pretraining on plain text; embeddings and head are trained as well, at their own learning rate."""

import argparse

from oribi import FastLanguageModel, SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
parser.add_argument("--data", default="examples/data/field-notes.txt")
parser.add_argument("--output", default="runs/field-notes")
parser.add_argument("--max_steps", type=int, default=30)
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=256)
model = FastLanguageModel.get_peft_model(
    model,
    r=32,
    lora_alpha=32,
    use_rslora=True,
    target_modules="all-linear",
    modules_to_save=["embed_tokens", "lm_head"],
)
trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir=options.output,
        max_steps=options.max_steps,
        learning_rate=5e-5,
        embedding_learning_rate=5e-6,  # embeddings of rare words move far on few examples
        packing=True,
    ),
    train_dataset=options.data,  # documents longer than max_seq_length are split, not cut
    processing_class=tokenizer,
)
trainer.train()
model.save_pretrained_merged(f"{options.output}/merged", tokenizer)
