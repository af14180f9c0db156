"""`selftest`: measures on this machine, with a small model or with one's own, that oribi computes what it claims."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from oribi.models.load_settings import choose_device
from oribi.selftest.check import Check
from oribi.selftest.codes import check_codes
from oribi.selftest.files import check_files
from oribi.selftest.invariance import check_steps
from oribi.selftest.kernels import check_kernels
from oribi.selftest.subject import Subject, quiet_libraries, write_small_model


def selftest(
    model: str | None = None, device: str | None = None, report: Callable[[Check], None] = lambda check: None
) -> list[Check]:
    """Compares training, files and kernels with float32 references.

    Args:
        model: what `load_model` takes; None takes a small random one.
        device: "cpu", "cuda", or None for the machine's.
        report: called with each check as soon as it is done.

    Returns:
        All checks; `Check.passed` says which held.

    Raises:
        ModelError: the model cannot be loaded, or is not of oribi's families.
    """
    checks = []
    with tempfile.TemporaryDirectory(prefix="oribi-selftest-") as name, quiet_libraries():
        folder = Path(name)
        subject = Subject(model or str(write_small_model(folder / "model")), device)
        for check in _all(subject, folder):
            checks.append(check)
            report(check)
    return checks


def _all(subject: Subject, folder: Path) -> Iterator[Check]:
    yield from check_kernels(torch.device(choose_device(subject.device)))
    yield from check_steps(subject, folder)
    yield from check_codes()
    yield from check_files(subject, folder)
