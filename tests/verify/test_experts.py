"""`oribi verify` passes exports of models with experts, and names what is wrong with one of them."""

from pathlib import Path

import pytest
import torch

from oribi.gguf import llama_cpp
from oribi.models.load import load_model
from oribi.save.gguf import save_gguf
from oribi.verify.call import verify_target
from tests.models.tiny import MIXED
from tests.models.tiny_checkpoint import checkpoint, mxfp4_checkpoint
from tests.save.test_experts import CHANGES, TEXTS, trained
from tests.verify.test_verify import different, words

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed"),
]
# as llama.cpp reads each family
FAMILIES = {
    "qwen3_moe": CHANGES,
    "ernie4_5_moe": {"moe_norm_min": 1e-12},
    "glm4_moe": {},
    "gpt_oss": {
        "layer_types": MIXED[:2],
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4,
        },
    },
}  # fmt: skip


def write(model_type: str, folder: Path) -> Path:
    if model_type == "gpt_oss":
        mxfp4_checkpoint(folder, num_hidden_layers=2, **FAMILIES[model_type])
    else:
        checkpoint(folder, model_type, num_hidden_layers=2, **FAMILIES[model_type])
    return folder


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_merged_folder_its_gguf_file_and_an_adapter_on_its_base_pass_and_the_base_does_not(
    model_type, tmp_path
):
    base = write(model_type, tmp_path / "base")
    model, tokenizer = trained(base, lora_alpha=48)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=TEXTS)
    model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora", held_out=TEXTS)
    found = model.save_pretrained_gguf(str(tmp_path / "gguf"), tokenizer, ["f16"], held_out=TEXTS)
    file = Path(found["gguf_files"][0])
    for target in (tmp_path / "merged", file, file.parent, tmp_path / "a"):
        checks = verify_target(str(target))
        assert different(checks) == set(), f"{target}: {words(checks)}"
        weights = next(check for check in checks if check.name == "weights")
        assert weights.outcome in ("equal", "close"), weights.line()
        assert weights.figures["kl_of_the_base"] > 0.1
    bare, _ = load_model(str(base), dtype=torch.float32, load_in_4bit=False, max_seq_length=None)
    plain = save_gguf(bare.eval(), tmp_path / "plain", tokenizer, ["f16"], verify=False)["gguf_files"][0]
    checks = verify_target(plain, probes=file.parent)
    assert "adapter" in different(checks), words(checks)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_fault_is_named_in_a_file_with_experts(model_type, tmp_path):
    base = write(model_type, tmp_path / "base")
    model, tokenizer = trained(base, lora_alpha=48)
    right = Path(
        model.save_pretrained_gguf(str(tmp_path / "g"), tokenizer, ["f16"], held_out=TEXTS)["gguf_files"][0]
    )
    coded = save_gguf(model, tmp_path / "coded", tokenizer, ["q8_0"], verify=False)["gguf_files"][0]
    checks = verify_target(coded, probes=right.parent)
    assert different(checks) == {"quantisation"}, words(checks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    stronger = save_gguf(model, tmp_path / "strong", tokenizer, ["f16"], verify=False)["gguf_files"][0]
    checks = verify_target(stronger, probes=right.parent)
    assert "adapter" in different(checks), words(checks)
    assert "2 times its strength" in words(checks)
    model, tokenizer = trained(base, lora_alpha=48)
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = layers[1], layers[0]
    swapped = save_gguf(model, tmp_path / "swapped", tokenizer, ["f16"], verify=False)["gguf_files"][0]
    checks = verify_target(swapped, probes=right.parent)
    assert "layers" in different(checks), words(checks)
