"""The gated delta rule by flash-linear-attention's kernels, where its package (`fla-core`) is installed.

Who installs it asks for it: on an NVIDIA GPU it then comes before oribi's own kernels, once it has given what the reference
gives, outputs and all gradients, for the shapes and the dtype at hand. Nothing needs it. Its function is called through
PyTorch's autograd; backward runs forward again, as oribi's own does.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from oribi.kernels.dispatch import use_triton
from oribi.kernels.gated_delta_chunks import Chunks
from oribi.kernels.gated_delta_reference import Rule, agrees

logger = logging.getLogger(__name__)

# arguments that are passed by name; a package whose function lacks one is left alone
_ARGUMENTS = {"scale", "initial_state", "output_final_state", "cu_seqlens", "cu_seqlens_cpu"}


@lru_cache
def fla_function() -> Callable | None:
    """The package's function, if it is there and takes what this file passes."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception as error:  # made for another PyTorch or Triton, it may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("fla-core is installed but cannot be used: %s", reason)
        return None
    if set(inspect.signature(function).parameters) >= _ARGUMENTS:
        return function
    logger.warning("fla-core is installed but its chunk_gated_delta_rule is of another version")
    return None


def use_fla(q: torch.Tensor, v: torch.Tensor, reference: Rule) -> bool:
    """Whether the rule of q [T, K, F] and v [T, H, E] runs the package's kernels.

    Args:
        q, v: as `gated_delta` takes them, read for device, dtype and shapes.
        reference: what the kernels are checked against, once per process and kind of input.
    """
    if not (q.is_cuda and q.dtype.itemsize == 2 and use_triton(q)) or fla_function() is None:
        return False
    return fla_agrees(q.device, q.dtype, *q.shape[1:], *v.shape[1:], reference)


@lru_cache
def fla_agrees(
    device: torch.device,
    dtype: torch.dtype,
    key_heads: int,
    key: int,
    heads: int,
    value: int,
    reference: Rule,
) -> bool:
    """Whether the package's kernels give what the reference gives in float64, to twice what 16 bits round.

    Args:
        device, dtype: of the inputs. key_heads, key, heads, value: K, F, H and E. reference: computes the truth.
    """
    return agrees(
        "fla-core's gated delta rule",
        lambda do, *given: (fla_forward(*given)[0], *fla_backward(do, *given)),
        reference, device, dtype, (key_heads, key), (heads, value),
    )  # fmt: skip


def fla_forward(
    inputs: Sequence[torch.Tensor],
    chunks: Chunks,
    scale: float,
    initial: torch.Tensor | None = None,
    final: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gated_delta_forward`; differentiable where gradients are recorded.

    Args:
        inputs: q, k, v, g and b. chunks, scale, initial, final: as there.
    """
    v = inputs[2]
    bounds = (
        chunks.bounds if final or initial is not None else sorted(set(chunks.bounds))
    )  # no empty documents
    rows, documents = _laid_out(inputs, bounds)
    out, last = fla_function()(
        *rows, scale=scale, initial_state=initial, output_final_state=final, **documents
    )  # fmt: skip
    return out.reshape(v.shape).to(v.dtype), last


def fla_backward(
    do: torch.Tensor, inputs: Sequence[torch.Tensor], chunks: Chunks, scale: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, g and b, in their dtypes."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, _ = fla_forward(leaves, chunks, scale)
    return torch.autograd.grad(out, leaves, do)


def _laid_out(inputs: Sequence[torch.Tensor], bounds: Sequence[int]) -> tuple[list[torch.Tensor], dict]:
    """Inputs [1, T, ...] with their documents, or [docs, length, ...] where these are equally long."""
    if len({b - a for a, b in zip(bounds, bounds[1:])}) == 1:
        return [x.unflatten(0, (len(bounds) - 1, -1)) for x in inputs], {}
    offsets = torch.tensor(bounds, dtype=torch.int64)
    documents = {"cu_seqlens": offsets.to(inputs[0].device), "cu_seqlens_cpu": offsets}
    return [x[None] for x in inputs], documents
