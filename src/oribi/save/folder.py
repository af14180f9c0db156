"""Folders that appear finished or not at all.

An export is written into a hidden sibling `.NAME.partial-PID`; its files move to their final names when all of them are
complete, so a killed run leaves nothing that looks finished, and the next run removes what it left.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from oribi.errors import ExportError, OribiError
from oribi.save.probe_file import PROBES_FILE
from oribi.text import gigabytes, say

# loaders read these first: they are removed before the first new file moves in, and arrive last
_ENTRIES = (SAFE_WEIGHTS_INDEX_NAME, "config.json", "adapter_config.json")
# errors of the disk, not of the trained model; another folder may work
_DISK_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ESTALE,
}  # fmt: skip


@contextmanager
def finished_folder(directory: str | os.PathLike, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder whose files move into `directory` when the block ends without an error.

    Args:
        directory: where the files belong; files of other names that are there already stay.
        needed_bytes: what will be written; checked against the free space first.

    Raises:
        ExportError: too little disk, `directory` is a file, or a folder or file there cannot be written.
    """
    final = Path(os.path.abspath(directory))  # "." has no name of its own
    partial = final.parent / f".{final.name}.partial-{os.getpid()}"
    try:
        if final.exists() and not final.is_dir():
            raise ExportError(f"{final} is a file; give the name of a folder to export into")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not os.access(final, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(final))
        remove_leftovers(final)
        require_disk(final.parent, needed_bytes)
        partial.mkdir()
    except (OSError, ValueError) as error:
        raise _cannot_write(directory, error) from error
    try:
        yield partial
        move_files(partial, final)
    except Exception as error:
        if isinstance(error, OribiError) or _fault_of_the_disk(error) is None:
            raise
        raise _cannot_write(directory, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cannot_write(folder: str | os.PathLike, error: Exception) -> ExportError:
    why = _fault_of_the_disk(error) or getattr(error, "strerror", None) or str(error)
    return ExportError(
        f"{str(folder)!r} cannot be written: {why}. No partial files were left there; free some space or give another folder"
    )


def _fault_of_the_disk(error: Exception) -> str | None:
    """The message of a disk error, also of one raised by a library in Rust in its own form; None for other errors."""
    found = re.search(r"\bos error (\d+)|\bcode: (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1] or found[2]) if found else None
    return os.strerror(number) if number in _DISK_FAULTS else None


def reject(partial: Path, final: str | os.PathLike) -> None:
    """Keep the files of a failed export under `final`.rejected, where no program mistakes them for a good export."""
    partial.rename(new_rejected(final))


def new_rejected(final: str | os.PathLike) -> Path:
    """`final`.rejected as an empty folder, in place of that of an earlier export."""
    rejected = Path(f"{os.path.abspath(final)}.rejected")
    if rejected.exists():
        shutil.rmtree(rejected)
    rejected.mkdir()
    return rejected


def announce(directory: str | os.PathLike, sizes: dict[str, int]) -> None:
    """Print what an export will write, before any work on it.

    Args:
        directory: where it will be.
        sizes: bytes of each part, by a few words on it.

    Raises:
        ExportError: the disk is too small for all parts.
    """
    for words, size in sizes.items():
        say(f"oribi: writing {words}, {gigabytes(size)}, into {directory}")
    needed, free = sum(sizes.values()), free_disk_bytes(directory)
    if 2 * needed > free:
        say(f"oribi: this disk has {gigabytes(free)} free")
    require_disk(Path(directory), needed)


def free_disk_bytes(folder: str | os.PathLike) -> int:
    """Free space of the disk where a folder is or will be.

    Raises:
        ExportError: no such folder can be.
    """
    existing = Path(folder).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free
    except (OSError, ValueError) as error:  # a name that is too long, or with a NUL
        raise _cannot_write(folder, error) from error


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise unless the disk of a folder, which need not exist yet, has `needed_bytes` and one per cent free.

    Raises:
        ExportError: it has not.
    """
    free = free_disk_bytes(folder)
    if free < needed_bytes * 1.01:
        raise ExportError(
            f"writing to {folder} needs {gigabytes(needed_bytes)} and its disk has {gigabytes(free)} free; "
            "free some space, choose another disk or a smaller format"
        )


def remove_leftovers(final: Path) -> None:
    """Remove partial folders beside `final` whose process no longer runs."""
    for leftover in final.parent.glob(f".{final.name}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(leftover)


def move_files(partial: Path, final: Path) -> None:
    """Give every file of `partial` its final name, so that no moment shows old and new parts as one checkpoint."""
    final.mkdir(exist_ok=True)
    names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    (final / PROBES_FILE).unlink(
        missing_ok=True
    )  # of the files that are replaced; an unchecked export writes none
    for name in names:
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    if any(name.suffix == ".safetensors" for name in names):
        stale = [*(final / name for name in _ENTRIES), *final.glob("model*.safetensors")]
        if any(name.name.startswith("adapter_model") for name in names):
            stale = [final / "adapter_config.json"]
        for path in stale:
            path.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name.name in _ENTRIES, name)):
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, final / name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
