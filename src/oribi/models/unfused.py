"""Models outside the family table: transformers' own class with NF4 weights, without oribi's fused path."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from oribi.errors import ConfigError, ModelError
from oribi.formats.packed import PackedSource, note_on_packed
from oribi.formats.settings import packed_format
from oribi.kernels.nf4 import nf4_bytes
from oribi.models.files import HubOptions, Location, open_weights, stored_settings
from oribi.models.generate import generate_in_inference_mode
from oribi.models.quantization import Quantization
from oribi.models.quantize import fits_nf4, notes_on_unfitting
from oribi.models.unwrap import read_by_kernels
from oribi.models.wrapper import automatic
from oribi.tensors import problems_in_words

_CPU = torch.device("cpu")
_NAMED = 3  # kinds of tensors that a note names
# tables that a model computes by itself and that older checkpoints store or lack
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")


@dataclass(frozen=True)
class UnfusedSizes:
    """Weights of a model outside the family table, by what bitsandbytes makes of them.

    Args:
        packed: weights of linear layers, which it packs.
        kept: weights that it leaves in 16 bits, by the name of their kind ("model.layers.*.mlp.experts.down_proj").
    """

    packed: int
    kept: dict[str, int]

    @property
    def parameters(self) -> int:
        return self.packed + sum(self.kept.values())

    def parts(self, width: int, load_in_4bit: bool) -> dict[str, int]:
        """Bytes of the loaded weights by kind; `width` bytes each where they are not packed."""
        experts = sum(count for name, count in self.kept.items() if _is_expert(name))
        return {
            "linear layers": nf4_bytes(self.packed) if load_in_4bit else self.packed * width,
            "experts": experts * width,
            "embeddings and other weights": (sum(self.kept.values()) - experts) * width,
        }

    def note(self, width: int) -> str:
        """What stays in 16 bits under load_in_4bit."""
        kept = {name: count * width for name, count in self.kept.items()}
        largest = sorted(kept, key=kept.get, reverse=True)[:_NAMED]
        packed = nf4_bytes(self.packed)
        named = ", ".join(f"{name} {kept[name] / 1e9:.2f} GB" for name in largest)
        text = (
            f"load_in_4bit: {sum(kept.values()) / 1e9:.2f} GB of {(packed + sum(kept.values())) / 1e9:.2f} GB of weights "
            f"stay in {8 * width} bits, above all {named}"
        )
        if any(_is_expert(name) for name in kept):
            text += "; bitsandbytes packs linear layers, not experts whose weights are one tensor"
        return text


def _is_expert(name: str) -> bool:
    return "expert" in name


def unfused_sizes(parameters: Iterable[tuple[str, nn.Parameter]], linear: set[str]) -> UnfusedSizes:
    """Sizes of named parameters, of which those in `linear` are packed."""
    packed, kept = 0, Counter()
    for name, parameter in parameters:
        if name in linear:
            state = getattr(parameter, "quant_state", None)
            packed += parameter.numel() if state is None else state.shape.numel()
        else:
            kept[re.sub(r"\.\d+\.", ".*.", name)] += parameter.numel()
    return UnfusedSizes(packed, dict(kept))


def weightless(
    config: PretrainedConfig, *, trust_remote_code: bool = False, classifies: bool = False
) -> PreTrainedModel:
    """The model that transformers makes of a config, on the meta device; no weights are read and no memory is taken."""
    with torch.device("meta"):
        return _auto(config, classifies).from_config(config, trust_remote_code=trust_remote_code)


def _auto(config: PretrainedConfig, classifies: bool) -> Any:
    return AutoModelForSequenceClassification if classifies else automatic(config)


def beside_decoder(model: PreTrainedModel) -> list[str]:
    """Modules of a multimodal class beside its text decoder and head, such as the vision tower: they are not trained, and not
    packed, so that an export holds them as they were."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder = names.get(id(model.get_decoder())) if hasattr(model, "get_decoder") else None
    head = names.get(id(model.get_output_embeddings()))
    if not decoder or getattr(model.config, "text_config", None) is None:
        return []
    parts = decoder.split(".")
    around = {".".join(parts[:depth]) for depth in range(len(parts))}
    kept = [f"{name}." for name in (decoder, head or decoder)]
    return [
        name
        for name in names.values()
        if name and name.rpartition(".")[0] in around and not any(one.startswith(f"{name}.") for one in kept)
    ]


def sizes_of_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> UnfusedSizes:
    """Sizes of the model that transformers makes of a config."""
    model = weightless(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    others = tuple(f"{name}." for name in (*beside_decoder(model), *read_by_kernels(model)))
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and module is not head
        and not f"{name}.".startswith(others)
    }
    return unfused_sizes(model.named_parameters(), linear)


def load_unfused(
    location: Location,
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    trust_remote_code: bool,
    allow_pickle: bool,
    notes: list[str],
    classifies: bool = False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A causal language model, or the text decoder within a multimodal one, or a sequence classifier, in transformers' class.

    Args:
        location: a checkpoint whose weights are on disk.
        config: its config; one that names NF4 is loaded as it is, and of formats for servers the name is taken out.
        device, dtype, quantization, trust_remote_code, allow_pickle: as in `load.Request`.
        notes: gets a line on what stays in 16 bits, one on tensors that the model does not use, and one on dequantised weights.
        classifies: whether the config holds labels to tell apart. What its checkpoint lacks of the head is made anew.

    Returns:
        The model, and its modules that were made anew.

    Raises:
        ModelError: transformers cannot load it, tensors are missing or have another shape than the config says, or its
            layers cannot be packed on this device.
    """
    packed = packed_weights(location, config)
    notes += note_on_packed(packed, quantization.enabled)
    try:
        expected = weightless(config, trust_remote_code=trust_remote_code, classifies=classifies)
        expected.get_input_embeddings()  # a class that finds none says so
        if not classifies and not hasattr(expected, "generate"):
            raise TypeError(f"{type(expected).__name__} does not answer in text")
        kept = [
            name for name, _ in expected.named_modules() if classifies and name and _is_head(expected, name)
        ]
        kept += [*quantization.kept(expected), *read_by_kernels(expected)]
        head = (
            expected.get_output_embeddings()
        )  # as in models of the family table; bitsandbytes packs no weight that is tied
        kept += [name for name, module in expected.named_modules() if module is head]
        kept += beside_decoder(expected)
        unfitting = _unfitting(expected, kept, device) if quantization.enabled else []
        settings = _bitsandbytes(config, quantization, [*kept, *unfitting], dtype)
        notes += notes_on_unfitting(unfitting if settings else [], dtype)
        model, report = from_checkpoint(
            _auto(config, classifies) if packed is None else type(expected),
            location,
            config,
            dtype,
            packed,
            device_map={"": device},
            quantization_config=settings,
            trust_remote_code=trust_remote_code,
            use_safetensors=not allow_pickle,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or its error would name no tensor; `_compare_tensors` refuses them
        )
    except (torch.OutOfMemoryError, ConfigError, ModelError):
        raise
    except Exception as error:  # a damaged file may end anywhere in the model's class
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ModelError(
            f"{location.name}: transformers cannot load this {config.model_type} model: {reason}"
        ) from error
    new_modules = _new_modules(model, report) if classifies else ()
    notes.append(_outside_table(config, model, expected))
    notes += _compare_tensors(location, model, expected, report)
    if not classifies:
        model.generate = partial(generate_in_inference_mode, model, model.generate)
    packed = require_exact_nf4(model, location.name, device)
    if quantization.enabled:
        notes.append(unfused_sizes(model.named_parameters(), packed).note(dtype.itemsize))
    return model, new_modules


def packed_weights(location: Location, config: PretrainedConfig) -> PackedSource | None:
    """A checkpoint's tensors where its weights are in a format for servers, which `config` no longer names then.

    Raises:
        ModelError: a part of a weight is missing or unknown.
    """
    if location.kind != "checkpoint" or packed_format(stored_settings(location.directory)) is None:
        return None
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return open_weights(location, HubOptions(local_files_only=True))


def from_checkpoint(
    kind: Any,
    location: Location,
    config: PretrainedConfig,
    dtype: torch.dtype,
    packed: PackedSource | None,
    **options: Any,
) -> Any:
    """What transformers' `from_pretrained` returns for a checkpoint; packed weights have their values in 16 or 32 bits.

    Args:
        kind: a class of transformers, or one that chooses a class by the config.
        location: of the files. config: of the model. dtype: of what is not quantised.
        packed: as `packed_weights` returns it; all values are held in host memory.
        options: of `from_pretrained`.
    """
    options |= {"config": config, "dtype": dtype, "local_files_only": True}
    if packed is None:
        return kind.from_pretrained(location.directory, **options)
    kind = kind._model_mapping[type(config)] if hasattr(kind, "_model_mapping") else kind
    state = {name: packed.read(name, _CPU, dtype) for name in packed.shapes()}
    return kind.from_pretrained(None, state_dict=state, **options)


def _bitsandbytes(
    config: PretrainedConfig, quantization: Quantization, kept: list[str], dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """How transformers packs the linear layers other than `kept`; None where none is packed, or all are already."""
    if not quantization.enabled or getattr(config, "quantization_config", None):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *kept, *quantization.skip],
    )


def _unfitting(model: PreTrainedModel, kept: list[str], device: torch.device) -> list[str]:
    """Names of the linear layers, other than `kept`, that a device cannot compute in NF4."""
    around = tuple(f"{name}." for name in kept)
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not f"{name}.".startswith(around) and not fits_nf4(layer, device)
    ]


def _outside_table(config: PretrainedConfig, model: PreTrainedModel, expected: PreTrainedModel) -> str:
    """What runs a model outside the family table, and what becomes of its parts for images and sound."""
    text = (
        f"{config.model_type} is outside oribi's family table: it runs as transformers' {type(model).__name__}, unfused; expect "
        "the speed and memory of plain PEFT"
    )
    if config.get_text_config() is config:
        return text
    kept = "stays as it is, frozen and not packed" if beside_decoder(expected) else "is not loaded"
    return f"{text}. Its text decoder is trained; what it has for images and sound {kept}"


def require_exact_nf4(model: PreTrainedModel, name: str, device: torch.device) -> set[str]:
    """Makes sure that a model's packed layers compute what they hold.

    Args:
        model: as transformers loaded it. name: for messages. device: where it computes.

    Returns:
        The names of the packed weights.

    Raises:
        ModelError: bitsandbytes would compute one of them wrongly.
    """
    packed = set()
    for part, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        packed.add(f"{part}.weight")
        if not fits_nf4(layer, device):
            raise ModelError(
                f"{name}: {part} has rows of {layer.in_features} values, which bitsandbytes computes wrongly on a CPU; pass "
                "load_in_4bit=False"
            )
        # bitsandbytes would repack the weight in an eval forward, and later gradients would be wrong
        layer.support_avx512bf16_for_cpu = False
    return packed


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a module or parameter of a classifier comes after the layers, which checkpoints of other models may lack."""
    return not name.startswith(model.base_model_prefix) or ".pooler." in f"{name}."


def _new_modules(model: PreTrainedModel, report: dict[str, Any]) -> tuple[str, ...]:
    """The modules outside the encoder that a classifier's checkpoint lacks; their tensors are no longer counted as missing."""
    missing = [name for name in report["missing_keys"] if _is_head(model, name)]
    report["missing_keys"] = [name for name in report["missing_keys"] if name not in missing]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in sorted(missing)))


def _compare_tensors(
    location: Location, model: PreTrainedModel, expected: PreTrainedModel, report: dict[str, Any]
) -> list[str]:
    """Compares the files' tensors with the model's: transformers gives random values to those that do not fit, and warns.

    With 4 bits it compares fewer of the shapes, or none, by its release; so the loaded ones are compared here.

    Args:
        location: the checkpoint.
        model: as loaded.
        expected: the same without weights.
        report: `from_pretrained`'s loading info.

    Returns:
        A note naming the tensors that the model does not use.

    Raises:
        ModelError: tensors are missing or have another shape.
    """
    wrong = {name: (list(stored), list(expected)) for name, stored, expected in report["mismatched_keys"]}
    shapes = {name: list(parameter.shape) for name, parameter in expected.named_parameters()}
    turned = {f"{name}.weight" for name, layer in expected.named_modules() if isinstance(layer, Conv1D)}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        stored = list(parameter.shape if state is None else state.shape)
        if state is not None and name in turned:  # packed as the linear layer that it is
            stored.reverse()
        if shapes.get(name, stored) != stored:
            wrong[name] = (stored, shapes[name])
    problems = problems_in_words({
        "missing": sorted(name for name in report["missing_keys"] if not _COMPUTED.search(name)),
        "of another shape": [f"{name}: {a}, expected {b}" for name, (a, b) in sorted(wrong.items())],
        "not converted": list(map(str, report["error_msgs"])),
    })  # fmt: skip
    if problems:
        raise ModelError(
            f"{location.name}: the checkpoint's tensors are not those of {type(model).__name__} with this config.json; {problems}. "
            "Download it again, or take the config.json that belongs to the weights"
        )
    unused = sorted(name for name in report["unexpected_keys"] if not _COMPUTED.search(name))
    words = problems_in_words({f"tensors of the checkpoint are not used by {type(model).__name__}": unused})
    return [words] if words else []
