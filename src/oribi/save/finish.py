"""What every export begins and ends with: the trained model's answers, the printed report, and what becomes of the files."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import stop_ids
from oribi.errors import ConfigError, ExportError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.unwrap import source_of
from oribi.save.card import model_card
from oribi.save.check import Check, NotTested, Outcome
from oribi.save.folder import new_rejected, reject
from oribi.save.naming import base_name
from oribi.save.probes import prompts_of, rows_of
from oribi.save.reference import Trained
from oribi.save.report import ExportReport
from oribi.save.trained import MergedModel

# True raises where a file is different, "report" keeps it under its name, False compares nothing
Verify = bool | str
# what says nothing of the file: memory that is not there, a package that is not installed
_CANNOT_RUN = (MemoryError, torch.OutOfMemoryError, ImportError)


def compares(verify: Verify) -> bool:
    """Whether an export is compared with the trained model.

    Raises:
        ConfigError: `verify` is none of its three values.
    """
    if verify not in (True, False, "report"):
        raise ConfigError(
            f"verify = {verify!r}; expected True (a file that differs is refused), 'report' (it is kept and reported as "
            "different) or False (nothing is compared)"
        )
    return bool(verify)


def require_other_place(model: nn.Module, directory: str | os.PathLike, files: Iterable[str] = ()) -> None:
    """Stop before an export replaces the base that its adapter, or the model in memory, stands on.

    Args:
        model: as loaded.
        directory: of the export.
        files: names of GGUF files that will be written there.

    Raises:
        ExportError: it would.
    """
    base = base_name(model)
    folder = Path(os.path.abspath(directory))
    targets = [folder, *(folder / file for file in files)]
    for target in targets:
        if base and os.path.exists(base) and os.path.exists(target) and os.path.samefile(base, target):
            raise ExportError(
                f"{target} is the base model itself, which the export would replace; give another folder"
            )


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
    model: nn.Module,
    tokenizer: Any,
    held_out: Sequence[Any] | AskedOnce | None,
    needed: bool,
    greedy: bool = True,
) -> tuple[Trained | None, list[Check]]:
    """The trained model's answers on the held-out rows.

    Args:
        model, tokenizer, held_out: as for `save_merged`.
        needed: whether anybody asks for them.
        greedy: whether it answers prompts, too, token by token.

    Returns:
        The answers, None if nobody asks for them or they cannot be had; in that case a check that says why.

    Raises:
        ConfigError: the held-out rows cannot be read.
    """
    if not needed:
        return None, []
    if isinstance(held_out, AskedOnce):
        if held_out.found is None:
            held_out.found = trained_answers(model, tokenizer, held_out.rows, True, greedy)
        return held_out.found
    if held_out is None:
        held_out = getattr(source_of(model), "held_out", None)
    vocab_size = model.config.get_text_config().vocab_size
    rows = rows_of(tokenizer, held_out, vocab_size)
    prompts = prompts_of(tokenizer, held_out, vocab_size) if greedy else []
    generation = getattr(model, "generation_config", None)
    stops = stop_ids(tokenizer, getattr(generation, "eos_token_id", None))
    try:
        return Trained(model, rows, prompts, stops), []
    except (
        Exception
    ) as error:  # foreign model code and full GPUs alike: the trained model is written all the same
        says = f"the trained model could not be asked ({_in_words(error)})"
        return None, [Check("trained model's answers", Outcome.NOT_RUN, says)]


def expected_answers(trained: Trained | None, merged: MergedModel, base: str) -> Trained | None:
    """What the written files must say: the trained model, or its adapter on the chosen base."""
    if trained is None or base == "dequantized" or not isinstance(trained.inner, DecoderForCausalLM):
        return trained
    return trained.on_base(merged)


def checked(name: str, compare: Callable[..., Check | list[Check]], *arguments: Any) -> list[Check]:
    """The checks that a comparison makes; where it fails, one that says why.

    A file that cannot be read back is different; memory or a package that is missing says nothing of the file.
    """
    try:
        found = compare(*arguments)
    except NotTested as why:
        return [Check(name, Outcome.NOT_TESTED, str(why))]
    except Exception as error:
        says = _in_words(error)
        if isinstance(error, _CANNOT_RUN) or "memory" in says.lower():
            return [Check(name, Outcome.NOT_RUN, says)]
        return [Check(name, Outcome.DIFFERENT, f"it cannot be read back ({says})")]
    return found if isinstance(found, list) else [found]


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def file_sizes(folder: Path, pattern: str) -> dict[str, int]:
    """Bytes of the files of a folder that match."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob(pattern))}


@dataclass(frozen=True)
class SortedOut:
    """The files of an export that keep their place, and those that were set aside.

    Args:
        kept: file names by format.
        refused: the report of the others; None if there are none.
    """

    kept: dict[str, str]
    refused: ExportReport | None = None

    def require(self) -> None:
        """Raise if files were set aside.

        Raises:
            ExportError: some were; the message names them and those in place.
        """
        if self.refused is not None:
            self.refused.require(self.kept.values())


def sort_out(
    report: ExportReport, partial: Path, files: dict[str, str], found: dict[str, list[Check]], verify: Verify
) -> SortedOut:
    """Set the files that differ aside from those that do not.

    Where all differ or `verify` is "report" they stay together: `finish_export` decides on the folder as a whole.

    Args:
        report: of the export; it gets the checks of the files that are kept.
        partial: the folder with the files.
        files: their names by format.
        found: the checks of each format.
        verify: as for `save_merged`.
    """
    different = [form for form in found if not all(check.passed for check in found[form])]
    if verify == "report" or len(different) in (0, len(files)):
        report.checks += [check for checks in found.values() for check in checks]
        return SortedOut(files)
    kept = {form: file for form, file in files.items() if form not in different}
    report.checks += [check for form in kept for check in found[form]]
    rejected, names = new_rejected(report.directory), [files[form] for form in different]
    for name in names:
        (partial / name).rename(rejected / name)
    checks = [check for form in different for check in found[form]]
    refused = replace(report, files=file_sizes(rejected, "*.gguf"), checks=checks, notes=list(report.notes))
    refused.write(
        rejected, model_card(refused, rejected.name, "", "Not what was trained: see the outcomes below.")
    )
    report.notes.append(f"not what was trained, and set aside in {rejected.name}: {', '.join(names)}")
    return SortedOut(kept, refused)


def finish_export(report: ExportReport, partial: Path, model: nn.Module, usage: str, verify: Verify) -> None:
    """Print and write the report; a file that differs is moved aside and raises, unless `verify` is "report"."""
    report.show()
    report.write(partial, model_card(report, Path(report.directory).name, base_name(model), usage))
    if not report.passed and verify != "report":
        reject(partial, report.directory)
        report.require()
