"""Which experts a token takes, and its rows in the experts' order.

T tokens, E experts, k experts of a token, R = T k rows, D hidden size. The router's logits l [T, E] give scores p and weights

    softmax        p = softmax(l)      v = the k largest p      w = c v or c v / sum(v)
    sigmoid        p = sigmoid(l)      likewise
    topk_softmax   p = l               v = the k largest l      w = softmax(v)

in float32, rounded to the logits' dtype. Where there is a correction b [E], which no gradient trains, the k are the largest of
p + b, and their weights are made of p all the same. Rows are sorted by expert, those of one expert in the order of the tokens,
so that whatever is added over them is added in one order. Shapes do not depend on what was chosen.
"""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class RouterRule:
    """How experts are chosen and weighed.

    Args:
        kind: "softmax", "sigmoid" or "topk_softmax", as above.
        count: k.
        normalise: whether the weights are divided by their sum v, which is taken to be v + `added`, and at least `least`.
        scale: c.
        groups, kept_groups: the experts lie in so many groups, and a token takes experts from so many of them alone: those
            whose best two have the highest scores together.
    """

    kind: Literal["softmax", "sigmoid", "topk_softmax"]
    count: int
    normalise: bool = False
    added: float = 0.0
    least: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """p [T, E] float32."""
        logits = wide(logits)
        if self.kind == "topk_softmax":
            return logits
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()


def choose(logits: torch.Tensor, rule: RouterRule, correction: torch.Tensor | None = None) -> torch.Tensor:
    """The experts [T, k] int64 of each token, by its logits [T, E] and the correction [E]."""
    scores = rule.scores(logits)
    if correction is not None:
        scores = scores + correction.to(scores.dtype)
    if rule.groups > 1:
        grouped = scores.unflatten(-1, (rule.groups, -1))
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(rule.kept_groups, dim=-1)[1]
        left = torch.ones_like(grouped, dtype=torch.bool).scatter(
            1, best[..., None].expand(-1, -1, grouped.shape[-1]), False
        )
        scores = grouped.masked_fill(left, -torch.inf).flatten(1)
    return scores.topk(rule.count, dim=-1)[1]


def weigh(
    logits: torch.Tensor, experts: torch.Tensor, rule: RouterRule, of_expert: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [T, k] of the chosen experts, differentiable in the logits and in `of_expert`.

    Args:
        logits: [T, E]. experts: [T, k] int64.
        of_expert: [E], by which each expert's weights are multiplied, or None.

    Returns:
        In the logits' dtype; with `of_expert` in float32, as transformers has them.
    """
    chosen = rule.scores(logits).gather(-1, experts)
    if rule.kind == "topk_softmax":
        return chosen.softmax(-1).to(logits.dtype)
    if rule.normalise:
        chosen = chosen / _total(chosen, rule)
    chosen = chosen * rule.scale if rule.scale != 1.0 else chosen
    return chosen.to(logits.dtype) if of_expert is None else chosen * of_expert.to(chosen.dtype)[experts]


def _total(chosen: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    total = chosen.sum(-1, keepdim=True)
    total = total + rule.added if rule.added else total
    return total.clamp(min=rule.least) if rule.least else total


def weigh_backward(
    dweights: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    rule: RouterRule,
    of_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient [T, E] of the logits, float32, from that of the weights [T, k]."""
    scores, dweights = rule.scores(logits), wide(dweights)
    dlogits, chosen = torch.zeros_like(scores), scores.gather(-1, experts)
    if of_expert is not None:
        dweights = dweights * of_expert.to(dweights.dtype)[experts]
    if rule.kind == "topk_softmax":
        weights = chosen.softmax(-1)
        return dlogits.scatter_(
            -1, experts, weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        )
    if rule.scale != 1.0:
        dweights = dweights * rule.scale
    if rule.normalise:
        total = _total(chosen, rule)
        of_total = (chosen * dweights).sum(-1, keepdim=True) / total
        if rule.least:
            of_total = of_total * (total > rule.least)
        dweights = (dweights - of_total) / total
    if rule.kind == "sigmoid":
        return dlogits.scatter_(-1, experts, dweights * chosen * (1 - chosen))
    dlogits.scatter_(-1, experts, dweights)
    return scores * (dlogits - (chosen * dweights).sum(-1, keepdim=True))


def sort_by_expert(experts: torch.Tensor, count: int) -> Routing:
    """The rows of tokens whose experts [T, k] were chosen among `count`."""
    # narrow numbers: a GPU's radix sort makes a pass for each of their bytes
    order, places = experts.reshape(-1).to(torch.int16).sort(stable=True)
    rows = torch.empty_like(places)
    rows[places] = torch.arange(len(places), device=places.device)
    every = torch.arange(count, dtype=order.dtype, device=order.device)
    offs = torch.searchsorted(order, every, right=True, out_int32=True)
    return Routing(experts, places // experts.shape[1], places, rows, offs)
