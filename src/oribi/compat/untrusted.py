"""Code that a model wrote, run by reward functions: in a process of its own, within limits of time and memory.

Limited: time, memory, processor time, processes and threads (none), bytes written to files (none), and what the process is told (no
environment variables, no installed packages). Not limited: reading files that its user may read, and the network. As root the
process becomes the user nobody first. For code that somebody wrote to do harm, take a container without network besides.
"""

import ast
import builtins
import ctypes
import functools
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oribi.compat.untrusted_worker import MOST_BYTES, frame, pack_value, unpack_value

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "untrusted_worker.py")
_START_SECONDS = 10.0  # to start the process and define the function
_CPU_SECONDS = 3600  # of a process whose parent was killed
_MOST_CODE = 1 << 20


class _TooLong(TimeoutError):
    """A call's own limit, and no other around it."""


class LockedDownFunction:
    """A function whose code runs in another process; each call sends its arguments there and returns what it answers.

    Arguments and results are plain data: numbers, texts, None, bytes, lists, tuples, sets and dicts. The process is ended when it takes
    too long, and with this object; the next call starts another.

    Args:
        code: Python that defines a function; of several, the first is taken, and it does not see the others.
        seconds: of one call.
        memory_bytes: of the process.

    Raises:
        RuntimeError: the process cannot be started, or ended by itself.
        Exception: what the code raises, where it is one of Python's own exceptions; else RuntimeError.
    """

    def __init__(self, code: str, seconds: float = 60.0, memory_bytes: int = 1 << 30) -> None:
        if sys.platform == "win32":
            raise RuntimeError("create_locked_down_function needs Linux or macOS, which can limit a process")
        self.code, self.seconds, self.memory_bytes = code, seconds, memory_bytes
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        with self._lock:
            self.__name__ = self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns.

        Raises:
            TimeoutError: it took longer than `seconds`.
            TypeError: an argument is no plain data.
        """
        message = frame({
            "args": [pack_value(value) for value in args], "kwargs": {k: pack_value(v) for k, v in kwargs.items()}
        })  # fmt: skip
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask(message, self.seconds)

    def close(self) -> None:
        """Ends the process and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None and not sys.is_finalizing():
            self.close()

    def _start(self) -> str:
        if len(self.code) > _MOST_CODE:
            raise ValueError(f"the code has {len(self.code)} characters, and at most {_MOST_CODE} are run")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", _WORKER, str(self.memory_bytes), str(_CPU_SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env={}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        return str(self._ask(frame({"code": self.code}), _START_SECONDS))

    def _ask(self, message: bytes, seconds: float) -> Any:
        try:
            reply = self._exchange(message, time.monotonic() + seconds)
        except _TooLong:
            self.close()
            raise TimeoutError(f"the function took longer than {seconds:g} seconds") from None
        except (
            BaseException
        ):  # a limit of `execute_with_time_limit` too: half an answer would be the next one's
            self.close()
            raise
        if "error" not in reply:
            return unpack_value(reply.get("value"))
        kind = getattr(builtins, str(reply["error"]), None)
        text = str(reply.get("text"))
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                raise_this = kind(text)
            except TypeError:  # such as UnicodeDecodeError, which takes five arguments
                raise_this = RuntimeError(f"{reply['error']}: {text}")
            raise raise_this
        raise RuntimeError(f"{reply['error']}: {text}")

    def _exchange(self, message: bytes, deadline: float) -> dict[str, Any]:
        """Sends a frame and reads one; the process may answer anything, or nothing."""
        into, outof = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(into, False)
        left = memoryview(message)
        while left:
            self._wait([], [into], deadline)
            try:
                left = left[os.write(into, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._ended() from None
        (size,) = struct.unpack("<I", self._read(outof, 4, deadline))
        if size > MOST_BYTES:
            raise RuntimeError(f"the function answers {size} bytes, and at most {MOST_BYTES} are read")
        try:
            reply = json.loads(self._read(outof, size, deadline))
            if not isinstance(reply, dict):
                raise ValueError(f"a {type(reply).__name__}")
            unpack_value(reply.get("value"))
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise RuntimeError(f"the function's process answers what is no answer: {error}") from None
        return reply

    def _read(self, source: int, size: int, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            self._wait([source], [], deadline)
            part = os.read(source, min(size - len(found), 1 << 20))
            if not part:
                raise self._ended()
            found += part
        return bytes(found)

    def _wait(self, readable: list[int], writable: list[int], deadline: float) -> None:
        poll = select.poll()
        for number in readable:
            poll.register(number, select.POLLIN)
        for number in writable:
            poll.register(number, select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise _TooLong

    def _ended(self) -> RuntimeError:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
        how = (
            "closed its pipes"
            if code is None
            else f"ended by signal {-code}"
            if code < 0
            else f"ended with exit code {code}"
        )
        return RuntimeError(
            f"the function's process {how}; its limit of memory is {self.memory_bytes >> 20} MiB"
        )


def create_locked_down_function(
    code: str, seconds: float = 60.0, memory_bytes: int = 1 << 30
) -> LockedDownFunction:
    """A function from code that a model wrote, which runs in a process of its own; see `LockedDownFunction`."""
    return LockedDownFunction(code, seconds, memory_bytes)


def check_python_modules(code: str) -> tuple[bool, dict[str, Any]]:
    """Whether code imports modules of Python's own library only; the code is read and not run.

    Args:
        code: Python.

    Returns:
        Whether it does, and "stdlib", "non_stdlib" (sorted names of modules), "relative_imports" (their number), and "error" where it is no
        Python.
    """
    found: dict[str, Any] = {"stdlib": [], "non_stdlib": [], "relative_imports": 0}
    try:
        if len(code) > _MOST_CODE:
            raise ValueError(f"{len(code)} characters are more than {_MOST_CODE}")
        tree = ast.parse(code)
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found["relative_imports"] += bool(node.level)
                names |= {node.module} if node.module and not node.level else set()
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "id", getattr(node.func, "attr", None))
                if called in ("__import__", "import_module"):
                    names |= {str(node.args[0].value)}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return False, {**found, "error": f"{type(error).__name__}: {error}"}
    for name in sorted({name.partition(".")[0] for name in names}):
        found["stdlib" if name in sys.stdlib_module_names else "non_stdlib"].append(name)
    return not found["non_stdlib"] and not found["relative_imports"], found


def execute_with_time_limit(seconds: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function raises TimeoutError when it runs longer.

    The function runs in this process and thread, so what it changes stays changed; code that nobody has read belongs into
    `create_locked_down_function`, whose process is ended with it. A call into C that does not return is not interrupted.

    Args:
        seconds: above 0.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(
            f"execute_with_time_limit({seconds!r}): give seconds above 0, as in @execute_with_time_limit(5)"
        )

    def limit(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            in_main = threading.current_thread() is threading.main_thread()
            with (_by_signal if in_main and hasattr(signal, "setitimer") else _by_thread)(seconds):
                return function(*args, **kwargs)

        return limited

    return limit


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block by the alarm signal; an alarm around it goes on counting."""
    started = time.monotonic()

    def stop(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # again, where the block catches the first
        raise TimeoutError(f"it ran longer than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # once more, should the alarm have come between
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - started), 1e-3))


@contextmanager
def _by_thread(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block by a second thread, where no signal can: outside the main thread, and on Windows."""
    ident, ended, fired = threading.get_ident(), threading.Lock(), []

    def stop() -> None:
        with ended:
            if not fired:
                fired.append(True)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(ident), ctypes.py_object(TimeoutError)
                )

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError as error:
        if not fired:
            raise
        raise TimeoutError(f"it ran longer than {seconds:g} seconds") from error
    finally:
        timer.cancel()
        with ended:
            fired.append(True)
