"""Stacks of experts in GGUF files: which of a file's tensors are one stack of the model, and in which types they are."""

from collections.abc import Iterable

from oribi.gguf.file import Type
from oribi.gguf.tensor import Tensor
from oribi.kernels.ggml_blocks import BLOCK_TYPES

# a stack of the model -> an expert's matrices in it, from top to bottom
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def first_matrices(prefix: str, stack: str) -> list[str]:
    """The checkpoint's names of the first expert's matrices in a stack.

    Args:
        prefix: name of the module of experts. stack: of the stack within it.
    """
    return [f"{prefix}.0.{part}.weight" for part in PARTS[stack]]


def types_of_stacks(tensors: Iterable[tuple[Tensor, Type]]) -> dict[str, tuple[str, ...]]:
    """The model's stacks of experts by name, each with the types of an expert's matrices in it.

    Args:
        tensors: of a file, with the type of each; those of no experts are left out.
    """
    kinds = {
        f"{module}.*.{part}": kind.name
        for tensor, kind in tensors
        if tensor.experts and tensor.source.endswith(".weight")
        for module, _, parts in [tensor.source.removesuffix(".weight").partition(".*.")]
        for part in parts.split("|")
    }
    modules = dict.fromkeys(name.partition(".*.")[0] for name in kinds)
    stacks = ((module, stack, PARTS[stack]) for module in modules for stack in PARTS)
    return {
        f"{module}.{stack}": tuple(kinds[f"{module}.*.{part}"] for part in parts)
        for module, stack, parts in stacks
        if all(f"{module}.*.{part}" in kinds for part in parts)
    }


def keeps_codes(kinds: tuple[str, ...]) -> bool:
    """Whether a stack whose matrices have these types stays in their codes."""
    return set(kinds) == {Type.MXFP4.name} or set(kinds) <= BLOCK_TYPES.keys()
