"""A few values of each tensor, by which a file of weights is told from another: of another base, adapter, scale or order.

A fixed choice of places serves every tensor of a shape, whatever its format, so that a file quantised by another program can
be compared too. N rows, K columns.
"""

import math
from collections import Counter
from typing import Any

import torch

from oribi.gguf.source import GGUFSource
from oribi.save.trained import Change
from oribi.tensors import TensorSource

COUNT = 16
_STEP = (math.sqrt(5) - 1) / 2  # multiples of it spread evenly between 0 and 1


def sampled_places(shape: tuple[int, ...]) -> torch.Tensor:
    """Indices [COUNT] into a tensor laid out flat."""
    total = math.prod(shape)
    return torch.tensor([int((i + 1) * _STEP % 1 * total) for i in range(COUNT)], dtype=torch.int64)


class SampledSource:
    """A source whose tensors are sampled as they are read.

    Attributes:
        values: name -> [COUNT] float32, of what was read.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.values: dict[str, torch.Tensor] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._source.shapes()

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self._source.read(name, device, dtype)
        if name not in self.values and tensor.numel():
            places = sampled_places(tuple(tensor.shape)).to(tensor.device)
            self.values[name] = tensor.reshape(-1)[places].float().cpu()
        return tensor

    def close(self) -> None:
        self._source.close()


def sample_all(source: TensorSource) -> SampledSource:
    """A source all of whose tensors were read once, one at a time."""
    sampled = SampledSource(source)
    for name in source.shapes():
        sampled.read(name, torch.device("cpu"), None)
    return sampled


def stored_as(source: TensorSource) -> str:
    """How most of a source's values are stored: a quantised type of GGUF, a format as its source calls it, or "floats"."""
    if isinstance(source, GGUFSource):
        sizes: Counter[str] = Counter()
        for tensor in source.file.tensors.values():
            sizes[tensor.kind.name] += math.prod(tensor.shape)
        kind = sizes.most_common(1)[0][0]
        return "floats" if kind in ("F32", "F16", "BF16") else kind
    return getattr(source, "stored_as", "floats")


def described_samples(sampled: SampledSource, changes: dict[str, Change]) -> dict[str, Any]:
    """What probes.json keeps of a file's tensors.

    Args:
        sampled: the file's source after every tensor was read.
        changes: what training changed.

    Returns:
        name -> {"shape", "values", "update"}; `update` is what the adapter added at the same places, None where it added
        nothing or is no low-rank update.
    """
    shapes = sampled.shapes()
    return {
        name: {
            "shape": list(shapes[name]),
            "values": _rounded(values),
            "update": _sampled_update(changes.get(name), shapes[name]),
        }
        for name, values in sampled.values.items()
    }


def _sampled_update(change: Change | None, shape: tuple[int, ...]) -> list[float] | None:
    if change is None or not change.updates or change.replacement or change.rows or len(shape) != 2:
        return None
    if any(update.magnitude is not None for update in change.updates):
        return None
    rows, columns = sampled_places(shape) // shape[1], sampled_places(shape) % shape[1]
    found = torch.zeros(COUNT)
    for update in change.updates:
        found += update.scale * (update.b[rows] * update.a[:, columns].T).sum(-1)
    return _rounded(found)


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
