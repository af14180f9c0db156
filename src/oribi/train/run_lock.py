"""One training per folder: a lock on a file in it, which the operating system drops when the process ends, however it ends."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oribi.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"  # a leading underscore: uploads of the output folder leave such names out
_mine: dict[tuple[int, str], int] = {}  # (process, folder) -> how often this process took it


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
            path.unlink(missing_ok=True)  # while it is held, so that nobody is between opening and locking it
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
                "%s: this file system has no locks, so a second training in the folder would not be noticed",
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
