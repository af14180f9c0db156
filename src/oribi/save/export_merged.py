"""The trained model as one folder, merged or as adapter: written, read back, compared, and only then named."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import stop_ids
from oribi.errors import ConfigError
from oribi.models.unwrap import base_model
from oribi.save.adapter_check import compare_in_plain_peft
from oribi.save.adapter_files import WEIGHTS, write_adapter
from oribi.save.base import choose_base, open_base
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome
from oribi.save.finish import (
    Verify,
    checked,
    compares,
    expected_answers,
    file_sizes,
    finish_export,
    require_other_place,
    trained_answers,
)
from oribi.save.folder import announce, finished_folder
from oribi.save.hub import MERGED_KEYWORDS, push, read_accepted, upload_folder
from oribi.save.merge import Checkpoint, merged_dtype
from oribi.save.reference import Trained
from oribi.save.report import ExportReport
from oribi.save.trained import MergedModel
from oribi.save.verify import check_folder, check_saved_tokenizer
from oribi.tensors import read_header

METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora")


def save_merged(
    model: nn.Module,
    directory: str | os.PathLike,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    *,
    base: str = "dequantized",
    dtype: torch.dtype | str | None = None,
    max_shard_size: str | int = "5GB",
    held_out: Sequence[Any] | None = None,
    verify: Verify = True,
    **accepted: Any,
) -> ExportReport | None:
    """Write the trained model as one folder that any program loads, or its adapter alone, and check it.

    Args:
        model: the trained model, PEFT's or plain.
        directory: created; files of an earlier export in it are replaced at once when this one is complete.
        tokenizer: saved with the model; None saves none.
        save_method: "merged_16bit", "merged_4bit" (the merge quantised to NF4 again), or "lora".
        base: "dequantized" (the trained function exactly), "original", "auto", or a folder; see `save.base`.
        dtype: dtype of "merged_16bit"; None takes bfloat16 or float16 of the model, and bfloat16 for float32.
        max_shard_size: a shard ends before it would pass this size.
        held_out: texts, lists of messages, or rows of a dataset on which the written model is compared with the trained
            one; None takes `model.oribi.held_out` if the trainer left one, else a few texts of oribi's own.
        verify: True refuses a file that differs from the trained model; "report" keeps it under its name, reported as
            different; False compares nothing and promises nothing.
        accepted: keywords of other libraries' calls, see `save.hub`.

    Returns:
        The report; also written as export_report.json and README.md. None in processes that are not the main one.

    Raises:
        ConfigError: an argument has an unknown value.
        ExportError: the merge cannot be expressed, does not fit on the disk, or differs from the trained model.
    """
    save_method = save_method or "merged_16bit"
    if save_method not in METHODS:
        raise ConfigError(f"save_method = {save_method!r}; expected one of {', '.join(METHODS)}")
    options = read_accepted(accepted, MERGED_KEYWORDS, "save_pretrained_merged")
    compared = compares(verify)
    if not options.is_main_process:
        return None
    require_other_place(model, directory)
    save_method = save_method.removesuffix("_forced")
    if save_method == "lora":
        report = ExportReport(str(directory), "lora", "", {}, tags=options.tags)
        _save_adapter(model, report, tokenizer, verify, held_out)
    else:
        dtype, quantized = merged_dtype(model, dtype), save_method == "merged_4bit"
        _announce(Checkpoint(model, MergedModel(model), dtype, quantized=quantized), directory, save_method)
        trained, unanswered = trained_answers(model, tokenizer, held_out, compared or base == "auto")
        chosen, reason = choose_base(model, base, trained)
        merged = MergedModel(model, open_base(model, chosen))
        checkpoint = Checkpoint(model, merged, dtype, quantized=quantized)
        notes = [reason] * bool(reason)
        report = ExportReport(str(directory), save_method, chosen, {}, notes=notes, tags=options.tags)
        report.checks += unanswered
        expected = expected_answers(trained if compared else None, merged, chosen)
        _write_checkpoint(checkpoint, report, tokenizer, max_shard_size, expected, verify)
    if options.push_to_hub:
        upload_folder(Path(directory), Path(directory).name, options)
    return report


def push_merged(
    model: nn.Module, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **keywords: Any
) -> str | None:
    """Save as `save_merged` does and upload the folder.

    Args:
        model, tokenizer, save_method: as for `save_merged`.
        repo_id: "user/name", or a name under the token's user; created if it does not exist.
        keywords: of `save_merged`; token, private, commit_message, commit_description, create_pr, revision, tags; and
            api, a `huggingface_hub.HfApi` (None makes one with `token`).

    Returns:
        The commit's address; None in processes that are not the main one.

    Raises:
        ConfigError, ExportError: as `save_merged`; nothing is uploaded then.
    """
    return push(save_merged, MERGED_KEYWORDS, model, repo_id, tokenizer, save_method, **keywords)


def _announce(planned: Checkpoint, directory: str | os.PathLike, save_method: str) -> None:
    words = f"{save_method}, {len(planned.plans)} tensors in {str(planned.dtype).removeprefix('torch.')}"
    announce(directory, {words: planned.nbytes})


def _write_checkpoint(
    checkpoint: Checkpoint,
    report: ExportReport,
    tokenizer: Any,
    max_shard_size: str | int,
    trained: Trained | None,
    verify: Verify,
) -> None:
    directory = Path(report.directory)
    model = checkpoint.model
    with finished_folder(directory, checkpoint.nbytes) as partial:
        checkpoint.write(partial, max_shard_size)
        _write_generation_config(model, tokenizer, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if trained is not None:
            report.checked_on = trained.rows.origin
            key = "4-bit" if checkpoint.quantized else str(checkpoint.dtype).removeprefix("torch.")
            report.checks += checked("weights read back", check_folder, trained, partial, key)
            if tokenizer is not None:
                report.checks += checked("tokenizer", check_saved_tokenizer, tokenizer, partial)
        report.files = file_sizes(partial, "*.safetensors")
        usage = fenced(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({directory.name!r}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({directory.name!r})",
            "python",
        )
        finish_export(report, partial, model, usage, verify)


def _write_generation_config(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    inner = base_model(model)
    generation = copy.deepcopy(getattr(inner, "generation_config", None))
    if generation is None:
        return
    stops = stop_ids(tokenizer, generation.eos_token_id)
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    generation.save_pretrained(folder)


def _save_adapter(
    model: nn.Module, report: ExportReport, tokenizer: Any, verify: Verify, held_out: Sequence[Any] | None
) -> None:
    directory = Path(report.directory)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    announce(directory, {"adapter": size})
    with finished_folder(directory, size) as partial:
        template = getattr(tokenizer, "chat_template", None)
        report.notes += [
            f"not tested: {line}" for line in write_adapter(model, partial, chat_template=template)
        ]
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form of blanks
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if verify:
            report.checked_on = "every weight of the adapter"
            report.checks += _check_adapter(model, partial, tokenizer, held_out)
            if tokenizer is not None:
                report.checks += checked("tokenizer", check_saved_tokenizer, tokenizer, partial)
        report.files = file_sizes(partial, "*.safetensors")
        usage = fenced(
            "from oribi import FastLanguageModel\n\n"
            f"model, tokenizer = FastLanguageModel.from_pretrained({directory.name!r})",
            "python",
        )
        finish_export(report, partial, model, usage + "\n\nor `peft.AutoPeftModelForCausalLM`.", verify)


def _check_adapter(
    model: nn.Module, folder: Path, tokenizer: Any, held_out: Sequence[Any] | None
) -> list[Check]:
    """What `write_adapter` has compared already, and what the files say in plain PEFT."""
    count = sum(len(read_header(path)) for path in folder.glob(f"**/{WEIGHTS}"))
    says = f"{count} of {count} tensors are the same bit by bit, and plain PEFT has a place for each"
    checks = [Check("adapter read back", Outcome.EQUAL, says, {"same": count, "of": count})]
    trained, unanswered = trained_answers(model, tokenizer, held_out, True, greedy=False)
    if trained is None:
        return checks + unanswered
    return checks + checked("answers in plain PEFT", compare_in_plain_peft, model, folder, trained)
