"""New tokens get sensible rows, are trained with LoRA and nothing around them is, and travel in the adapter."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from oribi.errors import ConfigError
from oribi.lora.attach import attach_lora
from oribi.lora.tokens import add_new_tokens
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint

NEW = ["<tool>", "</tool>"]


def load(path: Path, **arguments):
    return load_model(
        str(path),
        **{"dtype": "float32", "device_map": "cpu", "load_in_4bit": False, "max_seq_length": 64, **arguments},
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [True, False])
def test_new_rows_are_the_mean_of_the_trained_ones(tied, spare, tmp_path):
    # the tokenizer has 267 tokens
    checkpoint(tmp_path, vocab_size=384 if spare else 267, tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path)
    before = model.get_input_embeddings().weight.detach().clone()
    add_new_tokens(model, tokenizer, NEW)
    assert len(tokenizer) == 269
    assert tokenizer("a<tool>b", add_special_tokens=False).input_ids[1] == 267
    after = model.get_input_embeddings().weight
    assert after.shape[0] == (384 if spare else 269) == model.config.vocab_size
    assert torch.equal(after[:267], before[:267])
    assert torch.allclose(after[267], before[:267].mean(0), atol=1e-6)
    assert (model.get_output_embeddings().weight is after) == tied
    assert not any(p.requires_grad for p in model.parameters())


def test_interpolation_leans_towards_the_pieces_of_the_token(tmp_path):
    checkpoint(tmp_path)
    model, tokenizer = load(tmp_path)
    pieces = tokenizer("<tool>", add_special_tokens=False).input_ids
    table = model.get_input_embeddings().weight.detach().clone()
    add_new_tokens(model, tokenizer, ["<tool>"], method="interpolation", interpolation=0.25)
    expected = 0.75 * table[:267].mean(0) + 0.25 * table[pieces].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[267], expected, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_only_the_new_rows_are_trained_and_the_adapter_carries_them(tied, load_in_4bit, tmp_path):
    checkpoint(tmp_path / "base", vocab_size=267, tie_word_embeddings=tied)
    model, tokenizer = load(tmp_path / "base", load_in_4bit=load_in_4bit)
    add_new_tokens(model, tokenizer, NEW)
    base_rows = model.get_input_embeddings().weight.detach().clone()
    model = attach_lora(model, r=4)
    ids = torch.tensor([[5, 267, 6, 268, 7, 267]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = model.get_input_embeddings()
    found = merged(torch.arange(269))
    assert torch.equal(found[:267], base_rows[:267])
    assert not torch.allclose(found[267:], base_rows[267:], atol=1e-4)
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    again, again_tokenizer = load(tmp_path / "adapter", load_in_4bit=load_in_4bit)
    assert len(again_tokenizer) == 269
    assert relative(again.eval()(ids).logits, logits) < 1e-5
    if not load_in_4bit:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "adapter")))
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert relative(theirs.eval()(ids).logits, logits) < 1e-5


def test_tokens_that_exist_are_left_alone(tmp_path):
    checkpoint(tmp_path)
    model, tokenizer = load(tmp_path)
    before = model.get_input_embeddings().weight.detach().clone()
    add_new_tokens(model, tokenizer, ["<|im_end|>"])
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.oribi.new_token_ids == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "zeros"}, "allowed are 'mean' and 'interpolation'"),
        ({"interpolation": 2.0}, "must be 0 to 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words, tmp_path):
    checkpoint(tmp_path)
    model, tokenizer = load(tmp_path)
    with pytest.raises(ConfigError, match=words):
        add_new_tokens(model, tokenizer, NEW, **arguments)
    with pytest.raises(ConfigError, match="must come before get_peft_model"):
        add_new_tokens(attach_lora(model, r=4), tokenizer, NEW)
    assert len(tokenizer) == 267


def test_single_rows_of_a_table_with_a_norm_behind_it_are_refused_as_peft_would_leave_it_out(tmp_path):
    checkpoint(tmp_path, "muse_glimmer_text")
    model, tokenizer = load(tmp_path)
    with pytest.raises(
        ConfigError, match=r"leaves out the norm .* modules_to_save = \[embed_tokens, lm_head\]"
    ):
        attach_lora(model, r=4, trainable_token_indices=[5])
    add_new_tokens(model, tokenizer, NEW)
    with pytest.raises(ConfigError, match="leaves out the norm"):
        attach_lora(model, r=4)
    attach_lora(model, r=4, modules_to_save=["embed_tokens", "lm_head"])
