"""The page's side of the process in which a run's model answers, and whether there is a GPU for it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from oribi.errors import OribiError
from oribi.run_record import newest_model
from oribi.text import gibibytes
from oribi.watch.runs import Watched, WatchedRun

FREE_SHARE = 0.5  # of a GPU's memory, below which another program is using it
_LAST_LINES = 5  # of what a process said before it ended


class TalkError(OribiError, RuntimeError):
    """The model cannot answer; the message says why."""


class Talk:
    """At most one model in a process of its own, for all visitors.

    Attributes:
        run: name of the run whose model is loaded; empty where none is. compares: whether its base answers, too.
        is_loading: whether a model is being loaded now.
    """

    def __init__(self) -> None:
        self.run, self.compares, self.is_loading = "", False, False
        self._process: subprocess.Popen | None = None
        self._errors: Any = None
        self._asking = threading.Lock()

    def load(self, run: WatchedRun) -> None:
        """Load a run's model in place of the one that is loaded.

        Raises:
            TalkError: it cannot be loaded.
        """
        self.close()
        with self._asking:
            self.is_loading = True
            try:
                self._start(run)
            finally:
                self.is_loading = False

    def _start(self, run: WatchedRun) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "oribi.watch.answering", str(run.folder)], text=True, encoding="utf-8", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        ready = self._reply()
        self.run, self.compares = run.name, ready["compares"]

    def answer(
        self, model: str, messages: list[dict[str, str]], max_new_tokens: int, temperature: float | None
    ) -> Iterator[dict[str, Any]]:
        """What a model says, piece by piece: {"piece": text} and at the end {"text": ..., "tokens": ..., "stopped": ...}.

        Raises:
            TalkError: it cannot answer.
        """
        request = {
            "model": model,
            "messages": messages,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
        with self._asking:
            self._send(request)
            reply = self._reply()
            try:
                while "piece" in reply:
                    yield reply
                    reply = self._reply()
                yield reply
            except GeneratorExit:  # the visitor left; what is still to come is no answer to the next question
                while "piece" in reply:
                    reply = self._reply()

    def losses(self, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
        """The mean loss of each row's trained tokens, by model.

        Raises:
            TalkError: they cannot be measured.
        """
        with self._asking:
            self._send({"rows": rows})
            return self._reply()["losses"]

    def close(self) -> None:
        """End the process, and with it whatever it holds on a GPU."""
        process, self._process, self.run = self._process, None, ""
        if process is not None:
            process.kill()  # it writes nothing that could be half-written
            process.wait()
            process.stdin.close()
            process.stdout.close()
            self._errors.close()

    def _send(self, request: dict[str, Any]) -> None:
        try:
            if self._process is None:
                raise TalkError("no model is loaded; load one first")
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise TalkError(self._why_it_ended()) from None

    def _reply(self) -> dict[str, Any]:
        process = self._process
        try:
            line = process.stdout.readline() if process is not None else ""
        except ValueError:  # closed by another visitor
            line = ""
        if not line:
            raise TalkError(self._why_it_ended())
        reply = json.loads(line)
        if "error" in reply:
            raise TalkError(reply["error"])
        return reply

    def _why_it_ended(self) -> str:
        if self._process is None:
            return "the model was unloaded"
        self._process.wait()
        self._errors.seek(0)
        said = "\n".join(self._errors.read().strip().splitlines()[-_LAST_LINES:])
        code = self._process.returncode
        self.close()
        return f"the model's process ended (exit code {code})" + (f":\n{said}" if said else "")


def why_no_talk(run: WatchedRun, watched: Watched) -> str | None:
    """The reason why a run's model cannot be loaded now; None where it can.

    A training is never disturbed: while one of the watched runs trains, or another program uses more than half of the GPU's
    memory, nothing is loaded.
    """
    training = watched.training
    if training:
        return f"{training[0]} trains now and needs the machine; chat when it has finished"
    if run.config is None:
        return "the run has no settings that can be read; chat with `oribi chat FOLDER`"
    if newest_model(run.folder) is None:
        return "the run has saved no model yet"
    return _busy_gpu()


def _busy_gpu() -> str | None:
    """What uses the GPU on which a model would be loaded; None where it is free, or there is none."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if program is None or not first or first == "-1":
        return None
    command = [
        program,
        f"--id={first}",
        "--query-gpu=memory.used,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        # asking through CUDA would take memory on the GPU
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        used, total = (float(part) * 2**20 for part in done.stdout.strip().splitlines()[0].split(","))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None  # loading will tell
    if total - used >= FREE_SHARE * total:
        return None
    return f"{gibibytes(used)} of the GPU's {gibibytes(total)} are in use by another program; chat when it has ended"


def model_words(run: WatchedRun) -> str:
    """Which of a run's models would be loaded, as `oribi chat` says it."""
    found = newest_model(run.folder)
    return found.note.removeprefix("loading ") if found else "nothing"
