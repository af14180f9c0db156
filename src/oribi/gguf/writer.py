"""Writing GGUF files of a trained model, tensor by tensor, in Python alone.

A file goes through the gguf package's writer: header, metadata, tensor list, then each tensor merged, translated and
quantised in turn, so the host holds one tensor in float32 at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from oribi.errors import ExportError
from oribi.gguf.file import Type, stored_bytes, write_header
from oribi.gguf.layers import constant_norms
from oribi.gguf.metadata import add_metadata
from oribi.gguf.mixes import Mix, mix_of
from oribi.gguf.names import family_in_gguf, tensors_to_write
from oribi.gguf.quantize import encode
from oribi.gguf.rope import rope_tensors
from oribi.gguf.tensor import Tensor
from oribi.gguf.tokenizer import SUPPRESSED, Vocabulary, add_tokenizer
from oribi.tensors import TensorSource, all_finite

_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: where it comes from, its shape [N, K] or [N], and its type in the file."""

    tensor: Tensor
    shape: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.type)


def plan_file(config: PretrainedConfig, shapes: dict[str, tuple[int, ...]], method: str) -> list[Entry]:
    """What a file will hold.

    Args:
        config: the model's config.
        shapes: the trained model's tensors.
        method: a quantisation method, such as "q4_k_m".

    Raises:
        ConfigError: the method is unknown.
        ExportError: llama.cpp has no place for a tensor.
    """
    tensors = tensors_to_write(config, list(shapes))
    mix = Mix(mix_of(method), config, [tensor.name for tensor in tensors])
    found = [(tensor, tensor.shape_in_file(shapes[tensor.sources[0]])) for tensor in tensors]
    return [Entry(tensor, shape, mix.type_of(tensor.name, shape)) for tensor, shape in found]


def note_on_rows(plan: Sequence[Entry], method: str) -> list[str]:
    """Which tensors of `plan_file` get another type since their rows do not fill the method's blocks, in one line; none where all do."""
    block = gguf.GGML_QUANT_SIZES[mix_of(method).default][0]
    odd = [
        e for e in plan if len(e.shape) > 1 and e.type not in (Type.F32, Type.BF16) and e.shape[-1] % block
    ]
    if not odd:
        return []
    kinds = ", ".join(sorted({entry.type.name for entry in odd}))
    widths = " or ".join(map(str, sorted({entry.shape[-1] for entry in odd})))
    return [
        f"{method}: {len(odd)} tensors, {odd[0].tensor.name} the first, have rows of {widths} values, which fill no blocks of "
        f"{block}; they are {kinds} instead, whose blocks are smaller"
    ]


def write_files(
    paths: dict[str, Path],
    source: TensorSource,
    config: PretrainedConfig,
    tokenizer: object,
    *,
    name: str,
    device: torch.device,
    suppressed: Sequence[int] = (),
) -> Vocabulary:
    """Write one GGUF file for each method; each tensor is merged once and quantised for all.

    Args:
        paths: file of each quantisation method; their folders exist.
        source: the trained model's tensors.
        config: the model's config.
        tokenizer: a fast tokenizer.
        name: the model's name, for people.
        device: where tensors are merged and quantised.
        suppressed: ids of tokens that the model never says.

    Returns:
        The tokenizer as written.

    Raises:
        ConfigError: a method is unknown.
        ExportError: the model or its tokenizer does not fit llama.cpp, or a value is not finite.
    """
    shapes = source.shapes()
    plans = {method: plan_file(config, shapes, method) for method in paths}
    family, facts = family_in_gguf(config)
    constants = rope_tensors(config) | constant_norms(config, family)
    writers = {}
    for method, path in paths.items():
        writer = gguf.GGUFWriter(path, facts.architecture)
        rows = shapes[_EMBEDDINGS][0]
        add_metadata(writer, config, name, rows)
        vocabulary = add_tokenizer(writer, tokenizer, rows, facts.pieces)
        if never := [token for token in suppressed if token < rows]:
            writer.add_array(SUPPRESSED, never)
        writer.add_file_type(mix_of(method).file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        listed = [(constant, tuple(values.shape), Type.F32) for constant, values in constants.items()]
        listed += [(entry.tensor.name, entry.shape, entry.type) for entry in plans[method]]
        write_header(writer, listed)
        for values in constants.values():
            writer.write_tensor_data(values.numpy())
        writers[method] = writer
    for entries in zip(*plans.values()):
        tensor, encoded = entries[0].tensor, [[] for _ in entries]
        for name in tensor.sources:
            # what training left alone comes as stored: an embedding in float32 would be twice as large
            values = tensor.to_gguf(source.read(name, device, None))
            if not all_finite(values):
                raise ExportError(f"{name} has a value that is not finite: training diverged")
            for parts, entry in zip(encoded, entries):
                parts.append(encode(values, entry.type))
        for writer, parts in zip(writers.values(), encoded):
            writer.write_tensor_data(np.stack(parts) if tensor.experts else parts[0])
    for writer in writers.values():
        writer.close()
    return vocabulary


def write_adapter_file(
    path: Path, config: PretrainedConfig, alpha: float, pairs: dict[str, torch.Tensor], kind: Type, name: str
) -> None:
    """Write a LoRA adapter as a GGUF file.

    Args:
        path: the file.
        config: the base's config.
        alpha: llama.cpp adds alpha / r * B A to each weight.
        pairs: a [r, K] and b [N, r] of every adapted weight, [E, r, K] and [E, N, r] of experts, float32, by their names in
            the file.
        kind: type of the factors; float16 where their rows do not fill its blocks.
        name: the adapter's name, for people.
    """
    writer = gguf.GGUFWriter(path, family_in_gguf(config)[1].architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    kinds = {name: Type.F16 if pair.shape[-1] % block else kind for name, pair in pairs.items()}
    write_header(writer, [(name, tuple(pair.shape), kinds[name]) for name, pair in pairs.items()])
    for name, pair in pairs.items():
        writer.write_tensor_data(encode(pair.contiguous(), kinds[name]))
    writer.close()
