"""Layers that multiply frozen weights in e4m3: near the exact gradients, equal to the formula, and only in training."""

import pytest
import torch
import torch.nn.functional as F

from oribi.families import FAMILIES
from oribi.kernels import fp8
from oribi.models import half, layers, mlp
from oribi.models.decoder import build
from oribi.models.linear_layers import project, read
from oribi.models.mixers import attention
from tests.models.test_fused_layer import KEEPS, adapt, batch_of, gradients
from tests.models.test_parity import TOLERANCE, relative
from tests.models.tiny import KINDS, tiny_config, tiny_pair


def similarity(left: torch.Tensor, right: torch.Tensor) -> float:
    return F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0).item()


@pytest.fixture
def model():
    return adapt(tiny_pair(tiny_config("llama"))[0])


class Straight(torch.autograd.Function):
    """x W^T of rounded operands; backward rounds dy, and takes the rounding of x for the identity."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return rounded_rows(x) @ (weight * scale).t()

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        return rounded_rows(dy) @ (weight * scale), None, None


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale > 0, scale, 1.0)  # what no label follows has no gradient
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def explicit(modules: list[torch.nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a group of LoRA layers by PyTorch's autograd, their bases as one matrix of rounded values."""
    layers = [read(module) for module in modules]
    weight = torch.cat([p.weight.detach() for p in layers])
    scale = weight.abs().max() / 448
    base = Straight.apply(x, (weight / scale).to(torch.float8_e4m3fn).float(), scale)
    outputs = []
    for p, y in zip(layers, base.split([p.shape[0] for p in layers], dim=-1)):
        y = y if p.a is None else y + (x @ p.a.t()) @ p.b.t() * p.scale
        outputs.append(y if p.bias is None else y + p.bias)
    return outputs


# one with a gated MLP beside experts, all of which every token takes: rounding could choose others
@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("qwen2_moe", {"num_experts_per_tok": 8})]
)
def test_loss_and_gradients_are_those_of_the_formula(model_type, changes, monkeypatch):
    model = adapt(tiny_pair(tiny_config(model_type, **changes))[0])
    decoder, first = model.get_base_model(), {*model.get_base_model().model.layers[0].modules()}
    assert decoder.use_fp8(True) == 3
    worst = []
    for seed in range(8):
        torch.manual_seed(seed)
        batch = batch_of()
        got = gradients(model, **batch)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "fusible_halves", lambda layer: None)
            for file in (attention, mlp):
                patch.setattr(
                    file,
                    "project",
                    lambda modules, x: (project if modules[0] in first else explicit)(modules, x),
                )
            expected = gradients(model, **batch)
        worst.append(max(relative(got[name], expected[name]) for name in got))
        if worst[-1] < 1e-5:
            break
    # where float32 noise carries a value over the border to its neighbour in e4m3, gradients differ by hundredths: not in all batches
    assert min(worst) < 1e-5, worst
    decoder.use_fp8(False)
    exact = gradients(model, **batch)
    assert min(relative(got[name], exact[name]) for name in got if name != "loss") > 0.03


def outlying(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, dict]:
    """A model with the initial weights of a real one, and inputs of which four channels are 50 times as large."""
    torch.manual_seed(0)
    config = tiny_config(
        "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=count, attention_bias=False,
        mlp_bias=False, head_dim=64,
    )  # fmt: skip
    model = adapt(build(config, dtype=dtype, device="cpu"))
    embeds = torch.randn(2, 32, 256)
    embeds[..., torch.randperm(256)[:4]] *= 50
    return model, {"inputs_embeds": embeds.to(dtype), "labels": torch.randint(3, 128, (2, 32))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_activations_with_outliers_point_where_the_exact_ones_do(dtype):
    model, batch = outlying(3, dtype)
    exact = gradients(model, **batch)
    assert model.get_base_model().use_fp8(True) == 2
    found = {name: similarity(grad, exact[name]) for name, grad in gradients(model, **batch).items()}
    assert min(found.values()) > 0.99, min(found.items(), key=lambda item: item[1])
    assert found["loss"] > 0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "granite"])
def test_gradients_do_not_depend_on_what_is_kept(model_type):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    decoder, batch = model.get_base_model(), batch_of()
    exact = gradients(model, **batch)
    decoder.use_fp8(True)
    everything = gradients(model, **batch)
    assert not torch.equal(everything["loss"], exact["loss"])
    for keep, policy in KEEPS.items():
        decoder.set_recompute_policy([policy] * 4)
        for _ in range(2):  # what is kept from step to step is read in the second
            for name, grad in gradients(model, **batch).items():
                assert torch.equal(grad, everything[name]), f"{keep}: {name}"
    decoder.use_fp8(False)
    for name, grad in gradients(model, **batch).items():
        assert torch.equal(grad, exact[name]), name


def test_copies_stay_only_where_weights_are_kept_and_follow_them(model):
    decoder, batch = model.get_base_model(), batch_of()
    decoder.use_fp8(True)
    for keep, copies in (("balanced", set()), ("weights kept", {"plain", "transposed"})):
        decoder.set_recompute_policy([KEEPS[keep]] * 4)
        first = gradients(model, **batch)
        layer = decoder.model.layers[2]
        known = {name: rounded for name, (_, rounded) in layer.dequantized.items()}
        assert set(known) == {"qkv", "o", "gate_up", "down"}
        for rounded in known.values():
            assert {"plain", "transposed"} & set(vars(rounded)) == copies
        assert len(decoder.model.layers[0].dequantized) == (4 if copies else 0)
        with torch.no_grad():
            layer.mlp.up_proj.base_layer.weight.mul_(1.5)
        assert not torch.equal(gradients(model, **batch)["loss"], first["loss"])
        assert layer.dequantized["gate_up"][1] is not known["gate_up"]
        assert layer.dequantized["qkv"][1] is known["qkv"]
    decoder.release()
    assert not any(layer.dequantized for layer in decoder.model.layers)


def test_only_training_is_approximate(model):
    decoder, batch = model.get_base_model(), batch_of()
    exact = model.train()(**batch).loss.detach()
    with torch.no_grad():
        evaluated = model.eval()(**batch, output_logits=True)
        decoder.train()
        decoder.use_fp8(True)
        again = model.eval()(**batch, output_logits=True)
    assert torch.equal(again.loss, evaluated.loss)
    assert torch.equal(again.logits, evaluated.logits)
    approximate = model.train()(**batch).loss.detach()
    assert not torch.equal(approximate, exact)
    with torch.no_grad():  # as a preference run's reference: training's bits, with gradients or without
        assert torch.equal(model(**batch).loss, approximate)


@pytest.mark.parametrize("model_type", KINDS)
def test_every_family_takes_part(model_type):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    decoder = model.get_base_model()
    after_the_first = decoder.model.layers[1:]
    # the matrix units take sizes that 16 divides; two rows per head make Qwen3.5's first product wider
    fits = [layer.mixer_name != "linear_attn" for layer in after_the_first]
    assert decoder.use_fp8(True) == sum(fits) > 0
    assert [layer.fp8 for layer in decoder.model.layers] == [False, *fits]
    said = decoder.precision_in_fp8()
    assert f"base products of {sum(fits)} of {len(fits) + 1} layers" in said
    assert ("exact are layers 0, " in said) == (not all(fits))
    experts = FAMILIES[model_type].experts
    assert ("experts' own stacks are computed in 16 bits" in said) == (experts is not None)
    assert ("the MLP beside the experts" in said) == (experts is not None and experts.has_shared)
    gradients(model, **batch_of())  # none of a factor is zero


def test_layers_that_need_autograd_and_odd_sizes_stay_exact():
    for changes, settings in (
        ({}, {"lora_dropout": 0.1}),
        ({}, {"use_dora": True}),
        ({"intermediate_size": 136}, {}),
    ):
        model = adapt(tiny_pair(tiny_config("llama", **changes))[0], **settings)
        decoder, batch = model.get_base_model(), batch_of()
        torch.manual_seed(3)
        exact = model(**batch).loss
        assert decoder.use_fp8(True) == 0
        torch.manual_seed(3)
        assert torch.equal(model(**batch).loss, exact)


def test_an_mlp_in_portions_gives_the_gradients_of_the_whole(model, monkeypatch):
    decoder, batch = model.get_base_model(), batch_of(rows=3, length=150)
    decoder.use_fp8(True)
    made = []
    real = fp8.dequantize_e4m3
    monkeypatch.setattr(fp8, "dequantize_e4m3", lambda *a, **k: made.append(1) or real(*a, **k))
    whole = gradients(model, **batch)
    assert (
        len(made) == 3 * 4 * 2
    )  # nothing is made again: one orientation a group in forward, the other in backward
    monkeypatch.setattr(half, "MLP_TOKENS", 200)
    in_portions = gradients(model, **batch)
    assert len(made) == 2 * 3 * 4 * 2
    assert max(relative(in_portions[name], whole[name]) for name in whole) < TOLERANCE
