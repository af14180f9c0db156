"""Where rows come from: files, folders, `datasets` names and objects, lists, and weighted mixtures of all these."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from oribi.data.readers import READERS, Rows, read_file, suffix_of
from oribi.errors import DataError

HUB_NAME = re.compile(r"[\w][\w.\-]*(/[\w.\-]+)?")
SPEC_KEYS = {"path", "source", "name", "split", "weight", "columns", "text_field", "streaming", "revision"}
READ_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture.

    `rows` starts the reading; `fingerprint` identifies the content, None where it cannot be known without reading it.
    """

    name: str
    rows: Callable[[], Rows]
    fingerprint: str | None
    weight: float | None = None
    columns: Mapping[str, str] | None = None
    text_field: str | None = None
    streaming: bool = False


def open_source(source: Any, *, split: str = "train", streaming: bool = False) -> list[Part]:
    """The parts of a source.

    Args:
        source: a path (.json, .jsonl, .csv, .tsv, .parquet, .txt, .md, each also .gz), a folder of such files or of
            `save_to_disk`, a name on the Hugging Face hub, a Dataset, IterableDataset or DatasetDict, a list of rows or of texts, or a
            list of sources. A source in a list may be a mapping with keys path (or source), name, split, weight, columns, text_field.
        split: the split of hub names, folders and DatasetDicts.
        streaming: load hub names as streams.

    Raises:
        DataError: no such file or data set, or a kind that cannot be read.
    """
    if isinstance(source, Mapping) and not isinstance(
        source, datasets.DatasetDict | datasets.IterableDatasetDict
    ):
        return (
            [_from_spec(source, split, streaming)]
            if SPEC_KEYS.issuperset(source)
            else [_from_columns(source)]
        )
    if isinstance(source, list | tuple):
        return _from_list(source, split, streaming)
    return [_open_one(source, split, streaming)]


def interleave(parts: Sequence[tuple[float | None, Iterable[Any]]]) -> Iterator[Any]:
    """Items of several iterables: one after the other, or in the shares of their weights.

    With weights, the part that is furthest behind its share gives the next item, and the mixture ends when that part is
    exhausted: every beginning of the mixture has the asked shares, and no item comes twice.
    """
    weights = [weight for weight, _ in parts]
    if all(weight is None for weight in weights):
        for _, items in parts:
            yield from items
        return
    total = sum(weights)
    iterators, taken, drawn = [iter(items) for _, items in parts], [0] * len(parts), 0
    while True:
        behind = max(range(len(parts)), key=lambda k: weights[k] / total * (drawn + 1) - taken[k])
        try:
            item = next(iterators[behind])
        except StopIteration:
            return
        yield item
        taken[behind] += 1
        drawn += 1


def _from_list(source: Sequence[Any], split: str, streaming: bool) -> list[Part]:
    if not source:
        raise DataError("the list of rows is empty: there is nothing to train on.")
    if all(isinstance(item, str) for item in source):
        if all(suffix_of(Path(item)) in READERS or Path(item).exists() for item in source):
            return [_open_one(item, split, streaming) for item in source]
        return [_from_rows([{"text": item} for item in source])]
    if all(isinstance(item, Mapping) and not SPEC_KEYS.issuperset(item) for item in source):
        return [_from_rows(source)]
    for number, item in enumerate(source, 1):
        if not isinstance(item, Mapping | str | Path | datasets.Dataset | datasets.IterableDataset):
            raise DataError(
                f"item {number} of the list is a {type(item).__name__}; a list holds rows (mappings), texts, or sources."
            )
    parts = [
        _from_spec(item, split, streaming) if isinstance(item, Mapping) else _open_one(item, split, streaming)
        for item in source
    ]
    weighted = [part.weight is not None for part in parts]
    if any(weighted) and not all(weighted):
        raise DataError(
            f"weights are given for {sum(weighted)} of {len(parts)} sources: give all of them one, or none."
        )
    return parts


def _from_spec(spec: Mapping[str, Any], split: str, streaming: bool) -> Part:
    unknown = set(spec) - SPEC_KEYS
    where = spec.get("path", spec.get("source"))
    if unknown or where is None:
        raise DataError(
            f"a source has keys {list(spec)}; it needs 'path' and may have {sorted(SPEC_KEYS - {'path'})}."
        )
    weight = spec.get("weight")
    if weight is not None and not (isinstance(weight, int | float) and weight > 0):
        raise DataError(f"source {where}: weight = {weight!r}; it must be a number above 0.")
    part = _open_one(
        where,
        spec.get("split", split),
        spec.get("streaming", streaming),
        name=spec.get("name"),
        revision=spec.get("revision"),
    )
    return Part(
        part.name,
        part.rows,
        part.fingerprint,
        weight,
        spec.get("columns"),
        spec.get("text_field"),
        part.streaming,
    )


def _open_one(
    source: Any, split: str, streaming: bool, name: str | None = None, revision: str | None = None
) -> Part:
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in source:
            raise DataError(
                f"the data set has splits {list(source)}, not {split!r}: set split to one of them."
            )
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return Part("dataset", lambda: _rows_of_dataset(source), source._fingerprint)
    if isinstance(source, datasets.IterableDataset):
        return Part("stream", lambda: _rows_of_stream(source), None, streaming=True)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _open_folder(path, split)
        if path.exists() or suffix_of(path) in READERS:
            rows = read_file(path)  # complains now about a missing file
            del rows
            return Part(path.name, lambda: read_file(path), _hash_files([path]))
        return _open_hub(str(source), split, streaming, name, revision)
    raise DataError(
        f"cannot read rows from a {type(source).__name__}; give a path, a data set name, a datasets.Dataset or "
        "IterableDataset, or a list of rows. A pandas frame: datasets.Dataset.from_pandas(frame)."
    )


def _open_folder(path: Path, split: str) -> Part:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _open_one(datasets.load_from_disk(str(path)), split, False)
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and suffix_of(f) in READERS and not f.name.startswith(".")
    )
    # the hub's cache keeps a snapshot's files two folders up
    inside = (path.parent.parent if path.parent.name == "snapshots" else path).resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside):
            raise DataError(
                f"{file}: a link to {file.resolve()}, outside its folder, so it is not read. If it is meant, name that file "
                "as a source itself."
            )
    of_split = [f for f in files if f.name.startswith(split)]
    files = of_split or files
    if not files:
        raise DataError(
            f"{path}: the folder has no file that ends with {', '.join(READERS)} (or these with .gz)."
        )

    def rows() -> Rows:
        for file in files:
            yield from read_file(file)

    return Part(path.name, rows, _hash_files(files))


def _open_hub(source: str, split: str, streaming: bool, name: str | None, revision: str | None) -> Part:
    if not HUB_NAME.fullmatch(source):
        raise DataError(f"{source}: no such file or folder, and no name of a data set (owner/name).")
    try:
        loaded = datasets.load_dataset(source, name, split=split, streaming=streaming, revision=revision)
    except (OSError, ValueError) as error:  # datasets' and the hub's errors derive from these
        raise DataError(
            f"{source}: no such file or folder here, and loading split {split!r} of the data set failed: {error}"
        ) from error
    part = _open_one(loaded, split, streaming)
    return Part(source, part.rows, part.fingerprint, streaming=part.streaming)


def _from_columns(columns: Mapping[str, Any]) -> Part:
    lengths = {
        name: len(v) if isinstance(v, Sequence) and not isinstance(v, str) else None
        for name, v in columns.items()
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise DataError(
            f"a mapping must hold columns, equally long lists; its columns have lengths {lengths}."
        )
    return _from_rows([dict(zip(columns, values)) for values in zip(*columns.values())])


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Part:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, default=repr).encode())
    return Part(
        "list", lambda: ((f"row {n}", dict(row)) for n, row in enumerate(rows, 1)), digest.hexdigest()
    )


def _rows_of_dataset(dataset: datasets.Dataset) -> Rows:
    number = 0
    for batch in dataset.with_format(None).iter(READ_ROWS):
        for values in zip(*batch.values()):
            number += 1
            yield f"row {number}", dict(zip(batch, values))
    if not number:
        raise DataError("the data set has no rows.")


def _rows_of_stream(dataset: datasets.IterableDataset) -> Rows:
    for number, row in enumerate(dataset, 1):
        yield f"row {number}", dict(row)


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        digest.update(b"\0file\0")
    return digest.hexdigest()
