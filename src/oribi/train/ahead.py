"""What the host does before the GPU needs it: batches of the next step, and the rows that the loss is computed on."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from oribi.train.batches import TRAINED_ROWS, labels_of
from oribi.train.position import PositionedTrainer


class AheadTrainer(PositionedTrainer):
    """transformers' `Trainer` that reads the next step's batches before it waits for a step's loss."""

    # labels on the device, the version of their values, and their trained rows; of each micro-batch of the step
    _trained_rows: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    _source: tuple[Iterator[Any], int, torch.device] | None = None
    _fetched: tuple[list, Any] | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        same = self._source is not None and self._source[0] is epoch_iterator
        fetched, self._fetched = self._fetched if same else None, None
        self._source = (epoch_iterator, num_batches, device)
        samples, targets = fetched or super().get_batch_samples(epoch_iterator, num_batches, device)
        self._trained_rows = []
        for batch in samples:
            # not left in the batch: whoever changes its labels changes these rows as well
            if isinstance(batch, MutableMapping) and TRAINED_ROWS in batch:
                labels = labels_of(batch)
                self._trained_rows.append((labels, labels._version, batch.pop(TRAINED_ROWS)))
        return samples, targets

    def trained_rows_of(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """[n] int64 rows of hidden states whose next token is trained; None where the labels are no longer the collator's."""
        labels = labels_of(inputs)
        for known, version, rows in self._trained_rows:
            if known is labels and known._version == version:
                return rows
        return None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._fetch_ahead()
        finally:
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _fetch_ahead(self) -> None:
        """Reads the next step's batches where the log of this one is going to wait for its loss.

        Not before a checkpoint or an evaluation: both must find the random numbers and the place in the data as they are.
        """
        control, left = self.control, self._batches_left
        if not left or control.should_training_stop or control.should_epoch_stop:
            self._source = None  # a loader's workers end with its iterator
        if self._source is None or control.should_evaluate or control.should_save or not control.should_log:
            return
        iterator, batches, device = self._source
        self._fetched = super().get_batch_samples(iterator, min(batches, left), device)

    @property
    def _batches_left(self) -> int:
        """Micro-batches left of a pass; 0 for a stream, which nobody reads further than a step needs."""
        position = self.position
        return 0 if position.batches is None else position.batches - position.read
