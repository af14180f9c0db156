"""prepare_dataset: from a source to token ids and labels on disk. Everything it decides is in the report that it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from oribi.data.cache import prepared
from oribi.data.preparation import FEATURES, Preparation, Settings
from oribi.data.report import DataReport
from oribi.data.sources import open_source


@dataclass
class PreparedData:
    """What preparation made.

    Args:
        dataset: columns input_ids and labels (int32 lists; labels not shifted, -100 untrained), and origin, the row that
            each example was, as file:line.
        report: how it came about.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    report: DataReport


def prepare_dataset(
    source: Any,
    tokenizer: Any,
    *,
    max_seq_length: int,
    split: str = "train",
    train_on: str = "responses",
    completion_only: bool | None = None,
    overlong: str | None = None,
    turns: str = "whole",
    malformed: str = "error",
    append_eos: bool = True,
    text_field: str | None = None,
    columns: Mapping[str, str] | None = None,
    role_aliases: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    streaming: bool | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
    progress: bool = True,
    announce: Callable[[str], None] | None = print,
) -> PreparedData:
    """Turn a source into token ids and exact response-only labels.

    Args:
        source: what `oribi.data.sources.open_source` takes: paths, names, data sets, lists, mixtures.
        tokenizer: a transformers tokenizer; its chat template renders messages.
        max_seq_length: longest example, in tokens.
        split: the split of names, folders and DatasetDicts.
        train_on: "responses" (assistant texts and their end tokens), "last_response", or "everything".
        completion_only: for rows of prompt and completion, whether only the completion is trained; None follows train_on.
        overlong: what to do with examples above max_seq_length: "error", "drop", "truncate" or "split" into several. None is
            "split" for text files and "truncate" otherwise.
        turns: "whole" makes one example of a conversation, in which turns whose thought the chat template drops are not
            trained; "split" makes one example per assistant turn, rendered as when the model generates it, thought included.
        malformed: "error" stops at the first rows that cannot be read; "drop" leaves them out and reports them.
        append_eos: close plain text and completions with EOS, once.
        text_field: column of plain text to use although the rows have messages.
        columns: name of ours -> name in the rows.
        role_aliases: further names of roles.
        formatting_func: row -> text or messages, or batch -> list of texts.
        chat_template_kwargs: passed to every rendering, e.g. {"enable_thinking": False}.
        max_rows: stop after so many rows.
        streaming: return an IterableDataset that prepares as it is read; None does so for an IterableDataset.
        num_proc: accepted for the callers of `datasets.map`; the tokenizer uses all cores from one process.
        cache_dir: where prepared data lies; None is the cache of `datasets`.
        use_cache: read and write the cache.
        progress: show a progress bar.
        announce: called with the recognised format and row 0 of each source; None is silent.

    Returns:
        PreparedData with the data set and its report.

    Raises:
        DataError: a row or file cannot be used (it names file and line), or no token would be trained.
        ConfigError: a setting is out of range.
    """
    preparation = make_preparation(
        source,
        tokenizer,
        max_seq_length=max_seq_length,
        split=split,
        train_on=train_on,
        completion_only=completion_only,
        overlong=overlong,
        turns=turns,
        malformed=malformed,
        append_eos=append_eos,
        text_field=text_field,
        columns=columns,
        role_aliases=role_aliases,
        formatting_func=formatting_func,
        chat_template_kwargs=chat_template_kwargs,
        max_rows=max_rows,
        streaming=bool(streaming),
        announce=announce,
    )
    if streaming or (streaming is None and any(part.streaming for part in preparation.parts)):
        stream = datasets.IterableDataset.from_generator(preparation.rows, features=FEATURES)
        return PreparedData(stream, preparation.report)
    key = preparation.cache_key() if use_cache else None
    return PreparedData(*prepared(preparation, key, cache_dir, progress))


def make_preparation(
    source: Any,
    tokenizer: Any,
    *,
    split: str = "train",
    overlong: str | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    streaming: bool = False,
    announce: Callable[[str], None] | None = print,
    **settings: Any,
) -> Preparation:
    """Open a source and fix the settings, without reading a row; arguments as for prepare_dataset."""
    parts = open_source(source, split=split, streaming=streaming)
    # text files are split whatever stands beside them
    split_texts = overlong is None and any(part.is_text for part in parts)
    if overlong is None:
        overlong = "split" if all(part.is_text for part in parts) else "truncate"
    fixed = Settings(**{**settings, "overlong": overlong, "split_texts": split_texts})
    return Preparation(parts, tokenizer, fixed, formatting_func, announce or (lambda line: None))
