"""The trained model as GGUF files, any number of quantisation methods in one call, or its LoRA adapter as such files.

llama.cpp applies an adapter to a GGUF file of the base: it adds alpha / r * B A to a weight, with one alpha for the file.
Where PEFT's scale is another (rsLoRA, alphas by layer), B carries the ratio.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oribi.chat.ends import renders, stop_ids
from oribi.errors import ConfigError, ExportError
from oribi.gguf import llama_cpp
from oribi.gguf.file import GGUFFile, Type
from oribi.gguf.metadata import WITH_PROJECTOR, check_config
from oribi.gguf.mixes import METHODS, mix_of
from oribi.gguf.modelfile import NoModelfile, modelfile
from oribi.gguf.names import WITHOUT_ADAPTER, tensors_to_write
from oribi.gguf.source import GGUFSource
from oribi.gguf.splits import CUT_BY_CASE
from oribi.gguf.tensor import Tensor
from oribi.gguf.tokenizer import Vocabulary
from oribi.gguf.writer import plan_file, write_adapter_file, write_files
from oribi.models.identity import AS_IN_FILE
from oribi.models.unwrap import is_classifier, source_of
from oribi.save.adapter_files import changed_tables
from oribi.save.base import base_name, changed_base
from oribi.save.card import fenced
from oribi.save.carried import DRAFT_COUNTS, has_other_parts
from oribi.save.check import Check, Outcome
from oribi.save.export import Export, Verify, checked, file_name, model_name, trained_answers
from oribi.save.folder import announce
from oribi.save.hub import GGUF_KEYWORDS, push, read_accepted
from oribi.save.one_writer import by_first_process
from oribi.save.probe_file import ExportedFile
from oribi.save.trained import LoadedModel, MergedModel, changes_of
from oribi.save.verify_gguf import check_gguf_tokenizer, check_in_llama_cpp
from oribi.save.whole import whole_model

_METADATA = 16 << 20  # bytes of a file; a vocabulary of 128k tokens and its merges takes 8 MB
_ADAPTER_TYPES = {"auto": Type.F16, "f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
# of the norm of a factor; float16 passes it only where a factor's values are too small for it
_TOLERANCE = {Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 4e-3, Type.Q8_0: 1e-2}


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
    _refuse_classifier(model)
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
    called = model_name(model) if name is None else file_name(name)
    files = {method: f"{called}.{method.upper()}.gguf" for method in methods}
    export = GGUFExport(model, directory, "gguf", files, verify, options.tags)
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


def _refuse_classifier(model: nn.Module) -> None:
    if is_classifier(model):
        raise ExportError(
            "a sequence classifier is not written as GGUF: llama.cpp and Ollama run models that continue texts, and would not read "
            "its scores. Call save_pretrained_merged, whose folder transformers' AutoModelForSequenceClassification loads"
        )


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
        sizes = {
            method: sum(entry.nbytes for entry in plan_file(config, shapes, method)) for method in self.files
        }
        announce(self.directory, {f"GGUF {m} ({METHODS[m].words})": size for m, size in sizes.items()})
        self.merged = self.merge(tokenizer, held_out, base)
        self.run(sum(sizes.values()) + _METADATA * len(self.files))

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


@by_first_process
def save_gguf_adapter(
    model: nn.Module,
    directory: str | Path,
    quantization_method: str | Sequence[str] = "f16",
    *,
    tokenizer: Any = None,
    held_out: Sequence[Any] | None = None,
    verify: Verify = True,
) -> dict[str, Any]:
    """Write the active LoRA adapter as GGUF and check that the file holds it.

    Args:
        model: PEFT's model with one active adapter, LoRA or rsLoRA alone.
        directory: where the file goes; created.
        quantization_method: f32, f16, bf16 or q8_0 (where rows allow it, f16 elsewhere), or several.
        tokenizer, held_out: for probes.json, which is written where a tokenizer is given.
        verify: as for `save_merged`.

    Returns:
        gguf_directory, gguf_files (paths) and report (`ExportReport`).

    Raises:
        ConfigError: an unknown type.
        ExportError: the adapter has parts that llama.cpp cannot apply, or a file differs from it.
    """
    _refuse_classifier(model)
    names = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    unknown = [name for name in names if name.lower() not in _ADAPTER_TYPES]
    if unknown:
        raise ConfigError(f"an adapter as GGUF is written as {', '.join(_ADAPTER_TYPES)}; got {unknown[0]!r}")
    if verify and tokenizer is not None:  # which asks the model, in this process alone
        model = whole_model(model)
    files = {name.lower(): f"{model_name(model)}-lora.{name.upper()}.gguf" for name in names}
    export = GGUFAdapterExport(model, directory, "gguf-adapter", files, verify)
    export.save(tokenizer, held_out)
    return {
        "report": export.report,
        "gguf_directory": str(directory),
        "gguf_files": [str(Path(directory) / file) for file in files.values()],
    }


class GGUFAdapterExport(Export):
    """GGUF files of the adapter, each in its own type."""

    pattern = "*.gguf"

    def save(self, tokenizer: Any, held_out: Any) -> None:
        """Write and check the files; arguments as for `save_gguf_adapter`."""
        _require_own_base(self.model)
        self.alpha, self.pairs = _pairs(self.model, self.inner.config)
        size = sum(pair.numel() * 4 for pair in self.pairs.values()) * len(self.files)
        announce(self.directory, {"adapter as GGUF": size})
        self.report.checked_on = "every factor of the adapter"
        self.report.notes += _belongs_to(self.model)
        if self.verify and tokenizer is not None:
            self.trained, unanswered = trained_answers(self.model, tokenizer, held_out)
            self.report.checks += unanswered
            if self.trained is not None:
                self.ask_signatures(tokenizer)
        self.run(size + (1 << 20))

    def write(self, folder: Path) -> None:
        base = base_name(self.model)
        name = f"LoRA of {base}" if base else "LoRA"
        for form, file in self.files.items():
            kind = _ADAPTER_TYPES[form]
            write_adapter_file(folder / file, self.inner.config, self.alpha, self.pairs, kind, name)

    def check(self, form: str, path: Path) -> list[Check]:
        if self.signatures is not None:
            self.said[path.name] = ExportedFile(form, self.signatures.says["trained"])
        return checked(form, _check_pairs, form, path, self.alpha, self.pairs, _ADAPTER_TYPES[form])

    def usage(self, folder: Path, file: str) -> str:
        return fenced(f"llama-cli -m BASE.gguf --lora {shlex.quote(file)}")


def _require_own_base(model: nn.Module) -> None:
    """Raise if the base in memory differs from every file of the base."""
    changed = changed_base(model)
    adapters = model.active_adapters if hasattr(model, "peft_config") else []
    rows = [name for adapter in adapters for name in changed_tables(model, adapter)]
    if changed or rows:
        raise ExportError(
            f"the base's weights were changed after it was loaded ({(changed + rows)[0]} the first), and a GGUF adapter "
            "holds LoRA updates alone; save merged GGUF files instead"
        )


def _belongs_to(model: nn.Module) -> list[str]:
    """What is to be known of the base that the adapter goes with."""
    identity = getattr(source_of(model), "identity", None)
    if identity is not None and identity.weights == AS_IN_FILE:
        return [
            f"the adapter was trained on the codes of {identity.name}: with that file it is the trained model"
        ]
    if identity is None or not identity.in_nf4:
        return []
    return [
        "the adapter was trained on NF4 weights; on a GGUF file of the 16-bit model it computes something else than was "
        "trained (measured: 74 % instead of 85 % of answers right, SmolLM2-135M). Merged GGUF files hold the trained model"
    ]


def _pairs(model: nn.Module, config: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """alpha, and a [r, K] and b [N, r] of every adapted weight by their names in the file; of experts, one behind the other."""
    changes = changes_of(model)
    if not changes:
        raise ExportError("the model has no active adapter to write")
    places: dict[str, list[Tensor]] = {}
    for tensor in tensors_to_write(config, list(LoadedModel(model).shapes())):
        for source in tensor.sources:
            places.setdefault(source, []).append(tensor)
    alpha, pairs = None, {}
    if unread := [name for name in WITHOUT_ADAPTER if name in changes]:
        raise ExportError(
            f"llama.cpp applies no LoRA update to {unread[0]}; save merged GGUF files instead, or train without it"
        )
    for name, change in changes.items():
        plain = len(change.updates) == 1 and not (change.replacement or change.rows or change.offsets)
        if (
            not plain
            or change.updates[0].magnitude is not None
            or change.updates[0].columns
            or name not in places
        ):
            raise ExportError(
                f"{name}: llama.cpp applies one LoRA update of a linear layer that the file holds, and no DoRA, bias, "
                "new token or fully trained module; save merged GGUF files instead"
            )
        update = change.updates[0]
        rank = len(update.a)
        alpha = update.scale * rank if alpha is None else alpha
        for place in places[name]:
            a, b = place.adapter_to_gguf(update.a, update.b)
            b = b * (update.scale * rank / alpha)
            for key, factor in ((f"{place.name}.lora_a", a), (f"{place.name}.lora_b", b)):
                pairs.setdefault(key, []).append(factor)
    # PEFT adapts the experts of a layer together, and names them in their order
    return alpha, {key: torch.stack(found) if len(found) > 1 else found[0] for key, found in pairs.items()}


def _check_pairs(name: str, path: Path, alpha: float, pairs: dict[str, torch.Tensor], type: Type) -> Check:
    """Compare a written file's factors with the adapter's."""
    file = GGUFFile(path)
    found = file.tensors
    lacking = [key for key in pairs if key not in found]
    if lacking:
        raise ExportError(f"{path} lacks {len(lacking)} of {len(pairs)} factors, {lacking[0]} the first")
    same_alpha = file.value("adapter.lora.alpha") == np.float32(alpha)
    worst = 0.0 if same_alpha else np.inf
    for key, pair in pairs.items():
        difference = file.read(key, torch.float32) - pair
        worst = max(worst, (difference.norm() / pair.norm().clamp_min(1e-30)).item())
    tolerance = _TOLERANCE[type]
    figures = {"factors": len(found), "of": len(pairs), "largest error": worst, "at most": tolerance}
    outcome = Outcome.DIFFERENT
    if worst <= tolerance and len(found) == len(pairs):
        outcome = Outcome.EQUAL if not worst else Outcome.CLOSE
    says = f"{len(found)} of {len(pairs)} factors, largest error {worst:.2g} of a factor's norm (at most {tolerance})"
    advice = "the adapter's values do not fit this type; take f32"
    return Check(f"{name}: adapter read back", outcome, says, figures, advice)
