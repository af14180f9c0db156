"""llama.cpp itself, where the package xllamacpp is installed: what it generates and how it tokenises.

It judges a GGUF file and is never needed to write one. It runs in a process of its own, so that the trained model survives
its crashes.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from oribi.errors import ExportError
from oribi.gguf import llama_cpp_process

_LOAD_SECONDS = 600


class LlamaCppUnavailable(ExportError):
    """llama.cpp cannot run on this machine, for a reason other than the file."""


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation: its tokens, and the log-probabilities of the likeliest tokens at each place.

    A place is None where llama.cpp withholds it: a token that ends inside a character.
    """

    tokens: list[int]
    logprobs: list[dict[int, float] | None]


def is_installed() -> bool:
    """Whether llama.cpp can be asked on this machine."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, until `close` or the end of a `with` block.

    Args:
        path: the file.
        context: tokens of prompt and answer together.
        adapter: LoRA adapter as GGUF, applied at full strength.

    Raises:
        LlamaCppUnavailable: xllamacpp is not installed or does not run here, or the loopback interface is blocked.
        ExportError: llama.cpp does not load the file; the message is llama.cpp's.
    """

    def __init__(self, path: str | Path, context: int = 512, adapter: str | Path | None = None) -> None:
        if not is_installed():
            raise LlamaCppUnavailable("xllamacpp is not installed (pip install xllamacpp)")
        # in a small model, threads would wait for each other longer than a layer takes
        small = Path(path).stat().st_size < 512 << 20
        threads = 1 if small else min(os.cpu_count() or 1, 8)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                # isolated: this folder's modules would hide installed ones of the same name
                [sys.executable, "-I", llama_cpp_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except (OSError, ValueError) as error:
            raise LlamaCppUnavailable(f"no process for llama.cpp could be started: {error}") from error
        adapter = None if adapter is None else str(adapter)
        arguments = {"path": str(path), "context": context, "threads": threads, "adapter": adapter}
        arguments["search_path"] = sys.path
        try:
            found = self._ask(arguments, _LOAD_SECONDS)
        except BaseException:
            self.close()
            raise
        if "refused" in found:
            words = self._last_words()
            self.close()
            if "unknown model architecture" in words or "unknown pre-tokenizer type" in words:
                raise LlamaCppUnavailable(f"this version of llama.cpp does not know the model: {words}")
            raise ExportError(f"llama.cpp does not load {Path(path).name}: {words or found['refused']}")

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def close(self) -> None:
        """End the process and its server."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close()
            except BrokenPipeError:  # what was not sent any more has no reader
                continue

    def generate(
        self, ids: Sequence[int], tokens: int, top: int = 1, *, forced: int | None = None
    ) -> Continuation:
        """Greedy continuation of a prompt.

        Args:
            ids: the prompt's token ids.
            tokens: most new tokens; generation ends earlier after an end token, which is included.
            top: how many log-probabilities each place has.
            forced: a token that is made the likeliest everywhere.

        Raises:
            LlamaCppUnavailable: llama.cpp crashed, took too long, or answered in an unknown form.
        """
        body = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "n_probs": top,
                "return_tokens": True, "cache_prompt": False}  # fmt: skip
        if forced is not None:
            body["logit_bias"] = [[forced, 1000.0]]
        answer = self._post("/completion", body)
        try:
            return _read_answer(answer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unknown_form("/completion", answer) from error

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of a text; `special` reads control tokens in it, `add_special` adds BOS and EOS as set in the file."""
        body = {"content": text, "add_special": add_special, "parse_special": special}
        return _entry(self._post("/tokenize", body), "/tokenize", "tokens", list)

    def render(self, messages: list[dict[str, str]], **values: str) -> str:
        """A conversation as the file's own chat template renders it, with the start of the answer.

        Args:
            messages: the conversation.
            values: further variables of the template; `date_string` replaces today's date.
        """
        body = {"messages": messages, "chat_template_kwargs": values}
        return _entry(self._post("/apply-template", body), "/apply-template", "prompt", str)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        found = self._ask({"path": path, "body": body}, llama_cpp_process.TIMEOUT)
        if "answer" not in found:
            raise _unknown_form(path, found)
        return found["answer"]

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send one line, read one line."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LlamaCppUnavailable(self._how_it_ended()) from error
        deadline = time.monotonic() + seconds
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise LlamaCppUnavailable(f"llama.cpp gave no answer within {seconds:.0f} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise LlamaCppUnavailable(self._how_it_ended())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        found = json.loads(line)
        if "unavailable" in found:
            raise LlamaCppUnavailable(f"llama.cpp could not be asked: {found['unavailable']}")
        return found

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"with signal {-code}" if code < 0 else f"with exit code {code}"
        return f"llama.cpp's process ended {how}: {self._last_words()}"

    def _last_words(self) -> str:
        """The first error that llama.cpp printed, else its last line."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if line.strip()]
        return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")[:300]


def _read_answer(answer: dict[str, Any]) -> Continuation:
    # withheld of tokens that end within a character: which they were can be told where only one order of places fits
    tokens, given = list(answer["tokens"]), answer.get("completion_probabilities", [])
    ids = [place["id"] for place in given]
    first, last = _earliest(tokens, ids), _earliest(tokens[::-1], ids[::-1])[::-1]
    logprobs: list[dict[int, float] | None] = [None] * len(tokens)
    for place, early, late in zip(given, first, last):
        if early is not None and late is not None and early == len(tokens) - 1 - late:
            logprobs[early] = {other["id"]: other["logprob"] for other in place["top_logprobs"]}
    return Continuation(tokens, logprobs)


def _earliest(tokens: list[int], ids: list[int]) -> list[int | None]:
    """Where each of `ids` stands at the earliest, if they stand among the tokens in this order."""
    at = iter(range(len(tokens)))
    return [next((place for place in at if tokens[place] == one), None) for one in ids]


def _entry(answer: Any, path: str, key: str, kind: type) -> Any:
    found = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(found, kind):
        raise _unknown_form(path, answer)
    return found


def _unknown_form(path: str, answer: Any) -> LlamaCppUnavailable:
    return LlamaCppUnavailable(f"llama.cpp answered {path} in an unknown form: {str(answer)[:200]!r}")
