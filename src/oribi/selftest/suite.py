"""`oribi selftest`: measures on this machine, with a small model or with yours, that oribi computes what it claims."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from oribi.models.load_settings import choose_device
from oribi.models.plain_peft import quiet_libraries
from oribi.selftest.comparison import Comparison
from oribi.selftest.experts import compare_experts
from oribi.selftest.files import compare_files
from oribi.selftest.gathered_codes import compare_gathered_codes
from oribi.selftest.kernels import compare_kernels
from oribi.selftest.steps import compare_steps
from oribi.selftest.subject import Subject, write_small_model


def run_selftest(
    model: str | None = None,
    device: str | None = None,
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> list[Comparison]:
    """Compares training, files and kernels with float32 references.

    Args:
        model: anything that `load_model` takes; None takes small random models: a dense one, and some with experts.
        device: "cpu", "cuda", or None for the machine's best.
        report: called with each comparison as soon as it is made.

    Returns:
        All comparisons; `Comparison.passed` says whether one is within its limit.

    Raises:
        ModelError: the model cannot be loaded, or is not of oribi's families.
    """
    made = []
    with tempfile.TemporaryDirectory(prefix="oribi-selftest-") as name, quiet_libraries():
        folder = Path(name)
        subject = Subject(model or str(write_small_model(folder / "model")), device)
        for comparison in _all(subject, folder, small=model is None):
            made.append(comparison)
            report(comparison)
    return made


def _all(subject: Subject, folder: Path, small: bool) -> Iterator[Comparison]:
    yield from compare_kernels(torch.device(choose_device(subject.device)))
    yield from compare_steps(subject, folder)
    yield from compare_gathered_codes()
    yield from compare_files(subject, folder)
    if small:
        yield from compare_experts(folder / "experts", subject.device)
