"""Where in the data a training reads: counted in rows, so that a run can be resumed with another batch layout.

transformers counts steps, and takes every step before a checkpoint for one of the present size.
"""

import math
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback

from oribi.errors import ConfigError, DataError
from oribi.text import say
from oribi.train.arguments import row_readers
from oribi.train.resume import Resumed
from oribi.train.setup import temporarily


@dataclass
class Position(TrainerCallback):
    """Counts the rows of the current pass over the data.

    Args:
        epoch: passes that are complete. rows: read in the current one.
        per_batch: rows of a micro-batch of all processes. batches: micro-batches left of the pass; None for a stream.
    """

    epoch: int = 0
    rows: int = 0
    per_batch: int = 1
    batches: int | None = None
    read: int = 0
    unused: int = 0  # micro-batches since the last optimizer step
    ended: bool = False

    def begin(self, epoch: int, rows: int, per_batch: int, batches: int | None) -> None:
        """A pass begins, or continues at one of its rows."""
        self.epoch, self.rows, self.per_batch, self.batches = epoch, rows, per_batch, batches
        self.read, self.unused, self.ended = 0, 0, False

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self.read += 1
        self.unused += 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.read += 1
        self.unused = 0

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self.ended = not control.should_training_stop

    def to_dict(self) -> dict[str, int]:
        """Where the next step reads."""
        if self.ended or (self.batches is not None and self.read >= self.batches):
            return {"epoch": self.epoch + 1, "rows": 0}
        return {"epoch": self.epoch, "rows": self.rows + self.read * self.per_batch}


class PositionedTrainer(Trainer):
    """transformers' `Trainer` that knows which rows it has read."""

    _resumed: Resumed | None = None
    # rows by when they joined the run: {"rows": number, "epoch": pass}; and the rows, or packs, of each such part
    _parts: list[dict[str, int]] | None = None
    _part_items: list[int] = []
    _tail: dict[str, int] | None = (
        None  # where the resumed epoch continues, if transformers would continue elsewhere
    )
    _sequential = False
    _nothing_left = False
    _told_unused = False
    _loss_before_step: torch.Tensor | None = None  # not logged yet; kept for streams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = Position()
        self.add_callback(self.position)

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            say(f"oribi: {text}")

    @property
    def reads_stream(self) -> bool:
        """Whether the rows are a stream, whose number is not known."""
        return not hasattr(self.train_dataset, "__len__")

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        if self._resumed is None:
            return values
        epochs, per_epoch, examples, samples, batch, in_epoch, max_steps = values
        done, position = self._resumed.step, self._resumed.record and self._resumed.record.position
        if position and self._reads_elsewhere(position, per_epoch):
            self._tail = position
            epochs, max_steps = self._steps_with_tail(epochs, per_epoch, max_steps)
        if done >= max_steps:
            self._nothing_left, epochs = True, 0
            self._say(
                f"nothing left to train: {self._resumed.path.name} is at step {done:,} of {max_steps:,}. Raise max_steps "
                "or num_train_epochs to continue"
            )
        return epochs, per_epoch, examples, samples, batch, in_epoch, max_steps

    @property
    def _rows_per_batch(self) -> int:
        return self.args.per_device_train_batch_size * row_readers(self.args)

    def _reads_elsewhere(self, position: dict[str, int], per_epoch: int) -> bool:
        """Whether transformers' count of steps would continue at other rows than the run stopped at."""
        epoch, steps = divmod(self._resumed.step, per_epoch)
        rows = steps * self.args.gradient_accumulation_steps * self._rows_per_batch
        added = any(part["epoch"] == position["epoch"] for part in (self._parts or [])[1:])
        return added or position != {"epoch": epoch, "rows": rows}

    def _tail_rows(self) -> int:
        return len(self.train_dataset) - self._tail["rows"]

    def _steps_with_tail(self, epochs: int, per_epoch: int, max_steps: int) -> tuple[int, int]:
        """Passes and steps of a training whose current pass began in another layout of batches or with fewer rows."""
        args, done, epoch = self.args, self._resumed.step, self._tail["epoch"]
        if self.reads_stream:
            return epochs, max_steps
        tail = self._steps_of(self._tail_rows())
        if args.max_steps > 0:
            return epoch + 1 + math.ceil(max(max_steps - done - tail, 0) / per_epoch), max_steps
        left = args.num_train_epochs - epoch - 1
        if left >= 0:
            return math.ceil(args.num_train_epochs), done + tail + math.ceil(left * per_epoch)
        rows = math.ceil(left * len(self.train_dataset)) + self._tail_rows()
        return math.ceil(args.num_train_epochs), done + self._steps_of(max(rows, 0))

    def _steps_of(self, rows: int) -> int:
        return math.ceil(rows / self._rows_per_batch / self.args.gradient_accumulation_steps)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed is not None:
            # the state of the checkpoint names the steps between logs, saves and evaluations of that time
            self.state.compute_steps(self.args, max_steps)
            self.state.train_batch_size = self._train_batch_size
        return (self._tail["epoch"], 0) if self._tail else (epochs, batches)

    def _run_epoch(
        self,
        *,
        epoch: int,
        train_dataloader: DataLoader,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **rest: Any,
    ) -> None:
        sized = not self.reads_stream
        resumes = self._resumed is not None and epoch == epochs_trained
        skipped = steps_trained_in_current_epoch if resumes else 0
        rows = skipped * self._rows_per_batch
        if resumes and self._tail:
            rows = self._tail["rows"]
            train_dataloader = self._tail_loader(train_dataloader, epoch)
            if sized:
                steps_in_epoch = len(train_dataloader)
                num_update_steps_per_epoch = math.ceil(steps_in_epoch / self.args.gradient_accumulation_steps)
        self.position.begin(epoch, rows, self._rows_per_batch, steps_in_epoch - skipped if sized else None)
        first = self.state.global_step
        super()._run_epoch(
            epoch=epoch, train_dataloader=train_dataloader, steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch, epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch, **rest,
        )  # fmt: skip
        if not sized:
            left = int(getattr(getattr(train_dataloader, "dataset", None), "left", 0))
            self._end_pass(first, bool(rows), left)

    def _end_pass(self, first: int, began_later: bool, left: int) -> None:
        """After a pass over a stream: it must have given a step; micro-batches of a step it could not fill are dropped.

        Args:
            first: the step at which the pass began. began_later: whether it did not begin at the first row.
            left: micro-batches at the end that did not suffice for all processes.
        """
        batches = self.position.unused * row_readers(self.args) + left
        needed = self.args.gradient_accumulation_steps * row_readers(self.args)
        if self.state.global_step == first and not began_later and not self.stop_on_signal.stopped:
            given = f"{batches} micro-batches" if batches != 1 else "1 micro-batch"
            raise DataError(
                f"the stream has {given} of {self.args.per_device_train_batch_size} rows, a step needs {needed}: lower "
                "gradient_accumulation_steps or per_device_train_batch_size, or give more rows"
            )
        if batches and self.state.global_step < self.state.max_steps:
            if self.position.unused:
                # or gradients and loss would be added to those of the next pass's first step
                self.model.zero_grad()
                self._tr_loss.copy_(self._loss_before_step)
            if not self._told_unused:
                self._told_unused = True
                self._say(
                    f"the last {batches} of the stream's micro-batches fill no step of {needed} and are not trained"
                )

    def _tail_loader(self, loader: DataLoader, epoch: int) -> DataLoader:
        """The rest of a pass that began in another layout of batches: every row that was not read, in the pass's order."""
        if self.reads_stream:
            if not hasattr(self.train_dataset, "skip"):
                raise ConfigError(
                    f"a stream of {type(self.train_dataset).__name__} cannot be entered in the middle with another batch "
                    "layout; resume with the run's per_device_train_batch_size and gradient_accumulation_steps"
                )
            with temporarily(self, train_dataset=self.train_dataset.skip(self._tail["rows"])):
                return self.get_train_dataloader()
        items = self._part_items or [len(self.train_dataset)]
        joined = [part["epoch"] for part in self._parts or [{"epoch": 0}]]
        later = [count for count, since in zip(items[1:], joined[1:]) if since == epoch]
        first = sum(items) - sum(later)
        order = _order(loader, epoch, first)
        for count in later:
            order += [first + index for index in _order(loader, epoch, count)]
            first += count
        rest = order[self._tail["rows"] :]
        rows = self.train_dataset
        rows = (
            rows.select(rest) if isinstance(rows, datasets.Dataset) else torch.utils.data.Subset(rows, rest)
        )
        with temporarily(self, train_dataset=rows, _sequential=True):
            return self.get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._sequential:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        before = self._tr_loss.clone() if self.reads_stream else None
        samples, targets = super().get_batch_samples(*args, **kwargs)
        if samples:
            self._loss_before_step = before
        return samples, targets


def _order(loader: DataLoader, epoch: int, count: int) -> list[int]:
    """The order in which a loader reads so many rows in a pass.

    Raises:
        ConfigError: it depends on more than the seed.
    """
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler = batches.sampler
    if isinstance(sampler, SeedableRandomSampler):
        generator = torch.Generator().manual_seed(sampler.initial_seed + epoch)
        return torch.randperm(count, generator=generator).tolist()
    if isinstance(sampler, SequentialSampler):
        return list(range(count))
    raise ConfigError(
        f"rows come in the order of {type(sampler).__name__}, which depends on the batch layout: resume with the run's "
        "per_device_train_batch_size, gradient_accumulation_steps, number of processes and rows"
    )
