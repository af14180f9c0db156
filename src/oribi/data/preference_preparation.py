"""One pass over rows of preferences: render each prompt with each of its answers, encode, cut and count.

What is trained of an answer, and where it ends, is what supervised fine-tuning would train of it: both go through the same
template, masks and encoder.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import pyarrow as pa

from oribi.chat.conversation import Conversation, with_known_roles
from oribi.chat.ends import added_tokens
from oribi.chat.masking import Marked
from oribi.data.converters import Document
from oribi.data.encoding import UNTRAINED, Encoded
from oribi.data.preference_columns import IDS, TEXT, array_of, feature_of
from oribi.data.preference_rows import (
    STAGES,
    Preference,
    PreferenceFormat,
    recognise_preference,
)
from oribi.data.preparation import Preparation, Settings
from oribi.data.report import DataReport, named, percentiles
from oribi.data.rows import safely, tokenised
from oribi.data.sources import Part
from oribi.errors import ConfigError, DataError
from oribi.text import one_of

LENGTH_BIAS = 0.9  # share of pairs whose chosen answer is longer, above which length alone tells them apart


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


class PreferencePreparation(Preparation):
    """One pass over the parts of a source of preferences, judged answers or prompts."""

    def __init__(self, parts: list[Part], tokenizer: Any, settings: Settings, *others: Any) -> None:
        stage = self.stage = settings.stage
        if stage not in STAGES:
            raise ConfigError(f"stage = {stage}: {one_of(stage, ('sft', *STAGES))}")
        if settings.overlong == "split":
            raise ConfigError(
                f"overlong = 'split': stage {stage} compares whole answers; take truncate, drop or error"
            )
        formatting_func, announce = others
        if formatting_func is not None:
            raise ConfigError(
                f"formatting_func makes one text of a row, but stage {stage} needs its prompt and answers apart"
            )
        self.added = added_tokens(tokenizer)
        answers_only = replace(settings, train_on="responses", completion_only=None, turns="whole")
        super().__init__(parts, tokenizer, answers_only, None, announce)
        self._ignored = [
            f"{key} has no effect: stage {stage} trains on answers, and never on prompts"
            for key, is_set in (
                ("train_on_responses_only", settings.train_on == "everything"),
                ("turns", settings.turns != "whole"),
            )
            if is_set
        ]
        self._lengths = {name: Counter() for name in ("prompt", *self.answer_names)}
        self._shared: Counter[int] = Counter()
        self._longer = self._equally_long = 0
        self._labels: Counter[bool] = Counter()
        self._seen: set[bytes] = set()
        self._features: datasets.Features | None = None
        self._has_margins = False
        self._kept: dict[str, None] = {}

    def _new_report(self) -> DataReport:
        report = super()._new_report()
        report.stage = self.stage
        return report

    @property
    def answer_names(self) -> tuple[str, ...]:
        """What the answers of a row are called."""
        return {"kto": ("completion",), "grpo": ()}.get(self.stage, ("chosen", "rejected"))

    def _recognise(self, part: Part, row: Mapping[str, Any]) -> PreferenceFormat:
        found = recognise_preference(
            row,
            self.stage,
            is_rendered=self._is_rendered,
            has_template=bool(self.tokenizer.chat_template),
            text_field=part.text_field or self.settings.text_field,
            columns=part.columns or self.settings.columns,
            role_aliases=self.settings.role_aliases,
        )
        self._has_margins |= found.has_margin
        return found

    def _is_rendered(self, text: str) -> bool:
        """Whether a text holds tokens that open or close turns, so that a chat template has been applied to it."""
        return bool(self.added and self.added.search(text))

    def _split_turns(self, examples: Iterator[Any]) -> Iterator[Any]:
        """Of stage kto, two rows for a pair: one per answer."""
        for origin, example in examples:
            if self.stage != "kto" or isinstance(example, DataError) or len(example.answers) == 1:
                yield origin, example
                continue
            for answer, label in zip(example.answers, (True, False)):
                notes = example.notes if label else []
                yield origin, Preference([answer], label, unused=example.unused, notes=notes)

    def _encode(self, batch: list[tuple[str, Any]]) -> list[tuple[str, Ranked]]:
        """The usable rows of a batch in tokens; the others are complained about."""
        self.report.rows_in += len(batch)
        found: list[Any] = [self._mark_row(origin, example) for origin, example in batch]
        flat, plain = [], []
        for (_, example), marks in zip(batch, found):
            if not isinstance(marks, DataError):
                flat += marks
                plain += [isinstance(one, Document) for one in example.answers]
        encoded = iter(tokenised(self.encoder, flat, plain))
        for place, ((origin, example), marks) in enumerate(zip(batch, found)):
            if isinstance(marks, DataError):
                continue
            ids = [next(encoded) for _ in marks]
            failed = next((one for one in ids if isinstance(one, DataError)), None)
            try:
                found[place] = failed or self._ranked(origin, example, marks, ids)
            except DataError as error:
                found[place] = error
        rows = [(origin, one) for (origin, _), one in zip(batch, found)]
        self._complain([(origin, one) for origin, one in rows if isinstance(one, DataError)])
        return [(origin, one) for origin, one in rows if isinstance(one, Ranked)]

    def _mark_row(self, origin: str, example: Any) -> list[Marked] | DataError:
        """The texts of a row with the spans of their answers, or what is wrong with it."""
        if isinstance(example, DataError):
            return example
        try:
            marks = [safely("rendering the row", self._mark_answer, one, origin) for one in example.answers]
            self._remark(example, origin)
        except DataError as error:
            return error
        return marks

    def _mark_answer(self, example: Conversation | Document, origin: str) -> Marked:
        if self.stage != "grpo":
            return self._mark(self._closed(example, origin), origin)
        if isinstance(example, Document):
            return Marked(example.text, [], closed=True)
        template = self.masker.template
        known, notes = with_known_roles(example, template.writes_role)
        example.messages = template.adapt(known.messages)
        self.tally.note_all(notes, origin)
        return Marked(template.render(example.messages, add_generation_prompt=True), [], closed=True)

    def _closed(self, example: Conversation | Document, origin: str) -> Conversation | Document:
        """A rendered text ends where its answer's turn does; other plain texts end with EOS."""
        if not (
            isinstance(example, Document)
            and self.tokenizer.chat_template
            and self._is_rendered(example.text[: example.trained_from])
        ):
            return example
        end, answer = self.masker.template.turn_ends[1], example.text[example.trained_from :]
        if self.encoder.is_closed(answer):
            answer = answer.rstrip()
        elif end:
            answer += end
            self.tally.note(
                f"an answer to a rendered prompt does not end its turn; {end!r} is put behind it", origin
            )
        return replace(example, text=example.text[: example.trained_from] + answer)

    def _ranked(
        self, origin: str, example: Preference, marks: list[Marked], encoded: list[Encoded]
    ) -> Ranked:
        """The prompt and the answers of a row, apart.

        Raises:
            DataError: the prompt is not the same before both answers, the answers are, or there is none.
        """
        kept = {"label": example.label, "margin": example.margin, "kept": example.kept, "origin": origin}
        if self.stage == "grpo":
            one = example.answers[0]
            prompt = one.text if isinstance(one, Document) else one.messages
            return Ranked(encoded[0].ids, [], [marks[0].text], prompt=prompt, **kept)
        for mark, ids in zip(marks, encoded):
            if not mark.spans or all(label == UNTRAINED for label in ids.labels):
                raise DataError(
                    mark.untrained or "the chat template writes nothing of an answer; remove the row."
                )
        begin = min(mark.spans[0][0] for mark in marks)
        if len({mark.text[:begin] for mark in marks}) > 1:
            raise DataError(
                "the chat template writes the prompt differently before the chosen and before the rejected answer, so they cannot be "
                "compared. Take another template, or remove the row."
            )
        starts = [next(i for i, label in enumerate(e.labels) if label != UNTRAINED) for e in encoded]
        ends = [max(i for i, label in enumerate(e.labels) if label != UNTRAINED) + 1 for e in encoded]
        # the tokens of a plain prompt may depend on what follows: the answers begin where they differ
        shared = common_prefix(*(e.ids for e in encoded)) if len(encoded) > 1 else starts[0]
        start = min(*starts, shared) if len(encoded) > 1 else starts[0]
        answers = [e.ids[start:end] for e, end in zip(encoded, ends)]
        if len(answers) > 1 and answers[0] == answers[1]:
            raise DataError(
                "the chosen and the rejected answer are equal as the model reads them: remove the row."
            )
        prompt = marks[0].text[:begin]
        if self.encoder.prefix_ids and self.tokenizer.bos_token:
            prompt = prompt.removeprefix(
                self.tokenizer.bos_token
            )  # whoever tokenises the text gets it from the tokenizer
        texts = [prompt, *(self._answer_text(mark, begin) for mark in marks)]
        return Ranked(
            encoded[0].ids[:start], answers, texts, split_tokens=sum(e.split_tokens for e in encoded), **kept
        )

    def _answer_text(self, mark: Marked, begin: int) -> str:
        text = mark.text[begin : mark.spans[-1][1]]
        closed = mark.closed or self.encoder.is_closed(text) or not self.tokenizer.eos_token
        return text if closed else text + self.tokenizer.eos_token

    def count(self, origin: str, encoded: Ranked) -> list[Ranked]:
        """Apply the overlong policy to one row and count what is left of it."""
        report, limit = self.report, self.settings.max_seq_length
        self.tally.length(encoded.length)
        self.tally.note(
            "a token reaches from the prompt into the answer; it belongs to the prompt",
            origin,
            encoded.split_tokens,
        )
        if encoded.length > limit:
            report.rows_overlong += 1
            named(report.overlong_rows, f"{origin} ({encoded.length:,} tokens)")
            if self.settings.overlong == "drop" or self.stage == "grpo":
                self.tally.drop(origin, "too long")
                return []
            space = limit - len(encoded.prompt_ids)
            if space <= 0:
                self.tally.drop(origin, "its answers lie beyond max_seq_length")
                return []
            cut = [ids[:space] for ids in encoded.answers]
            if len(cut) > 1 and cut[0] == cut[1]:
                self.tally.drop(origin, "its answers are equal up to max_seq_length")
                return []
            report.tokens_cut += sum(len(a) - len(b) for a, b in zip(encoded.answers, cut))
            report.rows_cut += 1
            encoded.answers = cut
        self._count_kept(origin, encoded)
        return [encoded]

    def _count_kept(self, origin: str, row: Ranked) -> None:
        report = self.report
        report.rows_kept += 1
        report.examples += 1
        prompt, lengths = len(row.prompt_ids), [len(ids) for ids in row.answers]
        report.tokens += sum(prompt + length for length in lengths or [0])
        for ids in row.answers:
            self.tally.trained([UNTRAINED, *ids])
        for name, length in zip(self._lengths, (prompt, *lengths)):
            self._lengths[name][length] += 1
        if len(lengths) > 1:
            self._longer += lengths[0] > lengths[1]
            self._equally_long += lengths[0] == lengths[1]
            self._shared[common_prefix(*row.answers)] += 1
        self._kept |= dict.fromkeys(row.kept)
        if row.label is not None:
            self._labels[row.label] += 1
        key = repr((row.prompt_ids, row.answers, row.label, row.kept)).encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if digest in self._seen:
            self.tally.note("a row repeats an earlier one", origin)
        self._seen.add(digest)

    def finish(self) -> None:
        """Close the report, and stop where there would be nothing to train on."""
        self._add_figures()
        super().finish()

    def _add_figures(self) -> None:
        report = self.report
        report.notes += self._ignored
        figures: dict[str, Any] = {name: percentiles(lengths) for name, lengths in self._lengths.items()}
        if pairs := self._shared.total():
            share = self._longer / pairs
            figures |= {
                "chosen_longer": round(share, 4),
                "equally_long": round(self._equally_long / pairs, 4),
                "shared_beginning": percentiles(self._shared),
            }
            if pairs >= 20 and share > LENGTH_BIAS:
                report.notes.append(
                    f"the chosen answer is the longer one in {100 * share:.0f} % of the pairs: the model would learn to write at "
                    "length. Add pairs whose shorter answer is better."
                )
        if self.stage == "kto":
            good, bad = self._labels[True], self._labels[False]
            figures |= {"desirable": good, "undesirable": bad}
            if report.rows_kept and not (good and bad):
                report.notes.append(
                    f"all {report.rows_kept:,} answers are labelled {'good' if good else 'bad'}: KTO learns from the difference and "
                    "needs both"
                )
        if self.stage == "grpo":
            figures["kept_columns"] = list(self._kept)
        report.preferences = figures

    @property
    def features(self) -> datasets.Features:
        """Of the prepared data set; those of stage grpo are known when all rows are read."""
        if self._features is not None:
            return self._features
        names = self.answer_names
        columns: dict[str, Any] = dict.fromkeys(("prompt", *names), TEXT)
        columns |= dict.fromkeys((() if self.stage == "reward" else ("prompt_ids",)), IDS)
        columns |= {f"{name}_ids": IDS for name in names}
        columns |= {"label": datasets.Value("bool")} if self.stage == "kto" else {}
        columns |= {"margin": datasets.Value("float32")} if self._has_margins else {}
        return datasets.Features({**columns, "origin": TEXT})

    def columns(self) -> Iterator[dict[str, pa.Array]]:
        """Batches of finished rows in the columns that the stage's trainer takes."""
        if self.stage == "grpo":
            yield from self._columns_with_kept([row for batch in self.batches() for row in batch])
            return
        for rows in self.batches():
            odd = next((row for row in rows if (row.margin is not None) != self._has_margins), None)
            if odd is not None:
                raise DataError(
                    f"{odd.origin}: some rows have a 'margin' and others have none: give all of them one, or none."
                )
            values = {
                name: [row.texts[i] for row in rows] for i, name in enumerate(("prompt", *self.answer_names))
            }
            values["prompt_ids"] = [row.prompt_ids for row in rows]
            for i, name in enumerate(self.answer_names):
                whole = self.stage == "reward"  # a score is of the prompt with its answer
                values[f"{name}_ids"] = [(row.prompt_ids if whole else []) + row.answers[i] for row in rows]
            values |= {name: [getattr(row, name) for row in rows] for name in ("label", "margin", "origin")}
            schema = self.features.arrow_schema
            yield {field.name: pa.array(values[field.name], type=field.type) for field in schema}

    def _columns_with_kept(self, rows: list[Ranked]) -> Iterator[dict[str, pa.Array]]:
        """All prompts, with the columns for reward functions under their own names."""
        if not rows:
            return
        kinds = {isinstance(row.prompt, str): row.origin for row in reversed(rows)}
        if len(kinds) > 1:
            raise DataError(
                f"{kinds[True]}: the prompt is text that a chat template was applied to, but in {kinds[False]} it is not: stage grpo "
                "needs one kind in all rows."
            )
        names = dict.fromkeys(name for row in rows for name in row.kept)
        values = {"prompt": [row.prompt for row in rows]}
        values |= {name: [row.kept.get(name) for row in rows] for name in names}
        for name in ("origin", "prompt_ids"):  # by which a message names the row, and batches are planned
            values.setdefault(name, [getattr(row, name) for row in rows])
        kinds = {name: IDS if name == "prompt_ids" else feature_of(column) for name, column in values.items()}
        self._features = datasets.Features(kinds)
        yield {name: array_of(column, kinds[name]) for name, column in values.items()}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
