"""One tensor of a GGUF file: its names there and in the checkpoint, and how the values of one become those of the other.

N rows, K columns, r rank of an adapter.
"""

from dataclasses import dataclass

import torch

from oribi.errors import ModelError


@dataclass(frozen=True)
class ValueHeads:
    """The value heads of a gated delta rule: one key head's stand together in a checkpoint, and in a file one of each in turn.

    Args:
        heads, key_heads: how many there are of values and of keys.
        before: rows that belong to no value head, before the others.
        columns: not the rows but the columns are theirs.
    """

    heads: int
    key_heads: int
    before: int = 0
    columns: bool = False

    def to_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] or [N, K] in the file's order."""
        return self._swapped(values, self.key_heads, self.heads // self.key_heads)

    def from_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] or [N, K] in the checkpoint's order.

        Raises:
            ModelError: the heads cannot share the rows or columns.
        """
        own = values.shape[1 if self.columns else 0] - self.before
        if own < 0 or not self.key_heads or self.heads % self.key_heads or not self.heads or own % self.heads:
            raise ModelError(
                f"the GGUF file is damaged: {self.heads} value heads of {self.key_heads} key heads cannot share "
                f"{own} rows. Download it again"
            )
        return self._swapped(values, self.heads // self.key_heads, self.key_heads)

    def _swapped(self, values: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        dim = 1 if self.columns else 0
        before, own = values.split([self.before, values.shape[dim] - self.before], dim)
        own = own.unflatten(dim, (outer, inner, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        return torch.cat([before, own], dim) if self.before else own


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name in the GGUF file, its name in the checkpoint, and how one becomes the other.

    Args:
        name, source: in the file and in the checkpoint.
        heads: how many heads share its rows, where llama.cpp wants the rows of a head in pairs; else 0.
        part: which of how many equal parts of its rows it is, where the checkpoint holds several layers as one.
        shift: added to the checkpoint's values, because the family multiplies by (shift + weight).
        single: the dimension of size 1 that it has in the checkpoint alone: 1 of a depthwise convolution's [N, 1, W], 0 of one row [1, K].
        value_heads: whose rows or columns the file has in another order.
        decay: the checkpoint holds the logarithm of a decay, and the file minus the decay.
        experts: of how many experts the file holds the matrices in one tensor; `source` has a star for an expert's number, and a
            bar between the names of matrices of one expert that lie one behind the other.
    """

    name: str
    source: str
    heads: int = 0
    part: tuple[int, int] = (0, 1)
    shift: float = 0.0
    single: int | None = None
    value_heads: ValueHeads | None = None
    decay: bool = False
    experts: int = 0

    @property
    def sources(self) -> list[str]:
        """The checkpoint's names of what the file holds in this tensor."""
        if not self.experts:
            return [self.source]
        before, after = self.source.split("*.")
        parts, dot, leaf = after.partition(".")
        each = [f"{part}{dot}{leaf}" for part in parts.split("|")]
        return [f"{before}{i}.{one}" for i in range(self.experts) for one in each]

    @property
    def joined(self) -> int:
        """How many matrices of each expert lie one behind the other."""
        return self.source.count("|") + 1

    def to_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """The checkpoint's values [N, ...] as llama.cpp wants them."""
        values = self._rows_to_gguf(values)
        if self.value_heads is not None and self.value_heads.columns:
            values = self.value_heads.to_gguf(values)
        if self.single is not None:
            values = values.squeeze(self.single)
        if self.decay:
            return -values.float().exp()
        return values.float() + self.shift if self.shift else values

    def adapter_to_gguf(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors [r, K] and [N, r] of an update of the checkpoint's values, as llama.cpp wants them."""
        if self.value_heads is not None and self.value_heads.columns:
            return self.value_heads.to_gguf(a), b
        return a, self._rows_to_gguf(b)

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor whose sources have `shape` in the checkpoint."""
        if self.experts:
            return (self.experts, self.joined * shape[0], *shape[1:])
        if self.single is not None:
            return (*shape[: self.single], *shape[self.single + 1 :])
        return (shape[0] // self.part[1], *shape[1:])

    def shape_in_checkpoint(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each source of a tensor that has `shape` in the file."""
        if self.experts:
            return (shape[1] // self.joined, *shape[2:])
        if self.single == 0:  # some programs write it as a matrix
            return (1, shape[-1])
        return shape if self.single is None else (*shape[: self.single], 1, *shape[self.single :])

    def from_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """A file's values [N, ...] in the checkpoint's order; the shift is left to the reader.

        Raises:
            ModelError: the rows cannot be divided among the heads.
        """
        if self.value_heads is not None:
            values = self.value_heads.from_gguf(values)
        if self.decay:
            return (-values.float()).log()
        if self.single is not None:
            return values.view(1, -1) if self.single == 0 else values.unsqueeze(self.single)
        if not self.heads:
            return values
        if self.heads < 0 or len(values) % (2 * self.heads):
            raise ModelError(
                f"the GGUF file is damaged: {self.heads} heads cannot share {len(values)} rows of a query or key matrix. "
                "Download it again"
            )
        return values.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).reshape(values.shape)

    @property
    def keeps_rows_whole(self) -> bool:
        """Whether a checkpoint's rows are rows of the file, in whatever order: what a row's values are coded in can stay."""
        of_columns = self.value_heads is not None and self.value_heads.columns
        return not (of_columns or self.single is not None or self.decay or self.shift or self.experts)

    def _rows_to_gguf(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...]: the file's rows, in its order."""
        index, count = self.part
        values = values.chunk(count)[index] if count > 1 else values
        if self.heads:
            # rows of a head: first halves then second halves -> pairs
            values = values.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).reshape(values.shape)
        if self.value_heads is not None and not self.value_heads.columns:
            values = self.value_heads.to_gguf(values)
        return values
