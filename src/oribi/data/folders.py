"""Finds the files of a folder that belong to a split, by the hub's rule: words in file and folder names.

A split is a word of a file's name (train-00000-of-00002.parquet, my_test.jsonl), or else of the folders it lies in
(data/train/0.jsonl). Only where no file bears any split's name are all files one split.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from oribi.data.readers import READERS
from oribi.data.text_files import suffix_of
from oribi.errors import DataError

# the hub's words for each split
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# what stands beside data and is none
CARDS = (
    "readme", "license", "licence", "changelog", "citation", "contributing", "notice", "dataset_card",
    "dataset card",
)  # fmt: skip
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SHOWN_FILES = 8


@dataclass(frozen=True)
class Chosen:
    """The files of a split, relative to their folder, and a sentence about which were read and which were not."""

    files: list[PurePath]
    about: str


def choose_files(folder: Path, split: str) -> Chosen:
    """The files of a folder that belong to a split.

    Args:
        folder: searched with all folders in it; hidden ones are skipped.
        split: train, validation or test, in any of the hub's words, or another word that files are named by.

    Raises:
        DataError: the folder cannot be read, has no file with rows, or files of other splits only.
    """
    found, aside = _data_files(folder)
    if not found:
        skipped = f" (it has {_listed(aside)}, which are no rows)" if aside else ""
        raise DataError(
            f"{folder}: the folder has no file that ends with {', '.join(READERS)} (or these with .gz){skipped}."
        )
    wanted = meaning(split)
    own = [file for file in found if _names(file, wanted)]
    if not own:
        named = {file: known for file in found if (known := split_of(file))}
        if named:
            by_split = {
                known: [f for f in named if named[f] == known] for known in dict.fromkeys(named.values())
            }
            listed = "; ".join(f"{known}: {_listed(files)}" for known, files in by_split.items())
            rest = [file for file in found if file not in named]
            raise DataError(
                f"{folder}: no file is named {split!r}; by their names there are {listed}"
                + (f"; without a split's name: {_listed(rest)}" if rest else "")
                + ". Set split to one of these, rename the files, or give the files themselves as sources."
            )
        own = found
    left = [file for file in found if file not in own] + aside
    about = f"{folder.name}: reads {len(own):,} of {len(own) + len(left):,} files: {_listed(own)}"
    if left:
        about += f"; not read: {_listed(left)}"
    if _has_configs(folder):
        about += "; the data_files of its README.md are not followed"
    return Chosen(own, about)


def split_of(file: PurePath) -> str | None:
    """The split that a file is named by, itself or by the folder nearest to it."""
    for part in (_stem(file), *reversed(file.parent.parts)):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split
    return None


def splits_of_files(folder: Path) -> list[str]:
    """The splits that files of a folder are named by."""
    found, _ = _data_files(folder)
    return sorted({known for file in found if (known := split_of(file))})


def meaning(split: str) -> str:
    """The split that a word stands for, in the words of `SPLITS`; another word is a split of its own."""
    return next((name for name, words in SPLITS.items() if split.lower() in words), split)


def _names(file: PurePath, wanted: str) -> bool:
    if wanted in SPLITS:
        return split_of(file) == wanted
    # a split of another name: a word, or words, of the file's name or of a folder
    pattern = rf"(?<![a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9])"
    return any(re.search(pattern, part.lower()) for part in (_stem(file), *file.parent.parts))


def _data_files(folder: Path) -> tuple[list[PurePath], list[PurePath]]:
    """Files with rows, and files that stand beside them, both in the order of their paths."""
    found, aside = [], []

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}).") from error

    # the hub's cache keeps a snapshot's files two folders up
    inside = (folder.parent.parent if folder.parent.name == "snapshots" else folder).resolve()
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(names):
            file = Path(place, name)
            if _is_hidden(name) or suffix_of(file) not in READERS or not file.is_file():
                continue
            if not file.resolve().is_relative_to(inside):
                raise DataError(
                    f"{file}: a link to {file.resolve()}, outside its folder, so it is not read. If it is meant, name that file "
                    "as a source itself."
                )
            relative = PurePath(file.relative_to(folder))
            card = suffix_of(file) in (".md", ".txt") and _stem(relative).lower() in CARDS
            (aside if card or name.lower() in METADATA else found).append(relative)
    return sorted(found), sorted(aside)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _stem(file: PurePath) -> str:
    name = file.name
    for _ in range(2):
        head, dot, suffix = name.rpartition(".")
        if dot and (f".{suffix.lower()}" in READERS or suffix.lower() == "gz"):
            name = head
    return name


def _has_configs(folder: Path) -> bool:
    """Whether the folder's card has its own rule of files."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    return head.startswith("---") and "data_files:" in head.split("\n---", 1)[0]


def _listed(files: list[PurePath]) -> str:
    shown = ", ".join(file.as_posix() for file in files[:SHOWN_FILES])
    return shown + (f" and {len(files) - SHOWN_FILES:,} more" if len(files) > SHOWN_FILES else "")
