"""Examples to batches. T: tokens of a batch, B: rows, S: longest row.

PackCollator lays documents end to end, without padding; PaddedCollator is for models that cannot take that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oribi.data.encoding import UNTRAINED
from oribi.errors import DataError

Batch = dict[str, Any]


@dataclass
class PackCollator:
    """Lays all documents of its examples end to end in one row.

    Args:
        tokens: constant T; the rest is filled with one document of pad tokens that trains nothing. None: no padding.
        pad_to_multiple_of: round T up to a multiple, where `tokens` is not given.
        pad_token_id: what the padding document consists of; any id does, it is never trained.
    """

    tokens: int | None = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate examples (one document each) or packs (with seq_lengths).

        Returns:
            input_ids, labels, position_ids [1, T] int64 (the first label of each document is -100: nothing predicts it; positions
            start anew in each), cu_seq_lens_q, cu_seq_lens_k [documents + 1] int32, max_length_q, max_length_k int.

        Raises:
            DataError: more tokens than T.
        """
        ids, labels, lengths = [], [], []
        for example in examples:
            ids.extend(example["input_ids"])
            labels.extend(example["labels"])
            lengths.extend(example.get("seq_lengths") or [len(example["input_ids"])])
        target = self.tokens
        if target is None and self.pad_to_multiple_of:
            target = -(-len(ids) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if target is not None and len(ids) > target:
            raise DataError(
                f"a batch has {len(ids):,} tokens, more than the constant {target:,}: raise tokens or pack smaller."
            )
        if target is not None and len(ids) < target:
            lengths.append(target - len(ids))
            labels += [UNTRAINED] * lengths[-1]
            ids += [self.pad_token_id] * lengths[-1]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        labels = torch.tensor(labels)
        labels[ends[:-1]] = UNTRAINED
        positions = torch.arange(len(ids)) - ends[:-1].repeat_interleave(torch.tensor(lengths))
        bounds, longest = ends.to(torch.int32), max(lengths)
        return {
            "input_ids": torch.tensor(ids)[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass
class PaddedCollator:
    """Pads rows to the longest one. What is padding is told by position, not by id: an EOS that is also the pad token stays trained.

    Args:
        pad_token_id: fills input_ids.
        padding_side: "right" or "left".
        pad_to_multiple_of: round S up to a multiple.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Returns: input_ids, labels, attention_mask [B, S] int64; labels are not shifted, -100 in the padding."""
        if any(len(example.get("seq_lengths") or ()) > 1 for example in examples):
            raise DataError(
                "PaddedCollator got packs: padding rows cannot keep their documents apart. Use PackCollator."
            )
        longest = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(examples), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, UNTRAINED),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            place = slice(longest - length, longest) if self.padding_side == "left" else slice(0, length)
            batch["input_ids"][row, place] = torch.tensor(example["input_ids"])
            batch["labels"][row, place] = torch.tensor(example["labels"])
            batch["attention_mask"][row, place] = 1
        return batch
