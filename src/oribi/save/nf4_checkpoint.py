"""A merged checkpoint in NF4 again, as bitsandbytes stores it: the tensors that `*-bnb-4bit` checkpoints hold."""

import math
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import nn
from transformers import BitsAndBytesConfig

from oribi.models.packed_linear import PackedLinear
from oribi.models.quantize import BLOCK, Quantization
from oribi.models.unfused import beside_decoder
from oribi.models.unwrap import base_model, source_of
from oribi.save.trained import stored_slots
from oribi.tensors import TensorSource

# bytes of what a packed weight has beside codes and scales: two tables of values and a description in JSON
_STATE = 16 * 4 + 256 * 4 + 512


def nf4_config(dtype: torch.dtype, kept: Sequence[str] = ()) -> BitsAndBytesConfig:
    """`quantization_config` of the checkpoint's config.json.

    Args:
        dtype: of what is not packed.
        kept: modules beside the head that are not packed.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *kept],
    )


def packed_names(model: nn.Module, block: int = BLOCK) -> set[str]:
    """Names of the weights that an export quantises: of the text decoder's linear layers and experts, whose rows are whole
    blocks, without those that a model in NF4 keeps in 16 bits."""
    loaded = getattr(source_of(model), "load_in_4bit", False)
    others = tuple(f"{name}." for name in beside_decoder(base_model(model)))
    found = set()
    for name, slot in stored_slots(model).items():
        if slot.matrix is not None:
            packs = hasattr(slot.tensor, "packed") or not loaded
            columns = slot.tensor.shape[2]
        else:
            packs = slot.leaf == "weight" and isinstance(
                slot.module, (bnb.nn.Linear4bit, PackedLinear) if loaded else nn.Linear
            )
            columns = slot.module.in_features if packs else 0
        if packs and columns % block == 0 and Quantization().covers(name) and not name.startswith(others):
            found.add(name)
    return found


def unpacked_modules(model: nn.Module, packed: set[str]) -> list[str]:
    """Modules of the text decoder, the head left out, that multiply by a weight which is not among the packed ones; routers of
    experts are among them, which some programs take for linear layers."""
    others = tuple(f"{name}." for name in beside_decoder(base_model(model)))
    return [
        name.removesuffix(".weight")
        for name, slot in stored_slots(model).items()
        if slot.leaf == "weight" and slot.tensor.dim() == 2 and not isinstance(slot.module, nn.Embedding)
        and name not in packed and name != "lm_head.weight" and not name.startswith(others)
    ]  # fmt: skip


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a weight's codes, scales and state, at most."""
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    return count // 2 + blocks + -(-blocks // 256) * 4 + _STATE


def pack_nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A dense weight as codes [N * K / 2, 1] uint8 and the tensors of their state, by their names."""
    codes, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return {name: codes, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}


class Nf4Source:
    """A checkpoint whose weights in NF4 are read dequantised; others are read as its source reads them.

    Args:
        source: of its files.

    Attributes:
        packed: names of the quantised weights, those that the source dequantises among them.
        stored_as: how most weights are stored; "floats" where they are not quantised.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        stored = source.shapes()
        self._states: dict[str, QuantState] = {}
        for key in stored:
            name, found, _ = key.partition(".quant_state.")
            if found:
                parts = [part for part in stored if part.startswith(f"{name}.")]
                tensors = {part: source.read(part, torch.device("cpu"), None) for part in parts}
                state = QuantState.from_dict(tensors, device=torch.device("cpu"))
                state.dtype = torch.float32  # the reader asks for its own dtype, and rounds to it once
                self._states[name] = state
        self.packed = self._states.keys() | getattr(source, "packed", set())
        self.stored_as = "nf4" if self._states else getattr(source, "stored_as", "floats")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        dense = {
            name: shape
            for name, shape in self._source.shapes().items()
            if not any(name.startswith(f"{packed}.") for packed in self._states)
        }
        return {**dense, **{name: tuple(state.shape) for name, state in self._states.items()}}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        if name not in self._states:
            return self._source.read(name, device, dtype)
        codes = self._source.read(name, torch.device("cpu"), None)
        return dequantize_4bit(codes, self._states[name]).to(device=device, dtype=dtype)

    def close(self) -> None:
        self._source.close()
