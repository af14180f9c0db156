"""Repositories that only repack a model load as they are; one that cannot be trained on names its original."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oribi import FastLanguageModel
from oribi.errors import ModelError
from oribi.memory.architecture import architecture_of
from oribi.models.original import original_of
from oribi.save.nf4_checkpoint import pack_nf4
from tests.models.tiny_checkpoint import checkpoint, edit_config

IDS = torch.arange(3, 43)[None]
CARD = "---\nbase_model:\n- meta-llama/Llama-3.2-1B-Instruct\nlanguage:\n- en\nlibrary_name: transformers\n---\n# Model\n"
# as unsloth's dynamic 4-bit repositories have it: names of whole parts beside those of every model
SKIPPED = ["lm_head", "multi_modal_projector", "merger", "modality_projection", "model.layers.1.mlp"]
NF4 = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": SKIPPED, "llm_int8_threshold": 6.0, "load_in_4bit": True,
    "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def load(path: Path, **arguments):
    settings = {"max_seq_length": 64, "dtype": torch.float32, "device_map": "cpu", **arguments}
    return FastLanguageModel.from_pretrained(str(path), **settings)


def repack(original: Path, folder: Path) -> None:
    """The files that a dynamic 4-bit repository has: one layer's MLP in 16 bits, a pad token of its own, a card."""
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "_proj.weight" in n and not n.startswith("model.layers.1.mlp.")]:
        tensors.update(pack_nf4(name, tensors.pop(name)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder, quantization_config=NF4, unsloth_fixed=True, unsloth_version="2026.10.1", pad_token_id=0
    )
    (folder / "README.md").write_text(CARD)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repacked")
    checkpoint(folder / "tiny", num_hidden_layers=2)
    repack(folder / "tiny", folder / "tiny-unsloth-bnb-4bit")
    return folder


def test_layers_that_a_4_bit_repository_leaves_in_16_bits_stay_so(folders):
    model, tokenizer = load(folders / "tiny-unsloth-bnb-4bit")
    packed = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert packed == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
        if (layer, part[:3]) != (1, "mlp")
    }  # fmt: skip
    stored = load_file(folders / "tiny" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stored)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_adapter_keeps_the_name_that_the_user_wrote_and_serves_on_the_original(folders, tmp_path):
    path = folders / "tiny-unsloth-bnb-4bit"
    model, _ = load(path)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05
                )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
    plain = AutoModelForCausalLM.from_pretrained(folders / "tiny", dtype=torch.float32)
    bare = logits(plain)
    served = PeftModel.from_pretrained(plain, tmp_path)
    assert (logits(served) - bare).norm() > 0.2 * bare.norm()
    assert torch.equal(logits(load(tmp_path, load_in_4bit=None)[0]), logits(model))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny-AWQ", {"quant_method": "awq", "bits": 4}),
        ("tiny-GPTQ-Int4", {"quant_method": "gptq", "bits": 4, "desc_act": False}),
    ],
)
@pytest.mark.parametrize("card", [True, False])
def test_weights_that_cannot_be_trained_on_name_the_original(name, settings, card, folders, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for file in (folders / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit_config(folder, quantization_config=settings)
    if card:
        (folder / "README.md").write_text(CARD)
    original = "meta-llama/Llama-3.2-1B-Instruct" if card else str(tmp_path / "tiny")
    for opens in (
        load,
        lambda folder: architecture_of(str(folder)),
    ):  # as estimate, init and inspect model do
        with pytest.raises(ModelError, match=f"Load the 16-bit original instead: {original}"):
            opens(folder)


def test_a_repository_of_gguf_files_without_a_file_says_how_to_name_one_and_the_original(folders, tmp_path):
    folder = tmp_path / "Llama-3.2-1B-Instruct-GGUF"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders / "tiny/config.json").read_bytes())
    for file in (folders / "tiny").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text(CARD)
    with pytest.raises(ModelError, match="gguf_file=.* original instead: meta-llama/Llama-3.2-1B-Instruct"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("unsloth/Qwen3-8B-bnb-4bit", "unsloth/Qwen3-8B"), ("unsloth/gemma-3-4b-it-GGUF", "unsloth/gemma-3-4b-it"),
        ("unsloth/Qwen3-8B-FP8-Dynamic", "unsloth/Qwen3-8B"), ("unsloth/Qwen3-8B-FP8", "unsloth/Qwen3-8B"),
        ("unsloth/Llama-3.2-1B-Instruct", None), ("unsloth/gpt-oss-20b-BF16", None),
    ],
)  # fmt: skip
def test_a_name_without_a_card_says_its_original(name, original, tmp_path):
    assert original_of(name, tmp_path) == original
