"""Embedding models are loaded, trained, merged and saved on sentence-transformers, and reload there with equal embeddings."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import oribi
from oribi.errors import ConfigError, ExportError, ModelError
from tests.train.conftest import chatml_tokenizer

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="embedding models need sentence-transformers"
)
from oribi.compat.embeddings import FastSentenceTransformer  # noqa: E402

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
# kind -> the model, how its tokens are pooled, and the projections that scripts name
KINDS = {
    "bert": (BertModel, BertConfig(**SIZES, **STILL), "mean", ["query", "key", "value", "dense"]),
    "xlm-r": (XLMRobertaModel, XLMRobertaConfig(**SIZES, **STILL, max_position_embeddings=130), "cls", ["query", "key", "value", "dense"]),
    "modernbert": (ModernBertModel, ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2, eos_token_id=2, bos_token_id=1, local_attention=16), "mean", ["Wi", "Wo", "Wqkv"]),
    "embeddinggemma": (Gemma3TextModel, Gemma3TextConfig(**DECODER, use_bidirectional_attention=True, sliding_window=16, query_pre_attn_scalar=16), "mean", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen3": (Qwen3Model, Qwen3Config(**DECODER), "lasttoken", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}  # fmt: skip
TEXTS = ["the red fox", "a blue bird near some deep lake sees the old hills", "runs"]


def write_encoder(folder: Path, kind: str) -> str:
    """A random model of a kind with files of transformers only."""
    model_class, config, _, _ = KINDS[kind]
    torch.manual_seed(3)
    model = model_class(config)
    model.save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return str(folder)


def write_embedder(folder: Path, kind: str) -> str:
    """The same with files of sentence-transformers: pooling, a projection and a normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    first = Transformer(write_encoder(folder / "encoder", kind))
    modules = [first, Pooling(64, KINDS[kind][2]), Dense(64, 32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query: "}).save_pretrained(
        str(folder / "model")
    )
    return str(folder / "model")


def train(model, folder, steps=8, **settings):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    words = ["fox", "bird", "lake", "hills", "red", "blue", "old", "deep"]
    rows = [{"anchor": f"{w} {w}", "positive": f"the {w}"} for w in words]
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-3, report_to="none", logging_steps=1,
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=1, **settings,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def load(name, **arguments):
    return FastSentenceTransformer.from_pretrained(
        name, **{"max_seq_length": 64, "dtype": torch.float32, **arguments}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_trained_and_its_merge_reloads_in_plain_sentence_transformers(kind, tmp_path):
    from sentence_transformers import SentenceTransformer

    name = write_embedder(tmp_path, kind)
    model = load(name, load_in_4bit=kind in ("qwen3", "xlm-r"))
    before = model.eval().encode(TEXTS)
    model = FastSentenceTransformer.get_peft_model(
        model, r=8, target_modules=KINDS[kind][3], lora_alpha=16, lora_dropout=0, bias="none", use_rslora=False,
        use_gradient_checkpointing=False, random_state=3407, loftq_config=None, task_type="FEATURE_EXTRACTION",
    )  # fmt: skip
    losses = train(model, tmp_path / "out")
    assert losses[-1] < losses[0]
    expected = model.eval().encode(TEXTS)
    assert np.abs(expected - before).max() > 1e-3
    assert expected.shape == (3, 32)
    model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer=model.tokenizer, save_method="merged_16bit"
    )
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), expected, atol=1e-4)
    assert plain.prompts["query"] == "query: "
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(str(tmp_path / "adapter"), load_in_4bit=kind in ("qwen3", "xlm-r"))
    np.testing.assert_allclose(again.eval().encode(TEXTS), expected, atol=1e-5)
    assert all("lora" in name for name, p in again.named_parameters() if p.requires_grad)


def test_full_fine_tuning_trains_every_weight_in_float32(tmp_path):
    model = FastSentenceTransformer.from_pretrained(
        write_encoder(tmp_path / "bert", "bert"), full_finetuning=True, load_in_4bit=True
    )
    assert model.dtype == torch.float32
    model = FastSentenceTransformer.get_peft_model(model, r=8)
    assert all(p.requires_grad for p in model[0].parameters())
    losses = train(model, tmp_path / "out")
    assert losses[-1] < losses[0]
    model.save_pretrained_merged(str(tmp_path / "merged"))
    plain = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), model.eval().encode(TEXTS), atol=1e-5)


def test_a_model_without_files_of_sentence_transformers_is_pooled_as_asked(tmp_path, capsys):
    name = write_encoder(tmp_path / "qwen3", "qwen3")
    model = load(name, pooling_mode="lasttoken")
    assert (
        "has no files of sentence-transformers: its tokens are pooled by 'lasttoken'"
        in capsys.readouterr().out
    )
    batch = model.preprocess(TEXTS)
    with torch.no_grad():
        states = model.transformers_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    places = (batch["attention_mask"] * torch.arange(states.shape[1])).argmax(-1)
    np.testing.assert_allclose(model.eval().encode(TEXTS), states[range(3), places].numpy(), atol=1e-5)
    assert load(name)[1].pooling_mode in ("mean", ("mean",))


def test_the_pooling_of_an_adapter_comes_with_it(tmp_path):
    model = load(write_encoder(tmp_path / "qwen3", "qwen3"), pooling_mode="lasttoken")
    model = FastSentenceTransformer.get_peft_model(model, r=2)  # names of BERT's: all linear layers
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(str(tmp_path / "adapter"))
    np.testing.assert_allclose(again.eval().encode(TEXTS), model.eval().encode(TEXTS), atol=1e-6)


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path):
    model = FastSentenceTransformer.get_peft_model(load(write_encoder(tmp_path / "bert", "bert")), r=2)
    model.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="nothing is loaded; 1 missing"):
        load(str(tmp_path / "adapter"))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    config = BertConfig(**SIZES, **STILL)
    BertModel(config).save_pretrained(tmp_path / "bert")
    chatml_tokenizer().save_pretrained(tmp_path / "bert")
    name = str(tmp_path / "bert")
    gradients = []
    for wanted in (False, "unsloth"):
        model = FastSentenceTransformer.get_peft_model(load(name), r=4, use_gradient_checkpointing=wanted)
        model.train()
        features = model.preprocess(TEXTS)
        model(features)["sentence_embedding"].pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_more_tokens_than_positions_are_not_promised(tmp_path, capsys):
    model = load(write_encoder(tmp_path / "xlm", "xlm-r"), max_seq_length=512)
    assert model.max_seq_length == 128  # of 130 positions two come before the first token
    assert "max_seq_length 512 is beyond the model's 128 positions" in capsys.readouterr().out
    model.encode(["fox " * 500])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported"),
        ({"pooling_mode": "first"}, "pooling_mode = 'first'; allowed are mean, cls"),
        ({"qat_scheme": "int4"}, "qat_scheme is refused"),
        ({"truncate_dims": 4}, "unknown keyword truncate_dims; did you mean truncate_dim"),
    ],
)
def test_what_is_not_done_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(write_encoder(tmp_path / "bert", "bert"), **arguments)


def test_settings_of_lora_that_do_not_fit_are_refused(tmp_path):
    model = load(write_encoder(tmp_path / "bert", "bert"))
    with pytest.raises(ConfigError, match="has no layer qkv; it has dense, key, query, value"):
        FastSentenceTransformer.get_peft_model(model, target_modules=["qkv"])
    with pytest.raises(ConfigError, match="an embedding model's is 'FEATURE_EXTRACTION'"):
        FastSentenceTransformer.get_peft_model(model, task_type="CAUSAL_LM")
    model = FastSentenceTransformer.get_peft_model(model, r=2)
    with pytest.raises(ConfigError, match="has a LoRA adapter already"):
        FastSentenceTransformer.get_peft_model(model, r=2)


def test_exports_that_differ_or_are_not_done_are_refused(tmp_path, monkeypatch):
    model = FastSentenceTransformer.get_peft_model(load(write_encoder(tmp_path / "bert", "bert")), r=2)
    with pytest.raises(ConfigError, match="written as 'merged_16bit' or 'lora'"):
        model.save_pretrained_merged(str(tmp_path / "merged"), save_method="merged_4bit")
    with pytest.raises(ExportError, match="embedding models are not written as GGUF here"):
        model.save_pretrained_gguf(str(tmp_path / "gguf"), model.tokenizer)
    from oribi.compat import embedding_files

    read = embedding_files.read_finite
    monkeypatch.setattr(embedding_files, "read_finite", lambda *a: read(*a) * 1.5)
    with pytest.raises(ExportError, match="gives other embeddings than the trained model"):
        model.save_pretrained_merged(str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    find = importlib.util.find_spec
    from oribi.compat import embedding_files

    monkeypatch.setattr(
        embedding_files, "find_spec", lambda name: None if name == "sentence_transformers" else find(name)
    )
    with pytest.raises(ImportError, match=r"pip install 'oribi\[embeddings\]'"):
        oribi.FastSentenceTransformer.from_pretrained("any")


def test_the_lora_method_writes_an_adapter_of_plain_peft(tmp_path):
    from sentence_transformers import SentenceTransformer

    name = write_embedder(tmp_path, "bert")
    model = FastSentenceTransformer.get_peft_model(load(name), r=4)
    train(model, tmp_path / "out", steps=2)
    model.save_pretrained_merged(str(tmp_path / "adapter"), save_method="lora")
    plain = SentenceTransformer(name, device="cpu")
    plain[0].model = PeftModel.from_pretrained(plain[0].model, str(tmp_path / "adapter"))
    np.testing.assert_allclose(plain.eval().encode(TEXTS), model.eval().encode(TEXTS), atol=1e-5)
