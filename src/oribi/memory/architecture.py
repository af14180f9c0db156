"""A model's sizes from its config alone: every parameter's shape, without weights and without memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.formats.settings import PackedFormat
from oribi.kernels.mxfp4 import mxfp4_bytes
from oribi.kernels.nf4 import nf4_bytes
from oribi.memory.account import linear_weights, packable_weights
from oribi.memory.experts_shape import packable
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.experts import Experts
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
        codes: linear layer -> its bytes under load_in_4bit, where a GGUF file's codes are kept.
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
        return packable_weights(self.decoder.model)

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
            experts = sum(map(packable, self._experts()))
            return mxfp4_bytes(experts) + (self.parameters - experts) * 2
        return self.weight_bytes(load_in_4bit=True) if self.stored else self.parameters * 2

    def _experts(self, *parts: str) -> list[Experts]:
        """The experts of all layers, or those within parts of the decoder."""
        modules = [self.decoder.get_submodule(part) for part in parts] or [self.decoder]
        return [one for module in modules for one in module.modules() if isinstance(one, Experts)]

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
        packed = self.packable_weights * load_in_4bit
        experts = sum(map(packable, self._experts())) if packed and self.in_mxfp4 else 0
        in_file = dict(self.codes) if packed else {}
        if packed and keep_in_16bit:
            kept = Quantization(asked=tuple(keep_in_16bit)).kept(self.decoder)
            packed -= sum(
                packable_weights(self.decoder.get_submodule(name)) for name in kept if name != "lm_head"
            )
            experts -= sum(map(packable, self._experts(*kept))) if experts and kept else 0
            in_file = {name: size for name, size in in_file.items() if name not in kept}
        others = experts + sum(self.decoder.get_submodule(name).weight.numel() for name in in_file)
        in_codes = mxfp4_bytes(experts) + sum(in_file.values())
        in_codes += nf4_bytes(packed - others) if packed > others else 0
        return in_codes + (self.parameters - packed) * width


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
    in_codes = {layer: (module.weight if codes is None else codes).nbytes for layer, module, codes in layers}
    return Architecture(name, config, location, decoder, stored, opened.keeps_mxfp4, in_codes)


def _sizes(config: PretrainedConfig, trust_remote_code: bool) -> UnfusedSizes | None:
    try:
        return sizes_of_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # code of the model's own: where it fails, loading says why
        return None
