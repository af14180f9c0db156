"""The recompute plan fits its budget, buys the best bargains first, and keeps everything where there is room."""

import pytest

from oribi.models.decoder import build
from oribi.models.fused_layer import Keep
from oribi.train import recompute
from oribi.train.recompute import choose, items, plan, workspace_bytes
from tests.models.tiny import tiny_config

TOKENS, LONGEST = 512, 256


def cost(decoder, keeps: list[Keep]) -> int:
    sizes = {item.name: item.bytes for item in items(decoder, TOKENS, LONGEST)}
    inputs = TOKENS * decoder.config.hidden_size * decoder.dtype.itemsize
    kept = sum(sizes[name] for keep in keeps for name in sizes if vars(keep)[name] == "keep")
    return kept + sum(inputs for keep in keeps if keep.x == "keep")


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
    assert all(keep.x == "host" for keep in plan(decoder, TOKENS, LONGEST, workspace))
    assert all(keep.x == "keep" for keep in plan(decoder, TOKENS, LONGEST, workspace + 4 * TOKENS * 64 * 4))


def test_what_a_layer_sends_to_the_host_hides_behind_its_arithmetic(decoder):
    # a hidden size as in real models: there a byte of a linear layer's output costs enough arithmetic to hide its copy
    for keep in plan(decoder, TOKENS, LONGEST, 0, host_bytes_per_flop=0.01):
        sizes = {item.name: item.bytes for item in items(decoder, TOKENS, LONGEST)}
        sizes["x"] = TOKENS * decoder.config.hidden_size * decoder.dtype.itemsize
        sent = sum(size for name, size in sizes.items() if vars(keep)[name] == "host")
        assert sizes["x"] < sent <= 1.3 * recompute.forward_flop(decoder, TOKENS) / 100.0


def test_with_room_for_all_nothing_is_computed_again(decoder):
    wanted = {item.name for item in items(decoder, TOKENS, LONGEST)}
    for keep in plan(decoder, TOKENS, LONGEST, 10**12):
        assert all(vars(keep)[name] == "keep" for name in wanted)
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
