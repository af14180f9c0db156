"""LoftQ on packed weights: pairs that begin as what NF4 rounded off, so that training starts nearer to the 16-bit model.

N out features, K in features of a layer, r the rank of its pair.
"""

from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from oribi.errors import ConfigError, ModelError
from oribi.kernels.nf4 import dequantize
from oribi.models.files import HubOptions, locate, open_weights
from oribi.models.unwrap import bare_name, source_of
from oribi.models.wrapper import renaming
from oribi.tensors import TensorSource

_OVERSAMPLING, _PASSES = 8, 4  # of the randomised decomposition


def start_from_rounding(model: PeftModel, adapter: str = "default") -> str:
    """Give the pairs of packed layers the best rank-r approximation of W - NF4(W); the base stays as it is.

    One iteration of LoftQ (Li et al., arXiv 2310.08659), with the adapter's scale divided out.

    Args:
        model: with LoRA on an NF4 base; its global random state is used.
        adapter: the name of the pairs.

    Returns:
        A sentence on what it gained.

    Raises:
        ConfigError: no layer is packed, or the 16-bit weights are not on this machine.
    """
    source = source_of(model)
    if source.kind == "bnb-4bit":
        raise ConfigError(
            f"init_lora_weights='loftq' compares NF4 with the 16-bit weights, and {source.name_or_path} holds NF4 alone; load the "
            "16-bit checkpoint, or leave it out"
        )
    packed = {
        bare_name(name).removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and hasattr(layer.get_base_layer().weight, "quant_state")
    }
    if not packed:
        raise ConfigError("init_lora_weights='loftq': no layer with a pair is packed in NF4; use True")
    options: HubOptions = replace(source.hub, local_files_only=True)
    gguf = next((file for file in source.identity.files if file.endswith(".gguf")), None)
    try:
        location = locate(source.name_or_path, options, gguf)
        weights = open_weights(location, options, renaming(source.names))
        lost, left = 0.0, 0.0
        for name, layer in packed.items():
            before, after = _start_one(layer, adapter, name, weights)
            lost, left = lost + before, left + after
        weights.close()
    except ModelError as error:
        raise ConfigError(f"init_lora_weights='loftq' needs the 16-bit weights: {error}") from error
    return (
        f"LoftQ: the pairs of {len(packed)} layers begin with what NF4 rounded off, which leaves "
        f"{100 * (left / lost) ** 0.5 if lost else 0:.0f} % of the error (root mean square)"
    )


@torch.no_grad()
def _start_one(layer: LoraLayer, adapter: str, name: str, weights: TensorSource) -> tuple[float, float]:
    """Sets one pair; the squared error of the layer's weight without and with it."""
    packed = layer.get_base_layer().weight
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [r, K], [N, r]
    whole = weights.read(f"{name}.weight", packed.device, torch.float32)
    error = whole - dequantize([packed], torch.float32)
    rank, most = a.shape[0], min(error.shape)
    u, s, v = torch.svd_lowrank(error, q=min(rank + _OVERSAMPLING, most), niter=_PASSES)
    root = s[:rank].sqrt()
    kept = min(rank, len(root))
    a.zero_(), b.zero_()
    a[:kept] = (v[:, :kept] * root[:kept]).T
    b[:, :kept] = u[:, :kept] * root[:kept] / layer.scaling[adapter]
    before = error.square().sum()
    return before.item(), max((before - s[:kept].square().sum()).item(), 0.0)
