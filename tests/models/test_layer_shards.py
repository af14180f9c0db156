"""A layer that holds 16-bit copies of its weights is not gathered, and whatever reads its codes gets them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from oribi.lora.attach import attach_lora
from oribi.models.core import Keep
from oribi.models.fused_layer import policy
from oribi.models.layer_shards import split_layers
from oribi.models.load import load_model
from oribi.selftest.subject import write_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"), torch.float32, num_hidden_layers=5)


@contextmanager
def group_of_one(folder: Path) -> Iterator[dist.ProcessGroup]:
    """Inside the block this process is a group by itself, whose store lies in a folder."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture
def group(tmp_path):
    with group_of_one(tmp_path) as found:
        yield found


def trained(folder, keep: str | None = None):
    """A 4-bit model with LoRA whose layers keep what the test says of their weights."""
    model, _ = load_model(str(folder), dtype="float32", load_in_4bit=True, max_seq_length=64)
    model = attach_lora(model, r=4, lora_alpha=8)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    decoder = model.get_base_model()
    set_weights(decoder, keep)
    return model.train(), decoder


def set_weights(decoder, keep: str | None) -> None:
    """What every layer does with its 16-bit weights between passes: "keep" or "recompute"; None: what "balanced" says."""
    layers = decoder.model.layers
    keeps = [policy("balanced", layer.results()) for layer in layers]
    decoder.set_recompute_policy([k if keep is None else Keep({**k, "weights": keep}) for k in keeps])


def passed(model, ids) -> list[torch.Tensor]:
    """Loss and gradients of one forward and backward."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def watched(shards, monkeypatch) -> list[int]:
    """The layers that are copied from now on; what lies in the buffers is worth nothing before it is copied."""
    copied, read = [], shards._read
    monkeypatch.setattr(shards, "_read", lambda index, whole: (copied.append(index), read(index, whole))[1])
    return copied


def spoil(shards) -> None:
    shards.flush()
    for buffer in shards._buffers:
        buffer.fill_(0x5A)


def test_layers_with_copies_of_their_weights_are_not_gathered(folder, group, monkeypatch):
    whole, _ = trained(folder, "keep")
    model, decoder = trained(folder, "keep")
    shards = split_layers(decoder.model.layers, torch.device("cpu"), group)
    assert not shards.lockstep
    copied = watched(shards, monkeypatch)
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = passed(whole, ids)
    layers = list(range(len(decoder.model.layers)))
    wanted = [layers, [], []]  # the first pass makes the copies, on the way forward
    for count in wanted:
        spoil(shards)
        copied.clear()
        found = passed(model, ids)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert sorted(set(copied)) == count

    # inference reads the codes, and training afterwards none
    with torch.no_grad():
        spoil(shards)
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
    assert set(copied) == set(layers)
    whole.train(), model.train()
    for _ in range(2):
        copied.clear()
        spoil(shards)
        assert all(torch.equal(a, b) for a, b in zip(passed(model, ids), expected, strict=True))
    assert not copied

    # copies that are given up are made again
    set_weights(decoder, "recompute")
    for _ in range(2):
        copied.clear()
        spoil(shards)
        assert all(torch.equal(a, b) for a, b in zip(passed(model, ids), expected, strict=True))
        assert set(copied) == set(layers)
    assert len(copied) == 2 * len(layers) - 2  # two are still there when the way back begins
