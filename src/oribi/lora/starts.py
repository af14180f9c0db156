"""How pairs on packed weights begin: LoftQ from what NF4 rounded off, PiSSA from the weights' own principal part.

The base stays as it is, so that the adapter that is saved is an ordinary one. N out features, K in features of a layer, r the
rank that was asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from oribi.errors import ConfigError, ModelError
from oribi.kernels.packed_weight import dense_weight, is_packed
from oribi.models.files import HubOptions, locate, open_weights
from oribi.models.unwrap import bare_name, source_of
from oribi.models.wrapper import renaming
from oribi.tensors import TensorSource

_OVERSAMPLING, _PASSES = 8, 4  # of the randomised decomposition
# a pair's first half is trained from the principal part, its second half takes that part off again
PRINCIPAL_RANKS = 2


def start_on_packed(model: PeftModel, how: str, adapter: str = "default") -> str:
    """Give the pairs of a model with packed layers their first values; the base stays as it is.

    LoftQ: the best rank-r approximation of W - NF4(W), one iteration (Li et al., arXiv 2310.08659). PiSSA (Meng et al.,
    arXiv 2404.02948): A and B are the principal part of W, as PEFT computes it. What PEFT takes off the base stands in the
    second half of a pair of rank 2r instead, which is not trained: NF4(W) + BA - B0 A0 is what the adapter's file says.

    Args:
        model: with LoRA on an NF4 base, with the settings of `packed_settings`; its global random state is used.
        how: "loftq", "pissa" or "pissa_niter_N".
        adapter: the name of the pairs.

    Returns:
        A sentence on how they begin.

    Raises:
        ConfigError: no layer is packed, or the 16-bit weights that LoftQ compares with are not on this machine.
    """
    layers = {
        bare_name(name).removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in getattr(layer, "lora_A", ())
    }
    packed = {name: layer for name, layer in layers.items() if _is_packed(layer)}
    if not packed:
        raise ConfigError(f"init_lora_weights={how!r}: no layer with a pair is packed in NF4; use True")
    if how != "loftq":
        passes = int(how.rpartition("_")[2]) if how.startswith("pissa_niter_") else None
        with _whole_weights(model, how, needed=False) as whole:
            for name, layer in layers.items():
                _start_principal(layer, adapter, whole(name, layer), passes)
        return (
            f"PiSSA: the pairs of {len(layers)} layers begin with the principal part of their weights. The base stays as it is: each pair has "
            "twice the rank that was asked for, of which the second half stays as it is and takes that part off the base"
        )
    lost = left = 0.0
    with _whole_weights(model, how, needed=True) as whole:
        for name, layer in packed.items():
            before, after = _start_rounded(layer, adapter, whole(name, layer))
            lost, left = lost + before, left + after
    return (
        f"LoftQ: the pairs of {len(packed)} layers begin with what NF4 rounded off, which leaves "
        f"{100 * (left / lost) ** 0.5 if lost else 0:.0f} % of the error (root mean square)"
    )


def packed_settings(how: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """LoRA's settings for a start of `start_on_packed`: those of PiSSA have ranks for both halves, at the scale that was asked for.

    Raises:
        ConfigError: they ask for something that the start cannot be beside.
    """
    if how in (None, "loftq"):
        return settings
    beside = {
        "use_dora": "its magnitudes are those of the whole pair",
        "target_parameters": "parameters that are no layers begin with B = 0",
    }
    problems = [f"{name}: {why}" for name, why in beside.items() if settings.get(name)]
    if problems:
        raise ConfigError(f"init_lora_weights={how!r} on packed weights goes without {'; '.join(problems)}")
    kept = PRINCIPAL_RANKS**0.5 if settings["use_rslora"] else PRINCIPAL_RANKS
    found = {**settings, "r": settings["r"] * PRINCIPAL_RANKS, "lora_alpha": settings["lora_alpha"] * kept}
    for name, factor in (("rank_pattern", PRINCIPAL_RANKS), ("alpha_pattern", kept)):
        if settings.get(name):
            found[name] = {layer: value * factor for layer, value in settings[name].items()}
    return found


class FirstHalf:
    """A hook on a parameter's gradient that keeps its second half as it is: rows of A [2r, K], columns of B [N, 2r].

    It is arithmetic alone, so a recorded step has it as well.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        first, second = grad.chunk(PRINCIPAL_RANKS, self.dim)
        return torch.cat([first, torch.zeros_like(second)], self.dim)


@contextmanager
def _whole_weights(
    model: PeftModel, how: str, needed: bool
) -> Iterator[Callable[[str, LoraLayer], torch.Tensor]]:
    """Reads layers' weights [N, K] in float32 as they were before they were packed.

    Args:
        model: whose weights. how: named in errors. needed: whether packed values in their place are an error.
    """
    source, weights = source_of(model), None
    if source.kind == "bnb-4bit" and needed:
        raise ConfigError(
            f"init_lora_weights={how!r} compares NF4 with the 16-bit weights, and {source.name_or_path} holds NF4 alone; load the "
            "16-bit checkpoint, or leave it out"
        )
    try:
        if source.kind != "bnb-4bit":
            options: HubOptions = replace(source.hub, local_files_only=True)
            gguf = next((file for file in source.identity.files if file.endswith(".gguf")), None)
            location = locate(source.name_or_path, options, gguf)
            weights = open_weights(location, options, renaming(source.names))
        yield lambda name, layer: _weight(layer, name, weights)
    except ModelError as error:
        raise ConfigError(f"init_lora_weights={how!r} needs the 16-bit weights: {error}") from error
    finally:
        if weights is not None:
            weights.close()


def _is_packed(layer: LoraLayer) -> bool:
    return is_packed(layer.get_base_layer().weight)


def _weight(layer: LoraLayer, name: str, weights: TensorSource | None) -> torch.Tensor:
    held = layer.get_base_layer().weight
    if not _is_packed(layer):
        return held.detach().float()
    if weights is None:
        return dense_weight(held, torch.float32)
    return weights.read(f"{name}.weight", held.device, torch.float32)


@torch.no_grad()
def _start_principal(layer: LoraLayer, adapter: str, whole: torch.Tensor, passes: int | None) -> None:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [2r, K], [N, 2r]
    rank = min(a.shape[0] // PRINCIPAL_RANKS, *whole.shape)
    if passes is None:
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(whole, q=rank, niter=passes)
        vt = v.T
    root = (s[:rank] / layer.scaling[adapter]).sqrt()
    (a_first, a_second), (b_first, b_second) = a.chunk(PRINCIPAL_RANKS), b.chunk(PRINCIPAL_RANKS, 1)
    for part in (a_first, a_second):
        part.zero_()[:rank] = root[:, None] * vt[:rank]
    b_first.zero_()[:, :rank] = u[:, :rank] * root
    b_second.copy_(-b_first)
    a.register_hook(FirstHalf(0)), b.register_hook(FirstHalf(1))


@torch.no_grad()
def _start_rounded(layer: LoraLayer, adapter: str, whole: torch.Tensor) -> tuple[float, float]:
    """Sets one pair; the squared error of the layer's weight without and with it."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [r, K], [N, r]
    error = whole - dense_weight(layer.get_base_layer().weight, torch.float32)
    rank, most = a.shape[0], min(error.shape)
    u, s, v = torch.svd_lowrank(error, q=min(rank + _OVERSAMPLING, most), niter=_PASSES)
    root = s[:rank].sqrt()
    kept = min(rank, len(root))
    a.zero_(), b.zero_()
    a[:kept] = (v[:, :kept] * root[:kept]).T
    b[:, :kept] = u[:, :kept] * root[:kept] / layer.scaling[adapter]
    before = error.square().sum()
    return before.item(), max((before - s[:kept].square().sum()).item(), 0.0)
