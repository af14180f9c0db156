"""Attention whose sizes differ from layer to layer, whose values are normed, and whose keys and values layers may share.

    q|k|v = n W_qkv      a = attention(rope(norm(q)), rope(norm(k)), norm(v))      out = a W_o

Where keys are values there is no v: norm(v) is that of the k that is not normed yet. A layer that shares takes k and v as
the last layer of its type that has its own left them, and has q alone; their gradients go back to that layer, which adds
its own. B rows, S tokens per row, T = B * S, H query heads, K key/value heads, E head_dim: H is one number, K and E are
the layer's.
"""

from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from oribi.families import Family
from oribi.families.layer_fields import config_of_layer
from oribi.kernels.attention import attention, attention_backward, decide
from oribi.kernels.blocked_attention import blocked_backward_bytes
from oribi.kernels.rope import rope, rope_forward
from oribi.models.core import Held
from oribi.models.linear_layers import RMSNorm, project
from oribi.models.mixers.attention import Attending, Attention

if TYPE_CHECKING:
    from oribi.models.layers import Batch

# heads too wide for a flash kernel: their scores go through device memory. Inferred from 2,048 FLOP beside 16 bytes a score
BLOCKED_BY_PRODUCTS = 3.0
WIDEST_FLASH = 256


class SharedAttention(Attention):
    """See the file's docstring.

    Attributes:
        donor: the layer whose keys and values this one reads: its own, or an earlier one's.
        reads, gives: the entry of `Batch.shared` with keys and values [B, C, K, E] that this layer reads, or leaves for
            later ones.
        leftovers: tensors of its own that a checkpoint may hold all the same, and that no program reads.
    """

    needs_whole_rows = "keys and values that several layers share"

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__(config_of_layer(config, index), family, index)
        self.v_norm = RMSNorm(None, getattr(config, family.norm_eps)) if family.value_norm else None
        self.donor, lends = donor_of(config, index) if family.kv_sharing else (index, False)
        kind = config.layer_types[index]
        self.reads, self.gives = kind if self.donor != index else None, kind if lends else None
        self.leftovers: tuple[str, ...] = ()
        sees_all = kind == "full_attention"
        self.keys_are_values = family.keys_as_values and sees_all and bool(config.attention_k_eq_v)
        absent = ["v_proj"] * (self.keys_are_values or self.reads is not None)
        if self.reads is not None:
            absent += ["k_proj", "k_norm"]
            self.leftovers = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight")
        for role in absent:
            self._modules.pop(family.attribute(role), None)
        self._inputs = tuple(role for role in self._inputs if role not in absent)
        # columns of the projections that there are
        self.widths = [
            size for role, size in zip(("q_proj", "k_proj", "v_proj"), self.sizes) if role in self._inputs
        ]
        if self.head_dim > WIDEST_FLASH:
            self.core_by_products = BLOCKED_BY_PRODUCTS

    @property
    def lent(self) -> int:
        """Numbers per token of the keys and values that later layers read, where `gives` says that they do."""
        return self.sizes[1] + self.sizes[2]

    def qk_norms(self) -> tuple[RMSNorm, ...]:
        """The norms of q and, where there is one, of k."""
        return tuple(self.part(role) for role in ("q_norm", "k_norm")[: 1 if self.reads else 2])

    def holds(self, length: int) -> dict[str, Held]:
        """Keys and values, of a layer that has its own."""
        return {} if self.reads else super().holds(length)

    def core_backward_bytes(self, tokens: int, width: int) -> int:
        """As of attention; of heads too wide for a flash kernel with a block's scores."""
        if self.head_dim <= WIDEST_FLASH:
            return super().core_backward_bytes(tokens, width)
        kv_heads = self.sizes[1] // self.head_dim
        scores = blocked_backward_bytes(1, self.columns["heads"], kv_heads, tokens, self.head_dim, width)
        return tokens * width * (self.sizes[0] + sum(self.sizes)) + scores

    def split(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """q [..., H, E], k and v [..., K, E], views of p [..., N]; v is k where keys are values, and None is shared."""
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in p.split(self.widths, dim=-1)]
        q, k = parts[0], parts[1] if len(parts) > 1 else None
        return q, k, parts[2] if len(parts) > 2 else k

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        rows, length = x.shape[:2]
        groups = self.groups()
        outputs = [t.reshape(rows * length, -1, self.head_dim) for t in project(groups["qkv"], x)]
        angles, norms = batch.angles[self.rope_kind], self.qk_norms()
        q, k = norms[0](outputs[0]), None
        if self.reads:
            q, _ = rope(q, q[:, :0], *angles)
            k, v = batch.shared[self.reads]
        else:
            v = outputs[-1] if self.v_norm is None else self.v_norm(outputs[-1])
            q, k = rope(q, norms[1](outputs[1]), *angles)
            k, v = (t.view(rows, length, -1, self.head_dim) for t in (k, v))
            if batch.cache is not None:
                k, v = batch.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
                k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.gives:
            batch.shared[self.gives] = k, v
        q = q.view(rows, length, -1, self.head_dim)
        out = attention(q, k, v, batch.visibility, self.scale, self.window, self.softcap)
        return project(groups["o"], out.reshape(rows, length, -1))[0]

    def normed_and_rotated(self, p: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        """q, k and v [T, heads, E] of p [T, N], without gradients; k and v are None where they are shared."""
        (q, k, v), _ = zip(*(_normed(t, norm) for t, norm in zip(self.split(p), self._norms())))
        self._rotate(q, k, angles)
        return q, k, v

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Attending:
        """q, k and v in memory of their own, since they are normed; `raw` and `rstd` are of q, k and v."""
        angles = batch.angles[self.rope_kind]
        shape = batch.visibility.batch, batch.visibility.length
        raw = self.split(p)
        normed = [_normed(t, norm) for t, norm in zip(raw, self._norms())]
        (q, k, v), rstd = zip(*normed)
        self._rotate(q, k, angles)
        q = q.unflatten(0, shape)
        k, v = batch.shared[self.reads] if self.reads else (t.unflatten(0, shape) for t in (k, v))
        if self.gives:
            batch.shared[self.gives] = k, v
        how = decide(q, batch.visibility, self.scale, self.window, self.softcap)
        return Attending(p, q, k, v, how, angles, raw=raw, rstd=rstd, batch=batch)

    def backward(self, prepared: Attending, dh: torch.Tensor) -> None:
        """Writes the gradient of q|k|v over it, and leaves that of shared keys and values in `Batch.gradients`."""
        shape, batch, angles = prepared.q.shape, prepared.batch, prepared.angles
        dq, dk, dv = attention_backward(
            dh.view(shape), prepared.q, prepared.k, prepared.v, prepared.out.view(shape), prepared.saved, prepared.how
        )  # fmt: skip
        prepared.out, prepared.saved = None, ()
        raw, rstd, (q_norm, k_norm, v_norm) = prepared.raw, prepared.rstd, self._norms()
        dq = dq.flatten(0, 1)
        if self.reads:
            batch.gradients[self.reads] = dk, dv
            self._rotate(dq, None, angles, inverse=True)
            q_norm.backward(dq, raw[0], rstd[0], out=raw[0])
            return
        if self.gives:  # those of the layers that read them
            dk, dv = (mine + theirs for mine, theirs in zip((dk, dv), batch.gradients.pop(self.gives)))
        dk, dv = dk.flatten(0, 1), dv.flatten(0, 1)
        self._rotate(dq, dk, angles, inverse=True)
        q_norm.backward(dq, raw[0], rstd[0], out=raw[0])
        if self.keys_are_values:
            through_v = dv if v_norm is None else v_norm.backward(dv, raw[2], rstd[2])
            k_norm.backward(dk, raw[1], rstd[1], dresidual=through_v, out=raw[1])
            return
        k_norm.backward(dk, raw[1], rstd[1], out=raw[1])
        if v_norm is None:
            raw[2].copy_(dv)
        else:
            v_norm.backward(dv, raw[2], rstd[2], out=raw[2])

    def _rotate(self, q: torch.Tensor, k: torch.Tensor | None, angles, inverse: bool = False) -> None:
        both = q, q[:, :0] if k is None else k
        rope_forward(*both, *angles, inverse=inverse, out=both)

    def _norms(self) -> tuple[RMSNorm | None, ...]:
        """Those of q, k and v; None where nothing is normed."""
        q_norm, k_norm = (*self.qk_norms(), None)[:2]
        return q_norm, k_norm, self.v_norm


def _normed(x: torch.Tensor | None, norm: RMSNorm | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """norm(x) in memory of its own, and 1/rms."""
    if x is None or norm is None:
        return x, None
    y, _, rstd = norm.compute(x)
    return y, rstd


def donor_of(config: PretrainedConfig, index: int) -> tuple[int, bool]:
    """The layer whose keys and values a layer reads, and whether later layers read this one's."""
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    kind = config.layer_types[index]
    last_own = max((i for i in range(first_shared) if config.layer_types[i] == kind), default=index)
    if index >= first_shared:
        return last_own, False
    return index, index == last_own and kind in config.layer_types[first_shared:]


def is_shared(config: PretrainedConfig, index: int) -> bool:
    """Whether a layer has no keys and values of its own."""
    return index >= config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
