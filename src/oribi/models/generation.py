"""Generation that works in the middle of training: the mode is switched for its duration and given back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch
from torch import nn

from oribi.errors import ModelError
from oribi.kernels.lora import weights_kept

# what transformers still makes of them; older names, which checkpoints carry, it reads as a growing cache
FIXED_CACHES = ("static", "offloaded_static")


class GeneratesInAnyMode:
    """Before `GenerationMixin` among a model's bases: `generate` may be called on a model in training."""

    def generate(
        self, inputs: torch.Tensor | Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' `generate`, in inference mode (no dropout, cached) whatever mode the model is in.

        Args:
            inputs: [B, S] int64, or a tokenizer's whole output, also under the name input_ids.
            args, kwargs: as in transformers.
        """
        return generate_in_inference_mode(self, super().generate, inputs, *args, **kwargs)


def generate_in_inference_mode(
    model: nn.Module,
    generate: Callable[..., Any],
    inputs: torch.Tensor | Mapping[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls `generate` with the model in inference mode and its inputs unpacked."""
    ids = kwargs.get("input_ids")
    for packed in (inputs, ids):
        if isinstance(packed, Mapping):  # what apply_chat_template returns since transformers 5
            kwargs.pop("input_ids", None)
            kwargs = {**packed, **kwargs}
            inputs = None
    kwargs.pop("token_type_ids", None)  # some tokenizers add them, no decoder takes them
    if isinstance(model, GeneratesInAnyMode):
        _require_growing_cache(model, kwargs)
    with inference_mode_of(model), weights_kept() if _has_room(model) else nullcontext():
        return generate(inputs, *args, **kwargs)


def _require_growing_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Stop before a cache of fixed size is made, whose prepared masks the decoder does not read.

    Raises:
        ModelError: the call or the model's generation config asks for one.
    """
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    asked = [kwargs.get("cache_implementation")]
    asked += [getattr(config, "cache_implementation", None) for config in configs if config is not None]
    fixed = next((name for name in asked if name in FIXED_CACHES), None)
    if fixed is not None:
        raise ModelError(
            f"cache_implementation = {fixed!r} is a cache of fixed size, for compiled models; oribi's decoder runs with one "
            "that grows, and answers the same: leave it out"
        )


def _has_room(model: nn.Module) -> bool:
    """Whether the packed weights fit into free memory once more in 16 bit, with as much left over."""
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    if not packed:
        return False
    needed = 2 * sum(p.quant_state.shape.numel() for p in packed)
    if packed[0].is_cuda:
        free = torch.cuda.mem_get_info(packed[0].device)[0]
    else:
        free = psutil.virtual_memory().available
    return free > 2 * needed


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, each in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
