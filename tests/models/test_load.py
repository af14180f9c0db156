"""Checkpoints load tensor by tensor into the weights that bitsandbytes would make of them, or the error says why not."""

import json
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oribi.errors import ConfigError, ModelError
from oribi.kernels import nf4
from oribi.models.load import load_model
from tests.models.tiny import MIXED, ROPES, tiny_config
from tests.models.tiny_checkpoint import checkpoint, edit_config, edit_tensors

IDS = torch.arange(3, 43)[None]


def load(path: Path, **arguments):
    return load_model(
        str(path), **{"dtype": "float32", "device_map": "cpu", "max_seq_length": 64, **arguments}
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS.to(model.device)).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -- what arrives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_16_bit_weights_arrive_as_they_are(shard_size, tied, tmp_path):
    theirs = checkpoint(tmp_path, shard_size=shard_size, tie_word_embeddings=tied)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "200KB")
    model, _ = load(tmp_path, load_in_4bit=False)
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert relative(logits(model), logits(theirs)) < 1e-5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", ["float16", "bf16", torch.float32])
def test_every_stored_dtype_is_cast_to_the_wanted_one(stored, wanted, tmp_path):
    theirs = checkpoint(tmp_path, dtype=stored)
    model, _ = load(tmp_path, load_in_4bit=False, dtype=wanted)
    dtype = {"float16": torch.float16, "bf16": torch.bfloat16}.get(wanted, wanted)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], theirs.state_dict()[name].to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3"])
def test_packed_weights_are_bitsandbytes_own_bit_for_bit(model_type, tmp_path):
    theirs = checkpoint(tmp_path, model_type)
    model, _ = load(tmp_path)
    dense = dict(theirs.named_parameters())
    packed = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        packed += 1
        codes, state = quantize_4bit(
            dense[f"{name}.weight"].data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(layer.weight.data, codes)
        found = layer.weight.quant_state
        assert torch.equal(found.absmax, state.absmax)
        assert torch.equal(found.state2.absmax, state.state2.absmax)
        assert torch.equal(
            nf4.dequantize([layer.weight], torch.float32), nf4.reference(layer.weight, torch.float32)
        )
    assert packed == (4 if model_type == "phi3" else 7) * model.config.num_hidden_layers
    assert type(model.lm_head) is torch.nn.Linear


def test_a_packed_model_computes_what_transformers_computes_from_the_same_settings(tmp_path):
    checkpoint(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    for layer in theirs.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    assert relative(logits(load(tmp_path)[0]), logits(theirs)) < 1e-5


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(576, 192), (7, 64), (257, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_in_portions_is_bitsandbytes_own_bit_for_bit(shape, dtype, double):
    weight = torch.randn(shape).to(dtype)
    codes, state = nf4.quantize(weight, double_quant=double)
    expected, theirs = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax, theirs.absmax)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type, state.nested) == (
        theirs.shape, theirs.dtype, theirs.blocksize, theirs.quant_type, theirs.nested,
    )  # fmt: skip
    assert torch.equal(state.code, theirs.code)
    if double:
        assert torch.equal(state.offset, theirs.offset)
        assert torch.equal(state.state2.absmax, theirs.state2.absmax)
        assert torch.equal(state.state2.code, theirs.state2.code)
        assert (state.state2.blocksize, state.state2.dtype) == (theirs.state2.blocksize, theirs.state2.dtype)


def test_weights_that_share_an_input_lie_in_one_buffer(tmp_path):
    checkpoint(tmp_path)
    layer = load(tmp_path)[0].model.layers[2]
    for group in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        for tensors in ([m.weight.data for m in group], [m.weight.quant_state.absmax for m in group]):
            place = tensors[0].data_ptr()
            for tensor in tensors:
                assert tensor.data_ptr() == place
                place += tensor.numel() * tensor.element_size()


def test_full_finetuning_packs_nothing_and_trains_everything(tmp_path):
    checkpoint(tmp_path)
    model, _ = load(tmp_path, full_finetuning=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.training
    assert any("load_in_4bit is ignored" in note for note in model.oribi.notes)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"float32_mixed_precision": True}, torch.float32),
        ({"dtype": "float16"}, torch.float32),
    ],
)
def test_full_finetuning_keeps_float32_weights_where_asked_or_needed(arguments, dtype, tmp_path):
    checkpoint(tmp_path)
    model, _ = load(tmp_path, full_finetuning=True, **{"dtype": "bfloat16", **arguments})
    assert model.dtype == dtype


def test_rows_that_bitsandbytes_cannot_pack_on_a_cpu_stay_dense(tmp_path):
    theirs = checkpoint(tmp_path, hidden_size=96, num_attention_heads=4, head_dim=32)
    model, _ = load(tmp_path)
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is torch.nn.Linear
    assert isinstance(layer.mlp.down_proj, bnb.nn.Linear4bit)
    assert any("NF4 on a CPU needs rows of a multiple of 64" in note for note in model.oribi.notes)
    assert torch.equal(layer.mlp.up_proj.weight, theirs.model.layers[0].mlp.up_proj.weight)


# -- checkpoints that come packed ----------------------------------------------------------------------------------


@pytest.fixture
def packed_checkpoint(tmp_path) -> tuple[Path, torch.nn.Module]:
    checkpoint(tmp_path / "dense")
    skip = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "layers.0.mlp"],
    }
    model, tokenizer = load(tmp_path / "dense", quantization_config=skip)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", model


def test_a_packed_checkpoint_loads_as_it_was_saved(packed_checkpoint):
    path, model = packed_checkpoint
    again, _ = load(path)
    assert again.oribi.kind == "bnb-4bit"
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(again.model.layers[1].mlp.up_proj, bnb.nn.Linear4bit)
    assert torch.equal(logits(again), logits(model))


def test_transformers_loads_our_packed_checkpoint(packed_checkpoint):
    path, model = packed_checkpoint
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    for layer in theirs.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    assert relative(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize("double", [True, False])
def test_a_packed_checkpoint_of_transformers_loads(double, tmp_path):
    checkpoint(tmp_path / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    load(tmp_path / "dense")[1].save_pretrained(tmp_path / "packed")
    model, _ = load(tmp_path / "packed")
    weight = model.model.layers[3].self_attn.k_proj.weight
    assert torch.equal(weight.data, theirs.model.layers[3].self_attn.k_proj.weight.data)
    assert weight.quant_state.nested == double


@pytest.mark.parametrize("arguments", [{"load_in_4bit": False}, {"full_finetuning": True}])
def test_a_packed_checkpoint_is_dequantised_where_16_bit_is_asked_for(arguments, packed_checkpoint):
    path, model = packed_checkpoint
    dense, _ = load(path, **arguments)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in dense.modules())
    assert any("its weights are dequantised" in note for note in dense.oribi.notes)
    assert relative(logits(dense), logits(model)) < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "awq", "bits": 4}, "quantised by awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes 8-bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "packed as 'fp4'",
        ),
    ],
)
def test_other_quantisations_are_refused(settings, words, tmp_path):
    checkpoint(tmp_path)
    edit_config(tmp_path, quantization_config=settings)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_float8_weights_are_refused(tmp_path):
    checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=f"{name} has dtype F8_E4M3"):
        load(tmp_path)


# -- damaged and odd checkpoints -----------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named_at_once(tmp_path):
    checkpoint(tmp_path)

    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.extra.weight"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(65)

    edit_tensors(tmp_path, damage)
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    for words in (
        "1 missing: model.layers.1.mlp.up_proj.weight",
        "1 unexpected: model.layers.0.extra.weight",
        "1 of another shape: model.norm.weight: [65], expected [64]",
    ):
        assert words in str(error.value)


def test_nothing_is_read_before_the_names_are_checked(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.norm.weight"))
    monkeypatch.setattr("oribi.tensors.SafetensorsSource.read", lambda *a: pytest.fail("data was read"))
    with pytest.raises(ModelError, match="1 missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"nothing", "not a safetensors file"),
    ],
)
def test_files_that_are_no_safetensors_are_named(content, words, tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path):
    checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is cut short: \d+ of \d+ bytes"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    checkpoint(tmp_path, shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} shards are missing, {shards[1].name}"):
        load(tmp_path)


def test_pickled_weights_are_refused_unless_asked_for(tmp_path):
    theirs = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="use_safetensors=False"):
        load(tmp_path)
    model, _ = load(tmp_path, use_safetensors=False, load_in_4bit=False)
    assert model.oribi.kind == "pickle"
    assert relative(logits(model), logits(theirs)) < 1e-5


def test_a_tied_checkpoint_with_a_head_says_that_the_head_is_not_used(tmp_path):
    checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(384, 64)}))
    model, _ = load(tmp_path)
    assert any("lm_head.weight is not used" in note for note in model.oribi.notes)
    assert model.lm_head.weight.abs().sum() > 0


def test_old_rotary_buffers_and_a_missing_model_prefix_are_understood(tmp_path):
    theirs = checkpoint(tmp_path, tie_word_embeddings=True)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit_tensors(tmp_path, bare)
    assert relative(logits(load(tmp_path, load_in_4bit=False)[0]), logits(theirs)) < 1e-5


def test_the_text_decoder_of_a_multimodal_checkpoint_is_loaded(tmp_path):
    theirs = checkpoint(tmp_path, "gemma3_text", vision_config=None)
    text = json.loads((tmp_path / "config.json").read_text())
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def inside(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = torch.zeros(4)
        tensors["multi_modal_projector.weight"] = torch.zeros(4)

    edit_tensors(tmp_path, inside)
    model, _ = load(tmp_path, load_in_4bit=False)
    assert relative(logits(model), logits(theirs)) < 1e-5
    assert any("the text decoder is loaded" in note for note in model.oribi.notes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "there is no folder"),
        ("./nowhere", "there is no folder"),
        ("not a name!", "neither a directory nor a possible name"),
    ],
)
def test_names_of_nothing_are_refused(name, words):
    with pytest.raises(ModelError, match=words):
        load(name)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither config.json nor adapter_config.json"):
        load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\); name one with gguf_file="):
        load(tmp_path)


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed are auto, float16"),
        ({"dtype": torch.float64}, "allowed are float16, bfloat16 and float32"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "torchrun"),
        ({"device_map": "nowhere"}, "give a device such as"),
        ({"device_map": "cuda:0"}, "device_map is 'cuda:0' but"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}},
            "bnb_4bit_quant_type='nf4'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words, tmp_path):
    if arguments.get("device_map") == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, **arguments)


@pytest.mark.parametrize(
    "device_map", ["auto", "sequential", "balanced", "cpu", {"": "cpu"}, torch.device("cpu"), None]
)
def test_device_maps_of_one_device_are_accepted(device_map, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there the machine's device is a GPU")
    checkpoint(tmp_path)
    assert load(tmp_path, device_map=device_map)[0].device.type == "cpu"


def test_dtype_auto_is_the_checkpoints(tmp_path):
    checkpoint(tmp_path, dtype=torch.float16)
    assert load(tmp_path, dtype="auto", load_in_4bit=False)[0].dtype == torch.float16


def test_quantization_config_wins_over_the_flags(tmp_path):
    checkpoint(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
    )
    model, _ = load(tmp_path, load_in_4bit=False, quantization_config=settings)
    assert not model.model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_resize_model_vocab_adds_rows(tmp_path):
    theirs = checkpoint(tmp_path)
    model, _ = load(tmp_path, resize_model_vocab=400)
    assert (
        model.get_input_embeddings().weight.shape[0]
        == model.lm_head.weight.shape[0]
        == model.config.vocab_size
        == 400
    )
    assert torch.equal(model.get_input_embeddings().weight[:384], theirs.get_input_embeddings().weight)
    assert not any(p.requires_grad for p in model.parameters())


# -- positions -----------------------------------------------------------------------------------------------------


def test_a_length_within_the_models_positions_changes_nothing(tmp_path):
    checkpoint(tmp_path)
    model, tokenizer = load(tmp_path, max_seq_length=256)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert tokenizer.model_max_length == model.max_seq_length == model.oribi.max_seq_length == 256


@pytest.mark.parametrize(
    ("rope", "kind", "factor"),
    [(None, "yarn", 2.0), ("linear", "linear", 8.0), ("yarn", "yarn", 8.0), ("dynamic", "dynamic", 4.0)],
)
def test_a_longer_length_stretches_rope_as_transformers_computes_it(rope, kind, factor, tmp_path):
    changes = {} if rope is None else {"rope_parameters": {**ROPES[rope], "factor": 4.0}}
    checkpoint(tmp_path, max_position_embeddings=128, **changes)
    model, _ = load(tmp_path, max_seq_length=256, load_in_4bit=False)
    parameters = model.config.rope_parameters
    assert parameters["rope_type"] == kind
    assert parameters["factor"] == factor
    assert any("RoPE is stretched" in note for note in model.oribi.notes)
    model.save_pretrained(tmp_path / "stretched")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stretched", dtype=torch.float32)
    long = torch.arange(200)[None] % 300
    with torch.no_grad():
        assert relative(model.eval()(long).logits, theirs(long).logits) < 1e-5


def test_only_layers_that_see_the_whole_context_are_stretched(tmp_path):
    checkpoint(tmp_path, "gemma3_text", max_position_embeddings=128, layer_types=MIXED)
    parameters = load(tmp_path, max_seq_length=512)[0].config.rope_parameters
    assert parameters["sliding_attention"]["rope_type"] == "default"
    assert parameters["full_attention"]["factor"] == 16.0  # linear 4 before


@pytest.mark.parametrize("rope", ["llama3", "longrope"])
def test_scalings_that_cannot_grow_are_refused(rope, tmp_path):
    checkpoint(tmp_path, rope_parameters=ROPES[rope], max_position_embeddings=128)
    with pytest.raises(ModelError, match=f"its {rope} RoPE cannot be stretched further"):
        load(tmp_path, max_seq_length=1024)


def test_rope_scaling_overrides_the_config(tmp_path):
    checkpoint(tmp_path, max_position_embeddings=64)
    model, _ = load(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}, max_seq_length=256)
    assert model.config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    assert model.config.max_position_embeddings == 256
    with pytest.raises(ModelError, match="allowed are default, linear"):
        load(tmp_path, rope_scaling={"type": "spiral", "factor": 4.0})


# -- adapters, runs, the hub, other families -----------------------------------------------------------------------


def adapter(tmp_path: Path) -> torch.nn.Module:
    """Writes base/ and adapter/ with plain transformers and PEFT; returns PEFT's model."""
    theirs = checkpoint(tmp_path / "base", tie_word_embeddings=False)
    theirs.name_or_path = str(tmp_path / "base")
    tuned = get_peft_model(
        theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned.eval()


@pytest.mark.parametrize("place", ["adapter", "run/adapter", "run/checkpoint-20"])
def test_an_adapter_brings_its_base_and_is_trainable(place, tmp_path):
    tuned = adapter(tmp_path)
    name = tmp_path / "adapter"
    if place != "adapter":
        (tmp_path / "run/checkpoint-3").mkdir(parents=True)
        name.rename(tmp_path / place)
        name = tmp_path / "run"
    model, _ = load(name, load_in_4bit=False)
    assert relative(logits(model), logits(tuned)) < 1e-5
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    assert any("is an adapter on" in note for note in model.oribi.notes)


def test_an_adapter_cannot_be_fully_finetuned(tmp_path):
    adapter(tmp_path)
    with pytest.raises(ConfigError, match="which full_finetuning=True cannot train"):
        load(tmp_path / "adapter", full_finetuning=True)


def test_an_adapter_without_weights_is_named(tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no adapter_model.safetensors"):
        load(tmp_path / "adapter")


def test_a_hub_name_loads_from_the_cache_without_a_network(tmp_path):
    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--name-bnb-4bit/snapshots/abc123"
    theirs = checkpoint(snapshot)
    (cache / "models--owner--name-bnb-4bit/refs").mkdir()
    (cache / "models--owner--name-bnb-4bit/refs/main").write_text("abc123")
    model, _ = load("owner/name-bnb-4bit", cache_dir=str(cache), local_files_only=True, load_in_4bit=False)
    assert model.name_or_path == "owner/name-bnb-4bit"
    assert relative(logits(model), logits(theirs)) < 1e-5
    with pytest.raises(ModelError, match="is not in the hub's cache"):
        load("owner/other", cache_dir=str(cache), local_files_only=True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_family_outside_the_table_runs_unfused_and_says_so(packed, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tests.save.tiny_export import byte_level_tokenizer

    config = GPTNeoXConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
    )
    theirs = GPTNeoXForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path, load_in_4bit=packed)
    assert any("outside oribi's family table" in note for note in model.oribi.notes)
    assert not model.oribi.fused
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == packed
    if not packed:
        assert relative(logits(model), logits(theirs)) < 1e-5
    tuned = get_peft_model(
        model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    ).train()
    first, second = (
        tuned.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=[]) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert tuned.base_model.model.training


def test_an_unknown_model_type_is_an_error_that_names_the_model(tmp_path):
    checkpoint(tmp_path)
    edit_config(tmp_path, model_type="martian")
    with pytest.raises(
        ModelError, match="config.json: model_type = 'martian': transformers .* knows no such model"
    ):
        load(tmp_path)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_host_memory_stays_near_the_model_and_one_shard(tmp_path):
    """A float32 checkpoint of 8 shards becomes bfloat16; the whole checkpoint is never in memory."""
    from transformers import LlamaForCausalLM

    config = tiny_config(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, attention_bias=False, mlp_bias=False, vocab_size=384,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="72MB")
    from tests.save.tiny_export import byte_level_tokenizer

    byte_level_tokenizer().save_pretrained(tmp_path)
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 8
    script = (
        "import resource, sys\n"
        "from oribi.models.load import load_model\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "load_model(sys.argv[1], load_in_4bit=False, dtype='bfloat16', device_map='cpu')\n"
        "print(peak() - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    added = int(out.stdout.split()[-1])
    assert added < sum(shards) / 2 + 2 * max(shards)
