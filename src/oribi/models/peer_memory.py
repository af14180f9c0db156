"""Memory of the processes of one machine that each of them reads without the others taking part.

On GPUs it is PyTorch's symmetric memory: copies go over NVLink or PCIe by the copy engines, beside kernels, and a CUDA graph
records them. On a CPU it is memory that processes share.
"""

import logging
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oribi.launch import processes_on_machine

logger = logging.getLogger(__name__)

# one start of one machine, where it says so: containers on different machines can have one name
BOOT = Path("/proc/sys/kernel/random/boot_id")


class PeerMemory:
    """So many bytes of each process of a group, zero at first; all of them make it together.

    Args:
        parts: uint8 [size] of each process, by its rank in the group.
        rank: of this process, whose part it writes.
        handle: what keeps the memory of the others mapped.
    """

    def __init__(self, parts: list[torch.Tensor], rank: int, handle: object = None) -> None:
        self.parts, self.own, self._handle = parts, parts[rank], handle


def machine_group() -> dist.ProcessGroup:
    """The processes of this machine, all of them where each machine has one or numbers differ; called by all together."""
    processes = dist.get_world_size()
    counts: list[int] = [0] * processes
    dist.all_gather_object(counts, processes_on_machine())
    here = counts[0]
    if set(counts) != {here} or not 1 < here < processes or processes % here:
        return dist.group.WORLD
    return dist.new_subgroups(here)[0]


def peer_memory(size: int, device: torch.device, group: dist.ProcessGroup) -> PeerMemory | None:
    """Memory that the processes of a group read from each other; None in all of them where one cannot.

    Args:
        size: bytes of each process, the same in all.
        device: of this process.
        group: the processes.
    """
    place = (socket.gethostname(), BOOT.read_text() if BOOT.exists() else "")
    gpu = device.index if device.type == "cuda" else None
    every: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (place, gpu, _sees_others(every, gpu)), group=group)
    if len({place for place, _, _ in every}) > 1 or not all(sees for _, _, sees in every):
        return None
    return _of_gpus(size, device, group) if gpu is not None else _of_host(size, group)


def _sees_others(every: list, gpu: int | None) -> bool:
    """Whether this GPU reads the memory of all others; a process that sees one alone cannot say."""
    if gpu is None:
        return True
    others = set(range(torch.cuda.device_count())) - {gpu}
    enough = torch.cuda.device_count() >= len(every)
    return enough and all(torch.cuda.can_device_access_peer(gpu, other) for other in others)


def _of_gpus(size: int, device: torch.device, group: dist.ProcessGroup) -> PeerMemory | None:
    # private in PyTorch, with these three calls from 2.6 on
    import torch.distributed._symmetric_memory as symmetric

    own = _tried(lambda: symmetric.empty(size, dtype=torch.uint8, device=device))
    if not _all_have(own, group):  # nobody may wait for one that has none
        return None
    handle = _tried(lambda: symmetric.rendezvous(own, group))
    if not _all_have(handle, group):
        return None
    own.zero_()
    parts = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(handle.world_size)]
    return PeerMemory(parts, handle.rank, (own, handle))


def _tried(make: Callable[[], Any]) -> Any:
    """What is made, or None where this machine cannot: a driver, a container or a build without it."""
    try:
        return make()
    except (RuntimeError, NotImplementedError) as error:
        logger.info("GPUs do not read each other's memory: %s", str(error).partition("\n")[0])
        return None


def _all_have(found: Any, group: dist.ProcessGroup) -> bool:
    every: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(every, found is not None, group=group)
    return all(every)


def _of_host(size: int, group: dist.ProcessGroup) -> PeerMemory:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    with tempfile.NamedTemporaryFile(prefix="oribi-shared-") as file:
        file.truncate(size)
        names = [""] * ranks
        dist.all_gather_object(names, file.name, group=group)
        parts = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        dist.barrier(
            group
        )  # files vanish when all have opened them; their memory stays as long as it is mapped
    return PeerMemory(parts, rank)
