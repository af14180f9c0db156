"""The sequence of every export: the trained model is asked, files are written into a temporary folder, compared with it,
reported, and only then given their names."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import stop_ids
from oribi.errors import ConfigError, ExportError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.packed_linear import is_requantised
from oribi.models.unwrap import base_model, source_of
from oribi.save.base import base_name, choose_base, open_base
from oribi.save.card import model_card
from oribi.save.check import Check, NotTested, Outcome
from oribi.save.folder import finished_folder, new_rejected, reject
from oribi.save.probe_file import PROBES_FILE, ExportedFile
from oribi.save.probes import prompts_of, rows_of
from oribi.save.reference import Trained
from oribi.save.report import ExportReport
from oribi.save.samples import SampledSource, described_samples, stored_as
from oribi.save.signatures import Signatures
from oribi.save.trained import MergedModel
from oribi.save.verify import compare
from oribi.tensors import TensorSource

# True raises where a file is different, "report" keeps it under its name, False compares nothing
Verify = bool | str
# errors that are not the file's fault: missing memory, a package that is not installed
_CANNOT_RUN = (MemoryError, torch.OutOfMemoryError, ImportError)


class Export:
    """One export. Each kind has its own `write`, `check` and `usage`; `run` is the sequence that all share.

    Args:
        model: the trained model, PEFT's or plain.
        directory: where the files go.
        kind: of the report.
        files: names by format of the files, or folders, that are compared one by one.
        verify: as for `save_merged`.
        tags: for the model card.

    Raises:
        ConfigError: `verify` is none of its three values.
        ExportError: the export would replace the base that its adapter, or the model in memory, stands on.
    """

    pattern = "*.safetensors"  # of the files that the report lists
    makes_codes_anew = False  # whether the original weights are merged and packed as the loaded ones are

    def __init__(
        self, model: nn.Module, directory: str | os.PathLike, kind: str, files: dict[str, str], verify: Verify,
        tags: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        if verify not in (True, False, "report"):
            raise ConfigError(
                f"verify = {verify!r}; expected True (a file that differs is refused), 'report' (it is kept and reported "
                "as different) or False (nothing is compared)"
            )
        self.model, self.inner = model, base_model(model)
        self.directory, self.files, self.verify = Path(directory), files, verify
        self.report = ExportReport(str(directory), kind, "", {}, tags=tags)
        self.trained: Trained | None = None
        self.signatures: Signatures | None = None
        self.said: dict[str, ExportedFile] = {}  # by name: what `expect` was told of the written files
        base, folder = base_name(model), Path(os.path.abspath(directory))
        for target in [folder, *(folder / file for file in files.values())]:
            if base and os.path.exists(base) and os.path.exists(target) and os.path.samefile(base, target):
                raise ExportError(
                    f"{target} is the base model itself, which the export would replace; give another folder"
                )

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        raise NotImplementedError

    def check(self, form: str, path: Path) -> list[Check]:
        """Compare a written file with the trained model."""
        raise NotImplementedError

    def usage(self, folder: Path, file: str) -> str:
        """How to run a file of the export, as Markdown; what names that file is written first."""
        raise NotImplementedError

    def merge(self, tokenizer: Any, held_out: Any, base: str) -> MergedModel:
        """The trained tensors on the chosen base; the trained model is asked what the files must say.

        Args:
            tokenizer, held_out, base: as for `save_merged`.
        """
        trained, unanswered = None, []
        if self.verify or base == "auto":
            trained, unanswered = trained_answers(self.model, tokenizer, held_out)
        chosen, reason = choose_base(self.model, base, trained)
        merged = MergedModel(self.model, open_base(self.model, chosen))
        self.report.base = chosen
        self.report.notes += [reason] * bool(reason)
        self.report.checks += unanswered
        if self.verify and trained is not None:
            # codes that are made anew stand for the trained function, whatever weights they are made of
            other = chosen != "dequantized" and not (self.makes_codes_anew or is_requantised(self.model))
            on_other = other and isinstance(trained.inner, DecoderForCausalLM)
            self.trained = trained.on_base(merged, merged.base) if on_other else trained
            self.report.checked_on = trained.rows.origin
            self.ask_signatures(tokenizer)
        return merged

    def ask_signatures(self, tokenizer: Any) -> None:
        """What probes.json holds of the trained model, asked once; where it cannot be asked, a check says why."""
        try:
            known = self.trained.signatures
            if known is None or known.tokenizer is not tokenizer:
                self.trained.signatures = Signatures(self.model, self.trained, tokenizer)
            self.signatures = self.trained.signatures
        # foreign model code may raise anything, a GPU may be full: the files are written and compared nevertheless
        except Exception as error:
            self.report.checks.append(Check(PROBES_FILE, Outcome.NOT_RUN, in_words(error)))

    def expect(self, form: str, path: Path, source: TensorSource) -> list[Check]:
        """Compare a written file, streamed from the disk, with the trained model; and keep what it says for probes.json.

        Args:
            form: a key of `KL_TOLERANCE`.
            path: the file, or the folder of the export.
            source: its tensors.
        """
        sampled = SampledSource(source)
        logits = self.trained.streamed(sampled)
        samples = described_samples(sampled, self.merged.changes)
        return self.expect_logits(form, path, logits, samples, stored_as(source))

    def expect_logits(
        self,
        form: str,
        path: Path,
        logits: torch.Tensor,
        samples: dict[str, Any] | None = None,
        stored: str = "",
    ) -> list[Check]:
        """As `expect`, from the file's logits [K, V]."""
        if self.signatures is not None:
            name = path.name if path.is_file() else "."
            said = self.signatures.of_file(logits)
            self.said[name] = ExportedFile(form, said, samples or {}, stored=stored)
        return compare(self.trained, logits, form)

    def run(self, size: int) -> ExportReport:
        """Write, compare, report and move the files.

        Args:
            size: bytes that the files take at most.

        Raises:
            ExportError: too little disk, or a file differs from the trained model; of several, the correct ones
                are in place nevertheless.
        """
        report = self.report
        with finished_folder(self.directory, size) as folder:
            self.write(folder)
            found = {}
            if self.verify:
                found = {form: self.check(form, folder / file) for form, file in self.files.items()}
            kept, refused = self._sort_out(folder, found)
            usage = self.usage(folder, next(iter(kept.values())))
            report.files = _file_sizes(folder, self.pattern)
            if self.signatures is not None:
                written = {name: self.said[name] for name in kept.values() if name in self.said}
                probes = self.signatures.describe(
                    report.kind, base_name(self.model), self.model.config, written
                )
                probes.write(folder)
                report.has_probes = True
            report.show()
            report.write(folder, model_card(report, self.directory.name, base_name(self.model), usage))
            if not report.passed and self.verify != "report":
                reject(folder, self.directory)
                report.require()
        if refused is not None:
            refused.require(kept.values())
        return report

    def _sort_out(
        self, folder: Path, found: dict[str, list[Check]]
    ) -> tuple[dict[str, str], ExportReport | None]:
        """Set the files that differ aside from those that do not; all stay together where all differ or `verify` is "report".

        Returns:
            Names by format of the files that stay, and the report of the others.
        """
        report = self.report
        different = [form for form, checks in found.items() if not all(check.passed for check in checks)]
        if self.verify == "report" or len(different) in (0, len(self.files)):
            report.checks += [check for checks in found.values() for check in checks]
            return self.files, None
        kept = {form: file for form, file in self.files.items() if form not in different}
        report.checks += [check for form in kept for check in found[form]]
        rejected, names = new_rejected(self.directory), [self.files[form] for form in different]
        for name in names:
            (folder / name).rename(rejected / name)
        refused = replace(
            report,
            files=_file_sizes(rejected, self.pattern),
            checks=[check for form in different for check in found[form]],
            notes=list(report.notes),
        )
        warning = "Not what was trained: see the outcomes below."
        refused.write(rejected, model_card(refused, rejected.name, "", warning))
        report.notes.append(f"not what was trained, and set aside in {rejected.name}: {', '.join(names)}")
        return kept, refused


@dataclass
class AskedOnce:
    """Held-out rows for several exports of one model: the first asks it, the others compare with the same answers.

    Args:
        rows: as `held_out` of `save_merged`.
        found: what `trained_answers` returned.
    """

    rows: Sequence[Any] | None
    found: tuple[Trained | None, list[Check]] | None = None


def trained_answers(
    model: nn.Module, tokenizer: Any, held_out: Sequence[Any] | AskedOnce | None
) -> tuple[Trained | None, list[Check]]:
    """The trained model's answers on the held-out rows.

    Args:
        model, tokenizer, held_out: as for `save_merged`.

    Returns:
        The answers; None if they cannot be had, and a check that says why.

    Raises:
        ConfigError: the held-out rows cannot be read.
    """
    if isinstance(held_out, AskedOnce):
        if held_out.found is None:
            held_out.found = trained_answers(model, tokenizer, held_out.rows)
        return held_out.found
    if held_out is None:
        held_out = getattr(source_of(model), "held_out", None)
    vocab_size = model.config.get_text_config().vocab_size
    rows = rows_of(tokenizer, held_out, vocab_size)
    prompts = prompts_of(tokenizer, held_out, vocab_size)
    generation = getattr(model, "generation_config", None)
    stops = stop_ids(tokenizer, getattr(generation, "eos_token_id", None))
    try:
        return Trained(model, rows, prompts, stops), []
    # foreign model code may raise anything, a GPU may be full: the trained model is written nevertheless
    except Exception as error:
        says = f"the trained model could not be asked ({in_words(error)})"
        return None, [Check("trained model's answers", Outcome.NOT_RUN, says)]


def checked(name: str, compare: Callable[..., Check | list[Check]], *arguments: Any) -> list[Check]:
    """The checks that a comparison makes; where it fails, one that says why.

    A file that cannot be read back is different; a lack of memory or of a package is not the file's fault.
    """
    try:
        found = compare(*arguments)
    except NotTested as why:
        return [Check(name, Outcome.NOT_TESTED, str(why))]
    except Exception as error:
        says = in_words(error)
        if isinstance(error, _CANNOT_RUN) or "memory" in says.lower():
            return [Check(name, Outcome.NOT_RUN, says)]
        return [Check(name, Outcome.DIFFERENT, f"it cannot be read back ({says})")]
    return found if isinstance(found, list) else [found]


def in_words(error: Exception) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _file_sizes(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob(pattern))}


def model_name(model: nn.Module) -> str:
    """A name for files: the last part of the name or path that the model was loaded by."""
    stem = os.path.basename(base_name(model).rstrip("/")).removesuffix(".gguf")
    stem = re.sub(r"\.(I?Q\d\w*|F16|F32|BF16)$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "-", stem.removesuffix("-bnb-4bit")) or "model"


def file_name(name: str) -> str:
    """A name that a caller gives to files, as it is.

    Raises:
        ConfigError: it is empty, has a folder in it, or a character that shells and file systems do not take well.
    """
    if not re.fullmatch(r"[\w(+][\w .()+@-]*", name):
        raise ConfigError(
            f"name = {name!r}; expected a name for files: letters, digits, spaces and . - _ + @ ( ), without a folder"
        )
    return name
