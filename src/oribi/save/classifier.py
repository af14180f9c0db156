"""A sequence classifier as one folder for transformers, its scores compared with the trained model's.

K texts, N labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification

from oribi.errors import ConfigError
from oribi.models.classifier import DecoderForSequenceClassification
from oribi.models.unwrap import base_model, source_of
from oribi.save.adapter_check import load_in_plain_peft
from oribi.save.base import choose_base, open_base
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome, percent
from oribi.save.export import AskedOnce, checked
from oribi.save.merged import MergedExport
from oribi.save.probes import rows_of
from oribi.save.trained import MergedModel
from oribi.save.verify import check_saved_tokenizer

# largest distance of all scores, as a share of their length, that rounding to a dtype explains; beyond an eighth equal is close
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
_OTHER_BASE = 0.5  # another base than the trained one, such as 16-bit weights under an adapter of NF4 ones


class ClassifierExport(MergedExport):
    """A merged classifier."""

    def merge(self, tokenizer: Any, held_out: Any, base: str) -> MergedModel:
        """The trained tensors on the chosen base; the trained model scores texts that the file must score equally."""
        chosen, _ = choose_base(self.model, "dequantized" if base == "auto" else base, None)
        if chosen != "dequantized" and not isinstance(self.inner, DecoderForSequenceClassification):
            raise ConfigError(
                f"base={base!r}: the checkpoint of a {type(self.inner).__name__} has other names for its tensors than the classifier; "
                "give base='dequantized', the weights that were trained on"
            )
        merged = MergedModel(self.model, open_base(self.model, chosen))
        self.report.base = chosen
        if self.verify:
            self.rows, origin = _probes(self.model, tokenizer, held_out)
            self.scores = scores_of(self.model, self.rows)
            self.report.checked_on = origin
        return merged

    def check(self, form: str, path: Path) -> list[Check]:
        found = checked("scores read back", self._compare, path)
        if self.tokenizer is not None:
            found += checked("tokenizer", check_saved_tokenizer, self.tokenizer, path)
        return found

    def _compare(self, path: Path) -> Check:
        device = next(self.model.parameters()).device
        outside = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=self.inner.config.dtype, local_files_only=True
        ).to(device)
        most = _TOLERANCE[self.dtype] if self.report.base == "dequantized" else _OTHER_BASE
        return _compared("scores read back", scores_of(outside, self.rows), self.scores, most)

    def usage(self, folder: Path, file: str) -> str:
        name = self.directory.name
        return fenced(
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f'model = AutoModelForSequenceClassification.from_pretrained({name!r}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            "python",
        )


def compare_scores_in_plain_peft(model: PeftModel, folder: Path, tokenizer: Any, held_out: Any) -> Check:
    """Scores of the written adapter in plain PEFT beside the trained model's.

    Args:
        model: the trained classifier.
        folder: its adapter "default", written.
        tokenizer, held_out: as for `save_merged`.

    Raises:
        NotTested, ExportError: as `load_in_plain_peft`.
    """
    rows, _ = _probes(model, tokenizer, held_out)
    inner = base_model(model)
    adapted = load_in_plain_peft(model, folder, inner.dtype, inner.device)
    most = _TOLERANCE[inner.dtype]
    return _compared("scores in plain PEFT", scores_of(adapted, rows), scores_of(model, rows), most)


def _compared(name: str, found: torch.Tensor, expected: torch.Tensor, most: float) -> Check:
    """Scores [K, N] of a file beside the trained model's, which may lie `most` of their length apart."""
    apart = ((found - expected).norm() / expected.norm().clamp_min(1e-6)).item()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    outcome = Outcome.EQUAL if apart <= most / 8 else Outcome.CLOSE if apart <= most else Outcome.DIFFERENT
    says = f"scores of {len(found)} texts lie {apart:.2g} of their length apart (at most {most:g})"
    if expected.shape[1] > 1:
        says += f"; the highest label agrees on {percent(same)}"
    figures = {"distance": apart, "tolerance": most, "same_label": same, "texts": len(found)}
    return Check(name, outcome, says, figures)


def _probes(
    model: nn.Module, tokenizer: Any, held_out: Sequence[Any] | AskedOnce | None
) -> tuple[list[list[int]], str]:
    """Token ids of texts to score, and where they come from; the labels of rows are not needed."""
    if isinstance(held_out, AskedOnce):
        held_out = held_out.rows
    if held_out is not None:
        known = ("text", "input_ids")
        held_out = [
            {k: v for k, v in row.items() if k in known} if isinstance(row, Mapping) else row
            for row in held_out
        ]
    rows = rows_of(tokenizer, held_out, model.config.get_text_config().vocab_size)
    most = getattr(source_of(model), "max_seq_length", None)
    return [document[:most] for document in rows.documents], rows.origin


@torch.no_grad()
def scores_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """A classifier's scores [K, N] float32 of rows of token ids, one by one, so that nothing is padded."""
    trains, device = model.training, next(model.parameters()).device
    model.eval()
    scores = [model(input_ids=torch.tensor([list(row)], device=device)).logits.float().cpu() for row in rows]
    model.train(trains)
    return torch.cat(scores)
