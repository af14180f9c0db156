"""Processes that begin as copies of this one: a start of Python that imports all of a training costs more than a short training."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from oribi.launch import free_port, rank_variables


def start(run: Callable[[], object], folder: Path | None = None) -> int:
    """Calls `run` in a copy of this process, where signals act as in a new process; the copy ends as Python would end.

    Args:
        run: the body; its SystemExit is the exit code, and any other exception is a traceback and 1.
        folder: for the files `out` and `err` with what it writes to the two streams; None drops it.

    Returns:
        The process id, for `ended`.
    """
    child = os.fork()
    if child:
        return child
    code: object = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, name in ((1, "out"), (2, "err")):
            path = folder / name if folder else os.devnull
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, stream)
            os.close(file)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        logging.getLogger().handlers.clear()  # pytest's, which keep what a new process would print
        run()
        code = 0
    except SystemExit as ends:
        code = ends.code or 0
    except BaseException:
        traceback.print_exc()
    finally:  # nothing of the program that was copied may run: neither its handlers of exits nor pytest
        os._exit(code if isinstance(code, int) else 1)


def together(run: Callable[[], object], folder: Path, processes: int = 2, seconds: float = 240) -> list[int]:
    """Calls `run` in copies of this process that know each other as torchrun's processes do.

    Args:
        run: the body. folder: each copy's streams go into its part 0, 1 ...
        processes: how many. seconds: after which they are killed.

    Returns:
        Their exit codes.
    """
    port, children = free_port(), []

    def ranked(rank: int) -> None:
        os.environ.update(rank_variables(rank, processes, port) if processes > 1 else {})
        run()

    for rank in range(processes):
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)
        children.append(start(partial(ranked, rank), folder / str(rank)))
    ends, codes = time.monotonic() + seconds, dict.fromkeys(children)
    while None in codes.values():
        for child in (child for child, code in codes.items() if code is None):
            if time.monotonic() > ends:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            codes[child] = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.01)
    return list(codes.values())


def ended(child: int) -> int:
    """Waits for a copy and returns its exit code, minus the signal's number if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
