"""A classifier on oribi's decoder is transformers' own, in scores, losses and gradients, and is saved under its names."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from oribi import FastLanguageModel, FastModel, SFTTrainer
from oribi.errors import ConfigError, ExportError, ModelError
from oribi.families import FAMILIES
from oribi.models.classifier import build_classifier
from oribi.models.labels import Labels, read_labels
from oribi.models.load import load_model
from tests.models.tiny import as_ours, in_float64, tiny_config, tiny_pair
from tests.models.tiny_checkpoint import checkpoint

LABELS = Labels(("no", "maybe", "yes"))
CLASSIFIERS = [family for family in FAMILIES if family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]


def classifier_pair(model_type: str, labels: Labels = LABELS, **changes):
    """Ours and transformers' with the same weights, all of them random."""
    config = tiny_config(model_type, **changes)
    labels.write(config)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = build_classifier(config, device="cpu")
    ours.load_state_dict(as_ours(ours, theirs.state_dict()))
    return ours.eval(), theirs.eval()


def padded(side: str, pad: int) -> dict[str, torch.Tensor]:
    """Three rows of different lengths."""
    torch.manual_seed(1)
    rows = [torch.randint(3, 120, (length,)) for length in (11, 4, 7)]
    return torch.nn.utils.rnn.pad_sequence(
        rows, True, pad, padding_side=side
    ), torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side=side)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
@pytest.mark.parametrize(("side", "pad"), [("right", 0), ("left", 2)])
def test_scores_and_gradients_are_those_of_transformers(model_type, side, pad, monkeypatch):
    ours, theirs = classifier_pair(model_type, pad_token_id=pad)
    in_float64(monkeypatch, ours, theirs)
    assert type(ours).__name__ == type(theirs).__name__
    ids, mask = padded(side, pad)
    labels = torch.tensor([2, 0, 1])
    found, expected = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (ours, theirs))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    gradients = as_ours(ours, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("labels", "targets", "problem"),
    [
        (read_labels(1), torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (read_labels(1), torch.tensor([1, 0, 2]), "regression"),
        (read_labels(2, problem_type="regression"), torch.randn(3, 2), "regression"),
        (LABELS, torch.tensor([0, 2, -100]), "single_label_classification"),
        (LABELS, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), "multi_label_classification"),
    ],
)  # fmt: skip
def test_each_kind_of_label_has_the_loss_of_transformers(labels, targets, problem):
    ours, theirs = classifier_pair("llama", labels)
    ids, mask = padded("left", 0)
    found = ours(input_ids=ids, attention_mask=mask, labels=targets)
    expected = theirs(
        input_ids=ids,
        attention_mask=mask,
        labels=targets.float() if problem == "regression" else targets,
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert ours.config.problem_type == problem
    # the summed loss over the labels of a whole step, as the trainer divides
    halves = [
        ours(input_ids=ids[part], attention_mask=mask[part], labels=targets[part],
             num_items_in_batch=(targets != -100).sum()).loss
        for part in (slice(0, 2), slice(2, 3))
    ]  # fmt: skip
    torch.testing.assert_close(sum(halves), found.loss, rtol=1e-5, atol=1e-6)


def test_several_rows_need_a_padding_token():
    ours, _ = classifier_pair("llama")
    ours.config.pad_token_id = None
    ids, mask = padded("right", 0)
    with pytest.raises(ModelError, match="pad_token_id is not set"):
        ours(input_ids=ids, attention_mask=mask)
    assert ours(input_ids=ids[:1, :5]).logits.shape == (1, 3)


def test_arguments_that_it_does_not_know_are_refused():
    ours, _ = classifier_pair("llama")
    with pytest.raises(ModelError, match="unknown argument 'attention_masks'.*did you mean attention_mask"):
        ours(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_masks=torch.ones(1, 3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_labels": 0}, "num_labels = 0: must be a whole number of at least 1"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b", 2: "c"}}, "num_labels = 2, and id2label names"),
        ({"id2label": {1: "a", 2: "b"}}, "give a name for each number from 0"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "name different labels"),
        ({"id2label": {"a": 0}}, "id2label maps numbers to names"),
        ({"problem_type": "regression"}, "give num_labels too"),
        ({"num_labels": 2, "problem_type": "multi_label"}, "allowed are single_label_classification"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        read_labels(**given)


def test_labels_are_named_from_either_table():
    for given in (
        {"id2label": {0: "no", 1: "yes"}},
        {"label2id": {"no": 0, "yes": 1}},
        {"id2label": {"1": "yes", "0": "no"}},
    ):
        assert read_labels(**given) == Labels(("no", "yes"))  # fmt: skip
    assert read_labels(2).names == ("LABEL_0", "LABEL_1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoint(path)
    return str(path)


def load(path, **arguments):
    return FastLanguageModel.from_pretrained(
        path, **{"max_seq_length": 64, "dtype": torch.float32, **arguments}
    )


TEXTS = ["the cat", "a much longer text about a dog", "no"]
ROWS = [{"labels": i % 3, "text": text} for i, text in enumerate(TEXTS * 4)]


def train(model, tokenizer, folder, **settings):
    """Five steps of transformers' own trainer."""
    rows = [{"labels": row["labels"], **tokenizer(row["text"])} for row in ROWS]
    arguments = TrainingArguments(
        str(folder), max_steps=5, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, seed=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_trained_adapter_acts_in_plain_transformers_and_peft(llama, tmp_path):
    names = {0: "no", 1: "maybe", 2: "yes"}
    model, tokenizer = load(llama, num_labels=3, id2label=names, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, task_type="SEQ_CLS")
    losses = train(model, tokenizer, tmp_path / "out")
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    base = AutoModelForSequenceClassification.from_pretrained(
        llama, num_labels=3, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    outside = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(outside(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    again, _ = load(str(tmp_path / "adapter"))
    assert again.config.id2label == names
    assert not any("score.weight" in note for note in again.oribi.notes)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_through_nf4_and_lora_are_those_of_peft_on_transformers(llama):
    ours, tokenizer = load(llama, num_labels=2)
    assert type(ours.score) is torch.nn.Linear
    assert type(ours.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    ours = FastLanguageModel.get_peft_model(ours, r=4)
    assert ours.base_model.model.score.modules_to_save["default"].weight.dtype == torch.float32
    ours(
        **tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=torch.tensor([0, 1, 0])
    ).loss.backward()
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert all(dict(ours.named_parameters())[name].grad is not None for name in names)
    assert any("score" in name for name in names)


def test_a_saved_classifier_is_loaded_as_one(llama, tmp_path):
    model, tokenizer = load(llama, id2label={0: "no", 1: "yes"}, full_finetuning=True)
    train_ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    assert "score.weight" in load_file(tmp_path / "model.safetensors")
    again, _ = load(str(tmp_path), load_in_4bit=False)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**train_ids).logits, model.eval()(**train_ids).logits)
    for asked in ({}, {"auto_model": AutoModelForSequenceClassification}):
        assert load(str(tmp_path), **asked)[0].config.num_labels == 2
    with pytest.raises(ModelError, match="a classifier of 2 labels, and 5 are asked for"):
        load(str(tmp_path), num_labels=5)


def test_what_cannot_be_loaded_is_refused(llama, tmp_path):
    tiny_pair(tiny_config("granite"))[1].save_pretrained(tmp_path)
    load(llama)[1].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no sequence classifier for granite"):
        load(str(tmp_path), num_labels=2)
    model, _ = load(llama)
    with pytest.raises(ConfigError, match="task_type is 'SEQ_CLS', and the model is loaded for 'CAUSAL_LM'"):
        FastModel.get_peft_model(model, task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="auto_model=Wav2Vec2ForCTC is refused"):
        FastModel.from_pretrained(llama, auto_model="Wav2Vec2ForCTC")
    adapter = FastLanguageModel.get_peft_model(model, r=2)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is the adapter of a language model"):
        load(str(tmp_path / "adapter"), num_labels=2)


def test_the_class_of_a_classifier_asks_for_two_labels(llama):
    model, _ = FastModel.from_pretrained(
        llama, auto_model=AutoModelForSequenceClassification, dtype=torch.float32
    )
    assert model.config.num_labels == 2


@pytest.mark.parametrize("four_bit", [False, True])
def test_encoders_are_trained_unfused_with_all_that_is_new(four_bit, tmp_path):
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    from tests.train.conftest import chatml_tokenizer

    chatml_tokenizer().save_pretrained(tmp_path / "bert")
    model, tokenizer = FastModel.from_pretrained(
        str(tmp_path / "bert"), auto_model=AutoModelForSequenceClassification, num_labels=3, max_seq_length=64,
        load_in_4bit=four_bit, dtype=torch.float32,
    )  # fmt: skip
    packed = [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    assert len(packed) == 12 * four_bit
    assert type(model.classifier) is type(model.bert.pooler.dense) is torch.nn.Linear
    model = FastModel.get_peft_model(model, r=4, task_type="SEQ_CLS")
    losses = train(model, tokenizer, tmp_path / "out")
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(
        any(part in name for name in stored) for part in ("bert.pooler.dense.weight", "classifier.weight")
    )
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        again, _ = load_model(str(tmp_path / "adapter"), max_seq_length=64, dtype=torch.float32)
        torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    if not four_bit:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3)
        outside = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            torch.testing.assert_close(outside(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_model_trains_with_trl(llama, tmp_path):
    pytest.importorskip("trl", reason="TRL's RewardTrainer")
    from datasets import Dataset

    from oribi.trl import RewardConfig, RewardTrainer

    model, tokenizer = load(llama, num_labels=1)
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_list([{"prompt": "the cat", "chosen": " sits", "rejected": " no no"}] * 8)
    trainer = RewardTrainer(
        model, args=RewardConfig(output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
                                 logging_steps=1, report_to="none", save_strategy="no"),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_composite_checkpoint_classifies_by_its_text_decoder(tmp_path):
    text = tiny_config("gemma3_text", vocab_size=384).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    from transformers import Gemma3ForConditionalGeneration

    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    from tests.save.tiny_export import byte_level_tokenizer

    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load(str(tmp_path / "base"), num_labels=2, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=2, dtype=torch.float32
    )
    base.config.text_config.pad_token_id = tokenizer.pad_token_id
    outside = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            outside(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-4
        )


def test_what_only_language_models_do_is_refused(llama, tmp_path):
    model, tokenizer = load(llama, num_labels=2)
    with pytest.raises(ExportError, match="a sequence classifier is not written as GGUF"):
        model.save_pretrained_gguf(tmp_path / "gguf", tokenizer)
    with pytest.raises(ConfigError, match="this one scores labels: pass it to transformers.Trainer"):
        SFTTrainer(model, train_dataset=[{"text": "a"}], processing_class=tokenizer)
    assert not any(tmp_path.iterdir())
