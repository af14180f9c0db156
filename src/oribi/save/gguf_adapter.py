"""The trained LoRA adapter as GGUF files, with the file of its base where that is made by oribi.

llama.cpp applies an adapter to a GGUF file of the base: it adds alpha / r * B A to a weight, with one alpha for the file.
Where PEFT's scale is another (rsLoRA, alphas by layer), B carries the ratio.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oribi.errors import ConfigError, ExportError, ModelError
from oribi.gguf import llama_cpp
from oribi.gguf.file import GGUFFile, Type
from oribi.gguf.names import WITHOUT_ADAPTER, tensors_to_write
from oribi.gguf.source import GGUFSource
from oribi.gguf.tensor import Tensor
from oribi.gguf.writer import plan_file, write_adapter_file, write_files
from oribi.kernels.block_stack import BlockStack
from oribi.kernels.expert_stack import PackedStack
from oribi.kernels.ggml_blocks import BlockCodes
from oribi.kernels.packed_weight import ShiftedCodes
from oribi.models.identity import AS_IN_FILE
from oribi.models.packed_linear import is_requantised
from oribi.models.unwrap import is_classifier, source_of
from oribi.save.adapter_files import changed_tables
from oribi.save.base import base_name, changed_base, locate_here, open_base
from oribi.save.card import fenced
from oribi.save.check import Check, Outcome
from oribi.save.export import Export, Verify, checked, model_name, trained_answers
from oribi.save.folder import announce
from oribi.save.one_writer import by_first_process
from oribi.save.probe_file import ExportedFile
from oribi.save.trained import LoadedModel, MergedModel, changes_of, slots_of
from oribi.save.verify_gguf import check_gguf_tokenizer, check_in_llama_cpp
from oribi.save.whole import whole_model

MOST_METADATA = 16 << 20  # bytes of a file; a vocabulary of 128k tokens and its merges takes 8 MB
_ADAPTER_TYPES = {"auto": Type.F16, "f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
# of the norm of a factor; float16 passes it only where a factor's values are too small for it
_TOLERANCE = {Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 4e-3, Type.Q8_0: 1e-2}
# how the names of what scales the output of each expert end in a file
_SCALE = ".scale"


def refuse_classifier(model: nn.Module) -> None:
    """Raise over a sequence classifier."""
    if is_classifier(model):
        raise ExportError(
            "a sequence classifier is not written as GGUF: llama.cpp and Ollama run models that continue texts, and would not read "
            "its scores. Call save_pretrained_merged, whose folder transformers' AutoModelForSequenceClassification loads"
        )


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

    Of a model that was loaded with `train_for`, the GGUF file of its base is written beside it. llama.cpp is asked with base and
    adapter, where it is installed and the adapter was trained on the values of a GGUF file.

    Args:
        model: PEFT's model with one active adapter, LoRA or rsLoRA alone.
        directory: where the file goes; created.
        quantization_method: f32, f16, bf16 or q8_0 (where rows allow it, f16 elsewhere), or several.
        tokenizer, held_out: for probes.json and what llama.cpp is asked, where a tokenizer is given; the base's file needs one.
        verify: as for `save_merged`.

    Returns:
        gguf_directory, gguf_files (paths) and report (`ExportReport`).

    Raises:
        ConfigError: an unknown type, or no tokenizer for the base's file.
        ExportError: the adapter has parts that llama.cpp cannot apply, or a file differs from it.
    """
    refuse_classifier(model)
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
        self.tokenizer, self.identity = tokenizer, getattr(source_of(self.model), "identity", None)
        self.method = None if self.identity is None else self.identity.train_for
        if self.method is not None and tokenizer is None:
            raise ConfigError(
                f"the adapter was trained for {self.method}, and the base's GGUF file, which is written beside it, holds the "
                "tokenizer; give tokenizer="
            )
        self.alpha, self.pairs = _pairs(self.model, self.inner.config)
        size = sum(pair.numel() * 4 for pair in self.pairs.values()) * len(self.files)
        sizes = {"adapter as GGUF": size}
        if self.method is not None:
            shapes = LoadedModel(self.model).shapes()
            sizes["base as GGUF"] = sum(e.nbytes for e in plan_file(self.inner.config, shapes, self.method))
        announce(self.directory, sizes)
        self.report.checked_on = "every factor of the adapter"
        self.report.notes += _belongs_to(self.model)
        if self.verify and tokenizer is not None:
            self.trained, unanswered = trained_answers(self.model, tokenizer, held_out)
            self.report.checks += unanswered
            if self.trained is not None:
                self.ask_signatures(tokenizer)
        self.run(sum(sizes.values()) + (MOST_METADATA if self.method else 1 << 20))

    @property
    def base_file(self) -> str:
        """Name of the base's file, as a `train_for` run writes it; else a name to be replaced."""
        return "BASE.gguf" if self.method is None else f"{model_name(self.model)}.{self.method.upper()}.gguf"

    def write(self, folder: Path) -> None:
        if self.method is not None:
            device = next(self.inner.parameters()).device
            with torch.no_grad():
                write_files(
                    {self.method: folder / self.base_file}, Untouched(self.model), self.inner.config, self.tokenizer,
                    name=model_name(self.model), device=device,
                    suppressed=self.inner.generation_config.suppress_tokens or (),
                )  # fmt: skip
        base = base_name(self.model)
        name = f"LoRA of {base}" if base else "LoRA"
        for form, file in self.files.items():
            kind = _ADAPTER_TYPES[form]
            write_adapter_file(folder / file, self.inner.config, self.alpha, self.pairs, kind, name)

    def check(self, form: str, path: Path) -> list[Check]:
        if self.signatures is not None:
            self.said[path.name] = ExportedFile(form, self.signatures.says["trained"])
        found = checked(form, _check_pairs, form, path, self.alpha, self.pairs, _ADAPTER_TYPES[form])
        base = self._base_path(path.parent)
        if base is None:
            return found
        if self.method is not None:
            found += checked("codes", compare_codes, self.model, base)
            found += checked(
                "tokenizer rebuilt from the base's file", check_gguf_tokenizer, self.tokenizer, base
            )
        if self.trained is None:
            return found
        if not llama_cpp.is_installed():
            says = "xllamacpp is not installed (pip install xllamacpp)"
            return [*found, Check("llama.cpp", Outcome.NOT_RUN, says)]
        both = MergedModel(self.model, GGUFSource(base))
        # llama.cpp rounds activations to 8 bits
        asked = (self.trained, self.tokenizer, base, "q8_0", path, both)
        return found + checked("llama.cpp", check_in_llama_cpp, *asked)

    def _base_path(self, folder: Path) -> Path | None:
        """The GGUF file whose values the adapter was trained on, if it is here."""
        if self.method is not None:
            return folder / self.base_file
        if self.identity is None or self.identity.weights != AS_IN_FILE:
            return None
        try:
            return locate_here(self.model, self.identity.name)[0].file
        except (ExportError, ModelError):
            return None

    def usage(self, folder: Path, file: str) -> str:
        return fenced(f"llama-cli -m {shlex.quote(self.base_file)} --lora {shlex.quote(file)}")


class Untouched:
    """The checkpoint that a model was loaded from, with the tensors of the model in its order, as a `TensorSource`.

    Raises:
        ExportError: as `open_base`.
    """

    def __init__(self, model: nn.Module) -> None:
        base = open_base(model, "original")
        self.shapes, self.read, self.close = LoadedModel(model).shapes, base.read, base.close


def _require_own_base(model: nn.Module) -> None:
    """Raise if the base in memory differs from every file of the base."""
    if is_requantised(model):
        raise ExportError(
            "the adapter was trained for one merged GGUF file, in which it is quantised with its base; export that file "
            "(gguf:METHOD), or train without it in quantization_method"
        )
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
    if identity is not None and identity.train_for is not None:
        return [
            f"the adapter was trained on the codes of the base's {identity.train_for} file, which is beside it"
        ]
    if identity is not None and identity.weights == AS_IN_FILE:
        if any(
            isinstance(getattr(slot.tensor, "packed", None), PackedStack) for slot in slots_of(model).values()
        ):
            return [
                f"the adapter was trained on experts in NF4: beside {identity.name}, whose experts have other values, it computes "
                "something else than was trained. Merged GGUF files hold the trained model"
            ]
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
    loaded = LoadedModel(model)
    tensors, scales = tensors_to_write(config, list(loaded.shapes())), {}
    for tensor in tensors:
        if tensor.name.endswith(_SCALE):
            values = loaded.read(tensor.source, torch.device("cpu"), torch.float32)
            scales[f"{tensor.name.removesuffix(_SCALE)}.weight"] = values
        for source in tensor.sources:
            places.setdefault(source, []).append(tensor)
    alpha, pairs = None, {}
    if unread := [name for name in changes if name.endswith(WITHOUT_ADAPTER)]:
        raise ExportError(
            f"llama.cpp applies no LoRA update to {unread[0]}; save merged GGUF files instead, or train without it"
        )
    for name, change in changes.items():
        update = change.plain_update
        if update is None or update.columns or name not in places:
            raise ExportError(
                f"{name}: llama.cpp applies one LoRA update of a linear layer that the file holds, and no DoRA, bias, "
                "new token or fully trained module; save merged GGUF files instead"
            )
        rank = len(update.a)
        alpha = update.scale * rank if alpha is None else alpha
        for place in places[name]:
            a, b = place.adapter_to_gguf(update.a, update.b)
            b = b * (update.scale * rank / alpha)
            if place.name in scales:
                # llama.cpp scales the product with an expert's weight, and adds that with the factors as it is
                b = b * scales[place.name][place.sources.index(name)].to(b.device)
            for key, factor in ((f"{place.name}.lora_a", a), (f"{place.name}.lora_b", b)):
                pairs.setdefault(key, []).append(factor)
    # PEFT adapts the experts of a layer together, and names them in their order
    joined = {place.name: place.joined for of_one in places.values() for place in of_one}
    return alpha, {
        key: _stacked(key, found, joined[key.rpartition(".")[0]]) if len(found) > 1 else found[0]
        for key, found in pairs.items()
    }


def _stacked(key: str, factors: list[torch.Tensor], joined: int) -> torch.Tensor:
    """Factors of all experts in one tensor: a [E, r, K] of a key that ends so, else b [E, N, r].

    Args:
        joined: how many matrices of each expert are one in the file; they share a.
    """
    if joined == 1:
        return torch.stack(factors)
    of_each = [factors[first : first + joined] for first in range(0, len(factors), joined)]
    if not key.endswith(".lora_a"):
        return torch.stack([torch.cat(one) for one in of_each])
    if not all(torch.equal(one[0], other) for one in of_each for other in one[1:]):
        raise ExportError(
            f"{key}: llama.cpp holds gate and up of an expert in one matrix, and this adapter has factors of their own for each; "
            "save merged GGUF files instead"
        )
    return torch.stack([one[0] for one in of_each])


def compare_codes(model: nn.Module, path: Path) -> Check:
    """Compare the codes of a file with those that are in memory, bit by bit."""
    file, different, count = GGUFSource(path), [], 0
    for name, slot in slots_of(model).items():
        packed = getattr(slot.tensor, "packed", None)
        packed = packed.whole if isinstance(packed, ShiftedCodes) else packed
        if isinstance(packed, (BlockCodes, BlockStack)):
            count += 1
            found = _codes_of_file(file, name, packed)
            if found is None or not torch.equal(found, packed.codes):
                different.append(name)
    figures = {"same": count - len(different), "of": count}
    says = f"{count - len(different)} of {count} weights have the codes that were trained on, bit by bit"
    if not count:
        return Check("codes", Outcome.NOT_TESTED, "the values of the codes were trained on in 16 bits")
    outcome = Outcome.DIFFERENT if different else Outcome.EQUAL
    return Check("codes", outcome, says, figures, f"{different[:1]} differs: the checkpoint was changed")


def _codes_of_file(file: GGUFSource, name: str, packed: BlockCodes | BlockStack) -> torch.Tensor | None:
    """The codes that a file has of a weight, as those in memory lie; None where it has the weight in another type."""
    if isinstance(packed, BlockCodes):
        same = file.block_type(name) == packed.kind
        return file.read_blocks(name, packed.codes.device).codes if same else None
    same = file.stack_types.get(name) == packed.kinds
    return file.stack_codes(*name.rsplit(".", 1), packed.codes.device).codes if same else None


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
