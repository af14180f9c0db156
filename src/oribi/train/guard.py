"""What stops a run that cannot succeed: a loss or gradient that is no number, and data with nothing to learn.

A step whose gradients are not finite changes no weight. The guard then finds the rows and the module behind it by running
the batches since the last log again; `save.finite` keeps such values out of every file.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from oribi.errors import DataError, TrainingError
from oribi.models.unwrap import base_model
from oribi.save.trained import first_non_finite
from oribi.train.context import shares_rows
from oribi.train.shards import in_lockstep

logger = logging.getLogger(__name__)

KEPT_BATCHES = 64  # micro-batches that can be looked at again; token ids only, a few MiB
HISTORY = 50  # logs that a spike is compared with
FEWEST = 10  # logs before anything is called a spike
# a loss this many typical deviations, and this share, above its recent median; a norm this many times its median
DEVIATIONS, SHARE, NORM_RATIO = 8.0, 0.25, 10.0
# nats per token: near a loss of zero every batch with one hard answer is many deviations above
LEAST_JUMP = 0.1


class LossGuard(TrainerCallback):
    """Stops at a loss or gradient norm that is nan or infinite, naming rows and module, and warns of spikes.

    Args:
        rows: the prepared data set that batches come from, to name rows by; None names none.
        decode: token ids -> text, for the message.
        scaled: whether a gradient scaler is at work, whose overflows are ordinary.
        searches: whether the rows behind a bad value are looked for; a loss that compares rows has none that can run alone.
        agree: gives each process what all of them found, which all ask at the same time.
    """

    def __init__(
        self,
        rows: Any = None,
        decode: Any = None,
        scaled: bool = False,
        searches: bool = True,
        agree: Callable[[Any], list[Any]] = lambda found: [found],
    ) -> None:
        self.agree = agree
        self.rows, self.decode, self.scaled, self.searches = rows, decode, scaled, searches
        self.batches: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT_BATCHES)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0

    def keep(self, step: int, inputs: dict[str, Any]) -> None:
        """Remember a micro-batch until the next log."""
        self.batches.append((step, inputs))

    def require_norm(self, norm: Any, step: int, model: nn.Module, args: TrainingArguments) -> None:
        """Before an optimizer that would write a bad gradient into the weights: stop if the norm is not finite."""
        if not self.scaled and norm is not None and not math.isfinite(float(norm)):
            raise self._error(f"the gradient norm is {float(norm)}", step, model, args)

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        skipped = int(getattr(getattr(optimizer, "optimizer", optimizer), "skipped_steps", 0))
        fresh, self.skipped = skipped - self.skipped, skipped
        if not math.isfinite(loss):
            raise self._error(f"the loss is {loss}", state.global_step, model, args)
        if not self.scaled and (fresh > 0 or not math.isfinite(norm)):
            bad_norm = f"the gradient norm is {norm}"
            what = f"{fresh} gradients were not finite" if math.isfinite(norm) else bad_norm
            raise self._error(what, state.global_step, model, args)
        self._warn_of_spikes(state.global_step, loss, norm)
        self.batches.clear()

    def _warn_of_spikes(self, step: int, loss: float, norm: float) -> None:
        usual = median(self.losses) if self.losses else loss
        deviation = median(abs(x - usual) for x in self.losses) if self.losses else 0.0
        if len(self.losses) >= FEWEST and loss - usual > max(
            DEVIATIONS * deviation, SHARE * abs(usual), LEAST_JUMP
        ):
            logger.warning(
                "step %d: the loss jumped to %.4f from about %.4f; if it does not recover, lower learning_rate",
                step, loss, usual,
            )  # fmt: skip
        usual = median(self.norms) if self.norms else norm
        if len(self.norms) >= FEWEST and norm > NORM_RATIO * usual > 0:
            logger.warning("step %d: the gradient norm jumped to %.3g from about %.3g", step, norm, usual)
        self.losses.append(loss)
        if math.isfinite(norm):
            self.norms.append(norm)

    def _error(self, what: str, step: int, model: nn.Module, args: TrainingArguments) -> TrainingError:
        found = ""
        try:
            if model is not None:
                # all processes search among their own rows; the others wait for the one that runs longest
                every = self.agree(self._find(model))
                found = next((text for text, is_cause in every if is_cause), every[0][0])
        finally:
            self.batches.clear()
        return TrainingError(
            f"{what} at step {step}. {found} Lower learning_rate (now {args.learning_rate:g}), use more warmup_steps, "
            "or look at these rows; the last checkpoint is from before"
        )

    def _find(self, model: nn.Module) -> tuple[str, bool]:
        """What is behind a bad value, and whether it is a cause."""
        bad = first_non_finite(model)
        if bad is not None:
            return f"The weights of {bad} are no longer finite.", True
        if not self.searches:
            return "The loss compares rows, so no single one was searched for.", False
        if in_lockstep(model):
            return (
                "The row that caused it was not searched for: no process can run the sharded model alone.",
                False,
            )
        if shares_rows(base_model(model)):
            return (
                "The row that caused it was not searched for: processes share the rows, and none has a whole one.",
                False,
            )
        documents = 0
        for step, inputs in self.batches:
            for document in documents_of(inputs):
                documents += 1
                where = offending_module(model, document)
                if where is not None:
                    row = self._row(document["input_ids"])
                    return f"{row} of step {step} gives values that are not finite, first {where}.", True
        return (
            f"None of the {documents} documents since the last log gives such a value when run again alone.",
            False,
        )

    def _row(self, input_ids: torch.Tensor) -> str:
        """Which row of the data a document is, and how it begins."""
        ids = input_ids.flatten().tolist()
        begins = f" ({self.decode(ids[:24])!r} ...)" if self.decode is not None else ""
        if isinstance(self.rows, Dataset) and "input_ids" in self.rows.column_names:
            for index, row in enumerate(self.rows):
                start = place_of(row["input_ids"], ids)
                if start is not None:
                    origin = origin_at(row, start)
                    return f"Row {index} of the prepared data{f', {origin}' if origin else ''}{begins}"
        return f"A document{begins}"


def place_of(row: list[int], ids: list[int]) -> int | None:
    """Where these ids begin in a row or pack; None if it does not hold them."""
    places = range(len(row) - len(ids) + 1)
    return next((i for i in places if row[i] == ids[0] and row[i : i + len(ids)] == ids), None)


def origin_at(row: dict[str, Any], start: int) -> str | None:
    """Which row of the source the document at token `start` was, as file:line; None where that is not known."""
    if row.get("origins"):
        ends = accumulate(row["seq_lengths"])
        return next(origin for origin, end in zip(row["origins"], ends) if start < end)
    return row.get("origin") or None


def documents_of(inputs: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """The documents of a micro-batch apart: input_ids and labels [1, S] without padding."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if inputs.get("cu_seq_lens_q") is not None:
        bounds = inputs["cu_seq_lens_q"].tolist()
        for start, end in zip(bounds, bounds[1:]):
            if (labels[:, start:end] != -100).any():
                yield {"input_ids": ids[:, start:end], "labels": labels[:, start:end]}
        return
    mask = inputs.get("attention_mask")
    for row in range(len(ids)):
        real = slice(None) if mask is None else mask[row].bool()
        yield {"input_ids": ids[row, real][None], "labels": labels[row, real][None]}


def offending_module(model: nn.Module, document: dict[str, torch.Tensor]) -> str | None:
    """Where a document first gives a value that is not finite, forward or backward; None where all are finite."""
    found: list[str] = []
    names = {module: name.replace(".default", "") for name, module in model.named_modules() if name}

    def watch(module: nn.Module, args: tuple, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in tensors:
            if not torch.is_tensor(tensor) or not tensor.is_floating_point() or found:
                continue
            if not torch.isfinite(tensor).all():
                found.append(f"in the output of {names[module]}")
            elif tensor.requires_grad:
                tensor.register_hook(lambda grad, module=module: watch_gradient(grad, module))

    def watch_gradient(grad: torch.Tensor, module: nn.Module) -> None:
        if not found and not torch.isfinite(grad).all():
            found.append(f"in the gradient of {names[module]}'s output")

    # a module with children says nothing that its last child did not say, but residual sums and fused parts do
    hooks = [module.register_forward_hook(watch) for module in names]
    before = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    training = model.training
    try:
        for p, _ in before:
            p.grad = None
        model.eval()  # noise on the embeddings is not this document's
        loss = model(**document, use_cache=False).loss
        if not found and not torch.isfinite(loss).all():
            found.append("in the loss")
        if not found:
            loss.backward()
            bad = next(
                (
                    n
                    for n, p in model.named_parameters()
                    if p.grad is not None and not p.grad.isfinite().all()
                ),
                None,
            )
            if bad is not None and not found:
                found.append(f"in the gradient of {bad}")
    finally:
        for hook in hooks:
            hook.remove()
        for p, grad in before:
            p.grad = grad
        model.train(training)
    return found[0] if found else None


def require_targets(dataset: Any, name: str) -> None:
    """Stop if no token of a prepared data set would be trained.

    Args:
        dataset: rows of input_ids and labels; streams and data sets without labels are not looked at.
        name: what to call it in the message.

    Raises:
        DataError: it has no rows, or every label is -100.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return
    if len(dataset) == 0:
        raise DataError(f"the {name} data has no rows left after preparation")
    # the first label of a row predicts nothing: no token stands before it
    if not any(label != -100 for row in dataset for label in row["labels"][1:]):
        raise DataError(
            f"no token of the {name} data would be trained: all labels of its {len(dataset)} rows are -100. Check that "
            "the answers are not cut off by max_length, and the markers given to train_on_responses_only"
        )
