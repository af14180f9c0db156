"""Gemma 4's experts, which lie in the layer itself beside an MLP: loaded, trained, exported, and read by other programs."""

from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.errors import ConfigError
from oribi.gguf import llama_cpp
from oribi.gguf.file import GGUFFile
from oribi.kernels.expert_stack import dequantize_stack
from oribi.kernels.packed_weight import PackedWeight
from oribi.memory.architecture import architecture_of
from oribi.models.load import load_model
from oribi.save.gguf import save_gguf, save_gguf_adapter
from tests.models.test_parity import relative
from tests.models.tiny_checkpoint import checkpoint
from tests.save.test_adapter_files import WRAPPERS
from tests.save.test_experts import TEXTS, logits, proved_and_merged_from_either_base, trained
from tests.save.tiny_export import byte_level_tokenizer, distance_from_llama_cpp

# as released: no inputs of single layers, every layer with keys of its own
RELEASED = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
STACKS = ("gate_up_proj", "down_proj")
PREFIX = "base_model.model.model.{}layers.1.experts."


@pytest.fixture(scope="module", params=["text", "wrapper"])
def folder(request, tmp_path_factory) -> Path:
    """A checkpoint of the text decoder alone, or of the image-text model as released."""
    folder = tmp_path_factory.mktemp("gemma4") / "base"
    if request.param == "text":
        checkpoint(folder, "gemma4_text+experts", **RELEASED)
        return folder
    settings = WRAPPERS["gemma4"]
    text = {**settings["text_config"], "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3}
    text |= {"moe_intermediate_size": 64, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    config = AutoConfig.for_model("gemma4", **{**settings, "text_config": text}, tie_word_embeddings=True)
    torch.manual_seed(0)
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = kind._from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def plain(folder: Path) -> torch.nn.Module:
    """transformers' model of a folder."""
    config = AutoConfig.from_pretrained(folder)
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), AutoModelForCausalLM)
    return kind.from_pretrained(folder, dtype=torch.float32)


def test_every_matrix_is_packed_alone_and_the_router_and_norms_stay(folder):
    model, _ = load_model(str(folder), dtype=torch.float32, max_seq_length=None)
    assert model.oribi.fused
    stored = load_file(folder / "model.safetensors")
    layer = model.model.layers[1]
    prefix = next(name for name in stored if name.endswith("layers.1.experts.down_proj")).removesuffix(
        "experts.down_proj"
    )
    for name in STACKS:
        packed = getattr(layer.experts, name)
        assert isinstance(packed, PackedWeight)
        values = dequantize_stack(packed.packed, torch.float32)
        for expert, weight in enumerate(stored[f"{prefix}experts.{name}"]):
            parts = weight.chunk(2) if name == "gate_up_proj" else [weight]
            for part, value in zip(parts, values[expert].chunk(len(parts))):
                alone = quantize_4bit(
                    part.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                assert torch.equal(value, dequantize_4bit(*alone))
    assert layer.mlp.gate_proj.weight.dtype == torch.uint8
    for name in (
        "router.proj.weight",
        "router.scale",
        "router.per_expert_scale",
        "pre_feedforward_layernorm_2.weight",
    ):
        assert torch.equal(layer.get_parameter(name), stored[f"{prefix}{name}"]), name
    held = sum(
        one.nbytes + getattr(getattr(one, "quant_state", None), "absmax", one[:0]).nbytes
        for one in model.parameters()
    )
    estimated = architecture_of(str(folder), dtype=torch.float32).weight_bytes(load_in_4bit=True)
    assert abs(estimated - held) < 0.02 * held  # at this size the tables of the codes weigh something


def test_an_adapter_and_a_merged_model_compute_in_transformers_class_what_was_trained(folder, tmp_path):
    model, tokenizer = trained(folder, None, load_in_4bit=False)
    reached = {
        name.split(".lora_A")[0].split("layers.1.")[-1]
        for name, _ in model.named_parameters()
        if "layers.1." in name and ".lora_A" in name
    }
    assert reached >= {"experts", "experts.base_layer", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # PEFT's layout of a stack of matrices, which vLLM reads of this family: gate|up inside, down outside, both there
    outside = next(name for name in names if name.endswith("layers.1.experts.lora_A.weight"))
    shapes = {
        part: names[outside.replace("lora_A", part)].shape
        for part in ("lora_A", "lora_B", "base_layer.lora_A", "base_layer.lora_B")
    }
    assert shapes == {
        "lora_A": (32, 64),
        "lora_B": (64, 32),
        "base_layer.lora_A": (32, 64),
        "base_layer.lora_B": (128, 32),
    }
    report = model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=TEXTS
    )
    assert report.outcome.value == "equal"
    base = plain(folder)
    assert relative(logits(base), expected) > 1e-2
    assert relative(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected) < 1e-5
    assert relative(logits(plain(tmp_path / "merged")), expected) < 1e-5
    held, written = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "merged"))
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in held.items()}
    again, _ = load_model(str(tmp_path / "adapter"), dtype=torch.float32, max_seq_length=None)
    assert torch.equal(logits(again), expected)


@pytest.mark.long
def test_what_was_trained_on_packed_experts_is_proved_in_plain_peft_and_merged_from_either_base(
    folder, tmp_path
):
    model, tokenizer = trained(folder, None)
    proved_and_merged_from_either_base(model, tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="lora_per_expert"):
        model.save_pretrained_merged(str(tmp_path / "each"), tokenizer, save_method="lora_per_expert")


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
def test_it_answers_in_llama_cpp_merged_and_with_its_adapter_beside_the_base(folder, tmp_path):
    model, tokenizer = trained(folder, None)
    merged = model.save_pretrained_gguf(str(tmp_path / "merged"), tokenizer, ["f32"], held_out=TEXTS)
    answers = [check for check in merged["report"].checks if "greedy answers in llama.cpp" in check.name]
    assert [check.outcome.value for check in answers] == ["equal"]
    names = GGUFFile(Path(merged["gguf_files"][0])).tensors
    assert names["blk.1.ffn_gate_up_exps.weight"].shape == (8, 128, 64)
    again, _ = load_model(
        merged["gguf_files"][0], dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    assert again.config.enable_moe_block
    assert relative(logits(again), logits(model)) < 1e-5
    base, _ = load_model(str(folder), dtype=torch.float32, load_in_4bit=False, max_seq_length=None)
    file = save_gguf(base.eval(), tmp_path / "gguf", tokenizer, ["f32"], verify=False)["gguf_files"][0]
    model, _ = trained(folder, None, load_in_4bit=False)
    adapter = save_gguf_adapter(model, tmp_path / "lora", "f32")["gguf_files"][0]
    a, b = (GGUFFile(Path(adapter)).tensors[f"blk.1.ffn_gate_up_exps.weight.lora_{x}"].shape for x in "ab")
    assert (a, b) == ((8, 4, 64), (8, 128, 4))
    prompt = list(range(20, 60))
    found = distance_from_llama_cpp(model.eval(), file, prompt, adapter=adapter)
    assert found.agreeing == 1.0
    assert found.worst < 3e-2  # 0.06 if llama.cpp got factors without the scales of the experts
    assert distance_from_llama_cpp(model.eval(), file, prompt).worst > 0.1
