"""The layer differentiated by hand equals transformers with PEFT, for every family, and whatever it keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oribi.errors import ModelError
from oribi.families import FAMILIES, row_name
from oribi.models import half as half_file
from oribi.models import layers as layers_file
from oribi.models.core import Keep
from oribi.models.fused_layer import POLICIES
from tests.models.test_parity import TOLERANCE, packed, relative
from tests.models.tiny import ADAPTED, KINDS, precise, tiny_config, tiny_pair

KEEPS = {
    **POLICIES,
    "attention again": Keep(attention="recompute"),
    "q|k|v again": Keep(qkv="recompute"),
    "middle again": Keep(x_mid="recompute", o="recompute"),
    "weights kept": Keep(weights="keep"),
    "gate|up again": Keep(gate_up="recompute", down="recompute"),
    "sums of experts again": Keep(experts="recompute", shared_down="recompute"),
    "sums of experts kept alone": Keep(gate_up="recompute", shared_gate_up="recompute"),
}


def adapt(model: torch.nn.Module, **changes: object) -> torch.nn.Module:
    """A PeftModel with LoRA on every linear layer, no factor zero, the same for every call."""
    torch.manual_seed(1)
    targets = ADAPTED.get(row_name(model.config), {"target_modules": "all-linear"})
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **targets, **changes}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    perturb(adapted, "lora_")
    return adapted.train()


def perturb(model: torch.nn.Module, part: str) -> None:
    # by name: the families' classes register their layers in different orders
    for name, parameter in sorted(model.named_parameters()):
        if part in name:
            torch.nn.init.normal_(parameter, std=0.05)


def gradients(model: torch.nn.Module, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for name, grad in found.items() if "lora_" in name)
    return {"loss": loss.detach(), **found}


@pytest.fixture
def fused_calls(monkeypatch):
    """How often a layer took the fused path."""
    calls = []
    real = layers_file.fused_layer
    monkeypatch.setattr(layers_file, "fused_layer", lambda *a: calls.append(1) or real(*a))
    return calls


def batch_of(rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (rows, length))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_lora_gradient_equals_transformers_with_peft(model_type, fused_calls, monkeypatch):
    pair = tiny_pair(tiny_config(model_type))
    ours, theirs = (adapt(model) for model in pair)
    precise(monkeypatch, *pair)
    batch = batch_of()
    mine, expected = gradients(ours, **batch), gradients(theirs, **batch)
    assert len(fused_calls) == ours.config.num_hidden_layers
    assert mine.keys() == expected.keys()
    errors = {name: relative(mine[name], expected[name]) for name in mine}
    assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


@pytest.mark.parametrize("model_type", KINDS)
def test_gradients_do_not_depend_on_what_is_kept(model_type):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    batch = batch_of()
    everything = gradients(model, **batch)
    for keep, policy in KEEPS.items():
        model.get_base_model().set_recompute_policy([policy] * model.config.num_hidden_layers)
        for name, grad in gradients(model, **batch).items():
            assert torch.equal(grad, everything[name]), f"{keep}: {name}"


@pytest.mark.parametrize("model_type", KINDS)
def test_a_reference_computed_without_gradients_has_the_bits_of_training(model_type):
    model = adapt(tiny_pair(tiny_config(model_type))[0].bfloat16())
    ids = torch.randint(5, 60, (2, 33), generator=torch.Generator().manual_seed(0))
    trained = model(input_ids=ids).logits.detach()
    with torch.no_grad():
        reference = model(input_ids=ids).logits
        model.gradient_checkpointing_enable()
        checkpointed = model(input_ids=ids).logits
    assert torch.equal(reference, trained)
    assert torch.equal(checkpointed, trained)


@pytest.fixture
def nan_in_new_memory():
    """Whatever is not initialised holds nan."""
    torch.use_deterministic_algorithms(True)  # which fills new memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma4_text", "lfm2", "qwen3_5_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_read_before_it_is_written(model_type, dtype, nan_in_new_memory):
    assert torch.empty(3).isnan().all()
    model = adapt(tiny_pair(tiny_config(model_type))[0].to(dtype))
    model(**batch_of(rows=2, length=48)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_an_mlp_in_portions_gives_the_gradients_of_the_whole(model_type, monkeypatch):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    batch = batch_of(rows=3, length=150)
    whole = gradients(model, **batch)
    monkeypatch.setattr(half_file, "MLP_TOKENS", 200)
    assert [(p.start, p.stop) for p in half_file.portions(450)] == [(0, 256), (256, 450)]
    in_portions = gradients(model, **batch)
    assert max(relative(in_portions[name], whole[name]) for name in whole) < TOLERANCE
    for keep, policy in KEEPS.items():
        model.get_base_model().set_recompute_policy([policy] * model.config.num_hidden_layers)
        for name, grad in gradients(model, **batch).items():
            assert torch.equal(grad, in_portions[name]), f"{keep}: {name}"


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("keep", ["speed", "memory"])
def test_packed_gradients_equal_the_sum_over_documents(model_type, keep, monkeypatch):
    pair = tiny_pair(tiny_config(model_type))
    model = adapt(pair[0])
    precise(monkeypatch, *pair)
    model.get_base_model().set_recompute_policy(keep)
    lengths = [5, 9, 2, 8]
    pack = packed(lengths)
    labels = pack["input_ids"].clone()
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[0, starts] = -100
    targets = int((labels != -100).sum())
    together = gradients(model, labels=labels, num_items_in_batch=targets, **pack)
    model.zero_grad()
    for ids, row in zip(pack["input_ids"].split(lengths, 1), labels.split(lengths, 1)):
        model(input_ids=ids, labels=row, num_items_in_batch=targets).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative(together[name], parameter.grad) < TOLERANCE, name


def test_some_projections_without_an_adapter(fused_calls):
    ours, theirs = (
        adapt(m, target_modules=["q_proj", "v_proj", "down_proj"]) for m in tiny_pair(tiny_config("qwen2"))
    )
    batch = batch_of()
    mine, expected = gradients(ours, **batch), gradients(theirs, **batch)
    assert len(fused_calls) == 4
    assert max(relative(mine[name], expected[name]) for name in mine) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 7, "up_proj": 2}, "alpha_pattern": {"k_proj": 11}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_equal_transformers_with_peft_whatever_path_they_take(changes):
    ours, theirs = (adapt(model, **changes) for model in tiny_pair(tiny_config("llama")))
    batch = batch_of()
    mine, expected = gradients(ours, **batch), gradients(theirs, **batch)
    assert mine.keys() == expected.keys()
    # DoRA leaves some factors gradients ten thousand times smaller than others': float32 noise against those says nothing
    floor = 1e-3 * max(grad.norm() for grad in expected.values())
    for name in mine:
        error = (mine[name] - expected[name]).norm() / expected[name].norm().clamp_min(floor)
        assert error < TOLERANCE, name


def test_dropout_takes_autograd_and_replays_its_random_state(fused_calls):
    model = adapt(tiny_pair(tiny_config("llama"))[0], lora_dropout=0.3)
    batch = batch_of()
    torch.manual_seed(5)
    plain = gradients(model, **batch)
    model.get_base_model().set_recompute_policy("balanced")
    torch.manual_seed(5)
    again = gradients(model, **batch)
    assert not fused_calls
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    torch.manual_seed(6)
    assert not torch.equal(plain["loss"], gradients(model, **batch)["loss"])


def test_disabled_switched_and_merged_adapters_give_their_own_output():
    ours, theirs = (adapt(model) for model in tiny_pair(tiny_config("llama")))
    batch = batch_of()
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.add_adapter(
            "second", LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "gate_proj"])
        )
        perturb(model, "second")

    def loss(model) -> torch.Tensor:
        return model(**batch).loss

    first = loss(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative(loss(ours), loss(theirs)) < TOLERANCE
        assert relative(loss(ours), first) > 1e-3
    for model in (ours, theirs):
        model.set_adapter("second")
    assert relative(loss(ours), loss(theirs)) < TOLERANCE
    assert relative(loss(ours), first) > 1e-3
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert relative(loss(ours), loss(theirs)) < TOLERANCE
    for model in (ours, theirs):
        model.base_model.merge_adapter()
    assert relative(loss(ours), loss(theirs)) < TOLERANCE


def test_a_second_backward_says_what_to_do():
    model = adapt(tiny_pair(tiny_config("llama"))[0])
    loss = model(**batch_of()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="call forward again"):
        loss.backward()


def test_kept_weights_follow_the_weights_they_were_made_of():
    model = adapt(tiny_pair(tiny_config("llama"))[0])
    decoder, batch = model.get_base_model(), batch_of()
    decoder.set_recompute_policy([Keep(weights="keep")] * 4)
    first = gradients(model, **batch)
    assert all(len(layer.dequantized) == 4 for layer in decoder.model.layers)
    with torch.no_grad():
        decoder.model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.1)
    changed = gradients(model, **batch)
    decoder.set_recompute_policy("speed")
    for name, grad in gradients(model, **batch).items():
        assert torch.equal(grad, changed[name])
    assert not torch.equal(first["loss"], changed["loss"])
    assert not any(layer.dequantized for layer in decoder.model.layers)


def test_a_pass_without_the_adapter_between_forward_and_backward_leaves_gradients_alone():
    model, batch = adapt(tiny_pair(tiny_config("llama"))[0]), batch_of()
    model.get_base_model().set_recompute_policy([Keep(weights="keep")] * 4)
    expected = gradients(model, **batch)
    model.zero_grad()
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model(**batch).loss, loss)  # written beside the same kept weights
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name


def test_unknown_policies_are_refused():
    model = tiny_pair(tiny_config("llama"))[0]
    with pytest.raises(ModelError, match="'balanced'"):
        model.set_recompute_policy("fast")
    with pytest.raises(ModelError, match="3 recompute policies for 4 layers"):
        model.set_recompute_policy([Keep()] * 3)
