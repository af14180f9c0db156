"""Adapters that hold the pairs of each expert by themselves are what they were trained to be, or are refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oribi.errors import ModelError
from oribi.models.load import load_model
from tests.models.test_parity import relative
from tests.models.tiny_checkpoint import checkpoint

EXPERT = "base_model.model.model.layers.{}.mlp.experts.{}.{}_proj.lora_{}.weight"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("each") / "base"
    checkpoint(folder, "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])
    return folder


def write(base: Path, folder: Path, one_a: bool = False, **changes: object) -> dict[str, torch.Tensor]:
    """An adapter in the older layout on attention and on all experts; its tensors."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        **changes,
    }
    for layer in range(2):
        for expert in range(8):
            for part in ("gate", "up", "down"):
                for factor, shape in (("A", (4, 64)), ("B", (64, 4))):
                    name = EXPERT.format(layer, expert, part, factor)
                    tensors[name] = torch.randn(shape, generator=generator) * 0.1
            if one_a:
                gate, up = (EXPERT.format(layer, expert, part, "A") for part in ("gate", "up"))
                tensors[up] = tensors[gate].clone()
        query = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{{}}.weight"
        tensors[query.format("A")] = torch.randn(4, 64, generator=generator) * 0.1
        tensors[query.format("B")] = torch.randn(128, 4, generator=generator) * 0.1
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base), **settings).save_pretrained(folder)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return tensors


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 380, (2, 14), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids).logits


def with_changes_added(
    base: Path, tensors: dict[str, torch.Tensor], scales: dict[str, float]
) -> torch.Tensor:
    """Logits of transformers' model with every update added to its weights."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def update(name: str) -> torch.Tensor:
        kind = next(kind for kind in scales if kind in name)
        return scales[kind] * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]

    with torch.no_grad():
        for index, layer in enumerate(plain.model.layers):
            query = f"base_model.model.model.layers.{index}.self_attn.q_proj.lora_A.weight"
            layer.self_attn.q_proj.weight += update(query)
            for expert in range(8):
                gate, up, down = (
                    update(EXPERT.format(index, expert, part, "A")) for part in ("gate", "up", "down")
                )
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([gate, up])
                layer.mlp.experts.down_proj[expert] += down
    return logits(plain)


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, {"_proj": 1.5}),
        pytest.param({"one_a": True}, {"_proj": 1.5}, marks=pytest.mark.long),
        pytest.param({"use_rslora": True}, {"_proj": 3.0}, marks=pytest.mark.long),
        ({"alpha_pattern": {"up_proj": 2, "q_proj": 8}}, {"up_proj": 0.5, "q_proj": 2.0, "_proj": 1.5}),
    ],
)  # fmt: skip
def test_it_computes_what_its_pairs_say_and_is_saved_as_plain_peft_reads_it(changes, scales, base, tmp_path):
    tensors = write(base, tmp_path / "each", **changes)
    expected = with_changes_added(base, tensors, scales)
    model, _ = load_model(
        str(tmp_path / "each"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    assert relative(logits(model), expected) < 1e-5
    assert relative(logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)), expected) > 1e-2
    inner = model.get_base_model().model.layers[1].mlp.experts.base_layer
    assert inner.lora_A["default"].weight.shape == (8 * (4 if "one_a" in changes else 8), 64)
    model.save_pretrained(str(tmp_path / "stacked"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert relative(logits(PeftModel.from_pretrained(plain, tmp_path / "stacked")), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT.format(1, 3, "up", "B")), "lacks .*layers.1.mlp.experts.3.up_proj.lora_B"),
        (lambda t: t.update({EXPERT.format(1, 9, "up", "B"): torch.ones(64, 4)}), "1 tensors that are no factor .*experts.9.up"),
        (lambda t: t.update({EXPERT.format(1, 3, "up", "B"): torch.ones(64, 5)}), "several ranks or shapes"),
        (lambda t: t.update({EXPERT.format(0, 3, "up", "A").replace("lora_A.weight", "lora_magnitude_vector"):
                             torch.ones(64)}), "1 tensors that are no factor .*lora_magnitude_vector"),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_much_is_refused(change, message, base, tmp_path):
    write(base, tmp_path)
    tensors = load_file(tmp_path / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    options = {"dtype": torch.float32, "load_in_4bit": False, "max_seq_length": None}
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), **options)


@pytest.mark.long
def test_stacks_that_only_some_layers_have_adapted_are_read_too(base, tmp_path):
    tensors = write(base, tmp_path)
    for name in list(tensors):
        if ".layers.0.mlp." in name or (".layers.1.mlp." in name and "down_proj" in name):
            tensors[name] = torch.zeros_like(tensors[name])
    expected = with_changes_added(base, tensors, {"_proj": 1.5})
    left = {name: t for name, t in tensors.items() if t.any()}
    save_file(left, tmp_path / FILE, metadata={"format": "pt"})
    model, _ = load_model(str(tmp_path), dtype=torch.float32, load_in_4bit=False, max_seq_length=None)
    assert relative(logits(model), expected) < 1e-5
