"""Rows of TRL's trainers: each counts once, in training and in evaluation, on any number of processes.

TRL's losses are means over micro-batches. So processes share micro-batches as one process would read them, and at the end of an
epoch some have a smaller one, or none: these compute a row that is not trained. Weights make the sum over processes the mean that
one process takes, and what TRL gathers for its metrics leaves such rows out. An evaluation is a mean over rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from oribi.train.batches import Filler, rank_loader
from oribi.train.evaluate import EvaluatingTrainer
from oribi.train.setup import temporarily

ROWS = "oribi_rows"  # of a batch: how many of its rows count


class CountedRows:
    """A collator whose batches say how many of their rows count.

    Args:
        collate: makes the batches.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        rows = 0 if isinstance(examples[0], Filler) else len(examples)
        return {**self._collate(examples), ROWS: rows}


class RowsOnceTrainer(EvaluatingTrainer):
    """A trainer of TRL's whose processes train and evaluate each row once."""

    # whether a loss compares the rows of all processes, so that their micro-batches are parts of one
    compares_processes = False
    _rounds: list[list[int]] = []  # of a step's micro-batches, rows of each process
    _round = -1  # the one that is computed

    def _get_dataloader(
        self, *args: Any, description: str, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        build = partial(
            super()._get_dataloader, *args, description=description, is_training=is_training, **kwargs
        )
        if not (is_training or description == "Evaluation" and self.compute_metrics is None):
            return build()  # its logits are handed out in the order of the rows
        deal = self.accelerator.prepare
        if self.exchanges:
            deal = partial(
                rank_loader,
                self.accelerator,
                self.args.gradient_accumulation_steps,
                1,
                is_training,
                by_cost=False,
            )

        def counted(loader: DataLoader) -> DataLoader:
            loader.collate_fn = CountedRows(loader.collate_fn)
            return deal(loader)

        with temporarily(self.accelerator, prepare=counted):
            return build()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        samples, targets = super().get_batch_samples(*args, **kwargs)
        rows = [batch.pop(ROWS) for batch in samples]
        self._rounds, self._round = [], -1
        if rows and self.exchanges:
            own = torch.tensor(rows, device=self.args.device)
            self._rounds = self.accelerator.gather(own).view(-1, len(rows)).T.tolist()
        return samples, targets

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._round += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._rounds or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        gather = self._gather if self._is_uneven() else self.accelerator.gather
        with temporarily(self.accelerator, gather=gather, gather_for_metrics=gather):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * self._weight()

    def _is_uneven(self) -> bool:
        """Whether processes have different numbers of rows in this micro-batch."""
        return bool(self._rounds) and self.model.training and len(set(self._rounds[self._round])) > 1

    def _weight(self) -> float:
        """What this process's mean counts, where a mean over processes and over a step's micro-batches is taken."""
        rows, processes = self._rounds[self._round], self.args.world_size
        own = rows[self.args.process_index]
        if self.compares_processes:
            return own * processes / sum(rows)
        batches = sum(count > 0 for counts in self._rounds for count in counts)
        return len(self._rounds) * processes / batches if own else 0.0

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """`Accelerator.gather` of an uneven micro-batch: only from processes whose rows count, and any number of them."""
        every = self._agree(values.detach().cpu())
        found = [torch.atleast_1d(part) for part, rows in zip(every, self._rounds[self._round]) if rows]
        return torch.cat(found).to(values.device)

    def prediction_step(self, model, inputs, *args, **kwargs):
        rows = inputs.pop(ROWS, None)
        if rows is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        logged = self._logged_in_evaluation()
        before = {name: len(values) for name, values in logged.items()}
        # what TRL appends to its metrics is a mean over this batch, and counts as many times as the batch has rows
        with temporarily(self.accelerator, gather=_own, gather_for_metrics=_own):
            found = super().prediction_step(model, inputs, *args, **kwargs)
        for name, values in logged.items():
            start = before.get(name, 0)
            values[start:] = values[start:] * rows
        if found[0] is not None:
            count = torch.tensor(float(rows), device=found[0].device)
            self._evaluated.append(torch.stack([found[0].float() * count, count]))
        return found

    def _logged_in_evaluation(self) -> dict[str, list[float]]:
        """TRL's lists of the values that the next log averages."""
        logged = vars(self).get("_metrics") or self._stored_metrics
        return logged["eval"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated and self.args.world_size > 1:
            logged = self._logged_in_evaluation()
            every = gather_object([dict(logged)])
            for name in {name for one in every for name in one}:
                logged[name] = [value for one in every for value in one.get(name, [])]
        return output


def _own(values: torch.Tensor) -> torch.Tensor:
    """What a process has alone."""
    return values
