"""Output whose reader may go away (`| head -1`, a closed terminal): work that nobody reads about is still done."""

import os
import sys
from collections.abc import Callable
from typing import Any


class LastingStream:
    """A text stream that drops what can no longer be written.

    Args:
        stream: gives the stream to write to, at each time; None counts as closed.
    """

    def __init__(self, stream: Callable[[], Any]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def write(self, text: str) -> int:
        try:
            self._stream().write(text)
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream().flush()
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)

    def isatty(self) -> bool:
        try:
            return self._stream().isatty()
        except (ValueError, AttributeError):
            return False

    def _drop(self, error: Exception) -> None:
        """Let what is still buffered go nowhere, or Python would complain at its end."""
        if isinstance(error, BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream().fileno())
            os.close(nowhere)


def say(text: str) -> None:
    """Print a line to standard output, if somebody reads it."""
    print(text, file=LastingStream(lambda: sys.stdout), flush=True)
