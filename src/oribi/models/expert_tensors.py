"""The tensors of a checkpoint's experts: read matrix by matrix, however the checkpoint stacks them, and packed as they arrive.

Everything outside a model's memory calls a matrix by the name that the family's checkpoints have for it
(`mlp.experts.3.up_proj.weight`). transformers keeps the experts of a layer in one tensor [E, N, K], and some checkpoints do, too.
"""

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping

import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels.block_stack import BlockStack
from oribi.kernels.expert_stack import PackedStack, StackCodes
from oribi.kernels.mxfp4 import MX_BLOCK, MXFP4Stack, decode_mxfp4
from oribi.kernels.nf4 import BLOCK
from oribi.kernels.packed_weight import PackedWeight
from oribi.models.expert_names import Renamed, expert_modules, in_model_names, renamed_parts
from oribi.models.experts import STACKS, Experts, StoredMatrix
from oribi.tensors import TensorSource


def matrix_shape(experts: Experts, matrix: StoredMatrix) -> tuple[int, int]:
    """[N, K] of a matrix, [N] of a vector of biases."""
    return matrix.rows.stop - matrix.rows.start, *getattr(experts, matrix.stack).shape[2:]


def stored_stack(experts: Experts, stack: str, values: torch.Tensor) -> torch.Tensor:
    """A stack [E, N, K], or biases [E, N], of the model as a checkpoint of stacks, and transformers' class, have it."""
    if experts.rules.alternating and stack.startswith("gate_up_proj"):
        values = values.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return values.mT if experts.rules.stored == "transposed" and values.dim() > 2 else values


def loaded_stack(experts: Experts, stack: str, stored: torch.Tensor) -> torch.Tensor:
    """What `stored_stack` made, as the model has it."""
    values = stored.mT if experts.rules.stored == "transposed" and stored.dim() > 2 else stored
    return _gate_first(experts, stack, values)


def _gate_first(experts: Experts, stack: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows [E, N, ...] of a stack, or its biases, in the model's order, where a checkpoint has those of gate and up by turns."""
    if experts.rules.alternating and stack.startswith("gate_up_proj"):
        return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return rows


class Unstacked:
    """A source whose stacks of experts are read as matrices; other tensors are read as they are.

    Args:
        source: of a checkpoint.
        experts: of the model, by the names of their modules.

    Attributes:
        stack_types: names of the stacks whose tensors are codes and scales, each with the types of an expert's matrices.

    Raises:
        ModelError: a stack has another shape than the model's.
    """

    def __init__(self, source: TensorSource, experts: dict[str, Experts]) -> None:
        self._source, self._experts = source, experts
        self._shapes = source.shapes()
        self._places: dict[str, tuple[str, str, StoredMatrix]] = {}
        self.stack_types: dict[str, tuple[str, ...]] = {}
        self._read: tuple[str, tuple[torch.Tensor, ...]] | None = None  # the stack that was read last
        wrong: list[str] = []
        for prefix, module in experts.items():
            found = {stack for stack in module.stacks if self._take(prefix, stack, module, wrong)}
            for matrix in module.matrices() if found else ():
                if matrix.stack in found:
                    full = f"{prefix}.{matrix.name}"
                    self._places[full] = prefix, matrix.stack, matrix
                    self._shapes[full] = matrix_shape(module, matrix)
        if wrong:
            raise ModelError(
                f"the checkpoint's experts are not those of its config.json; {len(wrong)} stacks have another shape: "
                + ", ".join(wrong[:3])
            )

    def _take(self, prefix: str, stack: str, module: Experts, wrong: list[str]) -> bool:
        """Whether the checkpoint has a stack, whose tensors are its matrices from now on; `wrong` takes those of another shape."""
        full, shape = f"{prefix}.{stack}", tuple(getattr(module, stack).shape)
        expected = {full: tuple(stored_stack(module, stack, torch.empty(shape, device="meta")).shape)}
        if any(f"{full}{ending}" in self._shapes for ending in _MXFP4):
            self.stack_types[full] = _in_mxfp4(module, stack)
            groups = (*shape[:2], shape[2] // MX_BLOCK)
            expected = {f"{full}_blocks": (*groups, MX_BLOCK // 2), f"{full}_scales": groups}
        elif full not in self._shapes:
            return False
        for name, wanted in expected.items():
            found = self._shapes.pop(name, None)
            if found != wanted:
                lies = "missing" if found is None else list(found)
                wrong.append(f"{name}: {lies}, expected {list(wanted)}")
        return True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def stack_codes(self, prefix: str, stack: str, device: torch.device) -> MXFP4Stack:
        """The codes of one of `stack_types`, in the model's order."""
        module = self._experts[prefix]
        stored = self._stack(f"{prefix}.{stack}")
        codes, scales = (_gate_first(module, stack, tensor.flatten(2)) for tensor in stored)
        shape, parts = tuple(getattr(module, stack).shape), _parts(module, stack)
        return MXFP4Stack(shape, parts, codes.contiguous().to(device), scales.contiguous().to(device))

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        if name not in self._places:
            return self._source.read(name, device, dtype)
        prefix, stack, matrix = self._places[name]
        found = [one[matrix.expert] for one in self._stack(f"{prefix}.{stack}")]
        if len(found) == 2:
            codes, scales = (one[matrix.stored_rows] for one in found)
            values = decode_mxfp4(codes.flatten(1), scales)
            dtype = dtype or torch.bfloat16  # what transformers makes of them, too
        else:
            transposed = self._experts[prefix].rules.stored == "transposed"
            values = (found[0].t() if transposed else found[0])[matrix.stored_rows]
        return values.to(device=device, dtype=dtype, copy=True)

    def _stack(self, full: str) -> tuple[torch.Tensor, ...]:
        """The tensor of a stack as it is stored, or its blocks and scales."""
        if self._read is None or self._read[0] != full:
            self._read = None  # two stacks at once would be twice the memory
            names = [f"{full}{ending}" for ending in _MXFP4] if full in self.stack_types else [full]
            cpu = torch.device("cpu")
            self._read = full, tuple(self._source.read(name, cpu, None) for name in names)
        return self._read[1]

    def close(self) -> None:
        self._read = None
        self._source.close()


# how the names of a stack's codes end in a checkpoint in MXFP4
_MXFP4 = ("_blocks", "_scales")


def unstacked(source: TensorSource, model: nn.Module) -> TensorSource:
    """What `stacked` gave, with each matrix of a model's experts by itself; the source itself where it is so already."""
    experts, source = expert_modules(model), in_model_names(source, model)
    stored = source.shapes()
    stacks = (f"{prefix}.{stack}" for prefix, one in experts.items() for stack in one.stacks)
    in_stacks = any(f"{stack}{ending}" in stored for stack in stacks for ending in ("", *_MXFP4))
    for one in experts.values():
        if one.rules.stored == "either":
            one.in_stacks = in_stacks
    return Unstacked(source, experts) if in_stacks else source


class Stacked:
    """A source whose matrices of experts are read as the stacks in which the family's checkpoints hold them.

    Args:
        source: of all matrices. experts: of the model, by the names of their modules.
    """

    def __init__(self, source: TensorSource, experts: dict[str, Experts]) -> None:
        self._source, self._shapes = source, {}
        self._stacks = {
            f"{prefix}.{stack}": (prefix, module, stack)
            for prefix, module in experts.items()
            for stack in module.stacks
        }
        stack_of = {
            f"{prefix}.{one.name}": f"{prefix}.{one.stack}"
            for prefix, module in experts.items()
            for one in module.matrices()
        }
        for name, shape in source.shapes().items():
            if name in stack_of:
                name = stack_of[name]
                _, module, stack = self._stacks[name]
                values = torch.empty(getattr(module, stack).shape, device="meta")
                shape = tuple(stored_stack(module, stack, values).shape)
            self._shapes[name] = shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        if name not in self._stacks:
            return self._source.read(name, device, dtype)
        prefix, module, stack = self._stacks[name]
        dtype = dtype or torch.float32
        values = read_stack(
            module, stack, lambda own: self._source.read(f"{prefix}.{own}", device, dtype), device, dtype
        )
        return stored_stack(module, stack, values).contiguous()

    def close(self) -> None:
        self._source.close()


def stacked(source: TensorSource, model: nn.Module) -> TensorSource:
    """A model's tensors as its family's checkpoints hold them; the source itself where they do already."""
    experts = expert_modules(model)
    in_stacks = {name: one for name, one in experts.items() if one.in_stacks}
    source, renamed = Stacked(source, in_stacks) if in_stacks else source, renamed_parts(model)
    return Renamed(source, renamed) if renamed else source


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters as its checkpoints hold them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for prefix, experts in expert_modules(model).items():
        for name in experts.stacks:
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
    kept: Mapping[str, tuple[str, ...]],
) -> None:
    """Puts a packed stack without values where experts will be packed, on the meta device; whoever reads the checkpoint fills it.

    Args:
        model: on the meta device.
        stored: names of the checkpoint's tensors. packed: those that it holds packed, which then decide alone.
        covers: whether the settings pack a module, by its name. double_quant: whether they quantise scales.
        dtype: that the stacks are computed in.
        kept: names of the stacks whose codes are kept as they are stored, each with the types of an expert's matrices.

    Raises:
        ModelError: rows of a packed matrix are no whole blocks.
    """
    for prefix, experts in expert_modules(model).items():
        for stack in STACKS:
            name = f"{prefix}.{next(matrices_of(experts, stack)).name}"
            if f"{prefix}.{stack}" in kept:
                empty = empty_codes(tuple(getattr(experts, stack).shape), kept[f"{prefix}.{stack}"])
                setattr(experts, stack, PackedWeight(empty, dtype))
                continue
            fits = fits_stack(experts, stack)
            if not fits and name in packed:
                raise ModelError(
                    f"{name} has rows that are no multiple of {BLOCK} values, and is packed in NF4"
                )
            if fits and (name in packed if packed else covers(prefix)):
                double = f"{name}.nested_absmax" in stored if packed else double_quant
                empty = _empty_stack(experts, stack, double, torch.device("meta"))
                setattr(experts, stack, PackedWeight(empty, dtype))


def empty_codes(shape: tuple[int, int, int], kinds: tuple[str, ...]) -> StackCodes:
    """A stack without values, on the meta device, whose matrices have these types."""
    if "MXFP4" in kinds:
        return MXFP4Stack.empty(shape, len(kinds))
    return BlockStack.empty(shape, kinds)


def note_on_kept(kept: Mapping[str, tuple[str, ...]], method: str | None = None) -> list[str]:
    """The line on stacks whose codes are kept; none where there are none.

    Args:
        kept: their names, each with the types of an expert's matrices. method: of the GGUF file that they are made for.
    """
    if not kept:
        return []
    types = Counter(" and ".join(dict.fromkeys(kinds)) for kinds in kept.values())
    names = ", ".join(types)
    if len(types) > 1:
        names = ", ".join(f"{name} ({count})" for name, count in types.most_common())
    if method is not None:
        return [f"{len(kept)} stacks of experts have the codes of a {method} GGUF file: {names}"]
    return [f"{len(kept)} stacks of experts stay in {names}, as they are stored"]


def stacks_in_mxfp4(experts: Mapping[str, Experts]) -> dict[str, tuple[str, ...]]:
    """Every stack of a model's experts with the types that its matrices have in MXFP4.

    Args:
        experts: of the model, by the names of their modules.
    """
    return {f"{prefix}.{stack}": _in_mxfp4(one, stack) for prefix, one in experts.items() for stack in STACKS}


def _in_mxfp4(experts: Experts, stack: str) -> tuple[str, ...]:
    return ("MXFP4",) * _parts(experts, stack)


def fits_stack(experts: Experts, stack: str) -> bool:
    """Whether a stack's rows are whole blocks, as its NF4 codes have to be."""
    return getattr(experts, stack).shape[2] % BLOCK == 0


def _empty_stack(experts: Experts, stack: str, double_quant: bool, device: torch.device) -> PackedStack:
    shape = tuple(getattr(experts, stack).shape)
    return PackedStack.empty(shape, _parts(experts, stack), double_quant, device)


def _parts(experts: Experts, stack: str) -> int:
    """Matrices of each expert in a stack."""
    return len(list(matrices_of(experts, stack))) // len(getattr(experts, stack))


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
