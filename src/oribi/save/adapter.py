"""The adapter alone as one folder, in PEFT's files."""

import json
from pathlib import Path
from typing import Any

from oribi.models.unwrap import is_classifier
from oribi.save.adapter_check import compare_in_plain_peft
from oribi.save.adapter_files import WEIGHTS, write_adapter, write_separately
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome
from oribi.save.export import Export, checked, trained_answers
from oribi.save.folder import announce
from oribi.save.forms import PER_EXPERT
from oribi.save.probe_file import STRENGTH_SETTINGS, ExportedFile
from oribi.save.report import ExportReport
from oribi.save.samples import described_samples, sample_all
from oribi.save.verify import check_saved_tokenizer
from oribi.tensors import SafetensorsSource, read_header


class AdapterExport(Export):
    """The adapter in PEFT's files."""

    def save(self, tokenizer: Any, held_out: Any) -> ExportReport:
        """Write and check it; arguments as for `save_merged`."""
        self.tokenizer, self.held_out = tokenizer, held_out
        size = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        announce(self.directory, {"adapter": size})
        return self.run(size)

    def write(self, folder: Path) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        untested = write_adapter(self.model, folder, chat_template=template)
        if self.report.kind == PER_EXPERT:
            write_separately(self.model, folder)
        self.report.notes += [f"not tested: {line}" for line in untested]
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form of blanks
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def check(self, form: str, path: Path) -> list[Check]:
        """What `write_adapter` has compared already, and what the files say in plain PEFT."""
        self.report.checked_on = "every weight of the adapter"
        count = sum(len(read_header(file)) for file in path.glob(f"**/{WEIGHTS}"))
        says = f"{count} of {count} tensors are the same bit by bit, and plain PEFT has a place for each"
        found = [Check("adapter read back", Outcome.EQUAL, says, {"same": count, "of": count})]
        found += self._check_in_plain_peft(path)
        if self.tokenizer is not None:
            found += checked("tokenizer", check_saved_tokenizer, self.tokenizer, path)
        return found

    def _check_in_plain_peft(self, path: Path) -> list[Check]:
        if is_classifier(self.model):
            from oribi.save.classifier import compare_scores_in_plain_peft

            asked = (self.model, path, self.tokenizer, self.held_out)
            return checked("scores in plain PEFT", compare_scores_in_plain_peft, *asked)
        self.trained, unanswered = trained_answers(self.model, self.tokenizer, self.held_out)
        if self.trained is None:
            return unanswered
        self.ask_signatures(self.tokenizer)
        if self.signatures is not None:
            self.said["."] = self._as_expected(path)
        return unanswered + checked(
            "answers in plain PEFT", compare_in_plain_peft, self.model, path, self.trained
        )

    def _as_expected(self, folder: Path) -> ExportedFile:
        """The adapter as probes.json describes it: it must say what the trained model says."""
        stored = SafetensorsSource([folder / WEIGHTS], any_dtype=True)
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return ExportedFile(
            str(self.trained.dtype).removeprefix("torch."),
            self.signatures.says["trained"],
            described_samples(sample_all(stored), {}),
            {name: settings.get(name) for name in STRENGTH_SETTINGS},
        )

    def usage(self, folder: Path, file: str) -> str:
        code = (
            "from oribi import FastLanguageModel\n\n"
            f"model, tokenizer = FastLanguageModel.from_pretrained({self.directory.name!r})"
        )
        other = "`peft.AutoPeftModelForCausalLM`"
        if is_classifier(self.model):  # PEFT takes 2 labels where it is not told
            other = f"`peft.AutoPeftModelForSequenceClassification` with `num_labels={self.inner.config.num_labels}`"
        return fenced(code, "python") + f"\n\nor {other}."
