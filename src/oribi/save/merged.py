"""The trained model as one folder, merged or as adapter.

Adapters are added to their base in float32, rounded once and written tensor by tensor.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oribi.chat.ends import stop_ids
from oribi.errors import ConfigError, ExportError
from oribi.families import family_of
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.expert_names import names_in_float32
from oribi.models.expert_tensors import stacked, unstacked
from oribi.models.files import HubOptions, Location, open_weights
from oribi.models.unfused import beside_decoder
from oribi.models.unwrap import is_classifier, source_of, vocab_rows
from oribi.models.wrapper import automatic
from oribi.save.adapter import AdapterExport
from oribi.save.base import base_name, locate_here, open_base
from oribi.save.card import fenced
from oribi.save.carried import DRAFT_COUNTS, Carried, copy_beside_weights, find_carried, has_other_parts
from oribi.save.check import Check
from oribi.save.export import Export, Verify, checked
from oribi.save.folder import announce
from oribi.save.forms import COMPRESSED, PER_EXPERT, require_form
from oribi.save.hub import MERGED_KEYWORDS, push, read_accepted, upload_folder
from oribi.save.nf4_checkpoint import (
    Nf4Source,
    nf4_config,
    pack_nf4,
    packed_bytes,
    packed_names,
    unpacked_modules,
)
from oribi.save.one_writer import by_first_process
from oribi.save.report import ExportReport
from oribi.save.shards import TensorPlan, shard_bytes, write_shards
from oribi.save.trained import MergedModel, changes_of
from oribi.save.verify import check_saved_tokenizer, logits_of_whole
from oribi.save.whole import whole_model
from oribi.tensors import TensorSource, all_finite

METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", *COMPRESSED, "lora", PER_EXPERT)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU = torch.device("cpu")


@by_first_process
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
        save_method: "merged_16bit", "merged_4bit" (the merge quantised to NF4 again), "fp8" or "w4a16" (quantised for vLLM and
            SGLang, see `save.compressed`), "lora", or "lora_per_expert" (the adapter with a pair for each expert by itself, as
            vLLM reads Qwen3-MoE's).
        base: "dequantized" (the trained function exactly), "original", "auto", or a folder; see `save.base`.
        dtype: of what is not quantised; None takes bfloat16 or float16 of the model, and bfloat16 for float32.
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
    if not options.is_main_process:
        return None
    save_method = save_method.removesuffix("_forced")
    if save_method not in ("lora", PER_EXPERT) or verify:  # which asks the model, in this process alone
        model = whole_model(model)
    common = (model, directory, save_method, {save_method: "."}, verify, options.tags)
    if save_method in ("lora", PER_EXPERT):
        report = AdapterExport(*common).save(tokenizer, held_out)
    else:
        export = _export_class(model, save_method)(*common)
        export.dtype = merged_dtype(model, dtype)
        report = export.save(tokenizer, held_out, base, shard_bytes(max_shard_size))
    if options.push_to_hub:
        upload_folder(Path(directory), Path(directory).name, options)
    return report


def _export_class(model: nn.Module, save_method: str) -> type["MergedExport"]:
    """What writes a merged model of this kind.

    Raises:
        ConfigError: a classifier, or a model with experts, is not written this way.
    """
    if not is_classifier(model):
        require_form(model.config, save_method)
        if save_method in COMPRESSED:
            from oribi.save.compressed import CompressedExport

            return CompressedExport
        return MergedExport
    if save_method != "merged_16bit":
        raise ConfigError(
            f"save_method = {save_method!r}: a sequence classifier is written as 'merged_16bit' or 'lora'"
        )
    from oribi.save.classifier import ClassifierExport

    return ClassifierExport


@by_first_process
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


class MergedExport(Export):
    """A merged checkpoint; `dtype` is that of the tensors that are not quantised."""

    dtype = torch.bfloat16

    def save(self, tokenizer: Any, held_out: Any, base: str, max_shard_bytes: int) -> ExportReport:
        """Write and check it; arguments as for `save_merged`."""
        self.tokenizer, self.max_shard_bytes = tokenizer, max_shard_bytes
        self.quantized = self.report.kind == "merged_4bit"
        base = self._base_of_codes(base)
        self.plans = self._plan(base)
        size = sum(plan.nbytes for plan in self.plans)
        words = f"{self.report.kind}, {len(self.plans)} tensors in {_dtype_name(self.dtype)}"
        announce(self.directory, {words: size})
        self.merged = self.merge(tokenizer, held_out, base)
        return self.run(size)

    def _base_of_codes(self, base: str) -> str:
        """The base of a merge that is packed in NF4 as its weights have been: "original" for "dequantized" where it is here.

        Rounded to its own codes again, a weight keeps little of a small update: of a trained adapter of 1 to 2 % of the weights'
        size 1 to 14 % was left, and 97 to 104 % where the 16-bit weights were merged and packed (SmolLM2-135M, four matrices).
        """
        is_packed = getattr(source_of(self.model), "load_in_4bit", False)
        if not (self.quantized and is_packed and base == "dequantized" and changes_of(self.model)):
            return base
        try:
            MergedModel(self.model, open_base(self.model, "original"))
        except ExportError as error:
            self.report.notes.append(
                "the merge is rounded to the NF4 codes that it came from, where most of a small update is lost: write merged_16bit, "
                f"serve the adapter, or merge with base= the folder of the 16-bit checkpoint ({error})"
            )
            return base
        self.makes_codes_anew = True
        self.report.notes.append(
            "the adapter is merged into the 16-bit checkpoint and packed: NF4 values rounded to their own codes again would lose small updates"
        )
        return "original"

    def _plan(self, base: str) -> list[TensorPlan]:
        """What is written: the trained tensors and, under the checkpoint's own names, what it holds beside them."""
        merged = MergedModel(self.model)
        shapes = self.in_files(merged).shapes()
        packed = self.names_to_pack(shapes)
        self.unpacked = unpacked_modules(self.model, packed) if packed else []
        self.wide = names_in_float32(self.inner, self.dtype)
        self.carried = None
        found = self.find_carried(merged, base)
        kind = getattr(getattr(source_of(self.model), "config", None), "model_type", "")
        if isinstance(found, str):
            if not beside_decoder(self.inner):
                self.report.notes.append(
                    f"the text model alone: what {kind} has for images and sound is not in it ({found})"
                )
        elif found is not None:
            self.carried = found
            self.report.notes.append(
                f"{len(found.others)} tensors that {kind} has beside the text model are carried over as they are"
            )
        text = dict.fromkeys(shapes) if self.carried is None else self.carried.text
        plans = []
        for name, own in ((name, text[name] or name) for name in text):
            plain = TensorPlan(name, shapes[own], self.dtype_of(own))
            plans += self.packed_plans(name, shapes[own]) if own in packed else [plain]
        for name in self.carried.others if self.carried is not None else ():
            tensor = self._read_carried(name)
            plans.append(TensorPlan(name, tuple(tensor.shape), tensor.dtype))
        return plans

    def in_files(self, source: TensorSource) -> TensorSource:
        """The model's tensors as the files hold them."""
        return stacked(source, self.inner)

    def in_model(self, source: TensorSource) -> TensorSource:
        """The files' tensors as the model's are named."""
        return unstacked(source, self.inner)

    def find_carried(self, merged: MergedModel, base: str) -> Carried | str | None:
        """As `carried.find_carried`."""
        return find_carried(self.model, stacked(merged, self.inner).shapes(), base, merged.tied)

    def dtype_of(self, own: str) -> torch.dtype:
        """Of a trained tensor that is not packed, by the model's name in the files."""
        return torch.float32 if own in self.wide else self.dtype

    def names_to_pack(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Names of the trained tensors that are quantised."""
        return packed_names(self.model) if self.quantized else set()

    def packed_plans(self, name: str, shape: tuple[int, ...]) -> list[TensorPlan]:
        """What a quantised tensor is written as."""
        return [TensorPlan(name, shape, self.dtype, packed_bytes(shape))]

    def quantization_settings(self, unpacked: list[str], beside: list[str]) -> dict[str, Any] | None:
        """quantization_config of config.json; None where nothing is quantised.

        Args:
            unpacked: modules of the text decoder that stay as they are. beside: parts of the class beside it, which do too.
        """
        return nf4_config(self.dtype, [*beside, *unpacked]).to_dict() if self.quantized else None

    @property
    def form(self) -> str:
        """What the tensors are, a key of `KL_TOLERANCE`."""
        return "4-bit" if self.quantized else _dtype_name(self.dtype)

    def _read_carried(self, name: str) -> torch.Tensor:
        tensor = self.carried.read(name)
        return tensor.to(self.dtype) if name in self.carried.source.packed else tensor

    def read_trained(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A trained tensor by its name in the export; None is the dtype of `dtype_of`."""
        own = name if self.carried is None else self.carried.text[name]
        return read_finite(self.in_files(self.merged), own, dtype or self.dtype_of(own))

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the export before it is packed."""
        if self.carried is None or name in self.carried.text:
            return self.read_trained(name)
        return self._read_carried(name)

    def write(self, folder: Path) -> None:
        write_shards(folder, self.plans, self.read, pack_nf4, self.max_shard_bytes)
        if self.carried is None:
            self._write_config(folder)
            self._copy_processor(folder)
        else:
            unpacked = list(map(self.carried.class_name, self.unpacked))
            settings = self.quantization_settings(unpacked, self.carried.beside)
            self.carried.write_config(folder, self.inner, self.merged.tied, self.dtype, settings)
            copy_beside_weights(self.carried.location.directory, folder)
        generation = copy.deepcopy(getattr(self.inner, "generation_config", None))
        if generation is not None and not is_classifier(self.model):
            stops = stop_ids(self.tokenizer, generation.eos_token_id)
            generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
            generation.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _copy_processor(self, folder: Path) -> None:
        """What prepares images for a multimodal model that is written as it lies in memory."""
        if not beside_decoder(self.inner):
            return
        try:
            copy_beside_weights(locate_here(self.model, base_name(self.model))[0].directory, folder)
        except ExportError:
            self.report.notes.append(
                "the base's files are not here, so no settings of its image processor are written"
            )

    def _write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.inner.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        settings = self.quantization_settings(self.unpacked, beside_decoder(self.inner))
        if settings is not None:
            config.quantization_config = settings
        family = family_of(config)
        as_family = family is not None and not is_classifier(self.model)
        config.architectures = [family.architecture if as_family else type(self.inner).__name__]
        config.dtype = self.dtype
        config.tie_word_embeddings = self.merged.tied
        config.get_text_config().vocab_size = vocab_rows(self.inner)
        for part in (config, config.get_text_config()):
            for name in DRAFT_COUNTS:
                if getattr(part, name, None):
                    setattr(part, name, 0)
        config.save_pretrained(folder)

    def check(self, form: str, path: Path) -> list[Check]:
        found = [] if self.carried is None else checked("what was not trained", self.carried.check, path)
        if self.trained is None:
            return found
        found += checked("weights read back", self._check_weights, self.form, path)
        if self.tokenizer is not None:
            found += checked("tokenizer", check_saved_tokenizer, self.tokenizer, path)
        return found

    def _check_weights(self, form: str, folder: Path) -> list[Check]:
        if not isinstance(self.inner, DecoderForCausalLM):
            return self.expect_logits(form, folder, logits_of_whole(self.trained, folder))
        own_name = (lambda name: name) if self.carried is None else self.carried.own_name
        stored = open_weights(Location("checkpoint", folder, str(folder)), HubOptions(), own_name)
        return self.expect(form, folder, Nf4Source(self.in_model(stored)))

    def usage(self, folder: Path, file: str) -> str:
        name, kind, reader = self.directory.name, automatic(self.inner.config).__name__, "AutoTokenizer"
        if self.carried is not None and has_other_parts(source_of(self.model).config):
            kind, reader = "AutoModelForImageTextToText", "AutoProcessor"
        return fenced(
            f"from transformers import {kind}, {reader}\n\n"
            f'model = {kind}.from_pretrained({name!r}, dtype="auto")\n'
            f"{reader.removeprefix('Auto').lower()} = {reader}.from_pretrained({name!r})",
            "python",
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def merged_dtype(model: nn.Module, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype of a merged checkpoint: as asked, else the model's, and bfloat16 for a float32 model.

    Raises:
        ConfigError: it is not bfloat16, float16 or float32.
    """
    if asked is None:
        dtype = getattr(model.config, "dtype", None)
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {asked!r}; expected bfloat16, float16 or float32")
    return dtype


def read_finite(source: TensorSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in `dtype` on the CPU.

    Raises:
        ExportError: a value is not finite there.
    """
    tensor = source.read(name, _CPU, dtype)
    if not all_finite(tensor):
        finite = all_finite(source.read(name, _CPU, torch.float32))
        problem = (
            f"passes the range of {dtype}; use torch.bfloat16"
            if finite
            else "is not finite: training diverged"
        )
        raise ExportError(f"{name} has a value that {problem}")
    return tensor
