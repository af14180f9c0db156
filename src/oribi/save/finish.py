"""What every export ends with: the comparison's tolerance, the printed report, and what becomes of the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.models.decoder import DecoderForCausalLM
from oribi.save.adapter import MergedModel
from oribi.save.folder import reject
from oribi.save.naming import base_name
from oribi.save.probes import rows_of
from oribi.save.report import ExportReport, model_card
from oribi.save.verify import KL_TOLERANCE, SIXTEEN_BIT, Trained


def trained_answers(
    model: nn.Module, tokenizer: Any, held_out: Sequence[Any] | None, needed: bool
) -> Trained | None:
    """The trained model's answers on the held-out rows; None if nobody asks for them."""
    if not needed:
        return None
    if held_out is None:
        held_out = getattr(getattr(model, "oribi", None), "held_out", None)
    return Trained(model, rows_of(tokenizer, held_out, model.config.vocab_size))


def expected_answers(trained: Trained | None, merged: MergedModel, base: str) -> Trained | None:
    """What the written files must say: the trained model, or its adapter on the chosen base."""
    if trained is None or base == "dequantized" or not isinstance(trained.inner, DecoderForCausalLM):
        return trained
    return trained.on_base(merged)


def kl_tolerance(key: str, trained: Trained) -> float:
    """Mean KL that is allowed for a format."""
    return KL_TOLERANCE[key] + (SIXTEEN_BIT if trained.dtype != torch.float32 else 0.0)


def file_sizes(folder: Path, pattern: str) -> dict[str, int]:
    """Bytes of the files of a folder that match."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob(pattern))}


def finish_export(report: ExportReport, partial: Path, model: nn.Module, usage: str) -> None:
    """Print and write the report; a failed one moves the files aside and raises."""
    report.show()
    report.write(partial, model_card(report, Path(report.directory).name, base_name(model), usage))
    if not report.passed:
        reject(partial, report.directory)
    report.require()
