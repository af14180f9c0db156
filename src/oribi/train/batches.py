"""Batches of several processes: together they read every row once per epoch, as one process does.

The rows of each optimizer step are those of one process, and are shared so that every process computes about as long: the longest
row goes first, to the process with the least work so far. Where lengths are not known, batch i goes to process i mod W. At the end
of an epoch some processes may have none left; they take a row of which nothing is trained. accelerate would repeat the first
rows of the data set there.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import datasets
import pyarrow.compute as compute
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from oribi.data.encoding import UNTRAINED
from oribi.kernels.cross_entropy import labelled_rows, next_tokens
from oribi.train.context import RowPart

# what a loader is made of beside its rows and their order
LOADER_SETTINGS = (
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor",
    "persistent_workers", "in_order",
)  # fmt: skip


# what a batch says of itself beside what its collator put there
TRAINED_ROWS = "trained_rows"
# of a row at which an 8B model's attention costs as much as its matrix products
QUADRATIC_TOKENS = 40_000


class Filler(dict):
    """A row that stands where a process has none left."""


class RankBatches(BatchSampler):
    """The batches of one process.

    Args:
        batch_sampler: the batches of all processes.
        num_processes: processes that share them. process_index: this one.
        filler: index of the row where no batch is left.
        costs: of each row; None deals out whole batches.
        rounds: micro-batches of an optimizer step.
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int,
        process_index: int,
        filler: int,
        costs: Sequence[float] | None = None,
        rounds: int = 1,
    ) -> None:
        self.batch_sampler = batch_sampler
        # accelerate and transformers know these names
        self.num_processes, self.process_index = num_processes, process_index
        self.batch_size, self.drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        self.sampler = getattr(batch_sampler, "sampler", None)
        self._filler, self._costs, self._rounds = filler, costs, rounds

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        rounds = 1 if self._costs is None else self._rounds
        step: list[list[int]] = []
        for batch in self.batch_sampler:
            step.append(batch)
            if len(step) == rounds * self.num_processes:
                yield from self._own(step)
                step = []
        if step:
            yield from self._own(step)

    def _own(self, step: list[list[int]]) -> Iterator[list[int]]:
        """This process's micro-batches of a step."""
        rounds = -(-len(step) // self.num_processes)
        if self._costs is None:
            own = step[self.process_index :: self.num_processes]
        else:
            size = max(map(len, step))
            rows = deal(
                [row for batch in step for row in batch], self._costs, self.num_processes, rounds * size
            )
            own = [batch for batch in deal(rows[self.process_index], self._costs, rounds, size) if batch]
        yield from own
        for _ in range(rounds - len(own)):
            yield [self._filler]


def deal(rows: Sequence[int], costs: Sequence[float], shares: int, size: int) -> list[list[int]]:
    """Rows in shares of at most `size` and of about equal cost: the dearest first, to the cheapest share with place for it."""
    found: list[list[int]] = [[] for _ in range(shares)]
    loads = [0.0] * shares
    for row in sorted(rows, key=lambda row: -costs[row]):
        place = min((i for i in range(shares) if len(found[i]) < size), key=lambda i: (loads[i], i))
        found[place].append(row)
        loads[place] += costs[row]
    return found


def row_lengths(dataset: Any) -> list[int]:
    """Tokens of each prepared row; none for a stream, whose rows are not known before they come."""
    if (
        not isinstance(dataset, datasets.Dataset)
        or not len(dataset)
        or "input_ids" not in dataset.column_names
    ):
        return []
    return compute.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_pylist()


def row_costs(dataset: Any) -> list[float] | None:
    """What each row costs a step, in tokens; attention adds as much again where a row has QUADRATIC_TOKENS."""
    return [length * (1 + length / QUADRATIC_TOKENS) for length in row_lengths(dataset)] or None


class FilledRows(Dataset):
    """Rows, and at the index behind the last one a `Filler`."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return Filler(self._rows[0]) if index == len(self._rows) else self._rows[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if len(self._rows) not in indices and hasattr(self._rows, "__getitems__"):
            return self._rows.__getitems__(indices)
        return [self[index] for index in indices]


class RankRows(IterableDataset):
    """The rows of a stream that one process reads, in rounds of one batch per process.

    Args:
        rows: the stream. batch_size: rows of a batch.
        drop_last: whether only whole batches are read.
        num_processes: that share them. process: this one.
        fills: whether processes for which the last round has no batch take rows that are not trained. If not, nobody reads that
            round: it could not fill a step of one process either.

    Attributes:
        left: batches of that round in the last pass [1], in memory that the loader's workers share.
    """

    def __init__(
        self,
        rows: Any,
        batch_size: int,
        drop_last: bool,
        num_processes: int,
        process: int,
        fills: bool = True,
    ) -> None:
        self._rows, self._batch_size, self._drop_last, self._fills = rows, batch_size, drop_last, fills
        self._round, self._first = batch_size * num_processes, batch_size * process
        self.left = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        found: list[Any] = []
        self.left.zero_()
        for row in self._rows:
            found.append(row)
            if len(found) == self._round:
                yield from self._own(found)
                found = []
        if found and self._drop_last:
            found = found[: len(found) // self._batch_size * self._batch_size]
        batches = -(-len(found) // self._batch_size)
        if not self._fills and batches * self._batch_size < self._round:
            self.left.fill_(batches)
        elif found:
            yield from self._own(found) or [Filler(found[0])] * (self._batch_size if self._drop_last else 1)

    def _own(self, found: list[Any]) -> list[Any]:
        return found[self._first : self._first + self._batch_size]


class UntrainedFiller:
    """A collator that takes the labels off batches of fillers, whichever collator made them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        batch = self._collate(examples)
        if any(isinstance(example, Filler) for example in examples):
            for name in ("labels", "shift_labels"):
                if name in batch:
                    batch[name] = torch.full_like(batch[name], UNTRAINED)
            if TRAINED_ROWS in batch:
                batch[TRAINED_ROWS] = batch[TRAINED_ROWS][:0]
        return batch


class TellsTrainedRows:
    """A collator whose batches say which rows of hidden states are trained, so that nobody has to ask a GPU.

    Args:
        collate: makes the batches. vocab_size: labels must be below it.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], vocab_size: int) -> None:
        self._collate, self._vocab_size = collate, vocab_size

    def __call__(self, examples: list[Any]) -> Any:
        batch = self._collate(examples)
        if isinstance(batch, MutableMapping) and (labels := labels_of(batch)) is not None:
            targets = labels if "shift_labels" in batch else next_tokens(labels)
            batch[TRAINED_ROWS] = labelled_rows(targets.reshape(-1), self._vocab_size)
        return batch


def labels_of(batch: Any) -> torch.Tensor | None:
    """The labels [B, S] that count in a batch."""
    return batch["shift_labels"] if "shift_labels" in batch else batch.get("labels")


def rank_loader(
    accelerator: Accelerator,
    rounds: int,
    context: int,
    is_training: bool,
    loader: DataLoader,
    by_cost: bool = True,
) -> DataLoader:
    """A process's loader: the rows and order of `loader`, dealt out as this file says, on this process's device.

    Args:
        accelerator: knows the processes.
        rounds: micro-batches of an optimizer step.
        context: processes that share each row, which read the same rows.
        is_training: whether the end of a stream that fills no step is left out.
        loader: of one process.
        by_cost: whether the rows of a step are dealt out so that all compute about as long; otherwise its batches are.
    """
    processes, (process, rank) = (
        accelerator.num_processes // context,
        divmod(accelerator.process_index, context),
    )
    settings = {name: getattr(loader, name) for name in LOADER_SETTINGS if hasattr(loader, name)}
    collate = UntrainedFiller(loader.collate_fn)
    settings["collate_fn"] = RowPart(collate, context, rank) if context > 1 else collate
    if isinstance(loader.dataset, IterableDataset):
        rows = RankRows(
            loader.dataset, loader.batch_size, loader.drop_last, processes, process, fills=not is_training
        )
        dealt = DataLoader(rows, batch_size=loader.batch_size, drop_last=loader.drop_last, **settings)
    else:
        batches = RankBatches(
            loader.batch_sampler, processes, process, len(loader.dataset),
            row_costs(loader.dataset) if by_cost else None, rounds,
        )  # fmt: skip
        dealt = DataLoader(FilledRows(loader.dataset), batch_sampler=batches, **settings)
    return prepare_data_loader(
        dealt,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=None,  # the order comes from seed and epoch, equal in all processes
        dispatch_batches=False,
        use_seedable_sampler=True,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
    )


class GroupedByLength(Sampler):
    """Rows of similar length together: the same order in every process, and another one in each epoch.

    Args:
        grouped: transformers' sampler, which draws from PyTorch's global generator unless it is given one.
        step_rows: rows of an optimizer step, over all processes.
        seed: of the order.
    """

    def __init__(self, grouped: LengthGroupedSampler, step_rows: int, seed: int) -> None:
        grouped.batch_size = step_rows
        self._grouped, self._seed, self._epoch = grouped, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._grouped)

    def __iter__(self) -> Iterator[int]:
        self._grouped.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._grouped)
