"""What NF4 costs a model before it is trained: how far its answers move from those of the 16-bit weights, and which layers
move them most.

Every measurement is one streamed forward: embeddings, head and one layer at a time are in memory. KL is the mean divergence
of the next token's distribution from that of the 16-bit model, in nats. S tokens, D hidden.
"""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from oribi.errors import ConfigError, ModelError
from oribi.kernels.nf4 import nf4_bytes
from oribi.models.decoder import build
from oribi.models.expert_names import expert_modules
from oribi.models.expert_tensors import fits_stack, matrices_of, unstacked
from oribi.models.experts import STACKS
from oribi.models.files import open_weights
from oribi.models.open import OpenedModel
from oribi.models.quantization import Quantization
from oribi.models.quantize import fits_nf4, rounded_to_nf4
from oribi.models.wrapper import renaming, wrapper_names
from oribi.save.check import percent
from oribi.save.probes import rows_of
from oribi.save.stream import streamed_logits
from oribi.save.verify import mean_kl
from oribi.tensors import TensorSource
from oribi.text import gibibytes

AUTO_BUDGET = 0.25  # of the packed model's bytes, that `keep_in_16bit: auto` adds at most
_WIDTH = 2  # bytes of a weight in 16 bits
_NOTHING_IN_NF4 = "loading packs nothing in NF4, because a GGUF file's linear layers and experts keep the codes that they have"
_WORTH = 0.1  # of the whole divergence, that a kind of layers has to save to be kept


class _Rounded:
    """A checkpoint whose linear layers are read as NF4 would hold them."""

    def __init__(self, source: TensorSource, packed: set[str]) -> None:
        self._source, self._packed = source, packed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._source.shapes()

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        weight = self._source.read(name, device, dtype)
        return rounded_to_nf4(weight, True) if name in self._packed else weight

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True)
class KindLoss:
    """One kind of linear layers kept in 16 bits, all others in NF4.

    Args:
        name: of its modules.
        kl: of the model then.
        extra_bytes: that keeping it takes.
    """

    name: str
    kl: float
    extra_bytes: int


@dataclass(frozen=True)
class FourBitLoss:
    """What NF4 costs a model.

    Args:
        kl: of the model with every linear layer in NF4, in nats per token.
        same_top_token: share of places with the same likeliest token.
        loss, loss_in_16bit: mean loss of the texts' tokens.
        tokens: compared places. origin: of the texts.
        kinds: linear layers by kind, those whose keeping saves most first.
        layers: of each layer, how far NF4 moves its output on the same input: |y4 - y| / |y|.
        packed_bytes: of the model in NF4.
        kept: kinds that `keep_in_16bit: auto` keeps: each saves a tenth of the divergence or more, most per byte first, as far
            as they add no more than AUTO_BUDGET of the packed model's bytes.
        kl_kept: of the model with these in 16 bits.
    """

    kl: float
    same_top_token: float
    loss: float
    loss_in_16bit: float
    tokens: int
    origin: str
    kinds: list[KindLoss]
    layers: list[float]
    packed_bytes: int

    kept: list[KindLoss] = field(default_factory=list)
    kl_kept: float = 0.0

    def note(self) -> str:
        """The whole in one line."""
        return (
            f"in NF4, the likeliest token agrees with 16 bits on {percent(self.same_top_token)} of {self.tokens} places, KL "
            f"{self.kl:.2g}, loss {self.loss:.3f} instead of {self.loss_in_16bit:.3f} ({self.origin})"
        )

    def note_on_kept(self) -> str:
        """What `keep_in_16bit: auto` keeps, and what that buys."""
        if not self.kept:
            return (
                "keep_in_16bit: auto keeps nothing: no kind of layers saves a tenth of that within its budget"
            )
        names = ", ".join(kind.name for kind in self.kept)
        extra = gibibytes(sum(kind.extra_bytes for kind in self.kept))
        return (
            f"keep_in_16bit: auto keeps {names}: {extra} more, KL {self.kl_kept:.2g} instead of {self.kl:.2g}"
        )


def four_bit_loss(
    opened: OpenedModel,
    tokenizer: Any,
    texts: Sequence[Any] | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda line: None,
) -> FourBitLoss:
    """Measure what NF4 costs a model of the family table.

    Args:
        opened: the model; its weights are fetched.
        tokenizer: its tokenizer.
        texts: as `held_out` of `save_merged`; None takes oribi's own.
        device, dtype: of the computation; the memory of a layer in `dtype` is enough.
        say: takes a line on progress before each of the streamed forwards.

    Raises:
        ConfigError: the model is outside the family table, none of it is packed, or no text has two tokens.
        ModelError: the weights cannot be read, or are packed already.
    """
    config = opened.config
    model = build(config, dtype=dtype) if opened.fused else None
    source = unstacked(_weights(opened), model)
    rows = rows_of(tokenizer, texts, config.vocab_size)
    packed = _packed_kinds(model, device, opened.gguf is not None, getattr(source, "stack_types", ()))
    if not packed:
        source.close()
        raise ConfigError(f"{opened.location.name}: {_NOTHING_IN_NF4}")
    every = {name for names in packed.values() for name in names}
    ids, positions = rows.ids.to(device), rows.positions.to(device)
    targets = rows.targets().to(device)
    places = (targets != -100).nonzero().flatten()

    def logprobs(weights: TensorSource, what: str, beside: Any = None) -> torch.Tensor:
        say(what)
        found = streamed_logits(config, weights, ids, positions, dtype, places, beside)
        return found.float().log_softmax(-1)

    layers: dict[int, float] = {}

    def told(index: int, packed_output: torch.Tensor, output: torch.Tensor) -> None:
        moved = (packed_output.float() - output.float()).norm() / output.float().norm().clamp_min(1e-12)
        layers[index] = moved.item()

    exact = logprobs(source, "16 bits, and each layer in NF4", (_Rounded(source, every), told))
    whole = logprobs(_Rounded(source, every), "every linear layer in NF4")

    def kl_without(names: Sequence[str]) -> float:
        left = every - {weight for name in names for weight in packed[name]}
        return mean_kl(logprobs(_Rounded(source, left), f"NF4 without {', '.join(names)}"), exact)

    kl, shapes = mean_kl(whole, exact), source.shapes()
    kinds = [KindLoss(name, kl_without([name]), _extra(weights, shapes)) for name, weights in packed.items()]
    packed_bytes = _bytes(shapes, every)
    kept = _worth_keeping(kinds, kl, AUTO_BUDGET * packed_bytes)
    kl_kept = kept[0].kl if len(kept) == 1 else kl_without([kind.name for kind in kept]) if kept else kl
    source.close()
    return FourBitLoss(
        kl=kl,
        same_top_token=(whole.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        loss=_loss(whole, targets[places]),
        loss_in_16bit=_loss(exact, targets[places]),
        tokens=len(places),
        origin=rows.origin,
        kinds=sorted(kinds, key=lambda kind: kind.kl),
        layers=[layers[index] for index in sorted(layers)],
        packed_bytes=packed_bytes,
        kept=kept,
        kl_kept=kl_kept,
    )


def _worth_keeping(kinds: list[KindLoss], kl: float, left: float) -> list[KindLoss]:
    """Kinds to keep in 16 bits within `left` bytes."""
    chosen = []
    saving = [kind for kind in kinds if kl - kind.kl >= _WORTH * kl > 0]
    for kind in sorted(saving, key=lambda kind: (kl - kind.kl) / kind.extra_bytes, reverse=True):
        if kind.extra_bytes <= left:
            chosen.append(kind)
            left -= kind.extra_bytes
    return chosen


def kept_by_auto(
    opened: OpenedModel, device: torch.device, dtype: torch.dtype
) -> tuple[Sequence[str], list[str]]:
    """Names of the linear layers that `keep_in_16bit: auto` keeps, and what is to be known of them; an adapter keeps its own.

    Raises:
        ConfigError, ModelError: as `four_bit_loss`.
    """
    if opened.adapter is not None and opened.adapter.record is not None:
        return opened.adapter.record.kept_in_16bit, []
    if opened.gguf is not None and not opened.gguf.other_stack_types():
        return (), [f"keep_in_16bit: auto keeps nothing: {_NOTHING_IN_NF4}"]
    found = four_bit_loss(opened, opened.tokenizer(), device=device, dtype=dtype)
    return [kind.name for kind in found.kept], [found.note(), found.note_on_kept()]


def _loss(logprobs: torch.Tensor, targets: torch.Tensor) -> float:
    return -logprobs.gather(1, targets[:, None]).mean().item()


def _weights(opened: OpenedModel) -> TensorSource:
    if not opened.fused:
        raise ConfigError(
            f"{opened.location.name}: model_type {opened.config.model_type!r} is outside oribi's family table, and what NF4 costs is "
            "measured on models of the table; name the layers to keep in keep_in_16bit"
        )
    if opened.gguf is not None:
        return opened.gguf
    names = wrapper_names(opened.whole) if opened.is_part else None
    source = open_weights(opened.location, opened.hub, renaming(names))
    if any(".quant_state." in name for name in source.shapes()):
        raise ModelError(
            f"{opened.location.name} is packed in NF4 already; what that costs is measured on the 16-bit original"
        )
    return source


def _packed_kinds(
    model: nn.Module, device: torch.device, from_gguf: bool, in_codes: Container[str]
) -> dict[str, list[str]]:
    """Names that `keep_in_16bit` takes -> the weights that they mean, of those that loading packs in NF4.

    Args:
        model: on the meta device. device: where it will compute.
        from_gguf: whether its linear layers keep a GGUF file's codes.
        in_codes: names of the stacks of experts whose codes are kept.
    """
    quantization, found = Quantization(), {}
    experts = expert_modules(model)
    for prefix, module in experts.items():
        stacks = [one for one in STACKS if f"{prefix}.{one}" not in in_codes and fits_stack(module, one)]
        weights = [f"{prefix}.{one.name}" for stack in stacks for one in matrices_of(module, stack)]
        if weights:
            found.setdefault("experts", []).extend(weights)
    for name, layer in [] if from_gguf else model.named_modules():
        if isinstance(layer, nn.Linear) and quantization.covers(name) and fits_nf4(layer, device):
            found.setdefault(name.rpartition(".")[2], []).append(f"{name}.weight")
    return found


def _extra(weights: list[str], shapes: dict[str, tuple[int, ...]]) -> int:
    count = sum(math.prod(shapes[name]) for name in weights)
    return count * _WIDTH - nf4_bytes(count)


def _bytes(shapes: dict[str, tuple[int, ...]], packed: set[str]) -> int:
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    inside = sum(count for name, count in counts.items() if name in packed)
    return nf4_bytes(inside) + (sum(counts.values()) - inside) * _WIDTH
