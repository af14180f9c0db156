"""Files of JSON lines that another process appends to, read as they grow: each line once, a half-written one later."""

import os
from pathlib import Path
from typing import Any

from oribi.run_record import step_entry

MOST_BYTES = 8 * 2**20  # of one read, so that a page is drawn before a huge file is read
LONGEST_LINE = 64 * 2**20
_HEAD = 256  # bytes by which a file is known: a run's first line holds its time


class FollowedLines:
    """The objects with a step in a file that grows.

    Args:
        path: of the file; it need not exist yet.

    Attributes:
        damaged: whole lines that hold no such object. size, offset: bytes of the file, and bytes that were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.offset = self.size = self.damaged = 0
        self._open_end = 0  # bytes of a last line that has no end yet
        self._file: tuple[int, int] | None = None
        self._head = b""

    @property
    def is_complete(self) -> bool:
        """Whether the last read reached the end of the file."""
        return self.offset + self._open_end >= self.size

    def read(self, most_bytes: int = MOST_BYTES) -> tuple[bool, list[dict[str, Any]]]:
        """The objects that were added since the last read.

        Args:
            most_bytes: about as many are read.

        Returns:
            Whether the file begins anew (a run was overwritten or resumed), so that what was read before counts no more; and
            the new objects in order.
        """
        try:
            with self.path.open("rb") as file:
                restarted = self._is_another(file)
                if restarted:
                    self._forget()
                stat = os.fstat(file.fileno())
                self._file, self.size = (stat.st_dev, stat.st_ino), stat.st_size
                if len(self._head) < _HEAD:
                    file.seek(0)
                    self._head = file.read(_HEAD)
                return restarted, self._new_entries(file, most_bytes)
        except OSError:  # not there yet, removed, or on a disk that went away
            restarted = self._file is not None
            self._forget()
            return restarted, []

    def _is_another(self, file: Any) -> bool:
        if self._file is None:
            return False
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self.offset:
            return True
        return (
            file.read(len(self._head)) != self._head
        )  # the number of a removed file is given to the next one

    def _new_entries(self, file: Any, most_bytes: int) -> list[dict[str, Any]]:
        file.seek(self.offset)
        block = file.read(most_bytes)
        while b"\n" not in block and len(block) < LONGEST_LINE and (more := file.read(most_bytes)):
            block += more
        end = block.rfind(b"\n") + 1
        if not end and len(block) >= LONGEST_LINE:  # no run writes such a line; read past it
            end = len(block)
        self.offset += end
        self._open_end = len(block) - end if self.offset + len(block) - end >= self.size else 0
        found = []
        for line in filter(bytes.strip, block[:end].split(b"\n")):
            entry = step_entry(line.decode("utf-8", errors="replace"))
            if entry is None:
                self.damaged += 1
            else:
                found.append(entry)
        return found
