"""prepare_dataset: from a source to token ids and labels on disk. Everything it decides is in the report that it returns.

Prepared data is written once, by one process at a time, and read by all; a damaged file is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from oribi.data.preference_preparation import PreferencePreparation
from oribi.data.preparation import FEATURES, Preparation, Settings
from oribi.data.report import DataReport
from oribi.data.sources import open_source
from oribi.errors import DataError
from oribi.text import printable, whole_file

try:
    import fcntl
except ImportError:  # a system without file locks: processes may prepare the same data side by side
    fcntl = None

CACHE_FORMAT = 5  # raise it when the same input gives other tokens or columns

_unwritable: set[Path] = set()  # cache folders about which a message was shown


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
        max_rows: stop after this many rows.
        streaming: return an IterableDataset that prepares as it is read; None does so for an IterableDataset.
        num_proc: accepted for the callers of `datasets.map`; the tokenizer uses all cores from one process.
        cache_dir: where prepared data lies; None is the cache of `datasets`.
        use_cache: read and write the cache.
        progress: show a progress bar.
        announce: called with the recognised format and the first row of each source; None is silent.

    Returns:
        PreparedData with the data set and its report.

    Raises:
        DataError: a row or file cannot be used (it names file and line), or no token would be trained.
        ConfigError: a setting is out of range.
    """
    preparation = make_preparation(
        source, tokenizer, max_seq_length=max_seq_length, split=split, train_on=train_on,
        completion_only=completion_only, overlong=overlong, turns=turns, malformed=malformed,
        append_eos=append_eos, text_field=text_field, columns=columns, role_aliases=role_aliases,
        formatting_func=formatting_func, chat_template_kwargs=chat_template_kwargs, max_rows=max_rows,
        streaming=bool(streaming), announce=announce,
    )  # fmt: skip
    if streaming or (streaming is None and any(part.streaming for part in preparation.parts)):
        stream = datasets.IterableDataset.from_generator(preparation.rows, features=FEATURES)
        return PreparedData(stream, preparation.report)
    return prepared(preparation, cache_dir, use_cache, progress)


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
    """Open a source and fix the settings, without reading a row; arguments as for prepare_dataset, or prepare_preferences."""
    parts = open_source(source, split=split, streaming=streaming)
    # text files are split whatever stands beside them
    split_texts = overlong is None and any(part.is_text for part in parts)
    stage = settings.get("stage", "sft")
    if overlong is None and stage != "sft":
        # a score is of a whole answer
        overlong, split_texts = "drop" if stage == "reward" else "truncate", False
    if overlong is None:
        overlong = "split" if all(part.is_text for part in parts) else "truncate"
    fixed = Settings(**{**settings, "overlong": overlong, "split_texts": split_texts})
    kind = Preparation if fixed.stage == "sft" else PreferencePreparation
    return kind(parts, tokenizer, fixed, formatting_func, announce or (lambda line: None))


def _cache_key(preparation: Preparation) -> str | None:
    """Hash of content, template, tokenizer and settings; None if a part's content is not known beforehand."""
    if any(part.fingerprint is None for part in preparation.parts):
        return None
    tokenizer = preparation.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    described = [
        CACHE_FORMAT,
        [
            [p.name, p.fingerprint, p.weight, p.columns, p.role_aliases, p.text_field, p.max_rows]
            for p in preparation.parts
        ],
        hashlib.blake2b(vocabulary.encode()).hexdigest(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        asdict(preparation.settings),
        datasets.fingerprint.Hasher.hash(preparation.formatting_func)
        if preparation.formatting_func
        else None,
    ]
    text = json.dumps(described, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def prepared(
    preparation: Preparation, cache_dir: str | os.PathLike[str] | None, use_cache: bool, progress: bool
) -> PreparedData:
    """What the cache holds of a preparation, or else what it makes; sources that cannot be known beforehand are not kept.

    Raises:
        DataError: as prepare_dataset.
    """
    key = _cache_key(preparation) if use_cache else None
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "oribi"
    if key is None or not ((found := _read(preparation, folder, key)) or _writable(preparation, folder)):
        # emptied when the program ends
        temporary = Path(datasets.fingerprint.get_temporary_cache_files_directory())
        return _write(preparation, temporary, f"prepared-{time.time_ns()}", progress)
    if found:
        return found
    with _locked(folder / f".{key}.lock"):  # the process that waited finds what the other wrote
        return _read(preparation, folder, key) or _write(preparation, folder, key, progress)


def _read(preparation: Preparation, folder: Path, key: str) -> PreparedData | None:
    """What lies in the cache; None if nothing does, or it is damaged."""
    examples, figures = folder / f"{key}.arrow", folder / f"{key}.json"
    if not (examples.exists() and figures.exists()):
        return None
    try:
        report = DataReport.from_dict(json.loads(figures.read_text(encoding="utf-8")))
        dataset = datasets.Dataset.from_file(str(examples))
        if len(dataset) != report.examples:
            raise ValueError(f"{len(dataset):,} of {report.examples:,} examples")
    except (ValueError, TypeError, KeyError, AttributeError, OSError, pa.ArrowException) as error:
        preparation.announce(f"{examples}: prepared data is damaged ({error}), so it is prepared anew")
        return None
    report.from_cache = True
    preparation.announce(report.first_row)
    return PreparedData(dataset, report)


def _write(preparation: Preparation, folder: Path, name: str, progress: bool) -> PreparedData:
    try:
        _write_arrow(preparation, folder / f"{name}.arrow", progress)
        preparation.report.save(folder / f"{name}.json")
        return PreparedData(datasets.Dataset.from_file(str(folder / f"{name}.arrow")), preparation.report)
    except OSError as error:
        raise DataError(
            f"{folder}: prepared data cannot be written ({error.strerror or error}). Free space there, or set cache_dir or HF_HOME "
            "to another folder."
        ) from error


def _write_arrow(preparation: Preparation, path: Path, progress: bool) -> None:
    """Write all examples as an Arrow file, under a temporary name until it is complete."""
    report = preparation.report
    bar = tqdm(desc=f"Preparing {printable(report.source)}", unit=" rows", disable=not progress)
    with whole_file(path) as file, bar:
        writer = None
        for columns in preparation.columns():
            writer = writer or ArrowWriter(features=preparation.features, path=str(file))
            writer.write_table(pa.table(columns))
            bar.update(report.rows_in - bar.n)
        preparation.finish()
        if writer is not None:
            writer.finalize()


def _writable(preparation: Preparation, folder: Path) -> bool:
    """Whether files can be made in a folder; where not, that is said once."""
    probe = folder / f".{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if folder not in _unwritable:
            preparation.announce(
                f"{folder}: prepared data is not kept, for the folder cannot be written ({error.strerror}); a temporary folder is "
                "used. Set HF_HOME to a folder that can be written to keep it."
            )
        _unwritable.add(folder)
        return False
    return True


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """One process at a time is inside; the lock goes with its process, however that ends."""
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks; files are written under names of their own
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        lock.unlink(missing_ok=True)  # who waits for it has it open, and looks into the cache first
        os.close(descriptor)
