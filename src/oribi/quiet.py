"""Imports without bitsandbytes' advice to install kernels, which are for 4-bit layers on a CPU that oribi never runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

ADVISER = "bitsandbytes.backends.cpu.ops"  # the logger that speaks once, when bitsandbytes is imported


@contextmanager
def without_advice() -> Iterator[None]:
    """Inside the block that one logger is off, and afterwards as it was."""
    log = logging.getLogger(ADVISER)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
