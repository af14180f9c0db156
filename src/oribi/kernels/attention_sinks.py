"""Sinks: a logit of its own in every softmax of a head, without a value, joined to attention that knows none of them.

S queries, H query heads, E head_dim. With out and the log-sum-exp L of a query's scores, and the head's sink z,

    out' = out sigmoid(L - z)      L' = log(exp L + exp z)      dz = - sum over the queries of exp(z - L') (dout . out')

Whatever backward computes its probabilities from L' and subtracts dout . out' gives the gradients of the whole: none is written anew.

Source: Efficient Streaming Language Models with Attention Sinks, Xiao et al. 2023 (arXiv:2309.17453); gpt-oss, arXiv:2508.10925.
"""

import torch

from oribi.kernels.dispatch import wide


def heads_last(lse: torch.Tensor, backend: str) -> torch.Tensor:
    """[..., H] view of what a backend gives: [B, S, H] ("blocked"), of a pack [H, T], or of rows [B, H, S] and more."""
    if backend == "blocked":
        return lse
    return lse.t() if lse.dim() == 2 else lse.view(lse.shape[:3]).transpose(1, 2)


def join_sinks(out: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor) -> None:
    """Writes out' and L' over out [B, S, H, E] and log_sums [..., H], from sinks [H]."""
    sinks = wide(sinks)
    out.mul_(torch.sigmoid(log_sums - sinks).reshape(*out.shape[:-1], 1))
    log_sums.copy_(torch.logaddexp(log_sums, sinks))


def sink_gradient(
    dout: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Gradient of the sinks [H], in their dtype, from that of out' [B, S, H, E], out' and L' [..., H]."""
    weights = torch.exp(wide(sinks) - log_sums).reshape(out.shape[:-1])
    return -(weights * (wide(dout) * wide(out)).sum(-1)).flatten(0, -2).sum(0).to(sinks.dtype)
