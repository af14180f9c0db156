"""Merges in FP8 and in 4-bit integers: compressed-tensors reads them as oribi does, and each says how far it is from the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oribi.cli.export import read_forms
from oribi.errors import ConfigError
from oribi.formats.codecs import encode_fp8, encode_int4
from oribi.models.files import HubOptions, Location, open_weights
from oribi.save.merged import save_merged
from oribi.save.probe_file import read_probes
from oribi.save.trained import MergedModel
from oribi.tensors import read_header
from oribi.verify.call import verify_target
from tests.models.tiny_checkpoint import checkpoint
from tests.save.test_adapter_files import adapted, load, write_wrapper

CPU = torch.device("cpu")
FORMS = ("fp8", "w4a16")
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 267}
HELD_OUT = ["the red fox runs over old hills"]


def tuned(folder: Path, model_type: str = "llama", load_in_4bit: bool = False, **changes):
    checkpoint(folder, model_type, **{**SIZES, **changes})
    model, tokenizer = load(folder, load_in_4bit=load_in_4bit)
    return adapted(model), tokenizer


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def dequantised(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = open_weights(Location("checkpoint", folder, str(folder)), HubOptions())
    return {name: source.read(name, CPU, dtype) for name in source.shapes()}


@pytest.mark.parametrize("form", FORMS)
def test_linear_layers_are_quantised_from_the_merge_in_float32_and_nothing_else_is(form, tmp_path):
    model, tokenizer = tuned(tmp_path / "base")
    # so small that each weight and its scale come into files of their own
    save_merged(model, tmp_path / form, tokenizer, form, verify=False, max_shard_size=20_000)
    assert len(list((tmp_path / form).glob("model-*.safetensors"))) > 9
    merged, found = MergedModel(model), dequantised(tmp_path / form)
    assert found.keys() == merged.shapes().keys()
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / form).glob("model-*.safetensors"):
        stored |= load_file(file)
    for name in found:
        expected = merged.read(name, CPU, torch.float32)
        if not name.endswith("_proj.weight"):
            assert torch.equal(stored[name], expected.to(torch.bfloat16)), name
            continue
        parts = (
            encode_fp8(expected, torch.bfloat16)
            if form == "fp8"
            else encode_int4(expected, 128, torch.bfloat16)
        )
        prefix = name.removesuffix("weight")
        assert all(torch.equal(stored[f"{prefix}{part}"], tensor) for part, tensor in parts.items()), name
        assert (found[name] - expected).norm() < (0.03 if form == "fp8" else 0.11) * expected.norm()
    settings = settings_of(tmp_path / form)
    (group,) = settings["config_groups"].values()
    assert settings["ignore"] == ["lm_head"]
    assert (settings["quant_method"], settings["quantization_status"]) == ("compressed-tensors", "compressed")
    if form == "fp8":
        assert group["weights"]["strategy"] == "channel"
        assert group["input_activations"] == {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    else:
        assert (group["weights"]["group_size"], group["input_activations"]) == (128, None)


def test_the_command_line_names_both_forms():
    assert read_forms("fp8,w4a16") == {"fp8": [], "w4a16": []}
    assert read_forms("fp8_dynamic") == {"fp8": []}


def test_rows_that_are_no_whole_groups_take_smaller_groups_or_stay_in_16_bits(tmp_path):
    model, tokenizer = tuned(tmp_path / "base", hidden_size=192, intermediate_size=272)
    report = save_merged(model, tmp_path / "out", tokenizer, "w4a16", verify=False)
    assert settings_of(tmp_path / "out")["config_groups"]["group_0"]["weights"]["group_size"] == 32
    left = [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    assert settings_of(tmp_path / "out")["ignore"] == ["lm_head", *left]
    assert {read_header(tmp_path / "out/model.safetensors")[f"{name}.weight"]["dtype"] for name in left} == {
        "BF16"
    }
    assert any("2 linear layers stay in 16 bits" in note for note in report.notes)
    assert any("group of 32 columns" in note for note in report.notes)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_transformers_loads_an_export_with_compressed_tensors_to_the_bit(model_type, form, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    changes = (
        {"mlp_only_layers": [], "layer_types": None, "use_sliding_window": False}
        if model_type == "qwen3_moe"
        else {}
    )
    model, tokenizer = tuned(tmp_path / "base", model_type, **changes)
    save_merged(model, tmp_path / "out", tokenizer, form, verify=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    again, _ = load(tmp_path / "out", load_in_4bit=False, dtype=torch.bfloat16)
    ours = dict(again.named_parameters())
    assert [name for name, weight in theirs.named_parameters() if not torch.equal(ours[name], weight)] == []
    if model_type == "qwen3_moe":
        assert [name for name in settings_of(tmp_path / "out")["ignore"] if name.endswith("mlp.gate")]
        assert not any("experts" in name for name in settings_of(tmp_path / "out")["ignore"])


@pytest.mark.long
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_compared_and_verified(form, load_in_4bit, tmp_path):
    model, tokenizer = tuned(tmp_path / "base", load_in_4bit=load_in_4bit)
    report = save_merged(model, tmp_path / form, tokenizer, form, verify="report", held_out=HELD_OUT)
    (check,) = (check for check in report.checks if check.name == "weights read back")
    assert 0 < check.figures["kl"] < 5
    assert "likeliest token agrees" in check.says
    (file,) = read_probes(tmp_path / form).files.values()
    assert (file.form, file.stored) == (form, "fp8" if form == "fp8" else "packed integers")
    card = (tmp_path / form / "README.md").read_text()
    assert f"vllm serve ./{form} --served-model-name {form}" in card
    assert "oribi verify http://localhost:8000/v1" in card
    assert all(check.passed for check in verify_target(str(tmp_path / form)))


@pytest.mark.long
def test_what_is_beside_the_text_decoder_is_carried_and_ignored(tmp_path):
    write_wrapper("mistral3", tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    report = save_merged(
        adapted(model), tmp_path / "out", tokenizer, "fp8", verify="report", held_out=HELD_OUT
    )
    assert [str(c.outcome) for c in report.checks if c.name == "what was not trained"] == ["equal"]
    assert settings_of(tmp_path / "out")["ignore"] == [
        "lm_head",
        "re:.*vision_tower.*",
        "re:.*multi_modal_projector.*",
    ]
    header = read_header(tmp_path / "out/model.safetensors")
    codes = {name for name, entry in header.items() if entry["dtype"] == "F8_E4M3"}
    assert codes
    assert all("language_model" in name for name in codes)
    again, _ = load(tmp_path / "out")
    assert again.oribi.names is not None


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_is_not_written_so(form, tmp_path):
    checkpoint(tmp_path / "base", **SIZES)
    model, tokenizer = load(tmp_path / "base", num_labels=2)
    with pytest.raises(ConfigError, match="a sequence classifier is written as 'merged_16bit' or 'lora'"):
        save_merged(model, tmp_path / "out", tokenizer, form)
    assert not (tmp_path / "out").exists()
