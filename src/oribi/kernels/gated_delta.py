"""The gated delta rule: a memory per head that decays, forgets what it held under a key, and learns what the value says.

    S_t = e^g_t S_{t-1} + k_t (b_t (v_t - k_t' e^g_t S_{t-1}))'      o_t = scale S_t' q_t      S = 0 before each document

In chunks of c tokens, with G the running sum of g inside a chunk and D_ij = e^(G_i - G_j) for j <= i:

    T = I + stril(b K K' D)      [U | W] = T^-1 b [V | e^G K]      N = U - W S      P = scale tril(Q K' D)
    O = scale e^G Q S + P N      S+ = e^G_c S + (e^(G_c - G) K)' N

Backward goes through the chunks in reverse with dS, the gradient of a chunk's last state, which is zero behind a document:

    dN = P' dO + e^(G_c - G) K dS      dS- = e^G_c dS + scale (e^G Q)' dO - W' dN      [bU | bW] = T^-T [dN | -dN S']

T tokens, H value heads of E numbers, K key heads of F numbers; H/K consecutive value heads share a key head. Computed in
float32 (float64 stays). Chunks never cross a document's border. All chunks are computed at once but for the states, which
follow one another, those of all documents side by side. Nothing keeps the states for backward, which makes them again.

Source: Gated Delta Networks, Yang et al. 2024 (arXiv:2412.06464), in the chunked form of DeltaNet (arXiv:2406.06484).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import wide

CHUNK = 64
# tokens times heads that are computed at a time: a tensor of E = 128 numbers each takes 128 MiB in float32
PORTION = 2**18


@dataclass(frozen=True)
class Chunks:
    """Where the tokens of a batch's documents lie in chunks, [chunks * CHUNK] slots; slots without a token hold zeros.

    The documents with most chunks come first, and a chunk's number counts all first chunks, then all second ones, and so on.

    Args:
        slot: [T] int64 of each token. count: of the chunks.
        starts: of each round, the number of its first chunk; the last entry is `count`. A round has as many chunks as
            there are documents that long.
        document: [docs] int64, the documents as the rounds have them.
        bounds: offsets of the documents as they were given.
    """

    slot: torch.Tensor
    count: int
    starts: tuple[int, ...]
    document: torch.Tensor
    bounds: tuple[int, ...]


def chunks_of(bounds: Sequence[int], device: torch.device) -> Chunks:
    """The chunks of documents.

    Args:
        bounds: their offsets on the host, ascending from 0; a document may be empty.
        device: of the tokens.
    """
    offsets = torch.tensor(bounds, dtype=torch.int64)
    lengths = offsets.diff()
    counts = -(-lengths // CHUNK)
    order = counts.argsort(descending=True, stable=True)
    place = order.argsort()  # of each document among the others
    rounds = int(counts.max()) if len(counts) else 0
    sizes = (counts[None, :] > torch.arange(rounds)[:, None]).sum(1)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    token = torch.arange(int(offsets[-1])) - offsets[document]
    slot = (starts[token // CHUNK] + place[document]) * CHUNK + token % CHUNK
    return Chunks(
        slot.to(device), int(starts[-1]), tuple(starts.tolist()), order.to(device), tuple(map(int, bounds))
    )


class DeltaGradients(NamedTuple):
    """What `gated_delta_backward` returns, shaped as the inputs: those of q, k and v in their dtype, of g and b wide."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dg: torch.Tensor
    db: torch.Tensor


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    chunks: Chunks,
    scale: float,
) -> torch.Tensor:
    """What each token reads from its document's memory, differentiable in q, k, v, g and b.

    Args:
        q, k: [T, K, F] in 16 or 32 bit, rows of length 1. v: [T, H, E].
        g: [T, H] float32, the logarithm of the decay, at most 0. b: [T, H], between 0 and 1.
        chunks: of the documents. scale: of q.

    Returns:
        [T, H, E] in v's dtype.
    """
    return _GatedDelta.apply(q, k, v, g, b, chunks, scale)


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, b, chunks, scale):
        ctx.save_for_backward(q, k, v, g, b)
        ctx.chunks, ctx.scale = chunks, scale
        return gated_delta_forward(q, k, v, g, b, chunks, scale)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        inputs = ctx.saved_tensors
        grads = gated_delta_backward(do, inputs, ctx.chunks, ctx.scale)
        return (*(grad.to(x.dtype) for grad, x in zip(grads, inputs)), None, None)


def gated_delta_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    chunks: Chunks,
    scale: float,
    initial: torch.Tensor | None = None,
    final: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gated_delta`, without gradients.

    Args:
        q, k, v, g, b, chunks, scale: as there.
        initial: [docs, H, F, E], the memory before each document; None is nothing.
        final: whether to return the memory after each document.

    Returns:
        [T, H, E] in v's dtype; the memory [docs, H, F, E], wide, or None.
    """
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states = []
    for heads, part in _portions(q, k, v, g, b, chunks, scale):
        before = None if initial is None else wide(initial[:, heads])
        s, n, last = part.scan(before)
        out[:, heads] = part.tokens((part.e * part.q) @ s + part.p @ n)
        states.append(last)
    return out, torch.cat(states, 1) if final else None


def gated_delta_backward(
    do: torch.Tensor, inputs: Sequence[torch.Tensor], chunks: Chunks, scale: float
) -> DeltaGradients:
    """Gradients of everything that `gated_delta` is differentiable in.

    Args:
        do: [T, H, E] gradient of its result. inputs: q, k, v, g and b. chunks, scale: as there.
    """
    q, k, v, g, b = inputs
    grads = DeltaGradients(
        *(torch.empty_like(x) for x in (q, k, v)), *(torch.empty_like(wide(x)) for x in (g, b))
    )
    for heads, part in _portions(q, k, v, g, b, chunks, scale):
        dq, dk, dv, dg, db = part.backward(part.laid_out(do[:, heads]))
        ratio = v.shape[1] // k.shape[1]
        shared = slice(heads.start // ratio, heads.stop // ratio)
        # the value heads of one key head
        grads.dq[:, shared], grads.dk[:, shared] = (
            part.tokens(x.unflatten(1, (-1, ratio)).sum(2)) for x in (dq, dk)
        )
        grads.dv[:, heads] = part.tokens(dv)
        grads.dg[:, heads], grads.db[:, heads] = (part.tokens(x[..., None])[..., 0] for x in (dg, db))
    return grads


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One token per row, which changes the row's memory in place.

    Args:
        q, k: [B, K, F], rows of length 1. v: [B, H, E]. g, b: [B, H]. scale: of q.
        state: [B, H, F, E] float32.

    Returns:
        [B, H, E] in v's dtype.
    """
    q, k = (wide(x).repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q, k))
    state *= wide(g).exp()[..., None, None]
    wrong = wide(v) - (k[:, :, None] @ state)[:, :, 0]
    state += k[..., None] * (wide(b)[..., None] * wrong)[:, :, None]
    return (scale * (q[:, :, None] @ state)[:, :, 0]).to(v.dtype)


def _portions(q, k, v, g, b, chunks, scale) -> Iterator[tuple[slice, "_Portion"]]:
    """Some value heads at a time, with all that their chunks compute before states are known."""
    key_heads, ratio = k.shape[1], v.shape[1] // k.shape[1]
    slots = max(chunks.count * CHUNK, 1)
    step = max(PORTION // (slots * ratio), 1)
    for first in range(0, key_heads, step):
        shared = slice(first, min(first + step, key_heads))
        heads = slice(first * ratio, shared.stop * ratio)
        yield (
            heads,
            _Portion(q[:, shared], k[:, shared], v[:, heads], g[:, heads], b[:, heads], chunks, scale),
        )


class _Portion:
    """The chunks of some heads, tensors [chunks, heads, CHUNK, ...]; names are those of the file's docstring."""

    def __init__(self, q, k, v, g, b, chunks: Chunks, scale: float) -> None:
        self.chunks, self.scale = chunks, scale
        ratio = v.shape[1] // k.shape[1]
        q, k, self.v = (self.laid_out(x) for x in (q, k, v))
        q = q * scale
        g, b = (self.laid_out(x[..., None])[..., 0] for x in (g, b))
        total = g.cumsum(-1)
        # the exponential never sees a positive number
        self.d = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        self.kk, self.qk = ((x @ k.mT).repeat_interleave(ratio, 1) for x in (k, q))
        self.q, self.k = (x.repeat_interleave(ratio, 1) for x in (q, k))
        self.e, self.f = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        self.b = b[..., None]
        eye = torch.eye(CHUNK, dtype=g.dtype, device=g.device)
        self.t = (self.b * self.kk * self.d).tril(-1) + eye
        right = self.b * torch.cat([self.v, self.e * self.k], -1)
        self.x = torch.linalg.solve_triangular(self.t, right, upper=False, unitriangular=True)
        self.u, self.w = self.x.split([v.shape[-1], k.shape[-1]], -1)
        self.p = self.qk * self.d

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, heads, n] in chunks, wide, with zeros where there is no token."""
        slots = wide(x.new_zeros(0)).new_zeros(self.chunks.count * CHUNK, *x.shape[1:])
        slots.index_copy_(0, self.chunks.slot, wide(x))
        return slots.view(-1, CHUNK, *x.shape[1:]).transpose(1, 2).contiguous()

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[chunks, heads, CHUNK, n] as [T, heads, n]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.chunks.slot)

    def rounds(self) -> list[slice]:
        """The chunks of each round, which needs the states of the one before."""
        starts = self.chunks.starts
        return [slice(first, last) for first, last in zip(starts, starts[1:])]

    def scan(self, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [chunks, heads, F, E] before each chunk, N, and the states [docs, heads, F, E] after the documents."""
        heads, documents = self.v.shape[1], len(self.chunks.document)
        shape = heads, self.k.shape[-1], self.v.shape[-1]
        states, n = self.v.new_empty(self.chunks.count, *shape), torch.empty_like(self.v)
        s = self.v.new_zeros(documents, *shape)
        if initial is not None:
            s.copy_(initial.index_select(0, self.chunks.document))
        fk, decay = self.f * self.k, self.e[:, :, -1:]
        for part in self.rounds():
            now = s[: part.stop - part.start]  # those that go on are the first
            states[part] = now
            n[part] = self.u[part] - self.w[part] @ now
            now.copy_(decay[part] * now + fk[part].mT @ n[part])
        last = torch.empty_like(s).index_copy_(0, self.chunks.document, s)
        return states, n, last

    def backward(self, do: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of q and k per value head, v, g and b."""
        s, n, _ = self.scan(None)
        q, k, v, b, d, e, f = self.q, self.k, self.v, self.b, self.d, self.e, self.f
        ds, dn = self._scan_back(do, s)
        dp, dqe, dkf = do @ n.mT * d, do @ s.mT, n @ ds.mT
        right = torch.cat([dn, -dn @ s.mT], -1)
        dx = torch.linalg.solve_triangular(self.t.mT, right, upper=True, unitriangular=True)
        da = -(dx @ self.x.mT).tril(-1) * d
        bv, bk = dx.split([v.shape[-1], k.shape[-1]], -1)
        pair = dp * self.qk + da * b * self.kk  # what each decay D_ij receives, times itself
        until = (dkf * f * k).sum(-1)
        dg = pair.sum(-1) - pair.sum(-2) + (dqe * e * q).sum(-1) + (bk * b * e * k).sum(-1) - until
        dg[..., -1] += until.sum(-1) + e[..., -1, 0] * (s * ds).sum((-1, -2))
        return (
            self.scale * (e * dqe + dp @ k),
            dp.mT @ q + f * dkf + b * (e * bk + da @ k) + da.mT @ (b * k),
            b * bv,
            dg.flip(-1).cumsum(-1).flip(-1),
            (da * self.kk).sum(-1) + (bv * v).sum(-1) + (bk * e * k).sum(-1),
        )

    def _scan_back(self, do: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dS [chunks, heads, F, E] behind each chunk, and dN."""
        behind, dn = torch.empty_like(s), self.p.mT @ do
        from_out, fk, decay = (self.e * self.q).mT @ do, self.f * self.k, self.e[:, :, -1:]
        ds = s.new_zeros(len(self.chunks.document), *s.shape[1:])
        for part in reversed(self.rounds()):
            now = ds[: part.stop - part.start]
            behind[part] = now
            dn[part] += fk[part] @ now
            now.copy_(decay[part] * now + from_out[part] - self.w[part].mT @ dn[part])
        return behind, dn
