"""FlashAttention 3, where its package is installed: attention written for Hopper, for packs and windows too.

The package (`flash_attn_3`) registers two PyTorch operators, which `attention` calls by name; nothing of PyTorch's own
attention is replaced.

Source: FlashAttention-3, Shah et al. 2024 (arXiv:2407.08608).
"""

import importlib
import importlib.util
import logging
from functools import lru_cache

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
