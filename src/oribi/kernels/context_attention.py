"""Context parallelism: causal attention of a row that several processes share, each with a part of its tokens.

C processes, T tokens of the row in 2C chunks of c, H query heads, K key/value heads, E head_dim. Process r has chunks r and
2C - 1 - r: the queries of an early chunk see few keys, those of a late one many, and every process has as much to compute.

Forward gathers the keys and values of all processes, in the order of the row. A chunk is a pack of documents: each of its
queries sees keys from its document's beginning on, which are one piece of the row, so one call per chunk attends without
anything to be joined. Backward gathers again, and adds up the gradients of keys and values in float32 over the processes.
Where keys and values of the row are large, heads follow each other in portions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from oribi.kernels.dispatch import wide
from oribi.kernels.visibility import Visibility

# of keys and values of a whole row that are gathered at a time
GATHERED_BYTES = 2**30
# a chunk's tokens are a multiple, which attention's kernels take a tile of
CHUNK_MULTIPLE = 128
# PyTorch's names from 2.13 on, and the ones before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def own_chunks(rank: int, processes: int) -> tuple[int, int]:
    """The two chunks, of 2C, that process `rank` of C has."""
    return rank, 2 * processes - 1 - rank


def chunk_tokens(tokens: int, processes: int) -> int:
    """c of a row of so many tokens, which is padded to 2C c."""
    return -(-tokens // (2 * processes * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE


def key_portions(tokens: int, kv_heads: int, width: int, itemsize: int) -> int:
    """Portions of the heads in which a row's keys and values are gathered.

    Args:
        tokens: T. kv_heads: K, which the portions divide. width: E. itemsize: bytes of a number.
    """
    size = 2 * tokens * kv_heads * width * itemsize
    fitting = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and size <= n * GATHERED_BYTES)
    return next(fitting, kv_heads)


def exchange_bytes(tokens: int, kv_heads: int, width: int, itemsize: int) -> int:
    """Device bytes of keys and values in backward: gathered as they come and in order, and their gradients in float32."""
    of_portion = 2 * tokens * kv_heads * width // key_portions(tokens, kv_heads, width, itemsize)
    return of_portion * (2 * itemsize + 4)


class ContextGroup:
    """The processes that share rows with this one: `processes` of them, with consecutive ranks.

    Args:
        processes: C, which divides the processes of the training. All of these make their groups together.
        timeout: seconds to wait for each other.

    Attributes:
        processes, rank: C, and r.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        world, own = dist.get_world_size(), dist.get_rank()
        self.processes, self.rank = processes, own % processes
        self._group = dist.group.WORLD
        if processes == world:
            return
        for first in range(0, world, processes):
            ranks = list(range(first, first + processes))
            group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
            if own in ranks:
                self._group = group

    def part(self, cu_seqlens: torch.Tensor, chunk: int, max_length: int) -> Visibility:
        """Who sees whom in this process's part of a row.

        Args:
            cu_seqlens: [docs + 1] int32 offsets of the row's documents; the last is 2C chunk.
            chunk: c. max_length: tokens of the longest document.
        """
        return part_of_row(self, cu_seqlens.tolist(), chunk, max_length, cu_seqlens.device)

    def gather(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of the whole row [1, 2C c, K, E] from each process's part [1, 2c, K, E]."""
        count, shape = self.processes, (2, -1, *k.shape[2:])
        own = torch.stack([k[0], v[0]])
        found = own.new_empty(count * len(own), *own.shape[1:])
        _all_gather(found, own, group=self._group)
        found = found.view(count, 2, *shape)  # process, k or v, early or late, tokens of a chunk
        whole = own.new_empty(2, 2 * count, *found.shape[3:])
        whole[:, :count] = found[:, :, 0].transpose(0, 1)
        whole[:, count:] = found[:, :, 1].flip(0).transpose(0, 1)
        k, v = whole.flatten(1, 2)[:, None]
        return k, v

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """This process's part [2, 2, c, K, E] of the sum over the processes of [C, 2, 2, c, K, E]."""
        own = sums.new_empty(sums.shape[1:])
        _reduce_scatter(own, sums.flatten(0, 1), group=self._group)
        return own


@dataclass(frozen=True)
class Chunk:
    """One of a process's two chunks.

    Args:
        queries: its place in the process's tokens. keys: the keys that it sees, in the row.
        visibility: who sees whom in it.
    """

    queries: slice
    keys: slice
    visibility: Visibility


@dataclass(frozen=True)
class SharedRow:
    """A row of T tokens that processes share.

    Args:
        group: the processes. chunk: c. chunks: the two that this process has.
    """

    group: ContextGroup
    chunk: int
    chunks: tuple[Chunk, Chunk]

    @property
    def tokens(self) -> int:
        return 2 * self.group.processes * self.chunk

    def portions(self, k: torch.Tensor) -> int:
        """Portions in which the heads follow each other; k [1, 2c, K, E]."""
        return key_portions(self.tokens, k.shape[2], k.shape[3], k.element_size())

    def add(self, sums: torch.Tensor, which: int, grad: torch.Tensor, keys: slice) -> None:
        """Adds the gradient [1, keys, K, E] of some keys (which 0) or values (1) to [C, 2, 2, c, K, E], by process and chunk."""
        count = self.group.processes
        for chunk in range(keys.start // self.chunk, -(-keys.stop // self.chunk)):
            first, last = max(keys.start, chunk * self.chunk), min(keys.stop, (chunk + 1) * self.chunk)
            late = chunk >= count
            place = sums[2 * count - 1 - chunk if late else chunk, which, int(late)]
            place = place[first - chunk * self.chunk : last - chunk * self.chunk]
            place += grad[0, first - keys.start : last - keys.start]


def part_of_row(
    group: ContextGroup, bounds: list[int], chunk: int, max_length: int, device: torch.device
) -> Visibility:
    """As `ContextGroup.part`, with the documents' offsets on the host."""
    found = []
    for place, index in enumerate(own_chunks(group.rank, group.processes)):
        first, last = index * chunk, (index + 1) * chunk
        begins = max(bound for bound in bounds if bound <= first)
        edges = [0, *(bound - first for bound in bounds if first < bound < last), chunk]
        visibility = Visibility(1, chunk, past=first - begins, tail=True)
        if len(edges) > 2:
            visibility.cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
            visibility.max_length = max(b - a for a, b in pairwise(edges))
            visibility._bounds = edges
        found.append(Chunk(slice(place * chunk, (place + 1) * chunk), slice(begins, last), visibility))
    return Visibility(1, 2 * chunk, max_length=max_length, shared=SharedRow(group, chunk, tuple(found)))


def shared_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row: SharedRow,
    hows: Sequence[Any],
    attend: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Attention of this process's queries over the row.

    Args:
        q: [1, 2c, H, E]. k, v: [1, 2c, K, E].
        row: that the processes share.
        hows: how each of the chunks is attended.
        attend: forward of (q, k, v, how) -> out and what backward needs.

    Returns:
        out, shaped as q, and what backward needs: of each portion of the heads, of each chunk.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    saved, portions = [], row.portions(k)
    for of_q, of_k, of_v, of_out in zip(*(x.chunk(portions, 2) for x in (q, k, v, out))):
        keys, values = row.group.gather(of_k, of_v)
        for chunk, how in zip(row.chunks, hows):
            found, one = attend(of_q[:, chunk.queries], keys[:, chunk.keys], values[:, chunk.keys], how)
            of_out[:, chunk.queries] = found
            saved.extend(one)
    return out, tuple(saved)


def shared_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Sequence[torch.Tensor],
    counts: Sequence[int],
    row: SharedRow,
    hows: Sequence[Any],
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped as they are; dout is shaped as out.

    Args:
        saved: of `shared_attention_forward`. counts: tensors in it of each chunk.
        attend: backward of (dout, q, k, v, out, saved, how) -> dq, dk and dv. The rest as in forward.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    saved, portions = iter(saved), row.portions(k)
    tensors = zip(*(x.chunk(portions, 2) for x in (dout, q, k, v, out, dq, dk, dv)))
    for of_dout, of_q, of_k, of_v, of_out, of_dq, of_dk, of_dv in tensors:
        keys, values = row.group.gather(of_k, of_v)
        shape = (row.group.processes, 2, 2, row.chunk, *of_k.shape[2:])
        sums = torch.zeros(shape, dtype=wide(k[:0]).dtype, device=k.device)
        for chunk, how, count in zip(row.chunks, hows, counts):
            own, seen = chunk.queries, chunk.keys
            grads = attend(
                of_dout[:, own], of_q[:, own], keys[:, seen], values[:, seen], of_out[:, own],
                tuple(next(saved) for _ in range(count)), how,
            )  # fmt: skip
            of_dq[:, own] = grads[0]
            for which, grad in enumerate(grads[1:]):
                row.add(sums, which, grad, seen)
            del grads, grad
        del keys, values
        for place, grad in zip((of_dk, of_dv), row.group.add_up(sums)):
            place.copy_(grad.flatten(0, 1)[None])
        del sums
    return dq, dk, dv
