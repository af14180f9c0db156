"""How pairs begin, which parameters get them, and which single layers' settings are refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.errors import ConfigError
from oribi.kernels.nf4 import dequantize
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoint(path)
    return path


def load(path: Path, load_in_4bit: bool = True):
    return load_model(
        str(path), dtype="float32", device_map="cpu", max_seq_length=64, load_in_4bit=load_in_4bit
    )[0]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"lora_alpha": 48, "use_rslora": True}])
def test_loftq_begins_with_the_best_pair_of_what_nf4_rounded_off(llama, settings):
    whole = load(llama, load_in_4bit=False)
    model = attach_lora(load(llama), r=16, init_lora_weights="loftq", **settings)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.base_model.model.model.layers[1].get_submodule(name)
        error = whole.model.layers[1].get_submodule(name).weight - dequantize(
            [layer.base_layer.weight], torch.float32
        )
        pair = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        best = (u[:, :16] * s[:16]) @ v[:16]
        assert (error - pair).norm() <= 1.01 * (error - best).norm()
    truth, packed = logits(whole), logits(load(llama))
    assert (logits(model) - truth).norm() < 0.8 * (packed - truth).norm()
    assert any("LoftQ: the pairs of 28 layers" in note for note in model.oribi.notes)


def test_an_adapter_of_loftq_acts_in_plain_peft_on_the_packed_base(llama, tmp_path):
    model = attach_lora(load(llama), r=4, init_lora_weights="loftq")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path)
    assert again.peft_config["default"].init_lora_weights is True  # PEFT's loftq would move the base
    assert torch.equal(logits(again), expected)


def test_loftq_is_the_same_in_every_run_and_leaves_the_base(llama):
    first, again = (attach_lora(load(llama), r=4, init_lora_weights="loftq", random_state=3) for _ in "ab")
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name
    assert not first.oribi.changed_weights(first.get_base_model())


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 8}, {"lora_alpha": 12, "use_rslora": True, "rank_pattern": {"q_proj": 6}}]
)
def test_pissa_on_nf4_begins_with_pefts_pairs_and_trains_their_first_half(llama, tmp_path, settings):
    packed, here = logits(load(llama)), {"r": 4, "init_lora_weights": "pissa", **settings}
    model, reference = attach_lora(load(llama), **here), attach_lora(load(llama, False), **here)
    assert (logits(model) - packed).norm() < 1e-5 * packed.norm()
    assert not model.oribi.changed_weights(model.get_base_model())
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        place = f"base_model.model.model.layers.1.{name}"
        own, peft = model.get_submodule(place), reference.get_submodule(place)
        assert own.scaling == pytest.approx(peft.scaling)
        for factor, dim in (("lora_A", 0), ("lora_B", 1)):
            first, _ = getattr(own, factor).default.weight.chunk(2, dim)
            assert torch.equal(first, getattr(peft, factor).default.weight)
    second = {
        name: p.detach().chunk(2, int("lora_B" in name))[1].clone()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = dict(model.named_parameters())
    for name, before in second.items():
        assert torch.equal(moved[name].chunk(2, int("lora_B" in name))[1], before)
    tuned = logits(model)
    assert (tuned - packed).norm() > 0.1 * packed.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(llama), tmp_path)), tuned)


def test_the_same_call_for_pissa_passes_through(llama):
    model = attach_lora(load(llama), r=4, init_lora_weights="pissa_niter_2")
    assert attach_lora(model, r=4, init_lora_weights="pissa_niter_2") is model


def test_loftq_of_several_iterations_is_refused_on_packed_weights(llama):
    with pytest.raises(ConfigError, match="one iteration of 4 bits"):
        attach_lora(load(llama), init_lora_weights="loftq", loftq_config={"loftq_iter": 5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_porj": 8}}, "rank_pattern: no layer with an adapter is named 'q_porj'; did you mean q_proj"),
        ({"rank_pattern": {"up_proj": 8}}, "named 'up_proj'"),
        ({"alpha_pattern": {"([": 8}}, r"alpha_pattern: '\(\[' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj = 0: must be a whole number of at least 1"),
        ({"target_parameters": ["experts.down"]}, "no parameter 'experts.down'.* Every matrix of it is a layer"),
        ({"target_parameters": ["q_proj.weight"]}, "is a layer's weight; name the layer in target_modules"),
    ],
)  # fmt: skip
def test_settings_of_layers_that_are_not_there_are_refused(llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        attach_lora(load(llama), r=4, target_modules=["q_proj", "v_proj"], **settings)


def test_experts_in_one_tensor_get_pairs_by_target_parameters(tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_experts=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=384, num_experts_per_tok=1,
    )  # fmt: skip
    checkpoint(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = attach_lora(load(tmp_path, False), r=4, target_modules=["q_proj"], target_parameters=names)
    model(IDS, labels=IDS).loss.backward()
    pairs = [p for name, p in model.named_parameters() if "experts" in name and p.requires_grad]
    assert len(pairs) == 4
    assert all(p.grad is not None for p in pairs)
    with pytest.raises(ConfigError, match="did you mean mlp.experts.down_proj"):
        attach_lora(load(tmp_path, False), target_parameters=["mlp.experts.down_porj"])


def test_trained_tokens_are_those_of_the_caller_and_the_added_ones(llama):
    model = load(llama)
    model.oribi.new_token_ids = (300, 301)
    attach_lora(model, r=4, trainable_token_indices=[7])
    assert model.peft_config["default"].trainable_token_indices["embed_tokens"] == [7, 300, 301]
