"""What a user's type checker sees of oribi: mypy reads this file strictly (`make types`), and nothing runs it."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from typing_extensions import assert_type

from oribi import (
    ConfigError,
    DataError,
    ExportError,
    FastLanguageModel,
    FastModel,
    ModelError,
    OribiError,
    SFTConfig,
    SFTTrainer,
    TrainingError,
    __version__,
    add_new_tokens,
    get_chat_template,
    inspect_data,
    is_bf16_supported,
    is_bfloat16_supported,
    prepare_dataset,
    print_quantization_methods,
    push_gguf,
    push_merged,
    save_gguf,
    save_merged,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)


def train() -> None:
    model, tokenizer = FastLanguageModel.from_pretrained("some/model", max_seq_length=2048, load_in_4bit=True)
    add_new_tokens(model, tokenizer, ["<name>"])
    tokenizer = get_chat_template(tokenizer, "chatml")
    adapted = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules="all-linear")
    prepared = prepare_dataset("rows.jsonl", tokenizer, max_seq_length=2048)
    assert_type(prepared.report.rows_in, int)
    inspect_data("rows.jsonl", tokenizer, max_seq_length=2048)
    settings = SFTConfig(output_dir="runs/one", max_steps=60, learning_rate=2e-4, packing=True)
    trainer = SFTTrainer(adapted, settings, train_dataset="rows.jsonl", processing_class=tokenizer)
    trainer = train_on_responses_only(trainer)
    trainer.train(resume_from_checkpoint=True)
    save_merged(adapted, "merged", tokenizer)
    save_gguf(adapted, "gguf", tokenizer, ["q4_k_m"])
    push_merged(adapted, "me/model", tokenizer)
    push_gguf(adapted, "me/model", tokenizer, "q8_0")


def whole_model() -> PreTrainedModel | Any:
    model, _ = FastModel.from_pretrained("some/model")
    return FastModel.for_inference(model)


def shapes(rows: Dataset) -> Any:
    return to_sharegpt(standardize_data_formats(standardize_sharegpt(rows)))


def dtype() -> str:
    print_quantization_methods()
    assert_type(is_bf16_supported(), bool)
    assert_type(__version__, str)
    return "bfloat16" if is_bfloat16_supported() else "float16"


def words(error: OribiError) -> str:
    kinds: tuple[type[OribiError], ...] = (ConfigError, DataError, ModelError, ExportError, TrainingError)
    return f"{error} {isinstance(error, kinds)}"
