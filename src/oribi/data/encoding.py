"""Text and character spans to token ids and labels: whole texts in one pass of the tokenizer, BOS and EOS once each."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oribi.chat.conversation import Span
from oribi.chat.ends import added_tokens
from oribi.chat.masking import Marked
from oribi.chat.tokenizer import prefix_ids
from oribi.errors import DataError

UNTRAINED = -100

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class Encoded:
    """Token ids and labels (not shifted, -100 untrained) of one text."""

    ids: list[int]
    labels: list[int]
    split_tokens: int = 0  # tokens that reach from context into a trained span: not trained
    origin: str = ""  # the row it was, as file:line
    untrained: str = ""  # why nothing is trained, where that is known
    from_text_file: bool = False


def without_lone_surrogates(text: str) -> tuple[str, int]:
    """Text that can be encoded, and how many halves of surrogate pairs (an emoji cut in two) U+FFFD stands for."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        return LONE_SURROGATE.subn("\ufffd", text)


class Encoder:
    """Encodes texts with one tokenizer.

    Args:
        tokenizer: any transformers tokenizer; a fast one gives exact offsets in the same pass.
        append_eos: close plain text with the EOS token, where no token of the tokenizer's closes it already.
    """

    def __init__(self, tokenizer: Any, append_eos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.added = added_tokens(tokenizer)
        self.prefix_ids = prefix_ids(tokenizer)
        self.bos_added = 0

    def encode(self, marks: Sequence[Marked], plain: Sequence[bool]) -> list[Encoded]:
        """Encode a batch of texts with their trained spans.

        Args:
            marks: the texts, special tokens written out; where `closed` is False a trained EOS is added.
            plain: whether BOS is added silently (plain text) or counted in `bos_added` (a template that forgot it).
        """
        if not marks:
            return []
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        output = self.tokenizer(
            [mark.text for mark in marks],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=fast,
            verbose=False,
        )
        offsets = output["offset_mapping"] if fast else [None] * len(marks)
        return [self._one(*item) for item in zip(marks, output["input_ids"], offsets, plain)]

    def _one(self, mark: Marked, ids: list[int], offsets: list[Span] | None, plain: bool) -> Encoded:
        text, labels, split = mark.text, [UNTRAINED] * len(ids), 0
        for start, end in mark.spans:
            if offsets is None:
                first, last = self._token_at(text, ids, start), self._token_at(text, ids, end)
            else:
                # A token is trained where it begins within the span, space before it aside: the model can write it then.
                first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
                if first and start < offsets[first - 1][1]:
                    if text[offsets[first - 1][0] : start].isspace():
                        first -= 1
                    else:
                        split += 1
            labels[first:last] = ids[first:last]
        eos = self.tokenizer.eos_token_id
        if not mark.closed and self.append_eos and eos is not None and not self.is_closed(text):
            ids, labels = [*ids, eos], [*labels, eos]
        prefix = self.prefix_ids
        if prefix and mark.begins and ids[: len(prefix)] != prefix:
            self.bos_added += not plain
            ids, labels = prefix + ids, [UNTRAINED] * len(prefix) + labels
        return Encoded(ids, labels, split, untrained=mark.untrained)

    def is_closed(self, text: str) -> bool:
        """Whether a token such as <|im_end|> ends the text already, so that an EOS would be a second end."""
        if self.added is None:
            return False
        tail = text.rstrip()[-200:]
        return any(found.end() == len(tail) for found in self.added.finditer(tail))

    def _token_at(self, text: str, ids: list[int], at: int) -> int:
        """The number of tokens before character `at`, for tokenizers that tell no offsets."""
        before = self._ids([text[:at]], add_special_tokens=False)[0] if at else []
        if ids[: len(before)] != before:
            raise DataError(
                f"{type(self.tokenizer).__name__} tells no character offsets, and a token reaches over the boundary near "
                f"{text[max(0, at - 20) : at + 20]!r}. Use the fast version of this tokenizer (use_fast=True)."
            )
        return len(before)

    def _ids(self, texts: list[str], **kwargs: Any) -> list[list[int]]:
        return self.tokenizer(texts, return_attention_mask=False, verbose=False, **kwargs)["input_ids"]
