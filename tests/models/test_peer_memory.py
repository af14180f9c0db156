"""Processes of one machine read each other's layers, one alone too, and inside a recorded graph."""

import json
import os
import sys

import pytest
import torch
import torch.distributed as dist

from oribi.models import peer_memory
from oribi.selftest.processes import run_together

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX"
)


@pytest.mark.long
def test_a_process_reads_the_layers_of_another_one_that_does_nothing():
    said, _ = run_together(["-m", "tests.models.peer_memory", "cpu"])
    first, second = json.loads(said.splitlines()[-1])
    assert not first["lockstep"]
    assert not second["lockstep"]
    assert first["share"] == second["share"] == 0.5
    assert first["alone"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reads_of_another_process_are_recorded(monkeypatch):
    """Both on one GPU, which PyTorch allows where it is asked to."""
    monkeypatch.setitem(os.environ, "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    said, _ = run_together(["-m", "tests.models.peer_memory", "cuda"], on_gpus=True)
    for one in json.loads(said.splitlines()[-1]):
        assert not one["lockstep"]
        assert one["recorded"] == [True] * 3
        assert one["after"]


def test_processes_of_different_machines_read_nothing(monkeypatch):
    def gathered(every, own, group):
        every[:] = [own, (("other", ""), *own[1:])]

    monkeypatch.setattr(peer_memory.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer_memory.dist, "all_gather_object", gathered)
    assert peer_memory.peer_memory(256, torch.device("cpu"), None) is None


@pytest.mark.parametrize("step", ["empty", "rendezvous"])
def test_where_memory_cannot_be_shared_all_gather_together(step, tmp_path, monkeypatch):
    import torch.distributed._symmetric_memory as symmetric

    def fails(*given, **named):
        raise RuntimeError("no such thing on this driver")

    monkeypatch.setattr(symmetric, "empty", lambda size, **_: torch.zeros(size))
    monkeypatch.setattr(symmetric, step, fails)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert peer_memory._of_gpus(256, torch.device("cpu"), dist.group.WORLD) is None
    finally:
        dist.destroy_process_group()
