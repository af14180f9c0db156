"""The tensors of a checkpoint's experts: read matrix by matrix, however the checkpoint stacks them, and packed as they arrive.

Everything outside a model's memory calls a matrix by the name that the family's checkpoints have for it
(`mlp.experts.3.up_proj.weight`). transformers keeps the experts of a layer in one tensor [E, N, K], and some checkpoints do, too.
"""

from collections.abc import Callable, Collection, Container, Iterator

import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels.expert_stack import PackedStack, PackedWeight
from oribi.kernels.nf4 import BLOCK
from oribi.models.experts import STACKS, Experts, StoredMatrix
from oribi.tensors import TensorSource


def expert_modules(model: nn.Module) -> dict[str, Experts]:
    """The experts of each layer by the module's name, without what PEFT put around them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def matrix_shape(experts: Experts, matrix: StoredMatrix) -> tuple[int, int]:
    """[N, K] of a matrix."""
    return matrix.rows.stop - matrix.rows.start, getattr(experts, matrix.stack).shape[2]


class Unstacked:
    """A source whose stacks of experts are read as matrices; other tensors are read as they are.

    Args:
        source: of a checkpoint.
        experts: of the model, by the names of their modules.

    Raises:
        ModelError: a stack has another shape than the model's.
    """

    def __init__(self, source: TensorSource, experts: dict[str, Experts]) -> None:
        self._source = source
        self._shapes = source.shapes()
        self._places: dict[str, tuple[str, StoredMatrix]] = {}
        self._read: tuple[str, torch.Tensor] | None = None  # the stack that was read last
        wrong = []
        for prefix, module in experts.items():
            stacks = {name: f"{prefix}.{name}" for name in STACKS if f"{prefix}.{name}" in self._shapes}
            for name, full in stacks.items():
                found, expected = self._shapes.pop(full), tuple(getattr(module, name).shape)
                if found != expected:
                    wrong.append(f"{full}: {list(found)}, expected {list(expected)}")
            for matrix in module.matrices() if stacks else ():
                if matrix.stack in stacks:
                    full = f"{prefix}.{matrix.name}"
                    self._places[full] = stacks[matrix.stack], matrix
                    self._shapes[full] = matrix_shape(module, matrix)
        if wrong:
            raise ModelError(
                f"the checkpoint's experts are not those of its config.json; {len(wrong)} stacks have another shape: "
                + ", ".join(wrong[:3])
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        if name not in self._places:
            return self._source.read(name, device, dtype)
        full, matrix = self._places[name]
        if self._read is None or self._read[0] != full:
            self._read = None  # two stacks at once would be twice the memory
            self._read = full, self._source.read(full, torch.device("cpu"), None)
        return self._read[1][matrix.expert, matrix.rows].to(device=device, dtype=dtype, copy=True)

    def close(self) -> None:
        self._read = None
        self._source.close()


def unstacked(source: TensorSource, model: nn.Module) -> TensorSource:
    """A source that has each matrix of a model's experts by itself; the source itself where it has already."""
    experts, stored = expert_modules(model), source.shapes()
    if any(f"{prefix}.{name}" in stored for prefix in experts for name in STACKS):
        return Unstacked(source, experts)
    return source


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters as its checkpoints hold them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for prefix, experts in expert_modules(model).items():
        for name in STACKS:
            shapes.pop(f"{prefix}.{name}")
        shapes |= {f"{prefix}.{one.name}": matrix_shape(experts, one) for one in experts.matrices()}
    return shapes


def read_stack(
    experts: Experts,
    stack: str,
    read: Callable[[str], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A dense stack [E, N, K].

    Args:
        experts: the module, with or without values. stack: which of `STACKS`.
        read: gives a matrix by its name from the module on.
        device, dtype: of the result.
    """
    out = torch.empty(getattr(experts, stack).shape, dtype=dtype, device=device)
    for matrix in matrices_of(experts, stack):
        out[matrix.expert, matrix.rows] = read(matrix.name)
    return out


def replace_stacks(
    model: nn.Module,
    stored: Container[str],
    packed: Collection[str],
    covers: Callable[[str], bool],
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    """Puts a packed stack without values where experts will be packed, on the meta device; `pack_stack` fills it.

    Args:
        model: on the meta device.
        stored: names of the checkpoint's tensors. packed: those that it holds packed, which then decide alone.
        covers: whether the settings pack a layer, by its name. double_quant: whether they quantise scales.
        dtype: that the stacks are computed in.

    Raises:
        ModelError: rows of a packed matrix are no whole blocks.
    """
    for prefix, experts in expert_modules(model).items():
        for stack in STACKS:
            name = f"{prefix}.{next(matrices_of(experts, stack)).name}"
            fits = getattr(experts, stack).shape[2] % BLOCK == 0
            if not fits and name in packed:
                raise ModelError(
                    f"{name} has rows that are no multiple of {BLOCK} values, and is packed in NF4"
                )
            if fits and (name in packed if packed else covers(name)):
                double = f"{name}.nested_absmax" in stored if packed else double_quant
                empty = _empty_stack(experts, stack, double, torch.device("meta"))
                setattr(experts, stack, PackedWeight(empty, dtype))


def _empty_stack(experts: Experts, stack: str, double_quant: bool, device: torch.device) -> PackedStack:
    shape = tuple(getattr(experts, stack).shape)
    parts = len(list(matrices_of(experts, stack))) // shape[0]
    return PackedStack.empty(shape, parts, double_quant, device)


def pack_stack(
    experts: Experts,
    stack: str,
    read: Callable[[str], tuple[torch.Tensor, object]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fills a stack that `replace_stacks` made with packed matrices, one after the other.

    Args:
        experts, stack: as of `read_stack`.
        read: gives codes and state of a matrix by its name from the module on.
        device: where the stack lies. dtype: that it is computed in.

    Raises:
        ModelError: a packed matrix has another shape, other blocks or other scales than the stack.
    """
    double_quant = getattr(experts, stack).packed.nested
    packed = _empty_stack(experts, stack, double_quant, device)
    for matrix in matrices_of(experts, stack):
        codes, state = read(matrix.name)
        expected = matrix_shape(experts, matrix)
        if tuple(state.shape) != expected or state.blocksize != BLOCK or state.nested != double_quant:
            raise ModelError(
                f"experts.{matrix.name} is packed from {list(state.shape)} in blocks of {state.blocksize}, with scales "
                f"{'quantised' if state.nested else 'in float32'}; its stack takes {list(expected)}, {BLOCK}, and "
                f"{'quantised' if double_quant else 'float32'} scales"
            )
        packed.put(matrix.place, codes, state)
    setattr(experts, stack, PackedWeight(packed, dtype))


def matrices_of(experts: Experts, stack: str) -> Iterator[StoredMatrix]:
    """The matrices of one stack."""
    return (matrix for matrix in experts.matrices() if matrix.stack == stack)
