"""Names of an MLP's projections in a model with experts, and what the estimate makes of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM

from oribi.config import PROJECTIONS, RunConfig
from oribi.errors import ConfigError
from oribi.families import FAMILIES
from oribi.lora.attach import attach_lora
from oribi.memory.architecture import Architecture, architecture_of
from oribi.memory.estimate import Training
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.experts import Experts
from oribi.models.load import ModelSource, load_model
from tests.models.tiny import KINDS, tiny_config

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


def loaded_by_hand(model_type: str) -> DecoderForCausalLM:
    """A tiny model of a family as if it had been loaded from a checkpoint."""
    base = build(tiny_config(model_type), device="cpu").requires_grad_(False)
    base.oribi = ModelSource(
        model_type, "safetensors", 32, False, identity=SimpleNamespace(weights="float32")
    )
    return base


NAMES = [list(PROJECTIONS), ["all-linear"], ["v_proj", "down_proj"], ["o_proj", "up_proj"]]


@pytest.mark.parametrize(
    "targets",
    [*NAMES[:2], *(pytest.param(one, marks=pytest.mark.long) for one in NAMES[2:])],
    ids=" ".join,
)
@pytest.mark.parametrize("model_type", KINDS)
def test_every_familys_estimate_counts_what_attaching_trains(model_type, targets):
    config = tiny_config(model_type)
    variants = [{}, {"finetune_last_n_layers": 1}, {"lora_dropout": 0.1}]
    if targets != NAMES[3]:
        variants.append(
            {"exclude_modules": [FAMILIES[model_type].projections().get("down_proj", "down_proj")]}
        )
    for settings in variants:
        base = loaded_by_hand(model_type)
        asked = "all-linear" if targets == ["all-linear"] else targets
        model = attach_lora(base, r=4, target_modules=asked, **settings)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        architecture = Architecture(model_type, config, None, build(config, device="meta"))
        training = Training(architecture, RunConfig(lora_r=4, target_modules=targets, **settings))
        assert training.trainable == trained, settings
        assert trained > 0


@pytest.mark.parametrize(("model_type", "reached"), [("qwen3_5_moe_text", True), ("glm4_moe", False)])
def test_an_mlp_beside_the_experts_is_reached_by_name_or_refused_and_never_means_the_experts(
    model_type, reached
):
    name = f"{FAMILIES[model_type].attribute('shared_experts')}.down_proj"
    if not reached:
        with pytest.raises(ConfigError, match=f"{name}: PEFT takes every name that ends so for the experts"):
            attach_lora(loaded_by_hand(model_type), r=4, target_modules=[name])
        return
    model = attach_lora(loaded_by_hand(model_type), r=4, target_modules=[name])
    assert not model.peft_config["default"].target_parameters
    trained = [one for one, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(f".{name}.lora_" in one for one in trained)


@pytest.mark.parametrize("part", ["router", "experts", "mlp"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts_and_routers_are_not_trained_whole(model_type, part):
    name = part if part == "experts" else FAMILIES[model_type].attribute(part)
    with pytest.raises(
        ConfigError, match=f"modules_to_save: {name}: experts and their router are not trained whole"
    ):
        attach_lora(loaded_by_hand(model_type), r=4, modules_to_save=[name])


def test_experts_of_one_layer_and_excluded_ones_get_what_was_asked(folder):
    model = attached(folder, target_modules=["layers.3.mlp.experts.down_proj"])
    assert stacks_with_pairs(model) == {(3, "down_proj")}
    model = attached(folder, exclude_modules=["layers.3.mlp.experts", "gate_up_proj"])
    held = {(i, "down_proj") for i in range(3) if has_experts(model, i)}
    assert stacks_with_pairs(model) == held


def has_experts(model, index: int) -> bool:
    return any(isinstance(one, Experts) for one in model.get_base_model().model.layers[index].modules())


def stacks_with_pairs(model) -> set[tuple[int, str]]:
    """Layer and name of each adapted stack."""
    return {
        (int(name.partition(".layers.")[2].partition(".")[0]), module.parameter_name)
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


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
