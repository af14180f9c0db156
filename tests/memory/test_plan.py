"""The recompute plan fits its budget, buys the best bargains first, and keeps everything where there is room."""

import pytest

from oribi.memory import plan as recompute
from oribi.memory.plan import choose, items, plan, workspace_bytes
from oribi.models.decoder import build
from oribi.models.half import Keep
from tests.models.tiny import tiny_config

TOKENS, LONGEST = 512, 256


def sizes(decoder) -> dict[str, int]:
    inputs = TOKENS * decoder.config.hidden_size * decoder.dtype.itemsize
    return {"x": inputs} | {item.name: item.bytes for item in items(decoder, TOKENS, LONGEST)}


def cost(decoder, keeps: list[Keep]) -> int:
    """Device bytes of what is kept; the last layer has its workspace's place for what others send to the host."""
    total = 0
    for name, size in sizes(decoder).items():
        places = [keep[name] for keep in keeps]
        total += size * (places.count("keep") - ("host" in places and places[-1] == "keep"))
    return total


@pytest.fixture(params=["llama", "gemma2"])
def decoder(request):
    return build(tiny_config(request.param))


def test_a_plan_never_costs_more_than_its_budget(decoder):
    workspace = workspace_bytes(decoder, TOKENS)
    costs = []
    for room in range(0, 6_000_000, 100_000):
        costs.append(cost(decoder, plan(decoder, TOKENS, LONGEST, workspace + room)))
        assert costs[-1] <= room
    assert costs == sorted(costs)
    assert costs[-1] > 0


def test_inputs_go_to_the_host_only_where_nothing_else_fits(decoder):
    workspace = workspace_bytes(decoder, TOKENS)
    places = [keep["x"] for keep in plan(decoder, TOKENS, LONGEST, workspace)]
    assert places == ["host"] * 3 + ["keep"]
    assert all(
        keep["x"] == "keep" for keep in plan(decoder, TOKENS, LONGEST, workspace + 4 * TOKENS * 64 * 4)
    )


def test_what_is_sent_to_the_host_hides_behind_the_layers_arithmetic(decoder):
    # a hidden size as in real models: there a byte of a linear layer's output costs enough arithmetic to hide its copy
    keeps = plan(decoder, TOKENS, LONGEST, 0, host_bytes_per_flop=0.01)
    attention = next(item.flop for item in items(decoder, TOKENS, LONGEST) if item.name == "attention")
    layer = 1.3 * recompute.forward_flop(decoder, TOKENS) + attention / 2
    sent = [sum(size for name, size in sizes(decoder).items() if keep[name] == "host") for keep in keeps]
    assert sizes(decoder)["x"] < max(sent)
    assert sum(sent) <= 4 * layer * 0.01
    assert sent[-1] == 0


def test_the_widest_wait_in_host_memory_where_two_of_them_can_come_back(decoder):
    each = sizes(decoder)
    others = 4 * (sum(each.values()) - each["gate_up"])
    workspace = workspace_bytes(decoder, TOKENS)

    def gate_up(room: float) -> list[str]:
        budget = workspace + others + int(room * each["gate_up"])
        keeps = plan(decoder, TOKENS, LONGEST, budget, host_bytes=10**12, host_bytes_per_flop=1.0)
        assert all(
            {keep["x"], keep["attention"], keep["qkv"], keep["x_mid"], keep["weights"]} == {"keep"}
            for keep in keeps
        )
        return [keep["gate_up"] for keep in keeps]

    assert gate_up(1.5) == ["recompute"] * 3 + ["keep"]
    assert gate_up(2.5) == ["host"] * 3 + ["keep"]
    assert gate_up(3.5) == ["host"] * 3 + ["keep"]
    assert gate_up(4.0) == ["keep"] * 4


@pytest.mark.parametrize(
    ("fits", "out", "expected"),
    [
        (0, 8, "hhhhhhhk"), (8, 0, "kkkkkkkk"), (0, 0, "rrrrrrrr"), (4, 4, "hhkhkhkk"), (2, 3, "hrhrhrkk"),
        (6, 2, "hkkhkkkk"),
    ],
)  # fmt: skip
def test_hosts_are_spread_and_the_last_layer_stays(fits, out, expected):
    places = "".join(place[0] for place in recompute.spread(fits, out, 8))
    assert places == expected
    assert recompute.spread(0, 1, 1) == ["host"]


def test_the_last_layer_keeps_what_its_backward_would_make_first(decoder, monkeypatch):
    def gate_up() -> list[str]:
        return [keep["gate_up"] for keep in plan(decoder, TOKENS, LONGEST, 0)]

    assert gate_up() == ["recompute"] * 4  # beside the loss of this small model it would not be free
    monkeypatch.setattr(recompute, "loss_bytes", lambda *_: 0)
    assert gate_up() == ["recompute"] * 3 + ["keep"]
    monkeypatch.setattr(recompute, "MLP_TOKENS", TOKENS - 1)  # made in portions, it takes less than kept
    assert gate_up() == ["recompute"] * 4


def test_with_room_for_all_nothing_is_computed_again(decoder):
    wanted = {item.name for item in items(decoder, TOKENS, LONGEST)}
    for keep in plan(decoder, TOKENS, LONGEST, 10**12):
        assert all(keep[name] == "keep" for name in wanted)
    assert "again" not in choose(decoder, TOKENS, LONGEST, 10**12)


def test_attention_is_the_first_to_be_kept_in_long_contexts():
    decoder = build(tiny_config("llama"))
    assert items(decoder, 10**6, 10**6)[0].name == "attention"
    assert items(decoder, 10**6, 1)[-1].name == "attention"


def test_a_plan_is_said_in_one_line():
    decoder = build(tiny_config("llama"))
    workspace = workspace_bytes(decoder, TOKENS)
    line = choose(decoder, TOKENS, LONGEST, workspace + 1_500_000)
    assert "of 4 layers" in line
    assert line.startswith("activations: on the device x, ")
    assert [layer.keep for layer in decoder.model.layers] == plan(
        decoder, TOKENS, LONGEST, workspace + 1_500_000
    )
