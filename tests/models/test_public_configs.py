"""Models with a config.json as public repositories have it: fused, equal to transformers, trained, packed, decoded, saved and exported."""

import contextlib
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.errors import ExportError, ModelError
from oribi.models.open import open_model
from oribi.models.wrapper import class_named
from oribi.save.gguf import save_gguf
from tests.models.public_configs import PUBLIC, write_public
from tests.models.test_parity import TOLERANCE, packed, relative
from tests.models.tiny import precise
from tests.save.test_adapter_files import adapted, load, logits
from tests.save.tiny_export import byte_level_tokenizer, distance_from_llama_cpp

PROMPTS = [list(range(start, start + 39)) for start in (20, 60, 100)]


@pytest.mark.parametrize("name", PUBLIC)
def test_its_config_json_opens_fused(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC[name]))
    opened = open_model(str(tmp_path))
    assert opened.fused, opened.notes
    assert opened.is_part is (
        AutoConfig.from_pretrained(tmp_path).get_text_config().model_type != PUBLIC[name]["model_type"]
    )


def every_gradient_equals_transformers(folder, theirs, monkeypatch):
    ours, _ = load(folder, full_finetuning=True)
    precise(monkeypatch, ours, theirs)
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    for one in (ours, theirs):  # attention's and the residual's own dropout is not applied, which a note says
        one.eval()
        one.zero_grad()
    mine, reference = (one(input_ids=ids, labels=ids) for one in (ours, theirs))
    mine.loss.backward(), reference.loss.backward()
    monkeypatch.undo()
    names = ours.oribi.names
    expected = {names.inner(name) if names else name: p.grad for name, p in theirs.named_parameters()}
    errors = {name: relative(p.grad, expected[name]) for name, p in ours.named_parameters()}
    errors["logits"] = relative(mine.logits, reference.logits)
    assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v > TOLERANCE}
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (
        theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    )


def decoding_padding_and_packs_are_exact(model):
    model.eval()
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(2))
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    again = model(input_ids=answer, use_cache=False).logits[:, 29:-1].argmax(-1)
    assert torch.equal(answer[:, 30:], again)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[1:, 9:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[1:, 30:], alone[:, 21:])
    batch = packed([19, 1, 20])
    together = model(**batch).logits
    for piece, part in zip(batch["input_ids"].split([19, 1, 20], 1), together.split([19, 1, 20], 1)):
        assert relative(part, model(input_ids=piece).logits) < TOLERANCE


def against_llama_cpp(model, file):
    """Of the first prompt whose answer llama.cpp gives probabilities of, which it withholds where no token ends a character."""
    for prompt in PROMPTS:
        with contextlib.suppress(ZeroDivisionError):
            return distance_from_llama_cpp(model, file, prompt)
    raise AssertionError("nothing could be compared")


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLIC)
def test_it_is_trained_decoded_saved_and_exported(name, tmp_path, monkeypatch):
    every_gradient_equals_transformers(tmp_path / "base", write_public(name, tmp_path / "base"), monkeypatch)
    model, tokenizer = load(tmp_path / "base")
    decoding_padding_and_packs_are_exact(model)
    before, model = logits(model), adapted(model)
    expected = logits(model)
    assert relative(expected, before) > 0.02
    model.save_pretrained(str(tmp_path / "adapter"))
    kinds = {class_named(AutoConfig.from_pretrained(tmp_path / "base"))}
    if type(AutoConfig.from_pretrained(tmp_path / "base")) in AutoModelForCausalLM._model_mapping:
        kinds.add(AutoModelForCausalLM)
    for kind in kinds:
        plain = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
        assert (logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")) - expected).abs().max() < 2e-4
    model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=["the red fox runs over the old hills"]
    )
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.architectures == PUBLIC[name]["architectures"]
    merged = class_named(config).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 2e-4
    pytest.importorskip("xllamacpp", reason="llama.cpp judges GGUF files")
    if name == "EXAONE-4.0-32B":  # llama.cpp has windows in models of 64 layers alone, as this one has
        with pytest.raises(ExportError, match="models of 64 layers have windows"):
            save_gguf(model, tmp_path / "gguf", byte_level_tokenizer(), "f32", verify=False)
        return
    file = save_gguf(model, tmp_path / "gguf", byte_level_tokenizer(), "f32", verify=False)["gguf_files"][0]
    found = against_llama_cpp(model, file)
    assert found.agreeing == 1.0
    assert found.worst < (2e-2 if name.startswith("Gemma") else 2e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_another_program_quantised_are_refused_by_name(method, tmp_path):
    write_public("Ministral-3-3B", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": method, "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=f"is quantised by {method}; oribi loads 16-bit checkpoints"
    ) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
