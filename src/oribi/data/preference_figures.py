"""Prompts with their answers in tokens, and the figures of a report on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oribi.data.report import percentiles

LENGTH_BIAS = 0.9  # share of pairs whose chosen answer is longer, above which length alone tells them apart
LEAST_PAIRS = 20  # from which on that share says something


@dataclass(slots=True)
class Ranked:
    """A prompt and its answers in tokens: the better and the worse one, the only one, or none.

    `texts` are the prompt and the answers as text; joined to the prompt's, an answer gives the whole. `cut` are the tokens by
    which each answer was shortened.
    """

    prompt_ids: list[int]
    answers: list[list[int]]
    texts: list[str]
    label: bool | None = None
    margin: float | None = None
    prompt: Any = None  # of grpo, as its trainer takes it
    kept: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    split_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longest answer."""
        return len(self.prompt_ids) + max(map(len, self.answers), default=0)


class Figures:
    """Counts rows of one stage; `answers` is what each answer of a row is called."""

    def __init__(self, stage: str, answers: Sequence[str]) -> None:
        self.stage = stage
        self.lengths: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", *answers)}
        self.shared: Counter[int] = Counter()  # tokens that both answers begin with
        self.longer = self.equally_long = 0
        self.labels: Counter[bool] = Counter()
        self.kept: dict[str, None] = {}
        self._seen: set[bytes] = set()

    def count(self, row: Ranked) -> bool:
        """Count a row; returns whether it repeats an earlier one."""
        lengths = [len(ids) for ids in row.answers]
        for counter, length in zip(self.lengths.values(), (len(row.prompt_ids), *lengths)):
            counter[length] += 1
        if len(lengths) > 1:
            self.longer += lengths[0] > lengths[1]
            self.equally_long += lengths[0] == lengths[1]
            self.shared[common_prefix(*row.answers)] += 1
        self.kept |= dict.fromkeys(row.kept)
        if row.label is not None:
            self.labels[row.label] += 1
        key = repr((row.prompt_ids, row.answers, row.label, row.kept)).encode(errors="replace")
        digest = hashlib.blake2b(key, digest_size=16).digest()
        repeats = digest in self._seen
        self._seen.add(digest)
        return repeats

    def finish(self) -> tuple[dict[str, Any], list[str]]:
        """The figures, and what is to be said about them."""
        figures: dict[str, Any] = {name: percentiles(lengths) for name, lengths in self.lengths.items()}
        notes = []
        if pairs := self.shared.total():
            share = self.longer / pairs
            figures |= {
                "chosen_longer": round(share, 4),
                "equally_long": round(self.equally_long / pairs, 4),
                "shared_beginning": percentiles(self.shared),
            }
            if pairs >= LEAST_PAIRS and share > LENGTH_BIAS:
                notes.append(
                    f"the chosen answer is the longer one in {100 * share:.0f} % of the pairs: the model would learn to write at "
                    "length. Add pairs whose shorter answer is better."
                )
        if self.stage == "kto":
            good, bad = self.labels[True], self.labels[False]
            figures |= {"desirable": good, "undesirable": bad}
            if not (good and bad):
                notes.append(
                    f"all {good + bad:,} answers are labelled {'good' if good else 'bad'}: KTO learns from the difference and needs "
                    "both"
                )
        if self.stage == "grpo":
            figures["kept_columns"] = list(self.kept)
        return figures, notes


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
