"""Small models with experts: their step, and their files, compared as those of the model that is tested."""

from collections.abc import Iterator
from pathlib import Path

from oribi.models.unwrap import base_model
from oribi.selftest.comparison import Comparison, failed
from oribi.selftest.files import compare_saved
from oribi.selftest.steps import compare_model, compare_ways, expected_steps
from oribi.selftest.subject import FAMILIES_TESTED, Subject, write_small_model

WITH_EXPERTS = tuple(name for name in FAMILIES_TESTED if name != "llama")


def compare_experts(folder: Path, device: str | None) -> Iterator[Comparison]:
    """For each family: loss and gradients of a step against transformers and PEFT, recomputation, packs, adapter and merge."""
    for model_type in WITH_EXPERTS:
        group = f"experts of {model_type}"
        try:
            path = write_small_model(folder / model_type / "model", model_type=model_type)
            yield from _compare(Subject(str(path), device), folder / model_type, group)
        except Exception as error:
            yield failed(group, "model", error)


def _compare(subject: Subject, folder: Path, group: str) -> Iterator[Comparison]:
    model, tokenizer = subject.load()
    rows = subject.rows(8, base_model(model).config.vocab_size)
    (expected,), own = expected_steps(model, [rows], group)
    yield own
    ways = {"batch 4, accumulation 2": (rows, expected, 4, 2, {}), "batch 8": (rows, expected, 8, 1, {})}
    yield from compare_ways(model, tokenizer, folder / "steps", ways, own.limit, group)
    yield from compare_model(model, rows, group)
    yield from compare_saved(subject, folder, group)
