"""A model's sizes from its config alone: every parameter's shape, without weights and without memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.formats.settings import PackedFormat
from oribi.kernels.nf4 import nf4_bytes
from oribi.memory.account import linear_weights
from oribi.memory.experts_shape import packable_parameters
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.expert_tensors import empty_codes, expert_modules, stacks_in_mxfp4
from oribi.models.files import HubOptions, Location
from oribi.models.open import open_model
from oribi.models.packed_linear import codes_of_layers, planned_types
from oribi.models.quantization import Quantization
from oribi.models.unfused import UnfusedSizes, sizes_of_config


class OutsideFamilyTable(ModelError):
    """The model exists, and of its memory only the weights are known: transformers' class runs it.

    Args:
        message: which model.
        sizes: of its weights; None where its class cannot be built here.
    """

    def __init__(self, message: str, sizes: UnfusedSizes | None) -> None:
        super().__init__(message)
        self.sizes = sizes


@dataclass(frozen=True)
class Architecture:
    """A model as its config describes it.

    Args:
        name: as the user calls it.
        config: the text decoder's config.
        location: where its files lie.
        decoder: the decoder on the meta device, in the compute dtype.
        stored: how the checkpoint's weights are quantised; None where they are not.
        in_mxfp4: whether its experts are in MXFP4, and stay so under load_in_4bit.
        codes: parameter -> its bytes under load_in_4bit, where it does not become NF4.
    """

    name: str
    config: PretrainedConfig
    location: Location
    decoder: DecoderForCausalLM
    stored: dict[str, Any] | PackedFormat | None = None
    in_mxfp4: bool = False
    codes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def linear_weights(self) -> int:
        """Weights of the layers that one token is multiplied with."""
        return linear_weights(self.decoder.model)

    @cached_property
    def packable_weights(self) -> int:
        """Weights of the layers that NF4 packs."""
        return sum(packable_parameters(self.decoder.model).values())

    @property
    def tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @cached_property
    def embedding(self) -> int:
        """Weights of the embedding."""
        return self.decoder.model.embed_tokens.weight.numel()

    @cached_property
    def head(self) -> int:
        """Weights of the head; 0 where it is the embedding."""
        return 0 if self.tied else self.decoder.lm_head.weight.numel()

    @property
    def stored_in_words(self) -> str:
        """How the checkpoint's weights are quantised; "" where they are not."""
        if self.stored is None:
            return "experts in MXFP4" * self.in_mxfp4
        return str(self.stored) if isinstance(self.stored, PackedFormat) else "packed in NF4"

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of the checkpoint's files: their size where they are on this machine, else by how their weights are stored."""
        file, folder = self.location.file, self.location.directory
        files = [file] if file is not None else sorted(folder.glob("*.safetensors"))
        if files and all(path.is_file() for path in files):
            return sum(path.stat().st_size for path in files)
        if isinstance(self.stored, PackedFormat):
            return (
                self.packable_weights * self.stored.bits // 8 + (self.parameters - self.packable_weights) * 2
            )
        if self.in_mxfp4:
            others = self.parameters - sum(map(self._numel, self.codes))
            return sum(self.codes.values()) + others * 2
        return self.weight_bytes(load_in_4bit=True) if self.stored else self.parameters * 2

    def _numel(self, name: str) -> int:
        return self.decoder.get_parameter(name).numel()

    @cached_property
    def waiting_bytes(self) -> int:
        """Bytes of tables that wait in host memory while a GPU trains an adapter."""
        waiting = [m for m in self.decoder.modules() if getattr(m, "waits_in_host_memory", False)]
        return sum(parameter.nbytes for module in waiting for parameter in module.parameters())

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(p.numel() for p in self.decoder.model.parameters()) + self.head

    def weight_bytes(self, load_in_4bit: bool, keep_in_16bit: Sequence[str] = ()) -> int:
        """Device memory of the loaded weights, of which some linear layers are not packed."""
        width = self.decoder.dtype.itemsize
        if not load_in_4bit:
            return self.parameters * width
        asked = tuple(keep_in_16bit)
        quantization = Quantization(skip=asked, asked=asked)
        quantization.kept(self.decoder)

        def packed(sizes: Mapping[str, int]) -> dict[str, int]:
            return {name: n for name, n in sizes.items() if quantization.covers(name.rpartition(".")[0])}

        codes, packable = packed(self.codes), packed(packable_parameters(self.decoder))
        in_nf4 = sum(size for name, size in packable.items() if name not in self.codes)
        others = self.parameters - in_nf4 - sum(map(self._numel, codes))
        return sum(codes.values()) + nf4_bytes(in_nf4) + others * width


def architecture_of(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: Any = None,
    train_for: str | None = None,
) -> Architecture:
    """A model's sizes; of a hub name only the small files are fetched.

    Args:
        name, revision, trust_remote_code, token: of the model. dtype: that it computes in.
        train_for: method of the GGUF file whose codes its linear layers get.

    Raises:
        ModelError: there is no such model, or its weights are quantised in a way that is not read.
        OutsideFamilyTable: oribi's decoder does not cover it.
    """
    opened = open_model(name, HubOptions(token, revision, trust_remote_code=trust_remote_code))
    location, config, stored = opened.location, opened.config, opened.stored()
    if not opened.fused:
        raise OutsideFamilyTable(
            f"{location.name}: model_type {config.model_type!r} is outside oribi's family table; it trains as transformers' "
            "class, of whose memory only the weights are estimated",
            _sizes(config, trust_remote_code),
        )
    decoder = build(config, dtype=dtype)
    file = opened.gguf if train_for is None else planned_types(decoder, train_for)
    layers = () if file is None else codes_of_layers(decoder, file, Quantization(as_in_file=True))
    in_codes = {
        f"{layer}.weight": (module.weight if codes is None else codes).nbytes
        for layer, module, codes in layers
    }
    stacks = {} if file is None else file.stack_types
    if file is None and opened.keeps_mxfp4:
        stacks = stacks_in_mxfp4(expert_modules(decoder))
    for stack, kinds in stacks.items():
        in_codes[stack] = empty_codes(tuple(decoder.get_parameter(stack).shape), kinds).nbytes
    return Architecture(name, config, location, decoder, stored, opened.keeps_mxfp4, in_codes)


def _sizes(config: PretrainedConfig, trust_remote_code: bool) -> UnfusedSizes | None:
    try:
        return sizes_of_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # code of the model's own: where it fails, loading says why
        return None
