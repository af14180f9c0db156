"""One pass over rows of preferences: render each prompt with each of its answers, encode, cut and count.

What is trained of an answer, and where it ends, is what supervised fine-tuning would train of it: both go through the same
template, masks and encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import datasets
import pyarrow as pa

from oribi.chat.conversation import Conversation, with_known_roles
from oribi.chat.ends import added_tokens
from oribi.chat.masking import Marked
from oribi.chat.template import slot
from oribi.data.converters import Document
from oribi.data.encoding import UNTRAINED, Encoded
from oribi.data.preference_columns import IDS, TEXT, array_of, feature_of
from oribi.data.preference_figures import Figures, Ranked, common_prefix
from oribi.data.preference_rows import (
    STAGES,
    Preference,
    PreferenceFormat,
    recognise_preference,
)
from oribi.data.preparation import Preparation, Settings
from oribi.data.report import DataReport, named
from oribi.data.rows import safely, tokenised
from oribi.data.sources import Part
from oribi.errors import ConfigError, DataError
from oribi.text import one_of

NOTHING = "the chat template writes nothing of an answer, such as one of tool calls alone: take a template that does, or remove the row."


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
        self._figures = Figures(self.stage, self.answer_names)
        self._features: datasets.Features | None = None
        self._has_margins = False
        self._prompt_end: str | None = (
            None  # what the chat template writes behind a question, for the answer to begin
        )
        self._turn_tokens: set[str] = set()

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
            role_aliases=part.role_aliases or self.settings.role_aliases,
        )
        self._has_margins |= found.has_margin
        return found

    def _is_rendered(self, text: str) -> bool:
        """Whether the chat template has been applied to a text: it ends as a generation prompt does, or holds its tokens."""
        if not self.tokenizer.chat_template:
            return False
        if self._prompt_end is None:
            asked = [{"role": "user", "content": slot(0)}]
            written = self.masker.template.render(asked, add_generation_prompt=True)
            unsaid = {self.tokenizer.bos_token, self.tokenizer.eos_token} - set(self.masker.template.ends)
            self._turn_tokens = (
                {t.group() for t in self.added.finditer(written)} - unsaid if self.added else set()
            )
            self._prompt_end = written.rpartition(slot(0))[2].strip()
        ends = bool(self._prompt_end) and text.rstrip().endswith(self._prompt_end)
        return ends or any(token in text for token in self._turn_tokens)

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
        """The example whose answer ends its turn once: neither written by the row and the template, nor by none of them."""
        if isinstance(example, Conversation):
            return self._without_end(example, origin)
        prompt, answer = example.text[: example.trained_from], example.text[example.trained_from :]
        if not self._is_rendered(prompt):
            return example
        self.tally.note("a prompt holds the chat template's own text, so it is used as it is", origin)
        end = self.masker.template.turn_ends[1]
        if self.encoder.is_closed(answer):
            answer = answer.rstrip()
        elif end:
            answer += end
            self.tally.note(
                f"an answer to such a prompt does not end its turn; {end!r} is put behind it", origin
            )
        return replace(example, text=prompt + answer)

    def _without_end(self, conversation: Conversation, origin: str) -> Conversation:
        *before, last = conversation.messages
        said = last["content"].rstrip()
        ends = [*self.masker.template.ends, self.tokenizer.eos_token or ""]
        end = next((e.strip() for e in ends if e.strip() and said.endswith(e.strip())), None)
        if end is None:
            return conversation
        self.tally.note(
            f"an answer ends with {end!r}, which the chat template writes; it is written once", origin
        )
        said = said.removesuffix(end)
        if not said.strip():
            raise DataError(f"an answer holds nothing but {end!r}: remove the row.")
        return replace(conversation, messages=[*before, {**last, "content": said}])

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
                raise DataError(mark.untrained or NOTHING)
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
        self.tally.note("a row repeats an earlier one", origin, self._figures.count(row))

    def finish(self) -> None:
        """Close the report, and stop where there would be nothing to train on."""
        report = self.report
        report.preferences, notes = self._figures.finish()
        report.notes += self._ignored + (notes if report.rows_kept else [])
        super().finish()

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
        yield {name: array_of(column, kinds[name], name) for name, column in values.items()}
