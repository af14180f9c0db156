"""Which experts a token takes, and its rows in the experts' order.

T tokens, E experts, k experts of a token, R = T k rows, D hidden size. The router's logits l [T, E] give

    softmax        p = softmax(l), v = the k largest p, w = v or v / sum(v)
    topk_softmax   v = the k largest l, w = softmax(v)

in float32, rounded to the logits' dtype. Rows are sorted by expert, those of one expert in the order of the tokens, so that
whatever is added over them is added in one order. Shapes do not depend on what was chosen.
"""

from dataclasses import dataclass

import torch

from oribi.kernels.dispatch import wide


@dataclass(frozen=True)
class Routing:
    """Chosen experts, and the rows in their order.

    Args:
        experts: [T, k] int64.
        tokens: [R] int64, the token of each row.
        places: [R] int64, the place of each row in (token, choice) order.
        rows: [R] int64, its inverse: the row of each token's choices.
        offs: [E] int32, where the rows of each expert end.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    offs: torch.Tensor

    def of_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """[R] of [T, k], in the rows' order."""
        return weights.reshape(-1)[self.places]

    def of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, k, ...] of [R, ...], in the tokens' order."""
        return rows[self.rows].unflatten(0, self.experts.shape)


def choose(logits: torch.Tensor, count: int, router: str) -> torch.Tensor:
    """The experts [T, count] int64 of each token, by its logits [T, E]."""
    scores = wide(logits)
    if router == "softmax":
        scores = scores.softmax(-1)
    return scores.topk(count, dim=-1)[1]


def weigh(logits: torch.Tensor, experts: torch.Tensor, router: str, normalise: bool) -> torch.Tensor:
    """The weights [T, k] of the chosen experts, in the logits' dtype; differentiable in them.

    Args:
        logits: [T, E]. experts: [T, k] int64.
        router: "softmax" or "topk_softmax". normalise: whether softmax's are divided by their sum.
    """
    scores = wide(logits)
    if router == "topk_softmax":
        return scores.gather(-1, experts).softmax(-1).to(logits.dtype)
    chosen = scores.softmax(-1).gather(-1, experts)
    return (chosen / chosen.sum(-1, keepdim=True) if normalise else chosen).to(logits.dtype)


def weigh_backward(
    dweights: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, router: str, normalise: bool
) -> torch.Tensor:
    """Gradient [T, E] of the logits, float32, from that of the weights [T, k]."""
    scores, dweights = wide(logits), wide(dweights)
    dlogits = torch.zeros_like(scores)
    if router == "topk_softmax":
        weights = scores.gather(-1, experts).softmax(-1)
        return dlogits.scatter_(
            -1, experts, weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        )
    probabilities = scores.softmax(-1)
    chosen = probabilities.gather(-1, experts)
    if normalise:
        total = chosen.sum(-1, keepdim=True)
        dweights = (dweights - (chosen * dweights).sum(-1, keepdim=True) / total) / total
    dlogits.scatter_(-1, experts, dweights)
    return probabilities * (dlogits - (chosen * dweights).sum(-1, keepdim=True))


def sort_by_expert(experts: torch.Tensor, count: int) -> Routing:
    """The rows of tokens whose experts [T, k] were chosen among `count`."""
    # narrow numbers: a GPU's radix sort makes a pass for each of their bytes
    order, places = experts.reshape(-1).to(torch.int16).sort(stable=True)
    rows = torch.empty_like(places)
    rows[places] = torch.arange(len(places), device=places.device)
    every = torch.arange(count, dtype=order.dtype, device=order.device)
    offs = torch.searchsorted(order, every, right=True, out_int32=True)
    return Routing(experts, places // experts.shape[1], places, rows, offs)
