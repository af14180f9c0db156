"""Pinned host memory: sizes, reuse, and pages that are locked exactly as long as their owner lives."""

import gc

import pytest
import torch

from oribi.models import host_memory
from oribi.models.host_memory import HostMemory, buffer_size, pinned

MIB = 2**20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Owner:
    pass


@pytest.mark.parametrize("size", [1, 15, 17, 1000, 5 * MIB, 9 * 2**28, 2**40 + 1])
def test_a_buffer_is_at_most_an_eighth_larger_than_asked(size):
    assert size <= buffer_size(size) <= max(size * 9 // 8, size + 1)
    assert buffer_size(buffer_size(size)) == buffer_size(size)


def test_lengths_of_one_octave_share_eight_sizes():
    assert len({buffer_size(size) for size in range(4097, 8193)}) == 8


@pytest.fixture
def store(monkeypatch) -> HostMemory:
    """A store without a GPU: its buffers are ordinary memory."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(host_memory, "pinned", lambda size, owner: torch.empty(size, dtype=torch.uint8))
    return HostMemory(torch.device("cuda"))


def test_the_smallest_buffer_that_is_large_enough_is_used_again(store):
    small, large = store.borrow(1024), store.borrow(4096)
    store.give_back(large)
    store.give_back(small)
    assert store.borrow(1000) is small
    assert store.borrow(1000) is large
    assert len(store.borrow(1000)) == 1024


@pytest.mark.gpu
@needs_gpu
def test_pages_are_pinned_while_their_owner_lives():
    for _ in range(3):  # the same addresses come again: they could not be registered twice
        owner = Owner()
        buffer = pinned(8 * MIB, owner)
        assert buffer.is_pinned()
        sent = torch.randint(0, 256, (8 * MIB,), dtype=torch.uint8, device="cuda")
        buffer.copy_(sent, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(buffer, sent.cpu())
        del owner
        gc.collect()
        assert not buffer.is_pinned()
        del buffer


@pytest.mark.gpu
@needs_gpu
def test_a_refused_registration_falls_back_and_leaves_no_error(monkeypatch):
    class Refusing:
        @staticmethod
        def cudaHostRegister(*_):
            return 1

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Refusing)
    assert pinned(8 * MIB, Owner()).is_pinned()
    torch.zeros(1, device="cuda").add_(1)
    torch.cuda.synchronize()
