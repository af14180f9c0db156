"""Merges in FP8 and in 4-bit integers: compressed-tensors reads them as oribi does, and each says how far it is from the model."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from oribi.cli.export import read_forms
from oribi.config import RunConfig
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.formats.codecs import encode_fp8, encode_int4
from oribi.models.expert_names import apart, expert_modules
from oribi.models.files import HubOptions, Location, open_weights
from oribi.preflight import check_before_loading
from oribi.save.forms import require_form
from oribi.save.merged import save_merged
from oribi.save.probe_file import read_probes
from oribi.save.trained import MergedModel
from oribi.tensors import read_header
from oribi.verify.call import verify_target
from tests.models.test_parity import relative
from tests.models.tiny import MIXED, tiny_config
from tests.models.tiny_checkpoint import checkpoint, edit_tensors
from tests.save.test_adapter_files import adapted, load, write_wrapper
from tests.save.test_experts import BOTH, as_released, logits, trained

CPU = torch.device("cpu")
FORMS = ("fp8", "w4a16")
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 267}
HELD_OUT = ["the red fox runs over old hills"]


def tuned(folder: Path, model_type: str = "llama", load_in_4bit: bool = False, **changes):
    checkpoint(folder, model_type, **{**SIZES, **changes})
    model, tokenizer = load(folder, load_in_4bit=load_in_4bit)
    return adapted(model), tokenizer


# expert families, with changes that let transformers' class compute as oribi does
EXPERTS = {
    "qwen3_moe": {"mlp_only_layers": [], "layer_types": None, "use_sliding_window": False},
    "qwen2_moe": {"mlp_only_layers": [], "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
    "glm4_moe": {},
    "ernie4_5_moe": {},
    "granitemoe": {},
    "qwen3_5_moe": {},
}


def with_experts(folder: Path, model_type: str):
    """A model of an expert family with an adapter on its experts, too, and its tokenizer."""
    if model_type == "qwen3_5_moe":  # in its releases' layout: stacks, a vision tower, a layer that drafts
        write_wrapper(model_type, folder)
        edit_tensors(folder, as_released)
    else:
        changes = {**SIZES, "vocab_size": 384, "moe_intermediate_size": 128, **EXPERTS[model_type]}
        checkpoint(folder, model_type, **changes)
    mlp = "block_sparse_moe" if model_type == "granitemoe" else "mlp"
    return trained(folder, [one.replace("mlp", mlp) for one in BOTH], load_in_4bit=False)


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
def test_transformers_loads_an_export_with_compressed_tensors_to_the_bit(form, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model, tokenizer = tuned(tmp_path / "base")
    save_merged(model, tmp_path / "out", tokenizer, form, verify=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    again, _ = load(tmp_path / "out", load_in_4bit=False, dtype=torch.bfloat16)
    ours = dict(again.named_parameters())
    assert [name for name, weight in theirs.named_parameters() if not torch.equal(ours[name], weight)] == []


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", [name for name in EXPERTS if name != "granitemoe"])
def test_transformers_computes_with_compressed_tensors_what_oribi_reads_of_experts(
    model_type, form, tmp_path
):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model, tokenizer = with_experts(tmp_path / "base", model_type)
    save_merged(model, tmp_path / "out", tokenizer, form, verify=False)
    kind = AutoModelForImageTextToText if model_type == "qwen3_5_moe" else AutoModelForCausalLM
    theirs, found = kind.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    assert not any(found.values())
    again, _ = load(tmp_path / "out", load_in_4bit=False, dtype=torch.bfloat16)
    assert relative(logits(again.float()), logits(theirs.float())) < 1e-5


SHORT = ("qwen3_5_moe", "granitemoe")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "model_type", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in EXPERTS]
)
def test_every_matrix_of_experts_is_quantised_by_itself_whatever_the_checkpoint_stacks(
    model_type, form, tmp_path
):
    model, tokenizer = with_experts(tmp_path / "base", model_type)
    report = save_merged(model, tmp_path / "out", tokenizer, form, verify=False, max_shard_size=200_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(file)
    merged, settings = apart(MergedModel(model), model.get_base_model()), settings_of(tmp_path / "out")
    inside = "model.language_model." if model_type == "qwen3_5_moe" else "model."
    width = settings["config_groups"]["group_0"]["weights"].get("group_size")
    matrices = [name for name in merged.shapes() if ".experts." in name]
    assert len(matrices) == 3 * sum(one.gate_up_proj.shape[0] for one in expert_modules(model).values())
    for name in matrices:
        expected = merged.read(name, CPU, torch.float32)
        parts = (
            encode_fp8(expected, torch.bfloat16)
            if form == "fp8"
            else encode_int4(expected, width, torch.bfloat16)
        )
        prefix = name.removesuffix("weight").replace("model.", inside, 1)
        assert all(torch.equal(stored[f"{prefix}{part}"], tensor) for part, tensor in parts.items()), name
    # what is dense is named, for programs that take every linear layer for quantised
    dense = {
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and tensor.dim() == 2 and tensor.dtype in (torch.bfloat16, torch.float32)
        and not re.search("embed|visual|mtp", name)
    }  # fmt: skip
    assert {name for name in settings["ignore"] if not name.startswith("re:")} == dense | {"lm_head"}
    patterns = {"re:.*visual.*", "re:.*mtp.*"} if model_type == "qwen3_5_moe" else set()
    assert {name for name in settings["ignore"] if name.startswith("re:")} == patterns
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("from_pretrained" in card, any("52706" in note for note in report.notes)) == (
        (False, True) if model_type == "granitemoe" else (True, False)
    )
    again, _ = load(tmp_path / "out", load_in_4bit=False)
    for name, one in expert_modules(again).items():
        found = one.gate_up_proj[1, : one.gate_up_proj.shape[1] // 2]
        expected = merged.read(f"{name}.1.gate_proj.weight", CPU, torch.float32)
        assert 0 < relative(found, expected) < (0.03 if form == "fp8" else 0.12)
    # the next merge has the checkpoint's stacks as before
    save_merged(model, tmp_path / "whole", tokenizer, verify=False)
    held, written = (load_file(tmp_path / one / "model.safetensors") for one in ("base", "whole"))
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in held.items()}


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_servers_do_not_read_so_are_refused_before_the_training(form, tmp_path):
    checkpoint(tmp_path / "base", "gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])
    model, tokenizer = load(tmp_path / "base", load_in_4bit=False)
    with pytest.raises(ConfigError, match="in MXFP4 or in 16 bits alone; give 'merged_16bit', or 'lora'"):
        save_merged(model, tmp_path / "out", tokenizer, form)
    assert not (tmp_path / "out").exists()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = RunConfig(
        model=str(tmp_path / "base"), dataset=[str(tmp_path / "rows.jsonl")], output_dir=str(tmp_path / "run"), save_method=[form]
    )  # fmt: skip
    with pytest.raises(ConfigError, match="in MXFP4 or in 16 bits alone"):
        check_before_loading(config, detect())


def test_a_form_that_no_program_reads_of_a_models_experts_is_refused_with_what_to_take_instead():
    def refused(form: str, model_type: str, **changes: object) -> str:
        with pytest.raises(ConfigError) as raised:
            require_form(tiny_config(model_type, **changes), form)
        return str(raised.value)

    assert "give 'fp8'" in refused("w4a16", "qwen3_moe", moe_intermediate_size=80)
    assert "packs no stacks of experts" in refused("merged_4bit", "glm4_moe")
    assert "as 'lora' writes them" in refused("lora_per_expert", "granitemoe")
    olmoe = AutoConfig.for_model("olmoe")
    for form in FORMS:
        with pytest.raises(ConfigError, match="outside oribi's family table"):
            require_form(olmoe, form)
    for form in ("lora", "merged_16bit", "fp8", "w4a16", "lora_per_expert", "gguf-adapter"):
        require_form(tiny_config("glm4_moe"), form)
        if form != "lora_per_expert":
            require_form(tiny_config("llama"), form)


@pytest.mark.parametrize("model_type", ["glm4_moe", pytest.param("ernie4_5_moe", marks=pytest.mark.long)])
def test_corrections_of_routers_are_float32_in_16_bit_files_as_in_releases(model_type, tmp_path):
    base = tmp_path / "base"
    checkpoint(base, model_type, dtype=torch.bfloat16, num_hidden_layers=2)

    def as_released(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            tensors[name] = torch.linspace(0.1, 0.11, tensors[name].numel()).view(tensors[name].shape)
            if model_type == "ernie4_5_moe":  # whose routers are float32, too
                gate = name.replace("moe_statics.e_score_correction_bias", "gate.weight")
                tensors[gate] = tensors[gate].float() + 1e-5

    edit_tensors(base, as_released)
    model, tokenizer = load(base, load_in_4bit=False, dtype=torch.bfloat16)
    model = adapted(model)
    for form in ("merged_16bit", "fp8"):
        save_merged(model, tmp_path / form, tokenizer, form, verify=False)
        held, written = (load_file(one / "model.safetensors") for one in (base, tmp_path / form))
        kept = [name for name in held if name.endswith(("correction_bias", "mlp.gate.weight"))]
        assert {held[name].dtype for name in kept} >= {torch.float32}
        for name in kept:
            assert written[name].dtype == held[name].dtype, name
            assert torch.equal(written[name], held[name]), name


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
