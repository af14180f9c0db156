"""Loading from a GGUF file: its config and its tensors, dequantised one at a time.

A GGUF file keeps the network under llama.cpp's names; what differs besides the names is undone by `names.Tensor`.
"""

from functools import cached_property
from pathlib import Path

import torch

from oribi.errors import ModelError
from oribi.gguf.file import GGUFFile, Type
from oribi.gguf.metadata import config_of_file
from oribi.gguf.names import tensors_to_read
from oribi.gguf.stacks import first_matrices, keeps_codes, types_of_stacks
from oribi.gguf.tensor import Tensor
from oribi.kernels.block_stack import BlockStack
from oribi.kernels.expert_stack import StackCodes
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes
from oribi.kernels.mxfp4 import MXFP4Stack, from_blocks


class GGUFSource:
    """Tensors of a GGUF file under the model's parameter names, dequantised as they are read.

    Args:
        path: the file.

    Raises:
        ModelError: it is not a GGUF file, is split, or its architecture is outside the family table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.value = self.file.value
        if (parts := self.value("split.count", 1)) > 1:
            raise ModelError(
                f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge {path.name} whole.gguf`, and load that file"
            )
        self.config = config_of_file(self.file)
        # name in the checkpoint -> the tensor, and which expert's matrix of it
        self._tensors: dict[str, tuple[Tensor, int | None]] = {}
        for tensor in tensors_to_read(self.config, self.file.tensors).values():
            found = self.file.tensors[tensor.name].shape
            dims = 2 if tensor.name.endswith(".bias") else 3
            if tensor.experts and (len(found) != dims or found[0] != tensor.experts):
                raise ModelError(
                    f"{path}: {tensor.name} has shape {list(found)}, and the model {tensor.experts} experts in each layer"
                )
            for index, name in enumerate(tensor.sources):
                self._tensors[name] = tensor, index if tensor.experts else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tensor.shape_in_checkpoint(self.file.tensors[tensor.name].shape)
            for name, (tensor, _) in self._tensors.items()
        }

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        tensor, index = self._tensors[name]
        read_as = torch.float32 if tensor.decay or dtype is None else dtype
        expert = None if index is None else index // tensor.joined
        values = self.file.read(tensor.name, read_as, offset=tensor.shift, index=expert)
        if tensor.joined > 1:
            values = values.chunk(tensor.joined)[index % tensor.joined]
        return tensor.from_gguf(values).to(device, dtype or torch.float32)

    def block_type(self, name: str) -> str | None:
        """The type in `kernels.ggml_blocks.BLOCK_TYPES` whose blocks a matrix's rows are made of; None where its codes cannot be kept."""
        if name not in self._tensors:
            return None
        tensor, _ = self._tensors[name]
        stored = self.file.tensors[tensor.name]
        kept = tensor.keeps_rows_whole and len(stored.shape) == 2
        return stored.kind.name if kept and stored.kind.name in BLOCK_TYPES else None

    def read_blocks(self, name: str, device: torch.device) -> BlockCodes:
        """A matrix of a `block_type` in the file's codes, its rows in the checkpoint's order."""
        tensor, _ = self._tensors[name]
        stored = self.file.tensors[tensor.name]
        # a row is whole blocks, so that rows change places without their codes being read
        codes = tensor.from_gguf(self.file.read_codes(tensor.name)).contiguous()
        return BlockCodes(stored.shape, stored.kind.name, codes.to(device))

    @cached_property
    def stack_types(self) -> dict[str, tuple[str, ...]]:
        """Stacks of experts whose codes are kept, each with the types of an expert's matrices in it."""
        return {stack: kinds for stack, kinds in self._stacks().items() if keeps_codes(kinds)}

    def other_stack_types(self) -> list[str]:
        """The types in stacks of experts whose codes are not kept."""
        left = self._stacks().items() - self.stack_types.items()
        return sorted({kind for _, kinds in left for kind in kinds})

    def _stacks(self) -> dict[str, tuple[str, ...]]:
        tensors = {tensor.name: tensor for tensor, _ in self._tensors.values()}
        return types_of_stacks((tensor, self.file.tensors[name].kind) for name, tensor in tensors.items())

    def stack_codes(self, prefix: str, stack: str, device: torch.device) -> StackCodes:
        """The codes of one of `stack_types`, gate before up.

        Args:
            prefix: name of the module of experts. stack: of the stack within it.
        """
        kinds = self.stack_types[f"{prefix}.{stack}"]
        parts = [self._tensors[name] for name in first_matrices(prefix, stack)]
        experts, rows, columns = self.file.tensors[parts[0][0].name].shape
        shape = (experts, len(parts) * rows // parts[0][0].joined, columns)
        if kinds[0] == Type.MXFP4.name:
            blocks = [self._codes_of(*part) for part in parts]
            codes, scales = (half.contiguous().to(device) for half in from_blocks(torch.cat(blocks, dim=1)))
            return MXFP4Stack(shape, len(parts), codes, scales)
        found = BlockStack.empty(shape, kinds, device)
        for part, lies in enumerate(parts):
            place = found.tensor(part)
            place.copy_(self._codes_of(*lies).reshape(place.shape))
        return found

    def _codes_of(self, tensor: Tensor, index: int) -> torch.Tensor:
        """[E, N, bytes of a row] of a matrix of each expert; `index` is the first expert's."""
        experts, rows, _ = self.file.tensors[tensor.name].shape
        codes = self.file.read_codes(tensor.name).view(experts, tensor.joined, rows // tensor.joined, -1)
        return codes[:, index % tensor.joined]

    def close(self) -> None:
        pass  # nothing stays open
