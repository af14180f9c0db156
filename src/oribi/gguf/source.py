"""Loading from a GGUF file: its config and its tensors, dequantised one at a time.

A GGUF file keeps the network under llama.cpp's names; what differs besides the names is undone by `names.Tensor`.
"""

from pathlib import Path

import torch

from oribi.errors import ModelError
from oribi.gguf.file import GGUFFile, Type
from oribi.gguf.metadata import config_of_file
from oribi.gguf.names import tensors_to_read
from oribi.gguf.tensor import Tensor
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes
from oribi.kernels.mxfp4 import MXFP4Stack, from_blocks

# an expert's matrices -> the stack of the model that holds them, in this order
_STACK_OF = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


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
            raise ModelError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`")
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
        values = self.file.read(tensor.name, read_as, offset=tensor.shift, index=index)
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

    @property
    def in_mxfp4(self) -> set[str]:
        """Names of the stacks of experts all of whose matrices are in MXFP4."""
        return {stack for stack, kinds in self._stacks().items() if kinds == {Type.MXFP4}}

    def expert_types(self) -> list[str]:
        """The types of the experts' matrices whose codes are not kept."""
        kinds = {kind for stack, of_stack in self._stacks().items() for kind in of_stack - {Type.MXFP4}}
        return sorted(kind.name for kind in kinds)

    def _stacks(self) -> dict[str, set[Type]]:
        """Stacks of experts in the model, with the types that their matrices have in the file."""
        found: dict[str, set[Type]] = {}
        for name, (tensor, _) in self._tensors.items():
            if tensor.experts and name.endswith(".weight"):
                prefix, _, part = tensor.source.removesuffix(".weight").partition(".*.")
                found.setdefault(f"{prefix}.{_STACK_OF[part]}", set()).add(
                    self.file.tensors[tensor.name].kind
                )
        return found

    def mxfp4(self, prefix: str, stack: str, device: torch.device) -> MXFP4Stack:
        """The codes of a stack that is `in_mxfp4`, gate before up.

        Args:
            prefix: name of the module of experts. stack: of the stack within it.
        """
        parts = [part for part, whole in _STACK_OF.items() if whole == stack]
        stored = [self._tensors[f"{prefix}.0.{part}.weight"][0].name for part in parts]
        shape = self.file.tensors[stored[0]].shape
        blocks = [self.file.read_codes(name).view(*shape[:2], -1) for name in stored]
        codes, scales = (half.contiguous().to(device) for half in from_blocks(torch.cat(blocks, dim=1)))
        return MXFP4Stack((shape[0], len(parts) * shape[1], shape[2]), len(parts), codes, scales)

    def close(self) -> None:
        pass  # nothing stays open
