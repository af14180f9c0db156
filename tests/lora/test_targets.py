"""Names of an MLP's projections in a model with experts, and what the estimate makes of them."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from oribi.config import PROJECTIONS, RunConfig
from oribi.errors import ConfigError
from oribi.lora.attach import attach_lora
from oribi.memory.architecture import architecture_of
from oribi.memory.estimate import Training
from oribi.models.load import load_model
from tests.models.tiny import tiny_config

BOTH = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def written(model_type: str, path: Path, tiny_folder: Path) -> Path:
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_folder / name).read_bytes())
    return path


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("glm4_moe", marks=pytest.mark.long)])
def folder(request, tmp_path_factory, tiny_folder):
    """A model whose first or second layer has no experts; GLM's others have an MLP beside them."""
    return written(request.param, tmp_path_factory.mktemp(request.param), tiny_folder)


def attached(folder, **settings):
    model, _ = load_model(str(folder), dtype="float32", load_in_4bit=False, max_seq_length=32)
    return attach_lora(model, r=4, **settings)


@pytest.mark.parametrize(
    ("settings", "stacks"),
    [
        ({}, BOTH),
        ({"target_modules": "all-linear"}, BOTH),
        ({"target_modules": ["q_proj", "down_proj"]}, {"mlp.experts.down_proj"}),
        ({"target_modules": "up_proj"}, {"mlp.experts.gate_up_proj"}),
        ({"target_modules": ATTENTION}, set()),
        ({"lora_dropout": 0.1}, set()),
        ({"use_dora": True}, set()),
        ({"target_modules": list(PROJECTIONS), "target_parameters": ["mlp.experts.down_proj"]}, {"mlp.experts.down_proj"}),
        ({"finetune_last_n_layers": 1}, {f"layers.3.{stack}" for stack in BOTH}),
    ],
)  # fmt: skip
def test_names_of_an_mlp_mean_the_experts_and_the_estimate_counts_them(folder, settings, stacks):
    model = attached(folder, **settings)
    assert set(model.peft_config["default"].target_parameters or ()) == stacks
    told = [note for note in model.oribi.notes if note.startswith("LoRA goes on the experts")]
    assert bool(told) == bool(stacks)
    pairs = sum(p.numel() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)
    asked = {**settings, "target_modules": settings.get("target_modules", list(PROJECTIONS)), "lora_r": 4}
    if isinstance(asked["target_modules"], str):
        asked["target_modules"] = [asked["target_modules"]]
    config = RunConfig(model=str(folder), load_in_4bit=False, **asked)
    training = Training(architecture_of(str(folder)), config)
    assert sum(training.adapted.values()) + sum(training.adapted_stacks.values()) == pairs


def test_experts_alone_have_no_pairs_with_what_parameters_cannot_have(folder):
    with pytest.raises(
        ConfigError, match="down_proj are stacks of experts .* no pairs with lora_dropout = 0.1"
    ):
        attached(folder, target_modules=["down_proj"], lora_dropout=0.1)


def test_a_model_without_experts_keeps_its_targets(tiny_folder):
    model = attached(tiny_folder)
    assert not model.peft_config["default"].target_parameters
    assert set(PROJECTIONS) <= set(model.peft_config["default"].target_modules)


@pytest.mark.long
@pytest.mark.parametrize("names", [["all-linear"], ["down_proj"]])
def test_an_mlp_beside_experts_is_trained_where_peft_reaches_it(names, tmp_path, tiny_folder):
    written("qwen3_5_moe_text", tmp_path, tiny_folder)
    model = attached(tmp_path, target_modules=names[0])
    adapted = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("mlp.shared_expert.down_proj") for name in adapted)
    assert any(name.endswith("mlp.experts") for name in adapted)
    assert not any(name.endswith((".gate", "shared_expert_gate")) for name in adapted)
    config = RunConfig(model=str(tmp_path), load_in_4bit=False, target_modules=names, lora_r=4)
    training = Training(architecture_of(str(tmp_path)), config)
    estimated = sum(training.adapted.values()) + sum(training.adapted_stacks.values())
    assert estimated == sum(p.numel() for p in model.parameters() if p.requires_grad)
