"""Which checkpoint a run continues from: the newest whole one, and only if the run is still the same."""

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from oribi.errors import ConfigError, ModelError
from oribi.models.files import shard_names
from oribi.run_record import Checkpoint, RunRecord, has_damaged_record, own_checkpoints, read_run_record

STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
WEIGHTS = "resume only the weights with `--resume weights` (in Python: train(..., resume_weights_only=True))"


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a training continues from.

    Args:
        step: optimizer steps done. path: the checkpoint's folder. record: None where it was written by other programs.
        weights_only: optimizer and random state start anew.
        damaged: newer checkpoints that could not be read, and why.
    """

    step: int
    path: Path
    record: RunRecord | None
    weights_only: bool = False
    damaged: tuple[tuple[Checkpoint, str], ...] = ()


def newest_whole(folder: str | os.PathLike, weights_only: bool = False) -> Resumed | None:
    """The newest whole checkpoint of the run that lies in a folder; None if there is no checkpoint at all.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
    """
    damaged = []
    for one in reversed(own_checkpoints(folder)):
        problem = damage_of(one.path, weights_only)
        if problem is None:
            return Resumed(one.step, one.path, read_run_record(one.path), weights_only, tuple(damaged))
        damaged.append((one, problem))
    if not damaged:
        return None
    listed = "; ".join(f"{one.path.name}: {problem}" for one, problem in damaged)
    advice = "" if weights_only else f", {WEIGHTS}"
    raise ConfigError(
        f"{folder}: no checkpoint is whole ({listed}). Put the missing files back{advice}, or start anew"
    )


def named_checkpoint(path: str | os.PathLike, weights_only: bool = False) -> Resumed:
    """The checkpoint of a path.

    Raises:
        ConfigError: there is none, or it is not whole.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"resume_from_checkpoint = {str(path)!r}: there is no such folder")
    problem = damage_of(path, weights_only)
    if problem is not None:
        advice = "" if weights_only else f", or {WEIGHTS}"
        raise ConfigError(f"{path} is not whole: {problem}. Resume from another checkpoint{advice}")
    step = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    return Resumed(step, path, read_run_record(path), weights_only)


def damage_of(checkpoint: Path, weights_only: bool = False) -> str | None:
    """Why a training cannot continue from a checkpoint; None if it can.

    Args:
        checkpoint: its folder.
        weights_only: optimizer, schedule and random state are not needed.
    """
    if has_damaged_record(checkpoint):
        return "its oribi_run.json cannot be read"
    record = read_run_record(checkpoint)
    files = record.files if record else {}
    return next(_problems(checkpoint, files, weights_only), None)


def _problems(checkpoint: Path, files: dict[str, int], weights_only: bool) -> Iterator[str]:
    optional = ("optimizer", "scheduler", "scaler", "rng_state")
    for name, size in files.items():
        if weights_only and name.startswith(optional):
            continue
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    try:
        step = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        if not isinstance(step, int):
            yield f"{STATE_FILE} names no step"
    except FileNotFoundError:
        yield f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        yield f"{STATE_FILE} cannot be read"
    yield from _weight_problems(checkpoint)
    if weights_only:
        return
    stored = [path.name for path in checkpoint.glob("optimizer*")] + [
        p.name for p in checkpoint.glob("global_step*")
    ]
    if not stored:
        yield "optimizer.pt is missing"
    if not (checkpoint / "scheduler.pt").is_file() and not any(
        name.startswith("global_step") for name in stored
    ):
        yield "scheduler.pt is missing"
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("rng_state*.pth")]):
        problem = _archive_problem(path)
        if problem:
            yield f"{path.name} {problem}"


def _weight_problems(checkpoint: Path) -> Iterator[str]:
    weights = [*checkpoint.rglob("*.safetensors"), *checkpoint.glob("pytorch_model*")]
    if (checkpoint / "adapter_config.json").is_file() and not (checkpoint / ADAPTER_FILE).is_file():
        yield f"{ADAPTER_FILE} is missing"
    if (checkpoint / ADAPTER_FILE).is_file():
        try:
            json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            yield "adapter_config.json is missing or cannot be read"
    if not weights:
        yield "its weights are missing"
    for path in weights:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError, ValueError) as error:
                yield f"{path.name} cannot be read ({str(error).splitlines()[0]})"
    try:
        shards = shard_names(checkpoint / SAFE_WEIGHTS_INDEX_NAME) or []
    except ModelError:
        yield f"{SAFE_WEIGHTS_INDEX_NAME} cannot be read"
        return
    yield from (f"{name} is missing" for name in shards if not (checkpoint / name).is_file())


def _archive_problem(path: Path) -> str | None:
    """What is wrong with a file of torch.save: PyTorch itself does not check the sums that it writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return None if bad is None else f"is damaged in {bad}"
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return "cannot be read"


def require_same(resumed: Resumed, refused: list[str]) -> None:
    """Refuse to continue where something changed that the weights depend on.

    Raises:
        ConfigError: naming every change with both values.
    """
    if refused:
        listed = "\n".join(f"  - {line}" for line in refused)
        raise ConfigError(
            f"{resumed.path} cannot be resumed, because what its weights depend on has changed:\n{listed}\n"
            "Give the run's own settings, or start a new run in another output_dir"
        )


def adapter_config_of(checkpoint: Path) -> dict[str, Any] | None:
    """The adapter's config in a checkpoint; None where there is none."""
    path = checkpoint / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
