"""The few shapes that micro-batches are brought to, so that a step which was recorded once serves many of them.

A pack is lengthened to one of eight lengths per octave by one more document of which nothing is trained; a single document is
lengthened itself, because its tokens do not see what follows. Behind the documents lie empty ones, up to a fixed number.
The rows of hidden states whose next token is trained are filled up with the last row, which has no next token.

B rows, S tokens per row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from oribi.kernels.dispatch import next_power_of_2

# tensors of a batch that a recorded step reads; its keys' documents are those of its queries
TENSORS = ("input_ids", "labels", "position_ids", "cu_seq_lens_q")
KNOWN = {*TENSORS, "cu_seq_lens_k", "max_length_q", "max_length_k"}
# shares of the rows that the head can be recorded for
SHARES = 4
# a larger recorded shape than needed is used up to this many times the tokens
WIDEST = 1.5
# tiles of queries for which attention's kernels start programs: most end at once, and so many more cost no time
TILES, TILE = 512, 128


class Sizes(NamedTuple):
    """Sizes of a batch, or those that a recorded step has place for.

    Args:
        rows, length: B and S. documents: of a pack; 0 for rows that are none.
        longest: tokens of the longest document; 0 for rows that are no pack.
        trained: rows of hidden states that the head runs on; B * S where that is not known.
        names: of the tensors.
    """

    rows: int
    length: int
    documents: int
    longest: int
    trained: int
    names: tuple[str, ...]

    @property
    def is_dense(self) -> bool:
        """Whether all documents are equally long, so that they are rows to attention, whose shape must stay exact."""
        return self.documents * self.longest in (0, self.length)

    @property
    def trains_all(self) -> bool:
        """Whether the head runs on every row."""
        return self.trained == self.rows * self.length

    def holds(self, batch: "Sizes") -> bool:
        """Whether a batch can be padded to these sizes at little cost."""
        if not self.trains_all and (batch.trains_all or batch.trained > self.trained):
            return False
        if self._replace(trained=0) == batch._replace(trained=0):
            return True
        padding = self.length - batch.length
        if self.names != batch.names or not 0 <= padding <= (WIDEST - 1) * batch.length:
            return False
        if self.is_dense:
            return self.documents == batch.documents == 1
        return batch.documents < self.documents and max(batch.longest, padding) <= self.longest


def sizes_of(batch: Mapping[str, Any], trained_rows: torch.Tensor | None) -> Sizes:
    """Sizes of a batch, without asking a GPU.

    Args:
        batch: as collators make it. trained_rows: [n] rows of hidden states that are trained; None where they are not known.
    """
    rows, length = batch["input_ids"].shape
    bounds = batch.get("cu_seq_lens_q")
    pack = () if bounds is None else (len(bounds) - 1, int(batch["max_length_q"]))
    trained = rows * length if trained_rows is None else len(trained_rows)
    names = tuple(name for name in TENSORS if batch.get(name) is not None)
    return Sizes(rows, length, *(pack or (0, 0)), trained, names)


def padded_sizes(
    batch: Sizes, pads: bool, same_angles: Callable[[int, int], bool] = lambda a, b: True
) -> Sizes | None:
    """The smallest sizes that a step is recorded for and that hold a batch; None where it had to be lengthened and is not.

    Args:
        batch: its sizes. pads: whether it may be lengthened.
        same_angles: whether documents of two lengths are rotated alike where the longer is a batch's longest.
    """
    length, documents, longest = batch.length, batch.documents, batch.longest
    step = max(next_power_of_2(length) // 16, 64)
    whole = -(-length // step) * step
    if documents and not (batch.is_dense and whole == length):
        if whole != length and not (pads and "position_ids" in batch.names):
            return None
        length = whole
        if documents == 1 and same_angles(longest, length):
            longest = length
        else:
            documents = next_power_of_2(documents) + 1
            least = max(longest, length - batch.length)
            bounds = [min(next_power_of_2(least), length), least]
            if documents * -(-length // TILE) <= TILES:
                bounds.insert(0, length)
            longest = next((bound for bound in bounds if same_angles(longest, bound)), 0)
            if not longest:
                return None
    everything = batch.rows * length
    share = -(-everything // SHARES)
    trained = min(max(-(-batch.trained // share), 1) * share, everything)
    return Sizes(
        batch.rows, length, documents, longest, everything if batch.trains_all else trained, batch.names
    )


def empty_batch(batch: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Buffers of these sizes for batches like this one, which `fill_buffers` fills."""
    like = {name: batch[name] for name in sizes.names}
    buffers: dict[str, Any] = {
        name: x.new_empty(sizes.documents + 1 if x.dim() == 1 else (sizes.rows, sizes.length))
        for name, x in like.items()
    }
    if "cu_seq_lens_q" in buffers:
        buffers["max_length_q"] = sizes.longest
    if sizes.trained < sizes.rows * sizes.length:
        buffers["trained_rows"] = batch["input_ids"].new_empty(sizes.trained)
    return buffers


def fill_buffers(
    buffers: Mapping[str, Any], batch: Mapping[str, Any], trained_rows: torch.Tensor | None
) -> None:
    """Writes a batch into buffers that hold it; what is added to it trains nothing and is seen by nothing."""
    length = batch["input_ids"].shape[1]
    whole = buffers["input_ids"].shape[1]
    bounds = batch.get("cu_seq_lens_q")
    for name, padding in (("input_ids", 0), ("labels", -100), ("position_ids", None)):
        if name not in buffers:
            continue
        buffers[name][:, :length].copy_(batch[name], non_blocking=True)
        rest = buffers[name][:, length:]
        if padding is not None:
            rest.fill_(padding)
        elif rest.numel():
            first = length if len(buffers["cu_seq_lens_q"]) == 2 else 0
            torch.arange(first, first + whole - length, out=rest[0])
    if bounds is not None:
        known = min(len(bounds), len(buffers["cu_seq_lens_q"]) - 1)  # the last bound is the end of the row
        buffers["cu_seq_lens_q"][:known].copy_(bounds[:known], non_blocking=True)
        buffers["cu_seq_lens_q"][known:].fill_(whole)
    if "trained_rows" in buffers:
        rows = buffers["trained_rows"]
        rows[: len(trained_rows)].copy_(trained_rows, non_blocking=True)
        rows[len(trained_rows) :].fill_(buffers["input_ids"].numel() - 1)
