"""The weights of all experts of a layer in the blocks of ggml's types, as a GGUF file holds them.

A stack is [E, N, K]: E experts, N rows and K columns of each. An expert holds C matrices of N / C rows one below the other (gate,
then up). A file holds the first matrices of all experts in one tensor, the second in another, each in a type of its own, and so do
the codes here: they are the bytes of the file's tensors, one behind the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from oribi.kernels.ggml_blocks import BLOCK_TYPES, decode_blocks, write_blocks


@dataclass
class BlockStack:
    """A stack in blocks of ggml types.

    Args:
        shape: (E, N, K), K a multiple of a block's values.
        kinds: of each of the C matrices of an expert, a name in `BLOCK_TYPES`.
        codes: [bytes] uint8: of the first matrix of all experts, then of the second.
    """

    shape: tuple[int, int, int]
    kinds: tuple[str, ...]
    codes: torch.Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], kinds: tuple[str, ...], device: torch.device | str = "meta"
    ) -> "BlockStack":
        """A stack whose values are still to be written into `tensor(part)`."""
        experts, rows, columns = shape
        size = sum(experts * rows // len(kinds) * _row_bytes(kind, columns) for kind in kinds)
        return cls(shape, kinds, torch.empty(size, dtype=torch.uint8, device=device))

    @property
    def parts(self) -> int:
        """C."""
        return len(self.kinds)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def moved(self, device: torch.device, codes: torch.Tensor) -> "BlockStack":
        """This stack with other memory for its codes, which are all that it holds."""
        return replace(self, codes=codes)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        return iter((self.codes,))

    def tensor(self, part: int) -> torch.Tensor:
        """[E, N / C, bytes of a row] uint8: one matrix of each expert, as a view of the codes."""
        experts, rows, columns = self.shape
        sizes = [experts * rows // self.parts * _row_bytes(kind, columns) for kind in self.kinds]
        return self.codes.split(sizes)[part].view(experts, rows // self.parts, -1)

    def write(self, out: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        """As of `StackCodes`, with the bits of the gguf package."""
        for part, (kind, rows) in enumerate(zip(self.kinds, out.chunk(self.parts, dim=1))):
            write_blocks(self.tensor(part), kind, rows, experts)

    def matrix(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `StackCodes`."""
        expert, part = divmod(place, self.parts)
        codes = self.tensor(part)[expert]
        out = torch.empty(len(codes), self.shape[2], dtype=dtype, device=codes.device)
        decode_blocks(codes, self.kinds[part], out)
        return out


def _row_bytes(kind: str, columns: int) -> int:
    return columns // BLOCK_TYPES[kind].values * BLOCK_TYPES[kind].nbytes
