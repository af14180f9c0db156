"""Where rows come from: files, folders, `datasets` names and objects, lists, and weighted mixtures of all these."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets

from oribi.data.folders import choose_files, meaning, splits_of_files
from oribi.data.readers import READERS, TEXTS, Rows, read_file
from oribi.data.text_files import suffix_of
from oribi.errors import ConfigError, DataError

HUB_NAME = re.compile(r"[\w][\w.\-]*(/[\w.\-]+)?")
SPEC_KEYS = {
    "path", "source", "name", "split", "weight", "columns", "role_aliases", "text_field", "streaming", "revision", "max_rows",
}  # fmt: skip
READ_ROWS = 1000
HELD_OUT_SPLITS = ("validation", "test")  # in the order in which they are taken for evaluation
# `datasets` takes these for readers, which would read every file under the working folder
READER_NAMES = frozenset((
    "arrow", "audiofolder", "csv", "hdf5", "imagefolder", "json", "lance", "niftifolder", "pandas", "parquet",
    "pdffolder", "sql", "text", "videofolder", "webdataset", "xml",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture.

    `rows` starts the reading; `fingerprint` identifies the content, None where it cannot be known without reading it;
    columns, role_aliases and text_field come before those of the whole preparation; of max_rows only the first are read.
    `about` says which files are read, where that is not in the name; `files` are these; `is_text` that they are plain text.
    """

    name: str
    rows: Callable[[], Rows]
    fingerprint: str | None
    weight: float | None = None
    columns: Mapping[str, str] | None = None
    role_aliases: Mapping[str, str] | None = None
    text_field: str | None = None
    max_rows: int | None = None
    streaming: bool = False
    about: str = ""
    is_text: bool = False
    files: tuple[Path, ...] = ()


def open_source(source: Any, *, split: str = "train", streaming: bool = False) -> list[Part]:
    """The parts of a source.

    Args:
        source: a path (.json, .jsonl, .csv, .tsv, .parquet, .txt, .md, each also .gz), a folder of such files or of
            `save_to_disk`, a name on the Hugging Face hub, a Dataset, IterableDataset or DatasetDict, a list of rows or of texts, or a
            list of sources. A source in a list may be a mapping with keys path (or source), name, split, revision, weight, columns,
            role_aliases, text_field, max_rows.
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


def evaluation_split(source: str, training: Sequence[str], split: str, eval_split: str | None) -> str:
    """The split of an evaluation source that is read.

    Args:
        source: a file, a folder or a hub name.
        training: the sources that are trained on.
        split: the training's split.
        eval_split: what the run's settings say; None takes, of a source that is trained on as well, its validation or test
            split, and of another one `split`.
    """
    if eval_split is not None:
        return eval_split
    if not any(_same(source, other) for other in training):
        return split
    names = _splits_of(source)
    wanted = [known for known in HELD_OUT_SPLITS if known != meaning(split)]
    return next((name for known in wanted for name in names if meaning(name) == known), split)


def require_held_out(source: str, evaluated: Sequence[Part], trained: Sequence[Part]) -> None:
    """Refuse an evaluation source whose rows are trained on.

    Raises:
        ConfigError: a file or a split is read for both.
    """
    prints = {part.fingerprint for part in trained} - {None}
    files = {file for part in trained for file in part.files}
    for part in evaluated:
        shared = [file for file in part.files if file in files]
        if shared or part.fingerprint in prints:
            what = f": {shared[0]}" if shared and str(shared[0]) != source else ""
            raise ConfigError(
                f"eval_dataset = {source}: its rows are trained on, too{what}. Keep some of them for evaluation "
                "(eval_fraction: 0.05 in place of eval_dataset), name another split of it (eval_split), or other files"
            )


def _same(a: str, b: str) -> bool:
    paths = local_path(a), local_path(b)
    if None in paths:
        return a == b
    return paths[0].resolve() == paths[1].resolve()


def _splits_of(source: str) -> list[str]:
    """The names of a source's splits; none where it is a file or has only one."""
    path = local_path(source)
    if path is None:
        try:
            return datasets.get_dataset_split_names(source)
        except Exception as error:  # any exception: this runs the data set's own reader
            raise DataError(
                f"{source}: its splits cannot be listed ({error}); name the one to evaluate on with eval_split."
            ) from error
    if not path.is_dir():
        return []
    if (path / "dataset_dict.json").exists():
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    return splits_of_files(path)


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
        if all(suffix_of(Path(item)) in READERS or local_path(item) for item in source):
            labels = _labels(source)
            return [_open_one(item, split, streaming, label=label) for item, label in zip(source, labels)]
        return [_from_rows([{"text": item} for item in source])]
    if all(isinstance(item, Mapping) and not SPEC_KEYS.issuperset(item) for item in source):
        return [_from_rows(source)]
    for number, item in enumerate(source, 1):
        if not isinstance(item, Mapping | str | Path | datasets.Dataset | datasets.IterableDataset):
            raise DataError(
                f"item {number} of the list is a {type(item).__name__}; a list holds rows (mappings), texts, or sources."
            )
    wheres = [i.get("path", i.get("source")) if isinstance(i, Mapping) else i for i in source]
    parts = [
        _from_spec(item, split, streaming, label)
        if isinstance(item, Mapping)
        else _open_one(item, split, streaming, label=label)
        for item, label in zip(source, _labels(wheres))
    ]
    weighted = [part.weight is not None for part in parts]
    if any(weighted) and not all(weighted):
        raise DataError(
            f"weights are given for {sum(weighted)} of {len(parts)} sources: give all of them one, or none."
        )
    return parts


def _labels(sources: Sequence[Any]) -> list[str | None]:
    """What files and folders of a list are called in origins: the ends of their paths that tell them apart."""
    paths = [
        Path(s).expanduser().absolute() if isinstance(s, str | Path) and local_path(s) else None
        for s in sources
    ]
    known = set(paths) - {None}
    labels = []
    for path in paths:
        if path is None or len(known) < 2:
            labels.append(None)
            continue
        length = next(
            n
            for n in count(1)
            if n >= len(path.parts) or sum(o.parts[-n:] == path.parts[-n:] for o in known) == 1
        )
        labels.append("/".join(path.parts[-length:]))
    return labels


def local_path(source: str | Path) -> Path | None:
    """The file or folder that a source names; None if there is none.

    Raises:
        DataError: the path cannot be looked at.
    """
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{str(source)[:200]!r}: no usable path ({error}).") from error


def _from_spec(spec: Mapping[str, Any], split: str, streaming: bool, label: str | None = None) -> Part:
    unknown = set(spec) - SPEC_KEYS
    where = spec.get("path", spec.get("source"))
    if unknown or where is None:
        raise DataError(
            f"a source has keys {list(spec)}; it needs 'path' and may have {sorted(SPEC_KEYS - {'path'})}."
        )
    weight = spec.get("weight")
    if weight is not None and not (isinstance(weight, int | float) and weight > 0):
        raise DataError(f"source {where}: weight = {weight!r}; it must be a number above 0.")
    most = spec.get("max_rows")
    if most is not None and not (isinstance(most, int) and most > 0):
        raise DataError(f"source {where}: max_rows = {most!r}; it must be a whole number above 0.")
    part = _open_one(
        where,
        spec.get("split", split),
        spec.get("streaming", streaming),
        name=spec.get("name"),
        revision=spec.get("revision"),
        label=label,
    )
    own = {name: spec.get(name) for name in ("columns", "role_aliases", "text_field")}
    return replace(part, weight=weight, max_rows=most, **own)


def _open_one(
    source: Any,
    split: str,
    streaming: bool,
    name: str | None = None,
    revision: str | None = None,
    label: str | None = None,
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
        return Part("stream", lambda: _numbered(source), None, streaming=True)
    if isinstance(source, str | Path):
        path = local_path(source) or Path(source)
        if path.is_dir():
            return _open_folder(path, split, label)
        if path.exists() or suffix_of(path) in READERS:
            return _open_file(path, label)
        return _open_hub(str(source), split, streaming, name, revision)
    raise DataError(
        f"cannot read rows from a {type(source).__name__}; give a path, a data set name, a datasets.Dataset or "
        "IterableDataset, or a list of rows. A pandas frame: datasets.Dataset.from_pandas(frame)."
    )


def _open_file(path: Path, label: str | None) -> Part:
    read_file(path)  # raises now if the file is missing
    label = label or path.name
    return _part_of_files(label, [path], [label], _hash_files([path]))


def _part_of_files(
    name: str, files: Sequence[Path], origins: Sequence[str], fingerprint: str, about: str = ""
) -> Part:
    """Files that are read one after the other; `origins` is what each is called in the origins of its rows."""

    def rows() -> Rows:
        for file, origin in zip(files, origins):
            yield from read_file(file, origin)

    is_text = all(suffix_of(file) in TEXTS for file in files)
    resolved = tuple(file.resolve() for file in files)
    return Part(name, rows, fingerprint, about=about, is_text=is_text, files=resolved)


def _open_folder(path: Path, split: str, label: str | None) -> Part:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:  # of whatever kind a damaged folder causes in the library
            raise DataError(
                f"{path}: a folder of save_to_disk that cannot be loaded ({type(error).__name__}: {error}). Save it again."
            ) from error
        return _open_one(saved, split, False)
    chosen = choose_files(path, split)
    names = [f"{label}/{file.as_posix()}" if label else file.as_posix() for file in chosen.files]
    files = [path / file for file in chosen.files]
    return _part_of_files(label or path.name, files, names, _hash_files(files, names), chosen.about)


def _open_hub(source: str, split: str, streaming: bool, name: str | None, revision: str | None) -> Part:
    if not HUB_NAME.fullmatch(source):
        raise DataError(f"{source}: no such file or folder, and no name of a data set (owner/name).")
    if source.lower() in READER_NAMES:
        raise DataError(
            f"{source}: the name of a file format, not of a data set; `datasets` would read every such file under the working "
            "folder. Give the files themselves, such as rows.jsonl, or a folder of them."
        )
    try:
        loaded = datasets.load_dataset(source, name, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # any exception: building a data set runs readers of every format
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
    digest: str | None = None
    try:
        content = hashlib.blake2b(digest_size=16)
        for row in rows:
            content.update(json.dumps(row, default=_whole).encode())
        digest = content.hexdigest()
    except (TypeError, ValueError, RecursionError):
        pass  # rows that are no JSON have no fingerprint: they are prepared each time
    return Part("list", lambda: _numbered(rows), digest)


def _whole(value: Any) -> Any:
    """All of a value; the repr of a long array leaves out its middle."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _rows_of_dataset(dataset: datasets.Dataset) -> Rows:
    number = 0
    for batch in dataset.with_format(None).iter(READ_ROWS):
        for values in zip(*batch.values()):
            number += 1
            yield f"row {number}", dict(zip(batch, values))
    if not number:
        raise DataError("the data set has no rows.")


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Rows:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)


def _hash_files(paths: Sequence[Path], names: Sequence[str] = ()) -> str:
    """A hash of contents, and of the names that stand in origins."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
        digest.update(b"\0file\0")
    digest.update("\0".join(names).encode())
    return digest.hexdigest()
