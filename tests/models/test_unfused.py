"""Of a model outside the family table it is said, and estimated, what stays in 16 bits under load_in_4bit."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.models.load import load_model
from oribi.models.unfused import NF4_BYTES, sizes_of_config
from tests.save.tiny_export import byte_level_tokenizer

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "intermediate_size": 64,
}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny(model_type: str):
    return AutoConfig.for_model(model_type, **SIZES, **EXPERTS.get(model_type, {}))


@pytest.mark.parametrize("model_type", [*EXPERTS, "gpt_neox"])
def test_the_sizes_of_a_config_are_those_of_the_loaded_model(model_type, tmp_path):
    config = tiny(model_type)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=torch.float32)
    estimated = sizes_of_config(config).parts(4, load_in_4bit=True)
    packed = kept = experts = 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            packed += parameter.quant_state.shape.numel()
        elif "expert" in name:
            experts += parameter.nbytes
        else:
            kept += parameter.nbytes
    assert packed > 0
    assert estimated == {
        "linear layers": int(packed * NF4_BYTES), "experts": experts, "embeddings and other weights": kept
    }  # fmt: skip
    note = next(note for note in model.oribi.notes if note.startswith("load_in_4bit: "))
    assert "stay in 32 bits" in note
    assert ("not experts" in note) == bool(experts) == (model_type in EXPERTS)
