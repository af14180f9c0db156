"""FlashAttention 3, where its package is installed: attention written for Hopper, for packs and windows too.

The package (`flash_attn_3`) registers two PyTorch operators; they are called here by name, and nothing of PyTorch's own
attention is replaced. q [T, H, E], k and v [T, K, E] of a pack, or [B, S, heads, E] of rows.

Source: FlashAttention-3, Shah et al. 2024 (arXiv:2407.08608).
"""

import importlib
import importlib.util
import logging
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

# arguments that are passed by name; a package whose operators lack one is left alone
_ARGUMENTS = {
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal", "window_size_left",
    "window_size_right",
}  # fmt: skip


@lru_cache
def installed() -> bool:
    """Whether the package is there and its operators are those that this file calls."""
    if importlib.util.find_spec("flash_attn_3") is None:
        return False
    try:
        importlib.import_module("flash_attn_3._C")
        operators = [getattr(torch.ops.flash_attn_3, name).default for name in ("fwd", "bwd")]
    except (ImportError, OSError, AttributeError) as error:  # built for another PyTorch
        logger.warning("flash_attn_3 is installed but cannot be used: %s", str(error).splitlines()[0])
        return False
    if all({a.name for a in operator._schema.arguments} >= _ARGUMENTS for operator in operators):
        return True
    logger.warning("flash_attn_3 is installed but its operators are of another version")
    return False


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extent: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, shaped as q, and the log-sum-exp of the scores ([H, T] of a pack, [B, H, S] of rows, float32).

    Args:
        extent: the operators' arguments that say what a query may see, and the scale.
    """
    return torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **extent)[:2]


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    **extent: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v."""
    return torch.ops.flash_attn_3.bwd(dout, q, k, v, out, lse, **extent)[:3]
