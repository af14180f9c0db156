"""Runs as their folders show them, followed while they train."""

import json
import math
import os
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oribi.config import RunConfig
from oribi.config_file import read_run_config
from oribi.errors import ConfigError, OribiError
from oribi.run_record import (
    CONFIG_FILE,
    EARLIER,
    LOCK_FILE,
    LOG_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    RunRecord,
    is_locked,
    own_checkpoints,
    read_run_record,
)
from oribi.train.smoothed import Smoothed
from oribi.watch.follow import FollowedLines

DEPTH = 4  # folders below the given one in which runs are looked for
MOST_FOLDERS = 20_000
SCAN_SECONDS = 10.0  # between two looks for new runs
KEPT_SAMPLES = 200  # evaluations whose answers are kept; of more, the base's and the last ones
# a run without a lock (another system, a disk without locks) trains as long as its log is about this young
FRESH_SECONDS = 90.0


class Series:
    """One figure of a log against the step, in order; `smooths` keeps its smoothed values, too."""

    def __init__(self, smooths: bool = False) -> None:
        self.steps, self.values, self.times = array("q"), array("d"), array("d")
        self.smoothed = array("d")
        self._mean = Smoothed() if smooths else None

    def add(self, step: int, value: float, at: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        self.times.append(at)
        if self._mean is not None:
            # one value that is not finite would hide all that follow
            self.smoothed.append(self._mean.add(value) if math.isfinite(value) else value)

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, most: int, smoothed: bool = False) -> tuple[list[int], list[float]]:
        """Steps and values for a curve of about `most` points: the lowest and the highest of each stretch stay."""
        values = self.smoothed if smoothed else self.values
        if len(values) <= most:
            return list(self.steps), list(values)
        kept: set[int] = {0, len(values) - 1}
        size = 2 * len(values) / most
        for part in range(most // 2):
            stretch = range(int(part * size), min(int((part + 1) * size), len(values)))
            kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
        places = sorted(kept)
        return [self.steps[place] for place in places], [values[place] for place in places]

    def last(self, count: int) -> list[float]:
        return list(self.values[-count:])


class WatchedRun:
    """What a run's folder says; `refresh` reads what was added.

    Attributes:
        folder, name: of the run. config: its settings; None where they cannot be read, and `config_problem` says why.
        record: how far it got. series: figure of the log -> its values. summary: the entry that ended a training.
        answers: entries of its samples, the base's first. report: warnings and measures of report.json, where there is one. version: grows with every change.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.log, self.samples = FollowedLines(folder / LOG_FILE), FollowedLines(folder / SAMPLES_FILE)
        self.config: RunConfig | None = None
        self.config_problem = ""
        self.record: RunRecord | None = None
        self.report: dict[str, Any] = {}
        self.answers: list[dict[str, Any]] = []
        self.trains = False
        self.version = 0
        self._stamps: dict[str, Any] = {}
        self._forget_log()

    def _forget_log(self) -> None:
        self.series: dict[str, Series] = {}
        self.summary: dict[str, Any] = {}
        self.last_step, self.last_time = 0, 0.0

    def glance(self) -> None:
        """Read how the run stands, and none of its log."""
        changed = self._read_small_files()
        trains = self._is_training()
        self.version += changed or trains != self.trains
        self.trains = trains

    def refresh(self) -> None:
        """Read what was added since the last time."""
        self.glance()
        restarted, entries = self.log.read()
        if restarted:
            self._forget_log()
        for entry in entries:
            self._add(entry)
        answered = self._read_samples()
        self.version += restarted or bool(entries) or answered

    def _add(self, entry: dict[str, Any]) -> None:
        step, at = entry["step"], entry.get("time")
        at = float(at) if isinstance(at, (int, float)) else self.last_time
        self.last_step, self.last_time = max(self.last_step, step), at
        if "train_loss" in entry:
            self.summary = entry
            return
        for key, value in entry.items():
            if key not in ("step", "time") and type(value) in (int, float):
                if key not in self.series:
                    self.series[key] = Series(smooths=key == "loss")
                self.series[key].add(step, float(value), at)

    def _read_samples(self) -> bool:
        restarted, entries = self.samples.read()
        if restarted:
            self.answers = []
        self.answers += [entry for entry in entries if _are_answers(entry)]
        if len(self.answers) > KEPT_SAMPLES:
            del self.answers[1 : len(self.answers) - KEPT_SAMPLES + 1]
        return restarted or bool(entries)

    def _read_small_files(self) -> bool:
        """The files that are written whole; each is read again when it was replaced."""
        changed = False
        for name, read in ((RECORD_FILE, self._read_record), (CONFIG_FILE, self._read_config), ("report.json", self._read_report)):  # fmt: skip
            stamp = _stamp(self.folder / name)
            if self._stamps.get(name, ()) != stamp:
                self._stamps[name] = stamp
                read()
                changed = True
        return changed

    def _read_record(self) -> None:
        self.record = read_run_record(self.folder)

    def _read_config(self) -> None:
        self.config, self.config_problem = None, ""
        path = self.folder / CONFIG_FILE
        try:
            if path.is_file():
                self.config = read_run_config(path)[0]
        except (OribiError, OSError) as error:
            self.config_problem = str(error)

    def _read_report(self) -> None:
        self.report = {}
        try:
            found = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(found, dict):
            warnings, measures = found.get("warnings"), found.get("measures")
            self.report = {
                "warnings": [one for one in warnings if isinstance(one, str)]
                if isinstance(warnings, list)
                else [],
                "measures": measures if isinstance(measures, dict) else {},
            }

    def _is_training(self) -> bool:
        if self.record is not None and self.record.state != "running":
            return False
        if (self.folder / LOCK_FILE).exists():
            return is_locked(self.folder)
        young = time.time() - _written(self.folder) < max(FRESH_SECONDS, 4 * self.seconds_per_log())
        return young and not self.summary

    def seconds_per_log(self) -> float:
        """Time between the last two lines with a loss; 0 where there are no two."""
        times = self.series["loss"].times if "loss" in self.series else ()
        return times[-1] - times[-2] if len(times) > 1 else 0.0

    @property
    def checkpoints(self) -> list[str]:
        return [one.path.name for one in own_checkpoints(self.folder)]

    @property
    def started(self) -> float:
        """When the log begins, in seconds; 0 where there is none."""
        return min((one.times[0] for one in self.series.values()), default=0.0)


def _are_answers(entry: dict[str, Any]) -> bool:
    samples = entry.get("samples")
    return isinstance(samples, list) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("prompt", "said", "expected"))
        and isinstance(one.get("stopped"), bool)
        and _are_turns(one.get("turns"))
        for one in samples
    )


def _are_turns(turns: Any) -> bool:
    return turns is None or (
        isinstance(turns, list)
        and all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(one, str) for one in turn)
            for turn in turns
        )
    )


def _stamp(path: Path) -> tuple[float, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0.0, -1)
    return (stat.st_mtime, stat.st_size)


def is_run_folder(files: set[str]) -> bool:
    """Whether files of these names are a run's. A config alone may be any program's, unless a training holds the folder."""
    return bool({LOG_FILE, RECORD_FILE} & files) or {CONFIG_FILE, LOCK_FILE} <= files


def run_folders(root: Path) -> Iterator[Path]:
    """Folders of runs at or below a folder; what lies within a run (checkpoints, results) is none of its own."""
    seen, below = 0, [(root, 0)]
    while below and seen < MOST_FOLDERS:
        folder, depth = below.pop(0)
        seen += 1
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError:
            continue
        if is_run_folder({entry.name for entry in found}):
            yield folder
        elif depth < DEPTH:
            folders = [
                one.name
                for one in found
                if one.is_dir(follow_symlinks=depth == 0) and one.name[0] not in "._"
            ]
            below += [(folder / name, depth + 1) for name in sorted(folders) if name != EARLIER]


@dataclass(frozen=True)
class Roots:
    """The folders that were asked for."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Roots":
        """Folders by their names.

        Raises:
            ConfigError: one is no folder.
        """
        for name in names:
            if not Path(name).is_dir():
                what = "is a file; give a folder" if Path(name).exists() else "does not exist"
                raise ConfigError(
                    f"oribi watch {name}: it {what}. Name a run's folder, or one that holds runs, such as runs"
                )
        return cls(tuple(Path(name) for name in names))


class Watched:
    """All runs below some folders, by name. Several visitors may ask at once.

    Args:
        roots: where runs are looked for, again and again.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.runs: dict[str, WatchedRun] = {}
        self._lock = threading.Lock()
        self._scanned = -SCAN_SECONDS

    def refresh(self, names: Sequence[str] | None = None) -> dict[str, WatchedRun]:
        """Look for new runs, and read on in the logs of those of these names; None reads all logs.

        Returns:
            Name -> run, the one that was written last first.
        """
        with self._lock:
            if time.monotonic() - self._scanned >= SCAN_SECONDS:
                self._scan()
                self._scanned = time.monotonic()
            for name, run in self.runs.items():
                if names is None or name in names:
                    run.refresh()
                else:
                    run.glance()
            newest = sorted(self.runs, key=lambda name: _written(self.runs[name].folder), reverse=True)
            self.runs = {name: self.runs[name] for name in newest}
            return dict(self.runs)

    def _scan(self) -> None:
        found: dict[str, WatchedRun] = {}
        known = {run.folder: run for run in self.runs.values()}
        for root in self.roots.folders:
            for folder in run_folders(root):
                name = _name(folder, root, len(self.roots.folders) > 1)
                if folder not in {run.folder for run in found.values()}:
                    found[name] = known.get(folder) or WatchedRun(folder, name)
        self.runs = found

    @property
    def training(self) -> list[str]:
        """Names of the runs that train now."""
        return [name for name, run in self.runs.items() if run.trains]


def _written(folder: Path) -> float:
    return max(_stamp(folder / name)[0] for name in (LOG_FILE, RECORD_FILE, CONFIG_FILE))


def _name(folder: Path, root: Path, many: bool) -> str:
    """A run's name on the page: its path below the folder that was asked for."""
    if folder == root:
        return str(root) if many else root.resolve().name or str(root)
    return str(folder) if many else folder.relative_to(root).as_posix()
