"""The adapter alone as one folder, in PEFT's files."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from peft.tuners.lora.layer import ParamWrapper

from oribi.models.expert_names import expert_modules
from oribi.models.unwrap import is_classifier
from oribi.save.adapter_check import compare_in_plain_peft
from oribi.save.adapter_files import WEIGHTS, write_adapter, write_separately
from oribi.save.base import base_name
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

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes in every release


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
        return fenced(code, "python") + f"\n\nor {other}." + self._in_vllm()

    def _in_vllm(self) -> str:
        """How vLLM serves an adapter of a model with experts, whose pairs it reads in one form for each family."""
        rules = next((one.rules for one in expert_modules(self.inner).values()), None)
        (settings, *others) = getattr(self.model, "peft_config", {}).values() or [None]
        if rules is None or settings is None or others or settings.use_dora or settings.modules_to_save:
            return ""
        wrapped = [m for m in self.model.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
        if wrapped and self.report.kind != PER_EXPERT and rules.stored not in ("transposed", "either"):
            form = "lora_per_expert" if rules.stored == "each" else "merged_16bit"
            return f"\n\nFor vLLM, save this model with `save_method={form!r}`: it does not read the experts' pairs as they are here."
        ranks = [settings.r, *(settings.rank_pattern or {}).values()]
        most = next((rank for rank in _VLLM_RANKS if rank >= max(ranks)), max(ranks))
        name, base = shlex.quote(self.directory.name), base_name(self.model)
        base = shlex.quote(base) if base and not os.path.exists(base) else "BASE_MODEL"
        return "\n\nWith vLLM, beside the model that it was trained on:\n\n" + fenced(
            f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}=./{name}", "bash"
        )
