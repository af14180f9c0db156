"""A family's adapter and merged model work in transformers' own class of it, whatever the checkpoint calls its parts."""

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oribi.families import FAMILIES
from tests.models.tiny_checkpoint import checkpoint
from tests.save.test_adapter_files import adapted, load, logits

OWN_NAMES = [
    name
    for name, row in FAMILIES.items()
    if (row.names or row.config_fields or row.query_scale_by_position)
    and row.experts is None  # experts are no linear layers: test_experts.py
    and row.architecture.endswith(
        "ForCausalLM"
    )  # without one there are wrappers alone: test_adapter_files.py
]


@pytest.mark.parametrize("model_type", [*OWN_NAMES, pytest.param("cohere2", marks=pytest.mark.long)])
def test_an_adapter_and_a_merged_model_compute_in_transformers_class_what_was_trained(model_type, tmp_path):
    checkpoint(tmp_path / "base", model_type, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    packed, _ = load(tmp_path / "base", load_in_4bit=True)
    linears = [name for name, module in packed.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linears) == 2 * len(set(FAMILIES[model_type].projections().values()))
    model, tokenizer = load(tmp_path / "base")
    assert (logits(packed) - logits(model)).norm() < 0.5 * logits(model).norm()
    before = logits(model)
    model = adapted(model)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(linears)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(str(tmp_path / "adapter"))
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=["a red fox"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")) - expected).abs().max() < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-4
