"""Checkpoints quantised for servers as bases: they train in NF4 or 16 bits as their dequantised values would."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oribi import FastLanguageModel
from oribi.memory.architecture import architecture_of
from oribi.models.unwrap import base_model
from oribi.save.trained import LoadedModel
from tests.formats.quantised import FORMATS, quantised_checkpoint
from tests.models.tiny_checkpoint import edit_config, edit_tensors
from tests.save.test_adapter_files import write_wrapper

CPU = torch.device("cpu")
NORMS = [
    f"model.layers.{i}.{norm}" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
]
NORMS.append("model.norm")


def load(path: Path, **arguments):
    settings = {"max_seq_length": 64, "dtype": torch.float32, "device_map": "cpu", **arguments}
    return FastLanguageModel.from_pretrained(str(path), **settings)


def weights(model) -> dict[str, torch.Tensor]:
    source = LoadedModel(model)
    return {name: source.read(name, CPU, torch.float32) for name in source.shapes()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def dequantised(folder: Path, values: dict[str, torch.Tensor], to: Path) -> None:
    """The same checkpoint with its values in float32."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    save_file(values, to / "model.safetensors", metadata={"format": "pt"})
    edit_config(to, quantization_config=None)


def perturbed(model):
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(noise * 0.05)
    return model


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("fp8 blocks", "qwen3"),
        *(pytest.param(name, "llama", marks=pytest.mark.long) for name in FORMATS if name != "fp8 blocks"),
        pytest.param("fp8 tensor", "ministral3", marks=pytest.mark.long),
        pytest.param("fp8 blocks", "qwen3_moe", marks=pytest.mark.long),
        pytest.param("w4a16", "qwen3_moe", marks=pytest.mark.long),
    ],
)
def test_a_base_is_what_its_dequantised_values_are(name, model_type, tmp_path):
    (tmp_path / "packed").mkdir()
    values = quantised_checkpoint(tmp_path / "packed", name, model_type)
    dequantised(tmp_path / "packed", values, tmp_path / "dense")
    whole, _ = load(tmp_path / "packed", load_in_4bit=False)
    assert same(weights(whole), values)
    (note,) = [note for note in whole.oribi.notes if "dequantised" in note]
    assert "NF4" not in note
    packed, dense = load(tmp_path / "packed")[0], load(tmp_path / "dense")[0]
    assert same(weights(packed), weights(dense))
    (note,) = [note for note in packed.oribi.notes if "dequantised" in note]
    assert "quantised again to NF4" in note
    assert packed.oribi.load_in_4bit
    assert any(getattr(p, "quant_state", None) or hasattr(p, "packed") for p in packed.parameters())


@pytest.mark.long
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a_merge_is_in_16_bits_and_says_nothing_of_the_base_s_format(base, tmp_path):
    values = quantised_checkpoint(tmp_path, "fp8 blocks", "qwen3")
    model, tokenizer = load(tmp_path, load_in_4bit=False)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, base=base, dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert same(load_file(tmp_path / "merged/model.safetensors"), values)


@pytest.mark.long
def test_an_adapter_names_its_quantised_base_and_is_proved_and_loaded_on_it(tmp_path):
    (tmp_path / "base").mkdir()
    quantised_checkpoint(tmp_path / "base", "fp8 blocks", "qwen3")
    model, tokenizer = load(tmp_path / "base")
    model = perturbed(model)
    report = model.save_pretrained_merged(str(tmp_path / "adapter"), tokenizer, "lora")
    assert [str(c.outcome) for c in report.checks if c.name == "answers in plain PEFT"] == ["equal"]
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    again, _ = load(tmp_path / "adapter", load_in_4bit=None)
    assert same(weights(base_model(again)), weights(base_model(model)))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.long
def test_a_text_decoder_in_fp8_within_an_image_text_checkpoint_is_merged_in_16_bits(tmp_path):
    """As Ministral 3 comes: the text model has one scale per weight, the tower and the projector have 16 bits."""
    write_wrapper("mistral3", tmp_path / "base")
    file, values = tmp_path / "base/model.safetensors", {}
    stored = load_file(file)
    for name in [
        name for name in stored if name.startswith("language_model.") and name.endswith("_proj.weight")
    ]:
        parts, values[name] = FORMATS["fp8 tensor"][1](stored.pop(name))
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    assert values
    save_file(stored, file, metadata={"format": "pt"})
    edit_config(tmp_path / "base", quantization_config=FORMATS["fp8 tensor"][0])
    model, tokenizer = load(tmp_path / "base", load_in_4bit=False)
    report = model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32")
    assert [str(c.outcome) for c in report.checks if c.name == "what was not trained"] == ["equal"]
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == {
        name for name in stored if not name.endswith("scale") and "_scale_inv" not in name
    }
    assert [name for name, value in values.items() if not torch.equal(merged[name], value)] == []
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_model_outside_the_family_table_is_loaded_from_its_values(load_in_4bit, tmp_path):
    (tmp_path / "packed").mkdir()
    values = quantised_checkpoint(tmp_path / "packed", "w4a16")
    extra = {f"{name}.bias": torch.zeros(192) for name in NORMS}
    biases = [name for name in values if name.endswith("_proj.bias")]
    edit_config(
        tmp_path / "packed",
        model_type="stablelm",
        architectures=["StableLmForCausalLM"],
        partial_rotary_factor=0.25,
    )
    edit_tensors(tmp_path / "packed", lambda tensors: [tensors.update(extra), *map(tensors.pop, biases)])
    values = {name: value for name, value in (values | extra).items() if name not in biases}
    dequantised(tmp_path / "packed", values, tmp_path / "dense")
    packed, dense = (load(tmp_path / one, load_in_4bit=load_in_4bit)[0] for one in ("packed", "dense"))
    assert not packed.oribi.fused
    assert same(weights(packed), weights(dense))
    assert load_in_4bit or same(weights(packed), values)
    assert len([note for note in packed.oribi.notes if "dequantised exactly" in note]) == 1


def test_inspect_says_how_a_checkpoint_is_stored_and_its_files_are_counted_as_they_are(tmp_path):
    quantised_checkpoint(tmp_path, "w4a16")
    found = architecture_of(str(tmp_path))
    assert found.stored_in_words == "compressed-tensors, 4 bits per weight"
    assert found.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").unlink()
    dense = (found.parameters - found.packable_weights) * 2
    assert architecture_of(str(tmp_path)).file_bytes == dense + found.packable_weights // 2
