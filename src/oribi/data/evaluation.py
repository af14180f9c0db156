"""Evaluation sources: which split of each is read, and that its rows are none of the training's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from oribi.data.folders import meaning, splits_of_files
from oribi.data.sources import Part, local_path
from oribi.errors import ConfigError, DataError

HELD_OUT_SPLITS = ("validation", "test")  # in the order in which they are taken


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
        except Exception as error:  # of whatever kind: it runs the data set's own reader
            raise DataError(
                f"{source}: its splits cannot be listed ({error}); name the one to evaluate on with eval_split."
            ) from error
    if not path.is_dir():
        return []
    if (path / "dataset_dict.json").exists():
        return sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir())
    return splits_of_files(path)
