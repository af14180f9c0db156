"""Embeddings and head in continued pretraining: their gradients, their learning rate, two phases, and every file they go into."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oribi import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, add_new_tokens
from oribi.config import PROJECTIONS
from oribi.errors import ExportError
from oribi.save.trained import LoadedModel
from tests.models.tiny_checkpoint import checkpoint
from tests.pairs import pairs
from tests.save.tiny_export import FAMILY_CHANGES, read_back
from tests.train.conftest import WORDS

IDS = torch.tensor([[5, 40, 6, 300, 7, 266, 9, 11, 5, 200]])
TABLES = [*PROJECTIONS, "embed_tokens", "lm_head"]
# how a script asks for embeddings and head
ASKED = {
    "targets": {"target_modules": TABLES},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": [*PROJECTIONS, "embed_tokens"]},
    "head": {"target_modules": [*PROJECTIONS, "lm_head"]},
    "untied by hand": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": False},
}


def load(path: Path, **arguments):
    settings = {"max_seq_length": 128, "dtype": "float32", "load_in_4bit": False, "device_map": "cpu"}
    return FastLanguageModel.from_pretrained(str(path), **{**settings, **arguments})


def adapt(model, **arguments):
    """LoRA as these scripts ask for it, every trained weight off its initial value."""
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, use_rslora=True, random_state=3407, **arguments
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def trainer_of(model, tokenizer, folder: Path, **arguments) -> UnslothTrainer:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(16, (12,), generator=generator).tolist() for _ in range(8)]
    texts = [" ".join(["<hills>", *(WORDS[i] for i in words), "<lake>", "and"]) for words in drawn]
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 5e-3,
        "embedding_learning_rate": 1e-3, "optim": "adamw_8bit", "warmup_steps": 0, "save_strategy": "no",
        "disable_tqdm": True, "output_dir": str(folder), "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    return UnslothTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        dataset_text_field="text",
        max_seq_length=128,
        args=UnslothTrainingArguments(**{**settings, **arguments}),
    )


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.float()


def apart(model, expected: torch.Tensor, ids: torch.Tensor = IDS) -> float:
    return ((logits(model, ids) - expected).norm() / expected.norm()).item()


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain(folder: Path, model) -> AutoModelForCausalLM:
    """transformers' model of a checkpoint with the weights that `model` computes with, those of NF4 dequantised."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = LoadedModel(model)
    state = {name: source.read(name, torch.device("cpu"), torch.float32) for name in source.shapes()}
    theirs.resize_token_embeddings(len(state["model.embed_tokens.weight"]), mean_resizing=False)
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    theirs.tie_weights()
    return theirs


# every two of these together in each run, and all three in `make test-all`
@pairs(
    {
        "model_type, tied": [
            ("llama", False),
            ("llama", True),
            ("qwen2", True),
            ("gemma", True),
            ("granite", False),
        ],
        "asked": list(ASKED),
        "load_in_4bit": [False, True],
    },
    others=pytest.mark.long,
)
def test_gradients_are_those_of_plain_peft(model_type, tied, asked, load_in_4bit, tmp_path):
    checkpoint(tmp_path / "base", model_type, tie_word_embeddings=tied, num_hidden_layers=2,
               **{"layer_types": ["sliding_attention", "full_attention"]} if model_type == "qwen2" else {})  # fmt: skip
    ours = adapt(load(tmp_path / "base", load_in_4bit=load_in_4bit)[0], **ASKED[asked])
    ours.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        plain(tmp_path / "base", ours), tmp_path / "adapter", is_trainable=True
    )
    theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert any("embed_tokens" in name or "lm_head" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() / expected[name].norm() < 1e-5, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_matrices_learn_at_the_embeddings_rate_and_lora_at_its_own(asked, tied, tmp_path):
    checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path / "base")
    model = adapt(model, **ASKED[asked])
    trainer = trainer_of(model, tokenizer, tmp_path, weight_decay=0.1)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (5e-3 if "lora_" in name else 1e-3), name
    assert not rates


def test_the_log_has_both_rates_and_the_main_one_is_lora_s(tmp_path, capsys):
    checkpoint(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    trainer = trainer_of(adapt(model, target_modules=TABLES), tokenizer, tmp_path)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == [5e-3, 2.5e-3]
    assert [entry["embedding_learning_rate"] for entry in logged] == [1e-3, 5e-4]
    assert "lr 5.00e-03" in capsys.readouterr().err


def test_a_rate_for_embeddings_that_are_not_trained_is_told(tmp_path, capsys):
    checkpoint(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    trainer_of(adapt(model), tokenizer, tmp_path).create_optimizer()
    assert "embedding_learning_rate = 0.001 has no effect" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_a_stopped_run_goes_on_with_the_embeddings_it_had(tied, tmp_path):
    checkpoint(tmp_path / "base", tie_word_embeddings=tied)

    def train(folder: str, resume: bool = False, **arguments):
        model, tokenizer = load(tmp_path / "base", load_in_4bit=True)
        trainer = trainer_of(
            adapt(model, target_modules=TABLES), tokenizer, tmp_path / folder, max_steps=4, **arguments
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2") if resume else None)
        return trained(model)

    whole = train("whole", save_strategy="steps", save_steps=2)
    again = train("again", resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
@pairs({"tied": [False, True], "asked": list(ASKED), "load_in_4bit": [False, True]}, others=pytest.mark.long)
def test_two_phases_and_new_tokens_come_back_from_every_file(tied, asked, load_in_4bit, tmp_path):
    checkpoint(tmp_path / "base", vocab_size=267, tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path / "base", load_in_4bit=load_in_4bit)
    add_new_tokens(model, tokenizer, ["<hills>", "<lake>"])
    model = adapt(model, **ASKED[asked])
    before = trained(model)
    for _ in range(2):  # pretraining, then fine-tuning of the same model
        trainer_of(model, tokenizer, tmp_path / "run", save_strategy="steps", save_steps=2).train()
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())
    ids = torch.tensor([[5, 267, 6, 268, 7, 267, 9]])
    expected = logits(model, ids)

    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter", load_in_4bit=None)[0], ids), expected)
    theirs = PeftModel.from_pretrained(plain(tmp_path / "base", model), tmp_path / "adapter")
    assert apart(theirs, expected, ids) < 1e-5

    model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer, save_method="merged_16bit", dtype="float32"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert apart(merged, expected, ids) < 1e-5
    stays_tied = tied and asked in ("targets", "saved", "embeddings")
    assert merged.config.tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) is not stays_tied

    written = model.save_pretrained_gguf(str(tmp_path / "model"), tokenizer, "f32")
    assert apart(read_back(written["gguf_files"][0]), expected, ids) < 1e-5


@pytest.mark.parametrize("settings", [{"target_modules": TABLES}, {}], ids=["whole", "rows of new tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_was_trained_in_float32_on_a_16_bit_model_comes_back_without_rounding(tied, settings, tmp_path):
    checkpoint(tmp_path / "base", vocab_size=267, tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path / "base", dtype="bfloat16", load_in_4bit=True)
    add_new_tokens(model, tokenizer, ["<hills>", "<lake>"])
    model = adapt(model, **settings)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", dtype="bfloat16", load_in_4bit=None)
    assert trained(again).keys() == trained(model).keys()
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(model).items())
    if tied and settings:
        return  # PEFT ties no matrix of a second adapter, so oribi refuses its file
    again.load_adapter(str(tmp_path / "adapter"), "second")
    again.set_adapter("second")
    ids = torch.tensor([[5, 267, 6, 268, 7]])
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_tied_model_says_in_one_line_what_becomes_of_its_matrix(tmp_path):
    checkpoint(tmp_path / "base", "gemma", **FAMILY_CHANGES["gemma"])
    said = {}
    for asked, settings in ASKED.items():
        model, _ = load(tmp_path / "base")
        model = FastLanguageModel.get_peft_model(model, r=4, **settings)
        (said[asked],) = [note for note in model.oribi.notes if "one matrix in this model (tied)" in note]
    assert all("trained whole, once" in said[asked] for asked in ("targets", "saved", "embeddings"))
    for asked in ("head", "untied by hand"):
        assert "a merged model holds two matrices, and no GGUF file can hold it" in said[asked]


def test_a_tied_head_with_an_adapter_of_its_own_goes_into_no_gguf_file_of_gemma(tmp_path):
    checkpoint(tmp_path / "base", "gemma", **FAMILY_CHANGES["gemma"])
    model, tokenizer = load(tmp_path / "base")
    with pytest.raises(ExportError, match="llama.cpp ties the head of gemma models"):
        adapt(model, **ASKED["head"]).save_pretrained_gguf(str(tmp_path / "model"), tokenizer, "f32")
    assert not (tmp_path / "model_gguf").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}, {},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_new_tokens_are_trained_in_embeddings_and_head(tied, settings, tmp_path):
    checkpoint(tmp_path / "base", vocab_size=267, tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path / "base")
    add_new_tokens(model, tokenizer, ["<hills>", "<lake>"])
    model = adapt(model, **settings)
    assert not any("were changed after it was loaded" in note for note in model.oribi.notes)
    ids = torch.tensor([[5, 267, 6, 268, 7, 267, 9]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in grads.values())
    assert any("embed_tokens" in name for name in grads)
    assert tied or any("lm_head" in name for name in grads)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert (
        apart(PeftModel.from_pretrained(plain(tmp_path / "base", model), tmp_path / "adapter"), expected, ids)
        < 1e-5
    )
