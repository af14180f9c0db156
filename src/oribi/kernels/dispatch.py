"""Where a kernel runs: Triton on NVIDIA GPUs, the PyTorch reference everywhere else.

Every op has a visible `if use_triton(x)`. `jit` is `triton.jit` where Triton is installed; without it, the kernels' files
still import.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed on macOS, on Windows and beside CPU builds of torch
    triton = None
    # the one name that is read when a kernel is defined: it annotates arguments, and wraps constants of any type
    tl = SimpleNamespace(constexpr=lambda value: value)

# under TRITON_INTERPRET=1 kernels run on CPU tensors, which is how the tests run them without a GPU
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

_local = threading.local()


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op on x runs its Triton kernel (True) or its PyTorch reference.

    Args:
        x: the op's main input. float64 always takes the reference: kernels compute in float32.
    """
    if triton is None or x.dtype is torch.float64 or getattr(_local, "reference_only", False):
        return False
    return INTERPRETED or (x.is_cuda and _capable(x.get_device()))


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside the block every op of this thread runs its PyTorch reference; for tests and benchmarks."""
    before = getattr(_local, "reference_only", False)
    _local.reference_only = True
    try:
        yield
    finally:
        _local.reference_only = before


@lru_cache
def _capable(device_index: int) -> bool:
    # Triton's oldest NVIDIA target is Turing; on AMD these kernels are untested
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= (7, 5)


def jit(kernel: Callable | None = None, **options: Any) -> Callable:
    """`triton.jit`, or the function unchanged (and never called) where Triton is not installed."""
    if kernel is None:
        return lambda function: jit(function, **options)
    return kernel if triton is None else triton.jit(**options)(kernel)


def launch(kernel: Callable, programs: int, x: torch.Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on x's device, x being its first argument.

    Args:
        kernel: what `jit` returned.
        programs: size of the one-dimensional grid.
        args, options: the kernel's further arguments, and num_warps or enable_fp_fusion.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        # a model spread over several GPUs calls from one process
        with torch.cuda.device(x.get_device()):
            kernel[(programs,)](x, *args, **options)
    else:
        kernel[(programs,)](x, *args, **options)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def warps_for(elements: int) -> int:
    """Warps of a program of `elements` elements: 16 per thread, so that 16-bit rows load in 16-byte vectors."""
    return min(max(elements // 512, 1), 16)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that references compute in: float64 as it is, everything else as float32."""
    return x if x.dtype is torch.float64 else x.float()
