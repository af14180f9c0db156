"""A merged classifier scores in plain transformers what it scored when it was trained."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from oribi import FastLanguageModel
from oribi.errors import ConfigError, ExportError
from tests.models.tiny_checkpoint import checkpoint
from tests.train.conftest import chatml_tokenizer

TEXTS = ["the cat", "a much longer text about a dog", "no"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "bert", "roberta"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("bert", "roberta"):
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
        kind, config = (BertModel, BertConfig) if request.param == "bert" else (RobertaModel, RobertaConfig)
        kind(config(vocab_size=512, **sizes), add_pooling_layer=False).save_pretrained(folder)
        chatml_tokenizer().save_pretrained(folder)
    else:
        checkpoint(folder, request.param)
    return str(folder)


def trained(folder, **arguments):
    """A classifier whose every trained weight was moved."""
    settings = {"max_seq_length": 256, "dtype": torch.float32, "id2label": {0: "no", 1: "yes", 2: "maybe"}}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, **{**settings, **arguments})
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, tokenizer


def scores(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_merge_loads_in_transformers_with_equal_scores(folder, four_bit, tmp_path):
    model, tokenizer = trained(folder, load_in_4bit=four_bit)
    report = model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype="float32")
    assert report.passed
    assert any("scores of" in check.says and check.outcome == "equal" for check in report.checks)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(plain, tokenizer), scores(model, tokenizer), rtol=1e-3, atol=1e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    again, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "merged"), max_seq_length=256, load_in_4bit=False, dtype=torch.float32
    )
    torch.testing.assert_close(scores(again, tokenizer), scores(plain, tokenizer), rtol=1e-4, atol=1e-4)


def test_a_merge_that_scores_otherwise_is_refused(folder, tmp_path, monkeypatch):
    from oribi.save import merged

    model, tokenizer = trained(folder, load_in_4bit=False)
    read = merged.read_finite
    monkeypatch.setattr(merged, "read_finite", lambda source, name, dtype: read(source, name, dtype) * 1.3)
    with pytest.raises(ExportError, match="scores of"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_other_ways_to_save_it(folder, tmp_path):
    model, tokenizer = trained(folder, load_in_4bit=True)
    with pytest.raises(ConfigError, match="a sequence classifier is written as 'merged_16bit' or 'lora'"):
        model.save_pretrained_merged(tmp_path / "packed", tokenizer, save_method="merged_4bit_forced")
    assert model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora").passed
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    PeftModel.from_pretrained(base, tmp_path / "lora")
    if type(model.base_model.model).__name__ in (
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
    ):
        with pytest.raises(ConfigError, match="has other names for its tensors"):
            model.save_pretrained_merged(tmp_path / "original", tokenizer, base="original")
        return
    report = model.save_pretrained_merged(tmp_path / "original", tokenizer, base="original")
    assert report.base == "original"
    assert report.passed


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_scores_in_plain_peft_what_it_scored_when_it_was_trained(
    folder, labels, four_bit, tmp_path
):
    named = {"id2label": None, "num_labels": 1} if labels == 1 else {}
    model, tokenizer = trained(folder, load_in_4bit=four_bit, **named)
    report = model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    (check,) = [check for check in report.checks if check.name == "scores in plain PEFT"]
    assert check.outcome == "equal", check.says
    assert f"num_labels={labels}" in (tmp_path / "lora" / "README.md").read_text()


def test_an_adapter_that_scores_otherwise_is_refused(folder, tmp_path, monkeypatch):
    from oribi.save import classifier

    model, tokenizer = trained(folder, load_in_4bit=False)
    load = classifier.load_in_plain_peft

    def halved(*arguments):
        adapted = load(*arguments)
        for parameter in (p for name, p in adapted.named_parameters() if "lora_B" in name):
            parameter.data.mul_(0.5)
        return adapted

    monkeypatch.setattr(classifier, "load_in_plain_peft", halved)
    with pytest.raises(ExportError, match=r"different\s+scores in plain PEFT"):
        model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
