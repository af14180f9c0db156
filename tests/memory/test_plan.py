"""The plan: what layers then really hold fits the budget, the best bargains come first, and all is kept where it fits."""

import pytest
import torch

from oribi.memory import account
from oribi.memory import plan as planning
from oribi.memory.account import LayerAccount, StepAccount, step_account
from oribi.memory.layer_shape import layer_shapes
from oribi.memory.plan import apply_plan, by_bargain, plan
from oribi.models.core import Keep
from oribi.models.decoder import build
from tests.memory.test_account import LENGTH, ROWS, TOKENS, Storages, tiny
from tests.models.tiny import tiny_config


def step_of(model: torch.nn.Module, tokens: int = TOKENS, longest: int = LENGTH) -> StepAccount:
    return step_account(model, layer_shapes(model), tokens, longest)


def peak(step: StepAccount, keeps: list[Keep]) -> int:
    weights = sum(keep["weights"] == "keep" for keep in keeps) * step.layers[0].weight_bytes
    return weights + max(moment.bytes for moment in step.moments(keeps))


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return tiny(request.param)


@pytest.fixture
def step(model):
    return step_of(model.get_base_model())


def held_after_the_layers(model: torch.nn.Module, keeps: list[Keep]) -> int:
    """Bytes that are held for backward after the last layer, its output and dequantised weights left out."""
    base, held = model.get_base_model(), []
    base.set_recompute_policy([Keep(keep, weights="recompute") for keep in keeps])
    hooks = [
        base.model.layers[0].register_forward_pre_hook(lambda *_: held.append(storages.held())),
        base.model.layers[-1].register_forward_hook(lambda *_: held.append(storages.held())),
    ]
    ids = torch.randint(3, 100, (ROWS, LENGTH))
    with Storages(model) as storages:
        model(input_ids=ids, labels=ids)
    for hook in hooks:
        hook.remove()
    return held[1] - held[0]


def test_what_layers_hold_stays_within_the_budget(model, step):
    everything = held_after_the_layers(model, [Keep()] * 4)
    masks = 4 * ROWS * LENGTH * LENGTH  # made in the first layers, once
    # the last layer's may stay in the workspace
    gate_up = step.layers[0].results["gate_up"].bytes + step.layers[0].results["gate_up"].beside
    found = []
    for share in (0.3, 0.5, 0.8, 1.1):
        room = int(share * everything)
        keeps = plan(step, step.workspace + room, host_bytes=0)
        assert "host" not in {place for keep in keeps for place in keep.values()}
        weights = sum(keep["weights"] == "keep" for keep in keeps) * step.layers[0].weight_bytes
        found.append(weights + held_after_the_layers(model, keeps))
        assert 0.6 * min(room, everything) < found[-1] <= room + masks + gate_up
    assert found == sorted(found)


def test_the_peak_stays_within_the_budget(step):
    inputs = 4 * step.layers[0].results["x"].bytes
    peaks = []
    for budget in range(step.workspace + inputs, 3 * step.workspace + 4 * inputs, 20_000):
        peaks.append(peak(step, plan(step, budget, host_bytes=10**12)))
        assert peaks[-1] <= budget
    assert peaks[-1] > peaks[0]


def test_inputs_go_to_the_host_only_where_nothing_else_fits(step):
    places = [keep["x"] for keep in plan(step, step.workspace)]
    assert places == ["host"] * 3 + ["keep"]
    enough = step.workspace + 4 * step.layers[0].results["x"].bytes
    assert all(keep["x"] == "keep" for keep in plan(step, enough))


def test_the_host_takes_what_its_link_copies_beside_the_arithmetic(step):
    def sent(rate: float) -> int:
        keeps = plan(step, 0, host_bytes=10**12, host_bytes_per_flop=rate)
        assert step.layers[0].in_host(keeps[-1]) == []
        return sum(sum(step.layers[0].in_host(keep)) for keep in keeps)

    inputs = 3 * step.layers[0].results["x"].bytes
    assert sent(0.0) == inputs  # which cannot be computed again
    assert inputs < sent(0.005) < sent(0.01)
    # beside attention and norms, forward and backward take at most three times as long as forward's products alone
    assert sent(0.01) <= 0.01 * 4 * 3 * step.layers[0].product_flop


def test_the_least_memory_makes_nothing_twice_where_the_link_hides_everything(step):
    def least(rate: float, free: int = 10**12) -> list[Keep]:
        return plan(step, 0, host_bytes=10**12, host_bytes_per_flop=rate, free=free)

    fast = least(10.0)
    assert {keep[name] for keep in fast[:-1] for name in keep if name != "weights"} == {"host"}
    for other in (least(0.0), least(10.0, free=step.workspace)):
        assert {keep["gate_up"] for keep in other[:-1]} == {"recompute"}
    again = [Keep(keep, gate_up="recompute") for keep in fast[:-1]] + fast[-1:]
    one = step.layers[0].results["gate_up"]
    assert 0 < peak(step, fast) - peak(step, again) <= 2 * one.bytes + 4 * one.beside


def test_the_widest_wait_in_host_memory_where_two_of_them_can_come_back(step, monkeypatch):
    results = step.layers[0].results
    last = sorted(by_bargain(step.kinds), key=lambda pair: pair[1].name == "gate_up")
    monkeypatch.setattr(planning, "by_bargain", lambda kinds: last)
    widest = results["gate_up"].bytes + results["gate_up"].beside
    others = 4 * (
        step.layers[0].weight_bytes + sum(one.bytes + one.beside for one in results.values()) - widest
    )

    def gate_up(room: float) -> str:
        budget = step.workspace + others + int(room * widest)
        keeps = plan(step, budget, host_bytes=10**12, host_bytes_per_flop=1.0)
        assert all({keep[name] for name in ("x", "attention", "qkv", "x_mid")} == {"keep"} for keep in keeps)
        return "".join(keep["gate_up"][0] for keep in keeps)

    assert gate_up(1.5) == "rrrk"
    assert gate_up(2.5) == "hhhk"
    assert gate_up(4.0) == "kkkk"


@pytest.mark.parametrize(
    ("fits", "out", "expected"),
    [
        (0, 8, "hhhhhhhk"), (8, 0, "kkkkkkkk"), (0, 0, "rrrrrrrr"), (4, 4, "hhkhkhkk"), (2, 3, "hrhrhrkk"),
        (6, 2, "hkkhkkkk"),
    ],
)  # fmt: skip
def test_hosts_are_spread_and_the_last_layer_stays(fits, out, expected):
    places = "".join(place[0] for place in planning.spread(fits, out, 8))
    assert places == expected
    assert planning.spread(0, 1, 1) == ["host"]


def test_the_last_layer_keeps_what_its_backward_would_make_first(monkeypatch):
    config = tiny_config(
        "llama", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=8
    )
    step = step_of(build(config, dtype=torch.bfloat16), 4096, 2048)

    def gate_up() -> list[str]:
        return [keep["gate_up"] for keep in plan(step, 0)]

    assert gate_up() == ["recompute"] * 3 + ["keep"]
    keeps = plan(step, 0)
    assert peak(step, keeps) <= peak(step, [*keeps[:3], Keep(keeps[3], gate_up="recompute")])
    monkeypatch.setattr(account, "MLP_TOKENS", 4095)  # made in portions, it takes less than kept
    assert gate_up() == ["recompute"] * 4


def test_with_room_for_all_nothing_is_computed_again(model, step):
    for keep in plan(step, 10**12):
        assert all(keep[name] == "keep" for name in [*step.layers[0].results, "weights"])
    assert "recomputed" not in apply_plan(model.get_base_model(), TOKENS, LENGTH, 10**12)


def test_attention_is_the_first_to_be_kept_in_long_contexts():
    shape = layer_shapes(build(tiny_config("llama")))[0]
    assert by_bargain([LayerAccount(shape, 10**6, 10**6)])[0][1].name == "attention"
    assert by_bargain([LayerAccount(shape, 10**6, 1)])[-1][1].name == "attention"


def test_a_plan_is_said_in_one_line(model, step):
    base, budget = model.get_base_model(), step.workspace + 700_000
    line = apply_plan(base, TOKENS, LENGTH, budget)
    assert "of 4 layers" in line
    assert line.startswith("activations: kept on the device: layer inputs, ")
    assert [layer.keep for layer in base.model.layers] == plan(step, budget)
