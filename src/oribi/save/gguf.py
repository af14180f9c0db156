"""The trained model as GGUF files, any number of quantisation methods in one call."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import renders, stop_ids
from oribi.config_setting import KEPT_CODES
from oribi.errors import ConfigError
from oribi.gguf import llama_cpp
from oribi.gguf.metadata import WITH_PROJECTOR, check_config
from oribi.gguf.mixes import METHODS, mix_of
from oribi.gguf.modelfile import NoModelfile, modelfile
from oribi.gguf.source import GGUFSource
from oribi.gguf.splits import CUT_BY_CASE
from oribi.gguf.tokenizer import Vocabulary
from oribi.gguf.writer import note_on_rows, plan_file, write_files
from oribi.models.identity import AS_IN_FILE
from oribi.models.packed_linear import is_requantised
from oribi.models.unwrap import source_of
from oribi.save.base import base_name
from oribi.save.card import fenced
from oribi.save.carried import DRAFT_COUNTS, has_other_parts
from oribi.save.check import Check, Outcome
from oribi.save.export import Export, Verify, checked, file_name, model_name
from oribi.save.folder import announce
from oribi.save.gguf_adapter import MOST_METADATA, compare_codes, refuse_classifier, save_gguf_adapter
from oribi.save.hub import GGUF_KEYWORDS, push, read_accepted
from oribi.save.one_writer import by_first_process
from oribi.save.trained import MergedModel
from oribi.save.verify_gguf import check_gguf_tokenizer, check_in_llama_cpp
from oribi.save.whole import whole_model


@by_first_process
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
            several, the correct ones are in place nevertheless.
    """
    options = read_accepted(accepted, GGUF_KEYWORDS, "save_pretrained_gguf")
    refuse_classifier(model)
    if tokenizer is None:
        raise ConfigError("GGUF files hold the tokenizer; give tokenizer=")
    if not options.is_main_process:
        return None
    if options.save_method == "lora":
        return save_gguf_adapter(
            model, directory, quantization_method, tokenizer=tokenizer, held_out=held_out, verify=verify
        )
    model = whole_model(model)
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    methods = list(dict.fromkeys(mix_of(method).name for method in asked))
    base, notes = _base_of_codes(model, methods, base)
    called = model_name(model) if name is None else file_name(name)
    files = {method: f"{called}.{method.upper()}.gguf" for method in methods}
    export = GGUFExport(model, directory, "gguf", files, verify, options.tags)
    export.report.notes += notes
    export.save(tokenizer, held_out, base, called)
    return {
        "save_directory": str(directory),
        "gguf_directory": str(directory),
        "gguf_files": [str(Path(directory) / file) for file in files.values()],
        "modelfile_location": str(Path(directory) / "Modelfile") if export.has_modelfile else None,
        "want_full_precision": all(method in ("f32", "f16", "bf16") for method in methods),
        "is_vlm": False,
        "fix_bos_token": export.vocabulary.bos_removed,
        "report": export.report,
    }


def _base_of_codes(model: nn.Module, methods: Sequence[str], base: str) -> tuple[str, list[str]]:
    """The base of a merge whose frozen weights are codes of a GGUF file, and what is to be known of it.

    Codes that are rounded to codes of the same type again change little: of updates of 1 % of a Q4_K weight, 1 % is left.

    Raises:
        ConfigError: files of several methods are asked of weights that were trained for one.
    """
    identity = getattr(source_of(model), "identity", None)
    if identity is None or base != "dequantized":
        return base, []
    if identity.train_for is None:
        kept = identity.weights == AS_IN_FILE and any(method in KEPT_CODES for method in methods)
        return base, [
            "the adapter is merged into the codes of a GGUF file and rounded again, where small updates are lost: serve that file with the "
            "adapter (gguf-adapter), or merge into 16-bit weights with base= a folder"
        ] * kept  # fmt: skip
    if identity.train_for not in methods:
        return base, []
    if is_requantised(model) and len(methods) > 1:
        raise ConfigError(
            f"the model was trained for one {identity.train_for} file; write {' and '.join(m for m in methods if m != identity.train_for)} "
            "in another call, from the same weights"
        )
    if is_requantised(model):
        return "original", [
            f"base and adapter are quantised together, as they were trained for {identity.train_for}"
        ]
    return "original", [
        f"the adapter is merged into the 16-bit checkpoint: rounding {identity.train_for} codes again would lose small updates"
    ]


def _without_projector(model: nn.Module) -> list[str]:
    """What is to be known of a multimodal model's parts that a GGUF file of its text model does not hold."""
    source = source_of(model)
    if source is None or not has_other_parts(source.config):
        return []
    kind, folder = source.config.model_type, base_name(model)
    text = f"GGUF holds the text model alone; what {kind} has for images and sound is a separate file, the projector"
    if kind not in WITH_PROJECTOR:
        return [f"{text}, which llama.cpp makes of no {kind} model that is known here"]
    folder = "MERGED_16BIT_FOLDER" if source.kind == "bnb-4bit" or not folder else shlex.quote(folder)
    return [
        f"{text}: llama.cpp's `python convert_hf_to_gguf.py {folder} --mmproj` writes it, and `--mmproj FILE` loads it"
    ]


def _without_drafts(model: nn.Module) -> list[str]:
    """What is to be known of layers that a program may draft answers with."""
    source = source_of(model)
    if source is None or source.config is None:
        return []
    text = source.config.get_text_config()
    if not any(getattr(text, name, 0) for name in DRAFT_COUNTS):
        return []
    return [
        "layers that predict further tokens (mtp) are not in the file: llama.cpp answers the same, without drafts"
    ]


@by_first_process
def push_gguf(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    **keywords: Any,
) -> str | None:
    """Save as `save_gguf` does and upload the folder; arguments as for `push_merged` and `save_gguf`."""
    return push(save_gguf, GGUF_KEYWORDS, model, repo_id, tokenizer, quantization_method, **keywords)


class GGUFExport(Export):
    """GGUF files of the merged model, each in its own quantisation, with a Modelfile for Ollama."""

    pattern = "*.gguf"
    vocabulary: Vocabulary
    has_modelfile = False

    def save(self, tokenizer: Any, held_out: Any, base: str, name: str) -> None:
        """Write and check the files; arguments as for `save_gguf`."""
        self.tokenizer, self.name, config = tokenizer, name, self.inner.config
        self.report.notes += [
            *check_config(config),
            *_without_projector(self.model),
            *_without_drafts(self.model),
        ]
        shapes = MergedModel(self.model).shapes()
        plans = {method: plan_file(config, shapes, method) for method in self.files}
        self.report.notes += [note for method, plan in plans.items() for note in note_on_rows(plan, method)]
        sizes = {method: sum(entry.nbytes for entry in plan) for method, plan in plans.items()}
        announce(self.directory, {f"GGUF {m} ({METHODS[m].words})": size for m, size in sizes.items()})
        self.merged = self.merge(tokenizer, held_out, base)
        self.run(sum(sizes.values()) + MOST_METADATA * len(self.files))

    def write(self, folder: Path) -> None:
        paths = {method: folder / file for method, file in self.files.items()}
        device, config = next(self.inner.parameters()).device, self.inner.config
        with torch.no_grad():
            self.vocabulary = write_files(
                paths, self.merged, config, self.tokenizer, name=self.name, device=device,
                suppressed=self.inner.generation_config.suppress_tokens or (),
            )  # fmt: skip
        if self.tokenizer.chat_template and not renders(self.tokenizer):
            self.report.notes.append(
                "the chat template fails on a plain conversation and is left out of the files"
            )
        if self.vocabulary.pre in CUT_BY_CASE:
            self.report.notes.append(
                f"llama.cpp splits some words beyond ASCII differently from this tokenizer (rule {self.vocabulary.pre}): "
                "those with combining marks, as in Hindi, or with capitals"
            )

    def check(self, form: str, path: Path) -> list[Check]:
        if self.trained is None:
            return []
        found = checked("weights read back", lambda: self.expect(form, path, GGUFSource(path)))
        found += checked("tokenizer rebuilt from the file", check_gguf_tokenizer, self.tokenizer, path)
        if llama_cpp.is_installed():
            found += checked("llama.cpp", check_in_llama_cpp, self.trained, self.tokenizer, path, form)
        else:
            says = "xllamacpp is not installed (pip install xllamacpp)"
            found.append(Check("llama.cpp", Outcome.NOT_RUN, says))
        if is_requantised(self.model) and form == source_of(self.model).identity.train_for:
            found += checked("codes", compare_codes, self.model, path)
        for check in found:
            check.name = f"{form}: {check.name}"
        return found

    def usage(self, folder: Path, file: str) -> str:
        usage = fenced(f"llama-cli -m {shlex.quote(file)}")
        generation = getattr(self.inner, "generation_config", None)
        stops = stop_ids(self.tokenizer, getattr(generation, "eos_token_id", None))
        adds_bos, notes = self.vocabulary.adds_bos, self.report.notes
        try:
            text = modelfile(file, self.tokenizer, stops, generation, adds_bos=adds_bos, notes=notes)
        except NoModelfile as why:
            notes.append(f"no Modelfile for Ollama was written: {why}")
            return usage
        (folder / "Modelfile").write_text(text)
        self.has_modelfile = True
        called = shlex.quote(self.name.lower())
        return f"{usage}\n\n" + fenced(f"ollama create {called} -f Modelfile\nollama run {called}")
