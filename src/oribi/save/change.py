"""How training changed one tensor, as one weight. A weight W [N, K] becomes, one active adapter after the other,

    W' + s B A             LoRA and rsLoRA: s = alpha / r, alpha / sqrt(r)
    g (W' + s B A)         DoRA: g = m / norm(W + s B A), of each row

which is PEFT's forward written as one weight. The sum is float32 and the caller rounds it once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_ROWS_AT_ONCE = 8192  # of an embedding: bounds the float32 copy at 8192 * hidden_size * 4 bytes


@dataclass
class LowRank:
    """One adapter's update of one weight, all on the CPU in float32: a [r, K], b [N, r], magnitude [N] for DoRA.

    `columns` marks an embedding or a transposed weight, whose DoRA norms are taken over its columns. Of a stack of experts
    [E, N, K] a is [E, r, K] and b [E, N, r].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    columns: bool = False


@dataclass
class Change:
    """How training changed one tensor: replaced, then rows replaced, then low-rank updates and offsets added."""

    replacement: Callable[[], torch.Tensor] | None = None
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    updates: list[LowRank] = field(default_factory=list)
    offsets: list[torch.Tensor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replacement or self.rows or self.updates or self.offsets)

    @property
    def plain_update(self) -> LowRank | None:
        """The one LoRA pair that the change consists of, if it consists of one, and is no DoRA."""
        if len(self.updates) != 1 or self.replacement or self.rows or self.offsets:
            return None
        return None if self.updates[0].magnitude is not None else self.updates[0]

    def apply(self, base: torch.Tensor | None) -> torch.Tensor:
        """The trained tensor, in float32 unless it was replaced as a whole; `base` [N, K] float32 is not kept."""
        if self.replacement is not None:
            base = self.replacement()
        if not (self.rows or self.updates or self.offsets):
            return base
        merged = base.to(torch.float32, copy=True)
        for ids, values in self.rows:
            merged.index_copy_(0, ids.to(merged.device), values.to(merged.device))
        if any(update.magnitude is not None for update in self.updates):
            _add_weight_decomposed(merged, self.updates)
        else:
            for update in self.updates:
                if merged.dim() > 2:
                    merged.baddbmm_(update.b.to(merged), update.a.to(merged), alpha=update.scale)
                    continue
                for start in range(0, len(merged), _ROWS_AT_ONCE):
                    part = slice(start, start + _ROWS_AT_ONCE)
                    merged[part].addmm_(update.b[part].to(merged), update.a.to(merged), alpha=update.scale)
        for offset in self.offsets:
            merged += offset.to(merged)
        return merged


def _add_weight_decomposed(merged: torch.Tensor, updates: list[LowRank]) -> None:
    base = merged.clone()
    for update in updates:
        delta = (update.b.to(base) @ update.a.to(base)) * update.scale
        if update.magnitude is None:
            merged += delta
            continue
        dim = 0 if update.columns else 1
        gain = (update.magnitude.to(base) / torch.linalg.norm(base + delta, dim=dim)).unsqueeze(dim)
        merged.add_(delta).mul_(gain)
