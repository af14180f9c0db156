"""A 16-bit checkpoint as the GGUF file of a quantisation method would hold it: its tensors in the codes that the export writes."""

from collections.abc import Callable, Mapping

import torch
from transformers import PretrainedConfig

from oribi.config_setting import KEPT_CODES
from oribi.errors import ConfigError
from oribi.gguf.file import Type
from oribi.gguf.mixes import mix_of
from oribi.gguf.quantize import encode
from oribi.gguf.stacks import PARTS, first_matrices, keeps_codes, types_of_stacks
from oribi.gguf.writer import Entry, plan_file
from oribi.kernels.block_stack import BlockStack
from oribi.kernels.ggml_blocks import BLOCK_TYPES, BlockCodes, decode_blocks
from oribi.tensors import TensorSource

_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


def kept_method(name: str) -> str:
    """The name of a method whose codes are kept in memory.

    Raises:
        ConfigError: there is none of that name, or its codes are not kept.
    """
    method = mix_of(name).name
    if method not in KEPT_CODES:
        raise ConfigError(
            f"train_for = {name!r}: its codes are not kept in memory; allowed are {', '.join(KEPT_CODES)}"
        )
    return method


class PlannedFile:
    """The types that a GGUF file of a method gives to the tensors of a model.

    Args:
        config: of the model.
        shapes: of its tensors as its checkpoint holds them, a tied head left out.
        method: one of `KEPT_CODES`.

    Raises:
        ConfigError: embeddings and head are one matrix in the model, and two of different types in the file.
        ExportError: the model's family has no GGUF files, or its file no place for a tensor.
    """

    def __init__(self, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], method: str) -> None:
        # by name in the checkpoint; several where the file holds one tensor in parts
        self.entries: dict[str, list[Entry]] = {}
        for entry in plan_file(config, dict(shapes), method):
            for name in entry.tensor.sources:
                self.entries.setdefault(name, []).append(entry)
        for name, found in self.entries.items():
            # a tied head, which some architectures write again, is read as the embeddings
            types = {entry.type for entry in found}
            if len(types) > 1:
                raise ConfigError(
                    f"train_for = {method}: llama.cpp holds {name} of this {config.model_type} model twice, as "
                    f"{' and '.join(sorted(kind.name for kind in types))}, and the model has it once; take q8_0"
                )
            if found[0].tensor.part[1] == 1:
                del found[1:]
        stacks = types_of_stacks((found[0].tensor, found[0].type) for found in self.entries.values())
        self.stack_types = {stack: kinds for stack, kinds in stacks.items() if keeps_codes(kinds)}

    def block_type(self, name: str) -> str | None:
        """The type of a matrix's codes, as `GGUFSource.block_type` tells it of a file."""
        if name not in self.entries:
            return None
        entry = self.entries[name][0]
        kept = entry.tensor.keeps_rows_whole and len(entry.shape) == 2
        return entry.type.name if kept and entry.type.name in BLOCK_TYPES else None


class CodedSource(PlannedFile):
    """A checkpoint whose tensors are read as the values that a GGUF file of it will have, or as its codes.

    Args:
        source: the checkpoint, each matrix of experts by itself.
        config: of the model.
        shapes: names and shapes of the model's tensors in the checkpoint.
        method: one of `KEPT_CODES`.

    Raises:
        ConfigError, ExportError: as `PlannedFile`.
    """

    def __init__(
        self,
        source: TensorSource,
        config: PretrainedConfig,
        shapes: Mapping[str, tuple[int, ...]],
        method: str,
    ) -> None:
        super().__init__(config, shapes, method)
        self.source, self.shapes, self.close = source, source.shapes, source.close

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """Values [N, ...] of the file's codes, in the checkpoint's order; float32 if `dtype` is None."""
        if name not in self.entries:
            return self.source.read(name, device, dtype)
        return self._parts(name, device, lambda codes, entry: _decoded(codes, entry, dtype or torch.float32))

    def read_blocks(self, name: str, device: torch.device) -> BlockCodes:
        """The codes of a matrix that has a `block_type`, its rows in the checkpoint's order."""
        entry = self.entries[name][0]
        codes = self._parts(name, device, lambda codes, _: codes)
        return BlockCodes((len(codes), entry.shape[1]), entry.type.name, codes.contiguous())

    def stack_codes(self, prefix: str, stack: str, device: torch.device) -> BlockStack:
        """The codes of one of `stack_types`, quantised matrix by matrix; arguments as of `GGUFSource.stack_codes`."""
        entry, parts = self.entries[first_matrices(prefix, stack)[0]][0], PARTS[stack]
        experts, rows, columns = entry.shape
        shape = (experts, len(parts) * rows // entry.tensor.joined, columns)
        found = BlockStack.empty(shape, self.stack_types[f"{prefix}.{stack}"], device)
        for part, name in enumerate(parts):
            for expert, place in enumerate(found.tensor(part)):
                place.copy_(self._parts(f"{prefix}.{expert}.{name}.weight", device, lambda codes, _: codes))
        return found

    def _parts(
        self, name: str, device: torch.device, of_codes: Callable[[torch.Tensor, Entry], torch.Tensor]
    ) -> torch.Tensor:
        """What is made of a tensor's codes as the export encodes them, in the checkpoint's order."""
        values, parts = self.source.read(name, device, None), []
        for entry in self.entries[name]:
            codes = torch.from_numpy(encode(entry.tensor.to_gguf(values), entry.type)).to(device)
            parts.append(entry.tensor.from_gguf(of_codes(codes, entry)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _decoded(codes: torch.Tensor, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """The values of codes as a reader of the file has them, in its order."""
    if entry.type in _FLOATS:
        values = codes.view(_FLOATS[entry.type]).float()
    else:
        rows = codes.view(-1, codes.shape[-1])
        columns = codes.shape[-1] // BLOCK_TYPES[entry.type.name].nbytes * BLOCK_TYPES[entry.type.name].values
        # a decay is the logarithm of what a file holds, rounded once
        values = torch.empty(
            len(rows), columns, dtype=torch.float32 if entry.tensor.shift else dtype, device=codes.device
        )
        decode_blocks(rows, entry.type.name, values)
        values = values.view(*codes.shape[:-1], columns)
    if entry.tensor.shift:
        values = values - entry.tensor.shift
    return values if entry.tensor.decay else values.to(dtype)
