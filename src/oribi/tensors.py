"""Named tensors that are read one at a time: what checkpoints, GGUF files and trained models have in common."""

from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from oribi.errors import ModelError


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by the model's parameter names, from headers alone."""

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """One tensor in memory of its own, cast to `dtype`; None keeps the stored dtype."""

    def close(self) -> None:
        """Closes open files."""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, some rows at a time: the masks of a whole embedding are large."""
    rows = max(1, (1 << 22) // max(tensor[0].numel(), 1)) if tensor.dim() > 1 else len(tensor)
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows))


def open_bytes(path: Path) -> BinaryIO:
    """Open a model's file for reading.

    Raises:
        ModelError: this user may not read it, or it is gone.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
