"""Runs that repeat to the bit, and what differs between two runs without that.

On a CPU every run repeats. On a GPU, sums that many threads add to come out in the order in which the threads arrive.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from oribi.errors import ConfigError

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUES = (":4096:8", ":16:8")  # what cuBLAS documents as reproducible
LEFT_OPEN = (
    "not deterministic: attention's backward adds its parts in any order, so two runs differ in the last bits; "
    "deterministic = True fixes the order, and is slower"
)


def fix_order_of_cublas() -> None:
    """Before CUDA starts: make cuBLAS add in a fixed order. Without CUDA this does nothing.

    Raises:
        ConfigError: CUDA has started already, and the variable that cuBLAS reads then was not set.
    """
    if not torch.cuda.is_available() or os.environ.get(CUBLAS_VARIABLE) in CUBLAS_VALUES:
        return
    if torch.cuda.is_initialized():
        given = os.environ.get(CUBLAS_VARIABLE)
        raise ConfigError(
            f"deterministic = True, but CUDA has started and {CUBLAS_VARIABLE} is {given or 'not set'}; set it to "
            f"{' or '.join(CUBLAS_VALUES)} before the model is loaded: {CUBLAS_VARIABLE}={CUBLAS_VALUES[0]} python ..."
        )
    os.environ[CUBLAS_VARIABLE] = CUBLAS_VALUES[0]


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """PyTorch's own operations, and the kernels that follow its setting, add in one order inside the block.

    An operation that has no such form raises RuntimeError and says its name.
    """
    if not asked:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
