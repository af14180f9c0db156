"""Rows of a run's data as its model sees them, a page at a time."""

from itertools import islice
from typing import Any

from oribi.config import RunConfig
from oribi.data.prepare import make_preparation
from oribi.data.view import RowView, view_of
from oribi.preflight import tokenizer_of

MOST_ROWS = 5000  # that are kept; nobody turns over more pages


class RunRows:
    """The training rows of a run in the order of its files, those that were held out among them.

    Args:
        config: of the run.

    Raises:
        OribiError: the tokenizer or a source cannot be opened.
    """

    def __init__(self, config: RunConfig) -> None:
        self.stage = config.stage
        self._preparation = make_preparation(
            config.sources(), tokenizer_of(config), announce=None, **config.row_settings()
        )
        self._batches = self._preparation.encoded()
        self._read: list[tuple[str, Any]] = []
        self.has_more = True

    def page(self, start: int, count: int) -> list[RowView]:
        """Views of rows from a place on, as many as there are.

        Raises:
            DataError: a row before the end of the page cannot be used.
        """
        return [view_of(self._preparation, origin, encoded) for origin, encoded in self._rows(start, count)]

    def tokens(self, start: int, count: int) -> list[dict[str, Any]]:
        """origin, input_ids and labels of the same rows, cut to the run's limit; none for a stage that compares answers."""
        if self.stage != "sft":
            return []
        limit = self._preparation.settings.max_seq_length
        return [
            {"origin": origin, "input_ids": list(one.ids[:limit]), "labels": list(one.labels[:limit])}
            for origin, one in self._rows(start, count)
        ]

    def _rows(self, start: int, count: int) -> list[tuple[str, Any]]:
        end = min(start + count, MOST_ROWS)
        while len(self._read) < end and self.has_more:
            batch = next(self._batches, None)
            self.has_more = batch is not None
            self._read += batch or []
        return list(islice(self._read, start, end))
