"""Prepared data on disk: written once, by one process at a time, read by all; a damaged file is made anew."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import pyarrow

from oribi.data.preparation import Preparation
from oribi.data.report import DataReport
from oribi.errors import DataError

try:
    import fcntl
except ImportError:  # a system without them: processes may prepare the same data side by side
    fcntl = None

Kept = tuple[datasets.Dataset, DataReport]

_told: set[Path] = set()  # folders whose failing was said


def prepared(
    preparation: Preparation, key: str | None, cache_dir: str | os.PathLike[str] | None, progress: bool
) -> Kept:
    """The examples of a preparation and its report, from the cache if they are there.

    Args:
        preparation: makes them otherwise.
        key: identifies them; None keeps nothing.
        cache_dir: None is the cache of `datasets`.
        progress: show a progress bar.

    Raises:
        DataError: a row cannot be used, or the disk takes no more.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "oribi"
    if key is None or not ((found := _read(preparation, folder, key)) or _writable(preparation, folder)):
        # emptied when the program ends
        temporary = Path(datasets.fingerprint.get_temporary_cache_files_directory())
        return _write(preparation, temporary, f"prepared-{time.time_ns()}", progress)
    if found:
        return found
    with _alone(folder / f".{key}.lock"):  # the process that waited finds what the other wrote
        return _read(preparation, folder, key) or _write(preparation, folder, key, progress)


def _read(preparation: Preparation, folder: Path, key: str) -> Kept | None:
    """What lies in the cache; None if nothing does, or it is damaged."""
    examples, figures = folder / f"{key}.arrow", folder / f"{key}.json"
    if not (examples.exists() and figures.exists()):
        return None
    try:
        report = DataReport.from_dict(json.loads(figures.read_text(encoding="utf-8")))
        dataset = datasets.Dataset.from_file(str(examples))
        if len(dataset) != report.examples:
            raise ValueError(f"{len(dataset):,} of {report.examples:,} examples")
    except (ValueError, TypeError, KeyError, AttributeError, OSError, pyarrow.ArrowException) as error:
        preparation.announce(f"{examples}: prepared data is damaged ({error}), so it is prepared anew")
        return None
    report.from_cache = True
    preparation.announce(report.first_row)
    return dataset, report


def _write(preparation: Preparation, folder: Path, name: str, progress: bool) -> Kept:
    try:
        preparation.write(folder / f"{name}.arrow", progress)
        preparation.report.save(folder / f"{name}.json")
        return datasets.Dataset.from_file(str(folder / f"{name}.arrow")), preparation.report
    except OSError as error:
        raise DataError(
            f"{folder}: prepared data cannot be written ({error.strerror or error}). Free space there, or set cache_dir or HF_HOME "
            "to another folder."
        ) from error


def _writable(preparation: Preparation, folder: Path) -> bool:
    """Whether files can be made in a folder; where not, that is said once."""
    probe = folder / f".{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if folder not in _told:
            preparation.announce(
                f"{folder}: prepared data is not kept, for the folder cannot be written ({error.strerror}); a temporary folder is "
                "used. Set HF_HOME to a folder that can be written to keep it."
            )
        _told.add(folder)
        return False
    return True


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
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
