"""Out of memory in training: the micro-batch is cut at document bounds and run in parts, with the same gradients.

The loss is a sum over targets divided by the targets of the whole optimizer step, so parts of a micro-batch add up to it
exactly. What an interrupted backward has left in the gradients is thrown away and the step's micro-batches run again.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from oribi.errors import TrainingError

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]
# free memory that the next plan of what layers keep may count on, for each time that it was not enough
RELIANCE = 0.7
LEANER_PLANS = 4  # after which a plan counts on a quarter of the free memory


class SmallerSteps:
    """Runs micro-batches, in parts once memory was short.

    Args:
        run: forward and backward of (inputs, targets of the step) -> loss.
        restart: makes gradients zero and memory free, and plans anew for micro-batches of that many parts.
        plans: whether `restart` can make layers keep less, which may help where nothing can be cut.

    Attributes:
        parts: how many each micro-batch is cut into.
        shortages: times that memory was short.
    """

    def __init__(
        self,
        run: Callable[[Inputs, Any], torch.Tensor],
        restart: Callable[[], None],
        plans: bool = False,
    ) -> None:
        self.parts, self.shortages = 1, 0
        self._run, self._restart, self._plans = run, restart, plans
        self._step, self._taken = -1, []

    @property
    def reliance(self) -> float:
        """Share of the free memory that plans may count on."""
        return RELIANCE**self.shortages

    def __call__(self, step: int, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Loss of one micro-batch, its gradients added.

        Args:
            step: number of the optimizer step. inputs: the micro-batch. targets: labelled tokens of the whole step.

        Raises:
            TrainingError: a single document does not fit.
        """
        if step != self._step:
            self._step, self._taken = step, []
        self._taken.append(inputs)
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    parts = cut(batch, self.parts)
                    loss = self._run(parts[0], targets)
                    for part in parts[1:]:
                        loss = loss + self._run(part, targets)
                return loss
            except torch.OutOfMemoryError as error:
                if (problem := self._problem()) is not None:
                    raise TrainingError(problem) from error
            # outside the handler: its traceback holds the activations
            self._make_smaller(step)
            todo = self._taken

    def _problem(self) -> str | None:
        """Why smaller parts and leaner plans would not help; None where they may."""
        leaner = self._plans and self.shortages < LEANER_PLANS
        if leaner or any(_documents(batch) > self.parts for batch in self._taken):
            return None
        longest = max(_longest(batch) for batch in self._taken)
        return (
            f"a document of {longest:,} tokens does not fit into GPU memory alone: lower max_seq_length, set "
            "gradient_checkpointing: memory, or let `oribi estimate` show what fits"
        )

    def _make_smaller(self, step: int) -> None:
        self.parts *= 2
        self.shortages += 1
        self._say_smaller(step)
        self._restart()

    def _say_smaller(self, step: int) -> None:
        tokens = max(batch["input_ids"].numel() for batch in self._taken)
        largest = max(part["input_ids"].numel() for batch in self._taken for part in cut(batch, self.parts))
        logger.warning(
            "step %d: out of memory with micro-batches of %s tokens; each now runs in up to %d parts of at most %s "
            "tokens, with the same gradients",
            step, f"{tokens:,}", self.parts, f"{largest:,}",
        )  # fmt: skip


class StepsOfSharedRows(SmallerSteps):
    """The same for parts of rows that processes share: while it computes, each waits for the others, so that none cuts its part."""

    def _problem(self) -> str:
        return (
            "a process ran out of GPU memory with its part of a row that processes share, which is not cut further: raise "
            "context_parallel and gpus, lower max_seq_length or per_device_train_batch_size, or set gradient_checkpointing: memory"
        )


def cut(inputs: Inputs, parts: int) -> list[Inputs]:
    """A micro-batch cut between documents into at most `parts`; those without labels are left out unless nothing remains.

    Args:
        inputs: one row of documents with `cu_seq_lens_q` [docs + 1], or padded rows [B, S].
        parts: at least 1.
    """
    count = _documents(inputs)
    if parts == 1 or count == 1:
        return [inputs]
    found = [part for part in _pieces(inputs, count, parts) if bool((part["labels"] != -100).any())]
    return found or [inputs]


def _pieces(inputs: Inputs, count: int, parts: int) -> list[Inputs]:
    if "cu_seq_lens_q" not in inputs:
        size = -(-count // parts)
        return [
            {name: value[start : start + size] if torch.is_tensor(value) else value for name, value in inputs.items()}
            for start in range(0, count, size)
        ]  # fmt: skip
    bounds = inputs["cu_seq_lens_q"].tolist()
    # ends of the parts: the document bounds nearest to even shares
    ends = [0]
    for i in range(1, parts):
        wanted = bounds[-1] * i / parts
        nearest = min(range(len(bounds)), key=lambda place: abs(bounds[place] - wanted))
        if nearest > ends[-1]:
            ends.append(nearest)
    if ends[-1] < count:
        ends.append(count)
    return [_documents_between(inputs, bounds, first, last) for first, last in zip(ends, ends[1:])]


def _documents_between(inputs: Inputs, bounds: list[int], first: int, last: int) -> Inputs:
    start, stop = bounds[first], bounds[last]
    part = {
        name: value[:, start:stop] if torch.is_tensor(value) and value.dim() == 2 else value
        for name, value in inputs.items()
    }
    own = inputs["cu_seq_lens_q"][first : last + 1] - start
    longest = max(after - before for before, after in zip(bounds[first:last], bounds[first + 1 : last + 1]))
    for side in "qk":
        if f"cu_seq_lens_{side}" in inputs:
            part[f"cu_seq_lens_{side}"] = own
        if f"max_length_{side}" in inputs:
            part[f"max_length_{side}"] = longest
    return part


def _documents(inputs: Inputs) -> int:
    bounds = inputs.get("cu_seq_lens_q")
    return len(bounds) - 1 if bounds is not None else len(inputs["input_ids"])


def _longest(inputs: Inputs) -> int:
    return int(inputs.get("max_length_q") or inputs["input_ids"].shape[1])
