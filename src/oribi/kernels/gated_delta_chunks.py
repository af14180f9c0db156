"""A batch's documents cut into chunks of 64 tokens that never cross a border, as the gated delta rule takes them.

Kernels read a table on the GPU, whose size depends on the number of tokens and documents alone: a recorded step may find
other documents in it. The reference wants the documents on the host, and asks for them when it runs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

CHUNK = 64


class Slots(NamedTuple):
    """Where tokens lie in chunks for the reference, [chunks * CHUNK] slots; slots without a token hold zeros.

    The documents with most chunks come first, and a chunk's number counts all first chunks, then all second ones, and so on.

    Args:
        token: [T] int64, the slot of each token. count: of the chunks.
        starts: of each round, the number of its first chunk; the last entry is `count`. A round has as many chunks as
            there are documents that long.
        document: [docs] int64, the documents as the rounds have them.
    """

    token: torch.Tensor
    count: int
    starts: tuple[int, ...]
    document: torch.Tensor


class Table(NamedTuple):
    """Where the chunks of documents are, for kernels.

    Args:
        chunks: [count, 2] int32, first token and number of tokens of each chunk, document by document. Where the
            documents have fewer chunks, the last ones have no tokens.
        first: [docs + 1] int32, the first chunk of each document.
    """

    chunks: torch.Tensor
    first: torch.Tensor


class Chunks:
    """The chunks of a batch's documents.

    Args:
        offsets: [docs + 1] int32 of the documents on the tokens' device, ascending from 0; a document may be empty.
        tokens: T, the last offset.
        bounds: the offsets on the host, or what asks for them.
    """

    def __init__(
        self, offsets: torch.Tensor, tokens: int, bounds: Sequence[int] | Callable[[], Sequence[int]]
    ) -> None:
        self.offsets, self.tokens, self._bounds = offsets, tokens, bounds

    @property
    def documents(self) -> int:
        """How many there are, empty ones included."""
        return len(self.offsets) - 1

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the documents on the host."""
        return tuple(map(int, self._bounds() if callable(self._bounds) else self._bounds))

    @cached_property
    def table(self) -> Table:
        """The chunks as kernels read them, made without asking the device for anything."""
        if callable(self._bounds):  # the most that so many documents of so many tokens can have
            count = (self.tokens + (CHUNK - 1) * self.documents) // CHUNK
        else:
            count = sum(-(-(b - a) // CHUNK) for a, b in zip(self.bounds, self.bounds[1:]))
        counts = (self.offsets.diff() + (CHUNK - 1)) // CHUNK
        first = torch.cat([self.offsets[:1], counts.cumsum(0, dtype=torch.int32)])
        chunk = torch.arange(count, dtype=torch.int32, device=self.offsets.device)
        document = torch.searchsorted(first[1:], chunk, right=True).clamp_max(self.documents - 1)
        start = self.offsets[document] + (chunk - first[document]) * CHUNK
        length = (self.offsets[document + 1] - start).clamp(0, CHUNK)
        return Table(torch.stack([start, length], 1), first)

    @cached_property
    def slots(self) -> Slots:
        """The chunks as the reference lays them out."""
        offsets = torch.tensor(self.bounds, dtype=torch.int64)
        lengths = offsets.diff()
        counts = -(-lengths // CHUNK)
        order = counts.argsort(descending=True, stable=True)
        place = order.argsort()  # of each document among the others
        rounds = int(counts.max()) if len(counts) else 0
        sizes = (counts[None, :] > torch.arange(rounds)[:, None]).sum(1)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        document = torch.arange(len(lengths)).repeat_interleave(lengths)
        token = torch.arange(int(offsets[-1])) - offsets[document]
        slot = (starts[token // CHUNK] + place[document]) * CHUNK + token % CHUNK
        device = self.offsets.device
        return Slots(slot.to(device), int(starts[-1]), tuple(starts.tolist()), order.to(device))


def chunks_of(bounds: Sequence[int], device: torch.device) -> Chunks:
    """The chunks of documents that the host knows.

    Args:
        bounds: their offsets, ascending from 0; a document may be empty.
        device: of the tokens.
    """
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Chunks(offsets, int(bounds[-1]), bounds)


def heads_at_a_time(
    key_heads: int, value_heads: int, chunks: int, portion: int
) -> Iterator[tuple[slice, slice]]:
    """Key heads and the value heads that share them, in portions that bound what is computed at a time.

    Args:
        key_heads, value_heads: K and H. chunks: their number.
        portion: slots times value heads of a portion, of one key head at least.
    """
    ratio = value_heads // key_heads
    step = max(portion // (max(chunks * CHUNK, 1) * ratio), 1)
    for first in range(0, key_heads, step):
        shared = slice(first, min(first + step, key_heads))
        yield shared, slice(first * ratio, shared.stop * ratio)
