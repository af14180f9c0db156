"""The report on a prepared data set: counts, lengths, rows that were cut or dropped or train nothing, and notes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oribi.chat.ends import end_id
from oribi.data.encoding import UNTRAINED, without_lone_surrogates
from oribi.text import write_whole

SHOWN_ROWS = 20  # rows named in a report; the counts are of all


@dataclass
class DataReport:
    """Figures of one prepared data set. Lengths are in tokens, before any cut."""

    source: str
    format: str = ""
    max_seq_length: int = 0
    overlong: str = "truncate"
    rows_in: int = 0
    rows_kept: int = 0
    rows_overlong: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    rows_malformed: int = 0
    rows_untrained: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    tokens_cut: int = 0
    length_percentiles: dict[str, int] = field(default_factory=dict)
    overlong_rows: list[str] = field(default_factory=list)
    dropped_rows: list[str] = field(default_factory=list)
    malformed_rows: list[str] = field(default_factory=list)
    untrained_rows: list[str] = field(default_factory=list)
    end_tokens: dict[str, int] = field(default_factory=dict)  # token that ends a turn -> times trained
    end_token_ids: list[int] = field(default_factory=list)  # for generation_config.eos_token_id
    mask_sources: dict[str, int] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    unused_message_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stage: str = "sft"
    preferences: dict[str, Any] = field(
        default_factory=dict
    )  # figures of the stages that compare or score answers
    first_row: str = ""
    seconds: float = 0.0
    from_cache: bool = False

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> DataReport:
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    def unused(self) -> dict[str, list[str]]:
        """Columns and keys of messages that nothing was read from."""
        return {
            "columns not used": [name or "one without a name" for name in self.unused_columns],
            "keys of messages not used": self.unused_message_keys,
        }

    def __str__(self) -> str:
        share = 100 * self.trained_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"data: {self.source}" + (" (from the cache)" if self.from_cache else ""),
            f"  format    {self.format}",
            f"  rows      {self.rows_in:,} in, {self.rows_kept:,} kept, {self.rows_cut:,} cut, {self.rows_dropped:,} dropped"
            f" -> {self.examples:,} examples",
            f"  tokens    {self.tokens:,}"
            + (
                f", of which {self.trained_tokens:,} trained ({share:.1f} %)"
                if self.stage != "grpo"
                else " of prompts"
            )
            + (f"; {self.tokens_cut:,} cut off" if self.tokens_cut else ""),
        ]
        if self.length_percentiles:
            lengths = ", ".join(f"{name} {value:,}" for name, value in self.length_percentiles.items())
            lines.append(f"  lengths   {lengths}; max_seq_length {self.max_seq_length:,}")
        lines += self._compared()
        if self.end_tokens:
            ends = ", ".join(f"{token!r} {count:,} times" for token, count in self.end_tokens.items())
            lines.append(f"  turn end  trained: {ends}")
        lines += [f"  {what}: {', '.join(names)}" for what, names in self.unused().items() if names]
        for name, count, rows in (
            (f"above max_seq_length ({self.overlong})", self.rows_overlong, self.overlong_rows),
            ("dropped", self.rows_dropped, self.dropped_rows),
        ):
            if count:
                lines.append(f"  {name}: {count:,} rows: {some_of(rows, count)}")
        if self.rows_malformed:
            lines.append(f"  malformed: {self.rows_malformed:,} rows, left out:")
            lines += [f"    {row}" for row in self.malformed_rows[:5]]
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  prepared in {self.seconds:.1f} s")
        return "\n".join(lines)

    def _compared(self) -> list[str]:
        """Lines on prompts and answers, of the stages that compare or score answers."""
        found = self.preferences
        lines = [
            f"  {said:<9} {', '.join(f'{place} {value:,}' for place, value in found[name].items())} tokens"
            for name, said in (
                ("prompt", "prompt"),
                ("chosen", "chosen"),
                ("rejected", "rejected"),
                ("completion", "answer"),
            )
            if found.get(name) and self.stage != "grpo"
        ]
        if "chosen_longer" in found:
            alike = found["shared_beginning"]
            lines.append(
                f"  pairs     chosen longer in {100 * found['chosen_longer']:.1f} %, equally long in "
                f"{100 * found['equally_long']:.1f} %; answers begin alike for p50 {alike['p50']:,}, max {alike['max']:,} tokens"
            )
        if "desirable" in found:
            lines.append(f"  labels    {found['desirable']:,} good, {found['undesirable']:,} bad")
        if found.get("kept_columns"):
            lines.append(f"  columns   for reward functions: {', '.join(found['kept_columns'])}")
        return lines


class Tally:
    """Counts while rows pass through, and makes the report."""

    def __init__(self, report: DataReport) -> None:
        self.report = report
        self.lengths: Counter[int] = Counter()
        self.trained_ids: Counter[int] = Counter()
        self.noted: Counter[str] = Counter()
        self.noted_first: dict[str, str] = {}

    def length(self, tokens: int) -> None:
        self.lengths[tokens] += 1

    def note(self, what: str, origin: str, count: int = 1) -> None:
        """Count something worth a line in the report; the first row is named."""
        if count:
            self.noted[what] += count
            self.noted_first.setdefault(what, origin)

    def note_all(self, notes: Iterable[str], origin: str) -> None:
        """Count each of several notes about a row."""
        for what, count in Counter(notes).items():
            self.note(what, origin, count)

    def unused(self, columns: Iterable[str], message_keys: Iterable[str]) -> None:
        """Name columns and keys of messages that nothing was read from, each once."""
        for names, known in (
            (columns, self.report.unused_columns),
            (message_keys, self.report.unused_message_keys),
        ):
            shown = [without_lone_surrogates(str(name))[0] for name in names]
            known += [name for name in shown if name not in known]

    def trained(self, labels: list[int]) -> None:
        """Count the labels of an example; its first token is never predicted."""
        self.trained_ids.update(labels[1:])

    def drop(self, origin: str, reason: str) -> None:
        self.report.rows_dropped += 1
        named(self.report.dropped_rows, f"{origin} ({reason})")

    def finish(self) -> DataReport:
        report = self.report
        report.trained_tokens = self.trained_ids.total() - self.trained_ids[UNTRAINED]
        report.length_percentiles = percentiles(self.lengths)
        for what, count in self.noted.items():
            report.notes.append(f"{what}: {count:,} times, first in {self.noted_first[what]}")
        return report

    def name_ends(self, tokenizer: Any, ends: list[str]) -> None:
        """Say which token ends a turn, how often it was trained, and whether generation would stop at it.

        Args:
            tokenizer: gives the tokens.
            ends: the texts with which the chat template closes a turn.
        """
        report = self.report
        if not ends:
            report.notes.append(
                "the chat template writes nothing at the end of a turn; EOS is added after the last one"
            )
            ends = [tokenizer.eos_token] if tokenizer.eos_token else []
        for end in ends:
            token = end_id(tokenizer, end)
            if token is None:
                report.notes.append(
                    f"turns end with {end!r}, which holds no token of its own: generation cannot stop at it. Add it to the "
                    "tokenizer (add_new_tokens) or choose another template."
                )
                continue
            report.end_token_ids.append(token)
            report.end_tokens[tokenizer.convert_ids_to_tokens(token)] = self.trained_ids[token]
        if report.end_tokens and not any(report.end_tokens.values()):
            report.notes.append(
                f"no end of a turn ({', '.join(map(repr, report.end_tokens))}) is trained: the model would not learn to stop. "
                "Raise max_seq_length."
            )
        if report.end_token_ids and tokenizer.eos_token_id not in report.end_token_ids:
            report.notes.append(
                f"turns end with {list(report.end_tokens)}, but the tokenizer's EOS is {tokenizer.eos_token!r}: put "
                f"{report.end_token_ids} into model.generation_config.eos_token_id."
            )


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Smallest, median, 90th, 99th percentile and largest length."""
    if not lengths:
        return {}
    values = np.array(sorted(lengths))
    cumulative = np.cumsum([lengths[v] for v in values.tolist()])
    places = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    total = int(cumulative[-1])
    return {
        name: int(values[np.searchsorted(cumulative, max(1, int(np.ceil(q * total))))])
        for name, q in places.items()
    }


def named(rows: list[str], origin: str) -> None:
    """Add a row to a list in the report, unless it is full."""
    if len(rows) < SHOWN_ROWS:
        rows.append(without_lone_surrogates(origin)[0])


def some_of(rows: list[str], count: int, shown: int = 5) -> str:
    """The first rows of a list, and how many more there are."""
    more = count - min(shown, len(rows))
    return ", ".join(rows[:shown]) + (f" and {more:,} more" if more > 0 else "")
