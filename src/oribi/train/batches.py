"""Batches of several processes: together they read every row once per epoch, as one process does.

The batches of an epoch are dealt out in rounds, batch i to process i mod W. In the last round some processes may have
none left; they take a row of which nothing is trained. accelerate would repeat the first rows of the data set there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from oribi.data.encoding import UNTRAINED

# what a loader is made of beside its rows and their order
LOADER_SETTINGS = (
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor",
    "persistent_workers", "in_order",
)  # fmt: skip


class Filler(dict):
    """A row that stands where a process has none left."""


class RankBatches(BatchSampler):
    """The batches of one process.

    Args:
        batch_sampler: the batches of all processes.
        num_processes: processes that share them. process_index: this one.
        filler: index of the row where no batch is left.
    """

    def __init__(self, batch_sampler: Any, num_processes: int, process_index: int, filler: int) -> None:
        self.batch_sampler = batch_sampler
        # accelerate and transformers know these names
        self.num_processes, self.process_index = num_processes, process_index
        self.batch_size, self.drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        self.sampler = getattr(batch_sampler, "sampler", None)
        self._filler = filler

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        own, count = [self._filler], 0
        for count, batch in enumerate(self.batch_sampler, 1):
            if (count - 1) % self.num_processes == self.process_index:
                own = batch
            if count % self.num_processes == 0:
                yield own
                own = [self._filler]
        if count % self.num_processes:
            yield own


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
    """The rows of a stream that one process reads, in rounds of one batch per process."""

    def __init__(self, rows: Any, batch_size: int, drop_last: bool, num_processes: int, process: int) -> None:
        self._rows, self._batch_size, self._drop_last = rows, batch_size, drop_last
        self._round, self._first = batch_size * num_processes, batch_size * process

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        found: list[Any] = []
        for row in self._rows:
            found.append(row)
            if len(found) == self._round:
                yield from self._own(found)
                found = []
        if found and self._drop_last:
            found = found[: len(found) // self._batch_size * self._batch_size]
        if found:
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
        return batch


def rank_loader(accelerator: Accelerator, loader: DataLoader) -> DataLoader:
    """A process's loader: the rows and order of `loader`, dealt out as this file says, on this process's device."""
    processes, process = accelerator.num_processes, accelerator.process_index
    settings = {name: getattr(loader, name) for name in LOADER_SETTINGS if hasattr(loader, name)}
    settings["collate_fn"] = UntrainedFiller(loader.collate_fn)
    if isinstance(loader.dataset, IterableDataset):
        rows = RankRows(loader.dataset, loader.batch_size, loader.drop_last, processes, process)
        dealt = DataLoader(rows, batch_size=loader.batch_size, drop_last=loader.drop_last, **settings)
    else:
        batches = RankBatches(loader.batch_sampler, processes, process, filler=len(loader.dataset))
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
