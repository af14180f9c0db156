"""Best-fit packing: puts whole documents into packs of at most `max_tokens` and leaves as little unused as possible.

Source: best fit decreasing, a guarantee of at most 11/9 of the fewest packs (Johnson et al. 1974, SIAM J. Comput. 3).
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from oribi.errors import DataError
from oribi.text import whole_file

PACK_FEATURES = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels", "seq_lengths")}
)
ORIGINS = {"origins": datasets.List(datasets.Value("string"))}
WRITTEN_TOKENS = 1 << 22  # tokens gathered in memory at a time


def best_fit(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Which documents go into which pack.

    Args:
        lengths: [N] tokens of each document.
        max_tokens: capacity of a pack, in tokens.

    Returns:
        Packs as lists of document numbers; each number comes once, and no pack holds more than max_tokens.

    Raises:
        DataError: a document is longer than a pack.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > max_tokens:
        longest = int(lengths.argmax())
        raise DataError(
            f"example {longest} has {lengths[longest]:,} tokens, a pack {max_tokens:,}: prepare the data with "
            f"max_seq_length <= {max_tokens} or make the packs larger."
        )
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = defaultdict(list)  # free tokens -> packs
    sizes: list[int] = []  # the keys of open_packs, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect_left(sizes, length)
        if place == len(sizes):
            pack, free = len(packs), max_tokens
            packs.append([])
        else:
            free = sizes[place]
            pack = open_packs[free].pop()
            if not open_packs[free]:
                del open_packs[free], sizes[place]
        packs[pack].append(document)
        free -= length
        if free:
            if free not in open_packs:
                insort(sizes, free)
            open_packs[free].append(pack)
    return packs


def pack(
    dataset: datasets.Dataset,
    max_tokens: int,
    *,
    seed: int = 3407,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Pack a prepared data set: each row of the result is one pack.

    Args:
        dataset: columns input_ids and labels, and origin where it is known.
        max_tokens: capacity of a pack, in tokens.
        seed: order of the packs; best fit alone would put the longest documents first.
        cache_dir: where the packs are written; None is a folder that is emptied when the program ends.

    Returns:
        A data set with columns input_ids, labels, seq_lengths (the documents' lengths, in order), and origins (their rows)
        where the data set has them.

    Raises:
        DataError: a document is longer than a pack.
    """
    table = dataset.with_format("arrow")
    lengths = token_lengths(dataset)
    packs = best_fit(lengths, max_tokens)
    order = np.random.default_rng(seed).permutation(len(packs))
    packs = [packs[i] for i in order]
    folder = Path(cache_dir or datasets.fingerprint.get_temporary_cache_files_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(f"{dataset._fingerprint} {max_tokens} {seed}".encode(), digest_size=16).hexdigest()
    path = folder / f"packs-{name}.arrow"
    if not path.exists():
        per_write = max(1, WRITTEN_TOKENS // max_tokens)
        features = datasets.Features(
            {**PACK_FEATURES, **(ORIGINS if "origin" in dataset.column_names else {})}
        )
        arrow_writer = datasets.arrow_writer.ArrowWriter
        with whole_file(path) as file, arrow_writer(features=features, path=str(file)) as writer:
            for first in range(0, len(packs), per_write):
                writer.write_table(_gather(table, packs[first : first + per_write], lengths))
            writer.finalize()
    return datasets.Dataset.from_file(str(path))


def token_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """[N] tokens of each example, from the offsets of the column alone."""
    column = dataset.with_format("arrow")
    found = [pa.compute.list_value_length(batch["input_ids"]).to_numpy() for batch in column.iter(10_000)]
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def _gather(table: datasets.Dataset, packs: list[list[int]], lengths: np.ndarray) -> pa.Table:
    documents = np.concatenate([np.asarray(p) for p in packs])
    rows = table[documents]
    counts = np.array([len(p) for p in packs])
    documents_before = np.concatenate([[0], np.cumsum(counts)])
    tokens_before = np.concatenate([[0], np.cumsum(lengths[documents])])[documents_before]
    columns = {}
    for name in ("input_ids", "labels"):
        values = pa.concat_arrays([chunk.flatten() for chunk in rows[name].chunks]).cast(pa.int32())
        columns[name] = pa.ListArray.from_arrays(pa.array(tokens_before, pa.int32()), values)
    columns["seq_lengths"] = pa.ListArray.from_arrays(
        pa.array(documents_before, pa.int32()), pa.array(lengths[documents], pa.int32())
    )
    if "origin" in rows.column_names:
        origins = rows["origin"].combine_chunks().cast(pa.string())
        columns["origins"] = pa.ListArray.from_arrays(pa.array(documents_before, pa.int32()), origins)
    return pa.table(columns)
