"""What a run's folder and each of its checkpoints say of themselves, and who may write there.

The record is one small JSON file, `oribi_run.json`. A lock keeps the folder for one training; the operating system drops it
when the process ends, however it ends.
A folder's record identifies its run and how far it got; a checkpoint's record says how its weights were trained.
"""

import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from oribi.errors import ConfigError
from oribi.text import write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

RECORD_FILE = "oribi_run.json"
CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
SAMPLES_FILE = "samples.jsonl"
VERSION = 1
EARLIER = "_earlier"  # a leading underscore: uploads of the output folder leave such names out
# form of the model -> its folder within the run's
FORM_FOLDERS = {
    "lora": "adapter", "lora_per_expert": "adapter_per_expert", "merged_16bit": "merged", "merged_4bit": "merged_4bit", "fp8": "fp8", "w4a16": "w4a16", "gguf": "gguf", "gguf-adapter": "gguf-adapter",
}  # fmt: skip
# the other files that a run writes into its folder
_OWN_FILES = (
    RECORD_FILE, CONFIG_FILE, LOG_FILE, SAMPLES_FILE, "report.html", "report.md", "report.json", "loss.png", "rewards.png",
)  # fmt: skip
_RESULT_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.gguf", "*.model", "README.md", "Modelfile", "merges.txt", "vocab.txt",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK_FILE = "_lock"  # a leading underscore: uploads of the output folder leave such names out
_mine: dict[tuple[int, str], int] = {}  # (process, folder) -> how often this process took it


@dataclass
class RunRecord:
    """A run as its folder or one of its checkpoints describes it.

    Args:
        run: identifies the run; a resumed run keeps it.
        model: the base model's name, as the user called it.
        base: the base's identity (`models.identity`); None where the model was not loaded by oribi.
        data: rows, and hashes of them (`train.fingerprint`).
        settings: of the training that decides what is learned, by name.
        step: optimizer steps done. max_steps: of the whole run.
        position: where the next step reads: passes over the data that are complete, and rows of the one that is not.
        state: "running", "stopped" or "finished"; a run that was killed stays "running".
        saved: result folder -> step that it holds; in the run's folder.
        files: name -> bytes; in a checkpoint.
    """

    run: str
    model: str = ""
    base: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    position: dict[str, int] | None = None
    state: str = "running"
    saved: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    version: int = VERSION

    def write(self, folder: str | os.PathLike) -> None:
        """Write the record into a folder; it is whole there or not there."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        write_whole(Path(folder) / RECORD_FILE, text)


def unfinished_words(record: RunRecord, steps: int, trains: bool, newest: str | None) -> str:
    """How a run that is not finished stands, as the end of a sentence about it.

    Args:
        record: of the run. steps: that are done. trains: whether a process trains it now.
        newest: name of its newest checkpoint; None where it has none.
    """
    total = f"step {steps:,} of {record.max_steps:,}"
    if trains:
        return f"trains now, {total}"
    ended = "was stopped" if record.state == "stopped" else "ended before its time"
    where = ", without a checkpoint" if newest is None else f"; --resume continues from {newest}"
    return f"{ended} at {total}{where}"


def new_run() -> str:
    """A name for a new run, by which runs sort in time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def read_run_record(folder: str | os.PathLike) -> RunRecord | None:
    """The record of a folder; None where there is none, or none that can be read."""
    try:
        values = json.loads((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))
        record = RunRecord(**{f.name: values[f.name] for f in fields(RunRecord) if f.name in values})
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    expected = {"run": str, "settings": dict, "saved": dict, "files": dict, "step": int}
    sound = all(isinstance(getattr(record, name), kind) for name, kind in expected.items())
    return record if sound else None


def has_damaged_record(folder: str | os.PathLike) -> bool:
    """Whether a folder has a record that cannot be read."""
    return (Path(folder) / RECORD_FILE).exists() and read_run_record(folder) is None


def record_saved(folder: str | os.PathLike, form: str, step: int) -> None:
    """Note in a run's folder that a result folder now holds the model of a step."""
    record = read_run_record(folder)
    if record is not None:
        record.saved[form] = step
        record.write(folder)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects with a step in a file that a run appends to, in order; none where there is no file.

    A line that was cut off, as by a kill, is left out with a warning.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in filter(str.strip, lines):
        entry = step_entry(line)
        if entry is not None:
            yield entry
        else:
            logger.warning("%s: a damaged line is left out: %r", path, line[:80])


def step_entry(line: str) -> dict[str, Any] | None:
    """The object with a step that a line holds; None where it holds none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


class Checkpoint(NamedTuple):
    """A folder `checkpoint-N`, whatever it holds."""

    step: int
    path: Path


def checkpoints(folder: str | os.PathLike) -> list[Checkpoint]:
    """All checkpoints of a folder by their step, the newest last."""
    try:
        names = [
            path for path in Path(folder).iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()
        ]
    except OSError:
        return []
    return sorted(Checkpoint(int(_CHECKPOINT.fullmatch(path.name)[1]), path) for path in names)


def own_checkpoints(folder: str | os.PathLike) -> list[Checkpoint]:
    """The checkpoints of the run that a folder's record names; all of them where nothing tells them apart."""
    found, record = checkpoints(folder), read_run_record(folder)
    if record is None:
        return found
    runs = {one: read_run_record(one.path) for one in found}
    return [one for one in found if runs[one] is None or runs[one].run == record.run]


class Newest(NamedTuple):
    """The newest model of a run's folder, and what to say about the choice."""

    path: Path
    note: str


def newest_model(folder: str | os.PathLike) -> Newest | None:
    """The adapter or checkpoint of a run that was trained longest; a merged model only if there is nothing else.

    A merged model in a run's folder may be an export of an earlier step. It is the run's own result if the run has
    neither an adapter nor a newer checkpoint.
    """
    folder, record = Path(folder), read_run_record(folder)
    kept = [one for one in own_checkpoints(folder) if _holds_model(one.path)]
    names = [name for name in ("adapter", "merged") if _holds_model(folder / name)]
    last, name = kept[-1] if kept else None, names[0] if names else None
    step = record.saved.get(name) if record and name else None
    if name is None:
        return None if last is None else Newest(last.path, f"loading its {last.path.name}")
    if last is not None:
        if step is not None:
            newer = last.step > step
        else:  # a folder that the record does not name: an export, or of an earlier version
            newer = name == "merged" or _written(last.path) > _written(folder / name)
        if newer:
            older = f"step {step}" if step is not None else "an earlier step"
            return Newest(last.path, f"loading its {last.path.name}; {name} is from {older}")
        step = last.step if step is None else step
    return Newest(folder / name, f"loading its {name}" + (f" (step {step})" if step is not None else ""))


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _written(folder: Path) -> float:
    """When the weights of a folder were written, in seconds."""
    return max((path.stat().st_mtime for path in folder.glob("*.safetensors")), default=0.0)


def remove_run(folder: str | os.PathLike) -> None:
    """Remove what a run left in its folder: record, log, report, checkpoints and results; files of others stay."""
    folder = Path(folder)
    for one in checkpoints(folder):
        shutil.rmtree(one.path)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    if _is_generated_card(folder / "README.md"):
        (folder / "README.md").unlink()
    for result in filter(Path.is_dir, (folder / name for name in FORM_FOLDERS.values())):
        for pattern in _RESULT_FILES:
            for path in result.rglob(pattern):
                path.unlink()
        for path in sorted([result, *filter(Path.is_dir, result.rglob("*"))], reverse=True):
            if not any(path.iterdir()):
                path.rmdir()


def _is_generated_card(path: Path) -> bool:
    """Whether a README.md is the model card that TRL and transformers write beside checkpoints."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    _, *parts = text.split("---", 2)  # the settings at its head, and the text
    return len(parts) == 2 and not text.partition("---")[0] and "- generated_from_trainer\n" in parts[0]


def set_aside(folder: str | os.PathLike, paths: Sequence[Path], name: str) -> Path:
    """Move files of a run's folder where nothing reads them: `_earlier/NAME`, which is returned."""
    place = Path(folder) / EARLIER / name
    number = 1
    while any((place / path.name).exists() for path in paths):
        number += 1
        place = place.with_name(f"{name}-{number}")
    place.mkdir(parents=True, exist_ok=True)
    for path in paths:
        os.replace(path, place / path.name)
    return place


def require_writable(folder: str | os.PathLike) -> None:
    """Make a run's folder and write in it, before hours of training find that they cannot.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    path = Path(folder)
    probe = path / f".oribi-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"oribi")
        probe.unlink()
    except (OSError, ValueError) as error:
        raise not_writable(path, error) from error


@contextmanager
def run_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a run's folder inside the block; the process that holds it already may do so again.

    Args:
        folder: of the run; it is made.

    Raises:
        ConfigError: another process trains there, or the folder cannot be written to.
    """
    key = (os.getpid(), os.path.abspath(folder))
    if key in _mine:
        _mine[key] += 1
        try:
            yield
        finally:
            _mine[key] -= 1
        return
    path, made = Path(folder) / LOCK_FILE, not os.path.exists(folder)
    descriptor = _take(path)
    _mine[key] = 1
    try:
        yield
    finally:
        del _mine[key]
        if descriptor is not None:
            path.unlink(
                missing_ok=True
            )  # while it is locked, so that no process is between opening and locking it
            os.close(descriptor)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()  # a run that was refused leaves nothing


def is_locked(folder: str | os.PathLike) -> bool:
    """Whether another process trains in a folder now."""
    path = Path(folder) / LOCK_FILE
    if fcntl is None or (os.getpid(), os.path.abspath(folder)) in _mine:
        return False
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def not_writable(folder: Path, error: Exception) -> ConfigError:
    """The error for an output folder that cannot be made or written to."""
    why = getattr(error, "strerror", None) or error  # a ValueError: the name holds a NUL
    return ConfigError(
        f"output_dir = {str(folder)[:200]}: cannot be written to ({why}); give a folder that this user may write in"
    )


def _take(path: Path) -> int | None:
    """The locked file's descriptor; None where the file system knows no locks, which is said."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (OSError, ValueError) as error:
            raise not_writable(path.parent, error) from error
        try:
            if fcntl is None:
                raise OSError
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"output_dir = {path.parent}: another process trains there ({holder or 'unknown'}). Wait for it, or give "
                "another output_dir"
            ) from None
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            logger.warning(
                "%s: this file system has no locks, so a second training in the same folder would go unnoticed",
                path.parent,
            )
            return None
        if _is_still_there(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and locking it


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
