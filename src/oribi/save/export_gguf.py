"""The trained model as GGUF files: one call, any number of quantisation methods; written, read back, compared."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import renders, stop_ids
from oribi.errors import ConfigError
from oribi.gguf import llama_cpp
from oribi.gguf.metadata import check_config
from oribi.gguf.mixes import METHODS, mix_of
from oribi.gguf.modelfile import NoModelfile, modelfile
from oribi.gguf.source import GGUFSource
from oribi.gguf.splits import CUT_BY_CASE
from oribi.gguf.tokenizer import Vocabulary
from oribi.gguf.writer import plan_file, write_files
from oribi.models.unwrap import base_model
from oribi.save.base import choose_base, open_base
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome
from oribi.save.finish import (
    SortedOut,
    Verify,
    checked,
    compares,
    expected_answers,
    file_sizes,
    finish_export,
    require_other_place,
    sort_out,
    trained_answers,
)
from oribi.save.folder import announce, finished_folder
from oribi.save.gguf_adapter import save_gguf_adapter
from oribi.save.hub import GGUF_KEYWORDS, push, read_accepted
from oribi.save.naming import file_name, model_name
from oribi.save.reference import Trained
from oribi.save.report import ExportReport
from oribi.save.trained import MergedModel
from oribi.save.verify import check_source
from oribi.save.verify_gguf import check_gguf_tokenizer, check_in_llama_cpp
from oribi.text import write_whole

_METADATA = 16 << 20  # bytes of a file; a vocabulary of 128k tokens and its merges takes 8 MB


def save_gguf(
    model: nn.Module,
    directory: str | os.PathLike,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    *,
    base: str = "dequantized",
    name: str | None = None,
    held_out: Sequence[Any] | None = None,
    verify: Verify = True,
    **accepted: Any,
) -> dict[str, Any] | None:
    """Write the trained model, adapters merged, as GGUF files that llama.cpp, Ollama and their kin run, and check them.

    Args:
        model: the trained model, PEFT's or plain.
        directory: where the files go; created.
        tokenizer: a fast tokenizer; its chat template goes into the files and, as Go template, into a Modelfile.
        quantization_method: one of `print_quantization_methods()` in any case, or several.
        base: the weights under the adapter, as for `save_merged`.
        name: the model's name; None takes the last part of the name it was loaded by.
        held_out, verify: as for `save_merged`; llama.cpp is asked too where xllamacpp is installed.
        accepted: keywords of other libraries' calls, see `save.hub`.

    Returns:
        save_directory, gguf_directory, gguf_files (paths), modelfile_location (path or None), want_full_precision,
        is_vlm, fix_bos_token (whether BOS is not added because the chat template never had it), report
        (`ExportReport`). None in processes that are not the main one.

    Raises:
        ConfigError: an unknown method, or no tokenizer.
        ExportError: llama.cpp cannot hold this model, the disk is too small, or a file differs from the trained model; of
            several, those that are right are in place all the same.
    """
    options = read_accepted(accepted, GGUF_KEYWORDS, "save_pretrained_gguf")
    if tokenizer is None:
        raise ConfigError("GGUF files hold the tokenizer; give tokenizer=")
    compared = compares(verify)
    if not options.is_main_process:
        return None
    if options.save_method == "lora":
        return save_gguf_adapter(model, directory, quantization_method, verify=verify)
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    methods = list(dict.fromkeys(mix_of(method).name for method in asked))
    config = base_model(model).config
    notes = check_config(config)
    shapes = MergedModel(model).shapes()
    called = model_name(model) if name is None else file_name(name)
    files = {method: f"{called}.{method.upper()}.gguf" for method in methods}
    require_other_place(model, directory, files.values())
    sizes = {m: sum(entry.nbytes for entry in plan_file(config, shapes, m)) for m in methods}
    announce(directory, {f"GGUF {m} ({METHODS[m].words})": size for m, size in sizes.items()})
    trained, unanswered = trained_answers(model, tokenizer, held_out, compared or base == "auto")
    chosen, reason = choose_base(model, base, trained)
    source = MergedModel(model, open_base(model, chosen))
    notes += [reason] * bool(reason)
    report = ExportReport(str(directory), "gguf", chosen, {}, notes=notes, tags=options.tags)
    report.checks += unanswered
    expected = expected_answers(trained if compared else None, source, chosen)
    with finished_folder(directory, sum(sizes.values()) + _METADATA * len(files)) as partial:
        vocabulary, sorted_out, has_modelfile = _write(
            partial, model, source, tokenizer, files, report, expected, verify
        )
    sorted_out.require()
    return {
        "save_directory": str(directory),
        "gguf_directory": str(directory),
        "gguf_files": [str(Path(directory) / file) for file in files.values()],
        "modelfile_location": str(Path(directory) / "Modelfile") if has_modelfile else None,
        "want_full_precision": all(method in ("f32", "f16", "bf16") for method in methods),
        "is_vlm": False,
        "fix_bos_token": vocabulary.bos_removed,
        "report": report,
    }


def push_gguf(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    **keywords: Any,
) -> str | None:
    """Save as `save_gguf` does and upload the folder; arguments as for `push_merged` and `save_gguf`."""
    return push(save_gguf, GGUF_KEYWORDS, model, repo_id, tokenizer, quantization_method, **keywords)


def _write(
    partial: Path,
    model: nn.Module,
    source: MergedModel,
    tokenizer: Any,
    files: dict[str, str],
    report: ExportReport,
    expected: Trained | None,
    verify: Verify,
) -> tuple[Vocabulary, SortedOut, bool]:
    inner = base_model(model)
    paths = {method: partial / file for method, file in files.items()}
    device, name = next(inner.parameters()).device, next(iter(files.values())).rsplit(".", 2)[0]
    with torch.no_grad():
        vocabulary = write_files(paths, source, inner.config, tokenizer, name=name, device=device)
    if tokenizer.chat_template and not renders(tokenizer):
        report.notes.append("the chat template fails on a plain conversation and is left out of the files")
    if vocabulary.pre in CUT_BY_CASE:
        report.notes.append(
            f"llama.cpp cuts some words beyond ASCII otherwise than this tokenizer (rule {vocabulary.pre}): those with "
            "combining marks, as in Hindi, or with capitals"
        )
    sorted_out = SortedOut(files)
    if expected is not None:
        report.checked_on = expected.rows.origin
        found = {method: _check_gguf(method, path, expected, tokenizer) for method, path in paths.items()}
        sorted_out = sort_out(report, partial, files, found, verify)
    first = next(iter(sorted_out.kept.values()))
    usage = fenced(f"llama-cli -m {shlex.quote(first)}")
    has_modelfile = _write_modelfile(partial, first, inner, tokenizer, vocabulary.adds_bos, report)
    if has_modelfile:
        called = shlex.quote(name.lower())
        usage += "\n\n" + fenced(f"ollama create {called} -f Modelfile\nollama run {called}")
    report.files = file_sizes(partial, "*.gguf")
    finish_export(report, partial, model, usage, verify)
    return vocabulary, sorted_out, has_modelfile


def _write_modelfile(
    folder: Path, file: str, inner: nn.Module, tokenizer: Any, adds_bos: bool, report: ExportReport
) -> bool:
    generation = getattr(inner, "generation_config", None)
    stops = stop_ids(tokenizer, getattr(generation, "eos_token_id", None))
    try:
        text = modelfile(file, tokenizer, stops, generation, adds_bos=adds_bos, notes=report.notes)
    except NoModelfile as why:
        report.notes.append(f"no Modelfile for Ollama was written: {why}")
        return False
    write_whole(folder / "Modelfile", text)
    return True


def _check_weights(trained: Trained, path: Path, method: str) -> list[Check]:
    return check_source(trained, GGUFSource(path), method)


def _check_gguf(method: str, path: Path, trained: Trained, tokenizer: Any) -> list[Check]:
    found = checked("weights read back", _check_weights, trained, path, method)
    found += checked("tokenizer rebuilt from the file", check_gguf_tokenizer, tokenizer, path)
    if llama_cpp.is_installed():
        found += checked("llama.cpp", check_in_llama_cpp, trained, tokenizer, path, method)
    else:
        found.append(
            Check("llama.cpp", Outcome.NOT_RUN, "xllamacpp is not installed (pip install xllamacpp)")
        )
    for check in found:
        check.name = f"{method}: {check.name}"
    return found
