"""One pass over the rows of a source: recognise the format, render, mask, encode, cut and count."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from oribi.chat.conversation import Conversation
from oribi.chat.masking import TRAIN_ON, Marked, Masker, takes_all
from oribi.chat.named_templates import template_source
from oribi.chat.rendering import ChatTemplate
from oribi.data import columns as known
from oribi.data.conversations import RowFormat, recognise_format
from oribi.data.converters import Document, Example, Tokens
from oribi.data.encoding import UNTRAINED, Encoded, Encoder, without_lone_surrogates
from oribi.data.report import DataReport, Tally, named, some_of
from oribi.data.rows import examples_of, formatted, readable_rows, safely, tokenised
from oribi.data.sources import Part, interleave
from oribi.data.tool_calls import without_nested_nulls
from oribi.errors import ConfigError, DataError
from oribi.text import printable

CHOICES = {
    "train_on": TRAIN_ON, "overlong": ("error", "drop", "truncate", "split"), "turns": ("whole", "split"),
    "malformed": ("error", "drop"),
}  # fmt: skip
BATCH_ROWS = 512
_IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features({"input_ids": _IDS, "labels": _IDS, "origin": datasets.Value("string")})
PAIR_TEMPLATE = "alpaca"  # for base models, which have no chat template
PLAIN_PAIRS = (
    "prompt and completion are trained as plain text, joined without the chat template that `oribi chat` uses; for chat, name the "
    "columns question and answer"
)


@dataclass(frozen=True)
class Settings:
    """What changes the tokens that come out of a source; see prepare_dataset."""

    max_seq_length: int
    train_on: str = "responses"
    completion_only: bool | None = None
    overlong: str = "truncate"
    split_texts: bool = False  # text files are split whatever `overlong` says
    turns: str = "whole"
    malformed: str = "error"
    append_eos: bool = True
    text_field: str | None = None
    columns: Mapping[str, str] | None = None
    role_aliases: Mapping[str, str] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_rows: int | None = None
    stage: str = "sft"

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}"
            for name, allowed in CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 2:
            problems.append(f"max_seq_length = {self.max_seq_length!r} must be an integer of at least 2")
        if problems:
            raise ConfigError("data: " + "; ".join(problems))

    @property
    def shown_overlong(self) -> str:
        """The policy for long examples, as reports name it."""
        return self.overlong + (", text files split" if self.split_texts and self.overlong != "split" else "")

    def overlong_of(self, encoded: Encoded) -> str:
        """What happens to an example above max_seq_length."""
        return "split" if self.split_texts and encoded.from_text_file else self.overlong


class Preparation:
    """One pass over the parts of a source."""

    features = FEATURES  # of the prepared data set

    def __init__(
        self,
        parts: list[Part],
        tokenizer: Any,
        settings: Settings,
        formatting_func: Callable[[Any], Any] | None,
        announce: Callable[[str], None],
    ) -> None:
        self.parts, self.tokenizer, self.settings = parts, tokenizer, settings
        self.formatting_func, self.announce = formatting_func, announce
        self.encoder = Encoder(tokenizer, settings.append_eos)
        self.report = self._new_report()
        self.tally = Tally(self.report)
        self._masker: Masker | None = None
        self._said: set[tuple[str, str]] = set()
        self._pairs = True  # every row so far is a question and its answer
        self._borrowed = False  # the template is not the tokenizer's

    def _new_report(self) -> DataReport:
        return DataReport(
            source=" + ".join(part.name for part in self.parts),
            max_seq_length=self.settings.max_seq_length,
            overlong=self.settings.shown_overlong,
        )

    @property
    def masker(self) -> Masker:
        """Created for the first conversation, since plain text needs no chat template."""
        borrowed = not self.tokenizer.chat_template and self._pairs
        if self._masker is None or (self._borrowed and not borrowed):
            source = template_source(self.tokenizer, PAIR_TEMPLATE) if borrowed else None
            template = ChatTemplate(self.tokenizer, source, self.settings.chat_template_kwargs)
            self._masker, self._borrowed = (
                Masker(template, self.settings.train_on, self.settings.completion_only),
                borrowed,
            )
            if borrowed:
                self.report.notes.append(
                    f"the tokenizer has no chat template; questions and answers are written in the form {PAIR_TEMPLATE!r}. "
                    f'For the same at inference: get_chat_template(tokenizer, "{PAIR_TEMPLATE}")'
                )
        return self._masker

    def rows(self) -> Iterator[dict[str, list[int]]]:
        """All examples one by one, for streams; each pass counts anew."""
        vars(self.report).update(vars(self._new_report()))
        self.tally = Tally(self.report)
        for encoded in self.batches():
            self._announce_unused()
            for example in encoded:
                yield {"input_ids": example.ids, "labels": example.labels, "origin": example.origin}
        self.finish()

    def columns(self) -> Iterator[dict[str, pa.Array]]:
        """Batches of finished examples in the columns of the prepared data set."""
        kind = FEATURES.arrow_schema.field("input_ids").type
        for encoded in self.batches():
            yield {
                "input_ids": pa.array([example.ids for example in encoded], type=kind),
                "labels": pa.array([example.labels for example in encoded], type=kind),
                "origin": pa.array([example.origin for example in encoded], type=pa.string()),
            }

    def _announce_unused(self) -> None:
        """Name columns and keys of a stream that nothing reads, when they first appear."""
        for what, names in self.report.unused().items():
            new = [name for name in names if (what, name) not in self._said]
            self._said |= {(what, name) for name in new}
            if new:
                self.announce(f"{self.report.source}: {what}: {', '.join(new)}")

    def batches(self) -> Iterator[list[Encoded]]:
        """Batches of finished examples; the report grows with them."""
        for batch in self.encoded():
            yield [piece for origin, one in batch for piece in self.count(origin, one)]

    def encoded(self) -> Iterator[list[tuple[str, Encoded]]]:
        """Batches of encoded rows with their origins, before any cut."""
        started = time.perf_counter()
        examples = self._split_turns(islice(self._examples(), self.settings.max_rows))
        while batch := list(islice(examples, BATCH_ROWS)):
            yield self._encode(batch)
            self.report.seconds = time.perf_counter() - started

    def _examples(self) -> Iterator[tuple[str, Example | DataError]]:
        return interleave([(part.weight, self._examples_of(part)) for part in self.parts])

    def _split_turns(
        self, examples: Iterator[tuple[str, Example | DataError]]
    ) -> Iterator[tuple[str, Example | DataError]]:
        """The examples as they are, or one per turn that is trained; each of these counts as a row."""
        for origin, example in examples:
            if self.settings.turns == "whole" or not isinstance(example, Conversation):
                yield origin, example
                continue
            try:
                parts = safely("splitting the row", self.masker.split, example)
            except DataError as error:
                yield origin, error
                continue
            self.tally.note("a row of several turns became one row per turn", origin, len(parts) > 1)
            for number, part in enumerate(parts):
                part.notes = part.notes if number == 0 else []
                yield origin, part

    def _examples_of(self, part: Part) -> Iterator[tuple[str, Example | DataError]]:
        """Converted rows of one part; its format is announced with the first row that shows it."""

        def recognised(row: Mapping[str, Any]) -> RowFormat:
            found = self._recognise(part, row)
            self._pairs &= found.is_pair
            self._announce(part, found.name, row)
            return found

        rows = islice(readable_rows(part), part.max_rows)
        if self.formatting_func is not None:
            # functions written for rows as they were know no keys that a columnar format filled in
            bare = ((o, r if isinstance(r, DataError) else without_nested_nulls(r)) for o, r in rows)
            rows = formatted(bare, self.formatting_func)
        return examples_of(rows, recognised)

    def _recognise(self, part: Part, row: Mapping[str, Any]) -> RowFormat:
        return recognise_format(
            row,
            text_field=part.text_field or self.settings.text_field,
            columns=part.columns or self.settings.columns,
            role_aliases=part.role_aliases or self.settings.role_aliases,
        )

    def _announce(self, part: Part, format_name: str, row: Mapping[str, Any]) -> None:
        try:
            shown = json.dumps(row, ensure_ascii=False, default=repr)
        except (TypeError, ValueError, RecursionError):
            shown = repr(row)  # names that are no text, or a value that holds itself
        shown, _ = without_lone_surrogates(shown)
        about = "" if part.about in self.report.first_row else f"{part.about}\n"
        line = f"{about}{part.name}: rows are {format_name}; first row: {shown[:300]}{'...' if len(shown) > 300 else ''}"
        self.report.format = ", ".join(filter(None, [self.report.format, format_name]))
        self.report.first_row = "\n".join(filter(None, [self.report.first_row, line]))
        self.announce(printable(line))
        texts = format_name == "prompt + completion" and isinstance(row.get("prompt"), str)
        if texts and self.tokenizer.chat_template and PLAIN_PAIRS not in self.report.notes:
            self.report.notes.append(PLAIN_PAIRS)
            self.announce(f"{printable(part.name)}: {PLAIN_PAIRS}")

    def _encode(self, batch: list[tuple[str, Example | DataError]]) -> list[tuple[str, Encoded]]:
        """The usable rows of a batch as tokens; the others are complained about."""
        self.report.rows_in += len(batch)
        found = [self._mark_row(origin, example) for origin, example in batch]
        places = [place for place, one in enumerate(found) if isinstance(one, Marked)]
        plain = [isinstance(batch[place][1], Document) for place in places]
        marks = [found[place] for place in places]
        for place, encoded in zip(places, tokenised(self.encoder, marks, plain)):
            found[place] = encoded
        rows = [(origin, example, one) for (origin, example), one in zip(batch, found)]
        self._complain([(origin, one) for origin, _, one in rows if isinstance(one, DataError)])
        for _, example, one in rows:
            if isinstance(one, Encoded):
                one.from_text_file = isinstance(example, Document) and example.from_text_file
        return [(origin, one) for origin, _, one in rows if isinstance(one, Encoded)]

    def _mark_row(self, origin: str, example: Example | DataError) -> Marked | Encoded | DataError:
        """A text with its trained spans, tokens that the row has already, or what is wrong with the row."""
        if isinstance(example, DataError):
            return example
        try:
            if isinstance(example, Tokens):
                marked = Encoded(example.ids, example.labels)
            else:
                marked = safely("rendering the row", self._mark, example, origin)
            self._remark(example, origin)
        except DataError as error:
            return error
        return marked

    def _remark(self, example: Example, origin: str) -> None:
        """Count what is to be said about a row that can be used."""
        self.tally.note_all(example.notes, origin)
        unread: list[str] = []
        if isinstance(example, Conversation):
            template = self.masker.template
            unread = [key for key in example.message_keys if not template.mentions(key, example.tools)]
            if example.marked and self.settings.train_on == "everything":
                self.tally.note(
                    "training marks of messages are not used, because train_on is 'everything'", origin
                )
        self.tally.unused(example.unused, unread)

    def _mark(self, example: Conversation | Document, origin: str) -> Marked:
        """The text of an example with its trained spans; what is to be said about it is counted."""
        if isinstance(example, Document):
            only = self.settings.completion_only if example.trained_from else None
            start = 0 if takes_all(self.settings.train_on, only) else example.trained_from
            marked = Marked(example.text, [(start, len(example.text))], not example.ends, example.begins)
        else:
            marked = self.masker.mark(example)
            marked.notes += [f"the chat template leaves out the {what}" for what in marked.left_out]
            marked.notes += [
                f"a message itself holds the text {end!r}, which is read as the end of a turn"
                for end in self.masker.template.ends
                if any(end in (message.get("content") or "") for message in example.messages)
            ]
        marked.text, replaced = without_lone_surrogates(marked.text)  # as long as before, so spans hold
        self.tally.note("half of a character (a lone surrogate) is replaced by U+FFFD", origin, replaced)
        self.tally.note_all(marked.notes, origin)
        return marked

    def _complain(self, bad: list[tuple[str, DataError]]) -> None:
        if not bad:
            return
        if self.settings.malformed == "error":
            origin, error = bad[0]
            further = (
                f" Further bad rows: {some_of([o for o, _ in bad[1:]], len(bad) - 1)}."
                if len(bad) > 1
                else ""
            )
            raise DataError(f"{origin}: {error}{further}") from error
        self.report.rows_malformed += len(bad)
        for origin, error in bad:
            self.tally.drop(origin, "malformed")
            named(self.report.malformed_rows, f"{origin}: {error}")

    def count(self, origin: str, encoded: Encoded) -> list[Encoded]:
        """Apply the overlong policy to one example and count what is left of it."""
        limit, length = self.settings.max_seq_length, len(encoded.ids)
        self.tally.length(length)
        self.tally.note(
            "a token reaches from the context into the trained text; it is not trained",
            origin,
            encoded.split_tokens,
        )
        pieces = [encoded]
        if length > limit:
            named(self.report.overlong_rows, f"{origin} ({length:,} tokens)")
            self.report.rows_overlong += 1
            overlong = self.settings.overlong_of(encoded)
            if overlong == "drop":
                self.tally.drop(origin, "too long")
                return []
            pieces = [
                Encoded(encoded.ids[a : a + limit], encoded.labels[a : a + limit])
                for a in range(0, length, limit)
            ]
            self.report.rows_cut += 1
            if overlong != "split":
                pieces = pieces[:1]
                self.report.tokens_cut += length - limit
        kept = [p for p in pieces if any(label != UNTRAINED for label in p.labels[1:])]
        if not kept:
            self.report.rows_untrained += 1
            reason = (
                "its responses lie beyond max_seq_length"
                if any(x != UNTRAINED for x in encoded.labels)
                else encoded.untrained or "no response to train on"
            )
            named(self.report.untrained_rows, f"{origin} ({reason})")
            self.tally.drop(origin, reason)
            return []
        self.tally.note(
            "a piece of a split row holds no response; it is left out", origin, len(pieces) - len(kept)
        )
        self.report.rows_kept += 1
        self.report.examples += len(kept)
        for piece in kept:
            piece.origin = origin
            self.report.tokens += len(piece.ids)
            self.tally.trained(piece.labels)
        return kept

    def _remark_on_labels(self) -> None:
        labels = [name for name in self.report.unused_columns if name in known.LABELS]
        if labels and self.report.format.startswith("text"):
            self.report.notes.append(
                f"texts with a column {labels[0]!r} are the rows of a classifier; here the texts alone are trained on. To train a "
                "classifier, load the model in Python with FastLanguageModel.from_pretrained(..., num_labels=N)"
            )

    def finish(self) -> None:
        """Close the report, and stop where there would be nothing to train on."""
        report, settings = self.report, self.settings
        if report.rows_in == 0:
            raise DataError(f"{report.source}: no rows.")
        if settings.overlong == "error" and report.rows_overlong:
            raise DataError(
                f"{report.source}: {report.rows_overlong:,} of {report.rows_in:,} rows are longer than max_seq_length = "
                f"{settings.max_seq_length:,}: {', '.join(report.overlong_rows[:5])}. Raise max_seq_length, or set overlong to "
                "drop, truncate or split."
            )
        if self.encoder.bos_added:
            self.tally.note(
                "the chat template writes no BOS but the tokenizer adds one: added",
                "the first conversation",
                self.encoder.bos_added,
            )
        self.tally.finish()
        self._remark_on_labels()
        if self._masker is not None:
            report.mask_sources = dict(self._masker.ways)
            if self.settings.stage != "grpo":
                self.tally.name_ends(self.tokenizer, self._masker.template.ends)
        if report.examples == 0:
            raise DataError(
                f"{report.source}: no token of {report.rows_in:,} rows would be trained: "
                f"{', '.join((report.untrained_rows or report.dropped_rows)[:5])}. Check max_seq_length "
                f"({settings.max_seq_length:,}), the rows' roles, and train_on ({settings.train_on})."
            )
