"""train_on_responses_only: mask everything but the answers in data that is tokenised already.

Only token ids are left at that point, so the answers are found by what the chat template writes around them: the header of an
answer, found by rendering, and the token that ends it. Texts are compared token by token, so it does not matter how the
tokenizer splits a marker in its context.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from oribi.chat.rendering import ChatTemplate
from oribi.chat.template import SLOT, shared_prefix, slot
from oribi.data.encoding import UNTRAINED
from oribi.errors import ConfigError, DataError
from oribi.text import say_notes

Batch = Mapping[str, list[Any]]  # columns of token rows


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before an answer, what before a question, and what ends an answer (nothing, if the template writes none).

    `prompts` are longer forms of `response` that a generation prompt may have, with the opening of a thought or an empty one.
    """

    response: str
    instruction: str
    ends: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Set the labels of a trainer's data sets to -100 outside the answers.

    A data set that was prepared from messages has exact labels already; they are kept, and only narrowed.

    Args:
        trainer: with train_dataset, eval_dataset (or a dict of them) and processing_class; None with return_function=True.
        instruction_part, response_part: the texts before a question and before an answer. Give both or neither; without them they
            are found by rendering the chat template.
        force_match: accepted for compatibility; markers are compared as text.
        tokenizer: instead of the trainer's.
        return_function: return the function batch -> {"labels"} instead of applying it.
        num_proc: passed to `datasets`' map.
        last_response_only: train the last answer of each row only.

    Returns:
        The trainer, or the function.

    Raises:
        ConfigError: one marker without the other, or a data set that is not tokenised yet.
        DataError: nothing would be trained, or the template's answers cannot be found in tokens.
    """
    tokenizer = tokenizer or getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("train_on_responses_only: give the tokenizer; the trainer has no processing_class.")
    if (instruction_part is None) != (response_part is None):
        raise ConfigError(
            "train_on_responses_only: give instruction_part and response_part, or neither of them."
        )
    if instruction_part is not None:
        template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        ends = template.ends if template else [tokenizer.eos_token] if tokenizer.eos_token else []
        markers = Markers(response_part, instruction_part, tuple(ends))
    else:
        markers = find_markers(tokenizer)
        shown = " or ".join(map(repr, markers.ends)) or "the next question"
        say_notes(
            [f"train_on_responses_only: answers begin after {markers.response!r} and end with {shown}."]
        )
    finder = Finder(tokenizer, markers)

    def labels_of(batch: Batch) -> dict[str, list[list[int]]]:
        return {"labels": finder.labels(batch, last_response_only)}

    if return_function:
        return labels_of

    def mask(dataset: Any) -> Any:
        return _mask(dataset, labels_of, finder, num_proc)

    trainer.train_dataset = mask(trainer.train_dataset)
    evaluation = getattr(trainer, "eval_dataset", None)
    if isinstance(evaluation, Mapping):
        trainer.eval_dataset = {name: mask(dataset) for name, dataset in evaluation.items()}
    elif evaluation is not None:
        trainer.eval_dataset = mask(evaluation)
    return trainer


def find_markers(tokenizer: Any) -> Markers:
    """The markers of a tokenizer's chat template, found by rendering and checked on an encoded conversation.

    Raises:
        DataError: the template has none that can be found again in the tokens.
    """
    template = ChatTemplate(tokenizer)
    user, answer = {"role": "user", "content": slot(0)}, {"role": "assistant", "content": slot(1)}
    again = {"role": "user", "content": slot(2)}
    opening, before, between, _ = SLOT.split(template.render([user, answer, again]))
    states = template.thinking_states
    asked = [SLOT.split(template.render([user], add_generation_prompt=True, **state))[-1] for state in states]
    question_end = SLOT.split(template.render([user]))[-1]
    header = shared_prefix(asked[0], before)
    skipped = len(question_end) if header.startswith(question_end) and len(header) > len(question_end) else 0
    response = header[skipped:]  # in [INST] formats, the end of the question is the beginning of the answer
    prompts = tuple(
        p[skipped:] for p in asked if p[skipped:].startswith(response) and p[skipped:] != response
    )
    after_end = next(
        (between[between.index(end) + len(end) :] for end in template.ends if end in between), between
    )
    instruction = after_end.strip() or opening.strip()
    if not response.strip() or not instruction:
        raise DataError(
            "train_on_responses_only: the chat template writes nothing before an answer or a question by which it could be "
            "found. Give instruction_part and response_part, or train on a data set of messages, which needs no markers."
        )
    markers = Markers(response.strip(" "), instruction, tuple(template.ends), prompts)
    _check(tokenizer, template, markers)
    return markers


def _check(tokenizer: Any, template: ChatTemplate, markers: Markers) -> None:
    """Encode a conversation of two turns and find both its answers by the markers."""
    words = ["What is it?", "It is this.", "And that?", "It is that."]
    messages = [{"role": r, "content": w} for r, w in zip(("user", "assistant") * 2, words)]
    ids = tokenizer(template.render(messages), add_special_tokens=False)["input_ids"]
    spans = Finder(tokenizer, markers).spans(ids)
    found = [tokenizer.decode(ids[a:b]) for a, b in spans]
    if len(found) != 2 or any(w not in f or u in f for w, u, f in zip(words[1::2], words[::2], found)):
        raise DataError(
            f"train_on_responses_only: answers should begin after {markers.response!r}, but in the tokens of a conversation they "
            f"were found as {found}. Give instruction_part and response_part, or train on a data set of messages."
        )


class Finder:
    """Finds answers in token ids.

    Compared are the tokens' own spellings put together, in which every tokenizer is consistent: a byte-level one spells a space
    as a letter of its own, a SentencePiece one as an underscore.
    """

    def __init__(self, tokenizer: Any, markers: Markers) -> None:
        self.tokenizer, self.markers = tokenizer, markers
        self._spellings: dict[int, str] = {}
        self.response, self.instruction = self._spell(markers.response), self._spell(markers.instruction)
        self.ends = [self._spell(end) for end in markers.ends]
        self.prompts = sorted((self._spell(prompt) for prompt in markers.prompts), key=len, reverse=True)

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Token spans of the answers, each with its end token."""
        pieces = [self._spelling(i) for i in ids]
        starts, text = [0], "".join(pieces)
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        spans, at = [], 0
        while (found := text.find(self.response, at)) >= 0:
            prompt = next((p for p in self.prompts if text.startswith(p, found)), self.response)
            begin = found + len(prompt)
            following = text.find(self.instruction, begin)
            following = len(text) if following < 0 else following
            ends = [e + len(end) for end in self.ends if 0 <= (e := text.find(end, begin)) < following]
            at = min(ends) if ends else following
            first, last = bisect_left(starts, begin), bisect_left(starts, at)
            if last > first:
                spans.append((first, min(last, len(ids))))
            at = max(at, begin)
        return spans

    def labels(self, batch: Batch, last_only: bool) -> list[list[int]]:
        """Labels of token rows: those they have, or their ids, within the answers (or the last one), and -100 elsewhere."""
        known = batch.get("labels") or batch["input_ids"]
        labels = []
        for ids, before in zip(batch["input_ids"], known):
            masked = [UNTRAINED] * len(ids)
            for first, last in self.spans(ids)[-1 if last_only else 0 :]:
                masked[first:last] = before[first:last]
            labels.append(masked)
        return labels

    def _spelling(self, token: int) -> str:
        if token not in self._spellings:
            self._spellings[token] = self.tokenizer.convert_ids_to_tokens(int(token)) or ""
        return self._spellings[token]

    def _spell(self, marker: str) -> str:
        ids = self.tokenizer(marker, add_special_tokens=False)["input_ids"]
        spelled = "".join(self._spelling(i) for i in ids)
        # SentencePiece begins every text with an underscore of its own
        return spelled[1:] if spelled.startswith("\u2581") and not marker.startswith(" ") else spelled


def _mask(dataset: Any, labels_of: Callable[[Batch], Any], finder: Finder, num_proc: int | None) -> Any:
    """A tokenised data set with the labels of its answers alone, without the rows that train nothing."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "input_ids" not in columns:
        raise ConfigError(
            f"train_on_responses_only: the data set has columns {columns}; it works on the tokenised data set of a trainer."
        )
    whole = isinstance(dataset, datasets.Dataset)
    options = {"batched": True, **({"num_proc": num_proc} if whole else {})}
    masked = dataset.map(labels_of, **options, **({"desc": "Masking all but the answers"} if whole else {}))
    kept = masked.filter(
        lambda batch: [any(label != UNTRAINED for label in labels[1:]) for labels in batch["labels"]],
        **options,
        **({"desc": "Leaving out rows without answers"} if whole else {}),
    )
    if not whole:
        return kept
    if len(kept) < len(masked):
        say_notes(
            [
                f"train_on_responses_only: {len(masked) - len(kept):,} of {len(masked):,} rows train nothing and are left out."
            ]
        )
    if not len(kept):
        start = finder.tokenizer.decode(dataset[0]["input_ids"][:120])
        raise DataError(
            f"train_on_responses_only: no token of {len(masked):,} rows would be trained; {finder.markers.response!r} was looked for as the "
            f"beginning of an answer. The first row begins {start!r}. Correct response_part, or raise max_seq_length if the rows were "
            "cut before the first answer."
        )
    return kept
