"""The gated delta rule in chunks by PyTorch, whose equations and letters are in `kernels/gated_delta.py`.

Computed in float32 (float64 stays). All chunks are computed at once but for the states, which follow one another, those
of all documents side by side. The kernels are used once they agree with it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from oribi.kernels.dispatch import wide
from oribi.kernels.gated_delta_chunks import CHUNK, Chunks, chunks_of, heads_at_a_time

logger = logging.getLogger(__name__)

# tokens times heads that are computed at a time: a tensor of E = 128 numbers each takes 128 MiB in float32
REFERENCE_PORTION = 2**18
# documents of the one-time check: shorter and longer than a chunk, and a single token
_CHECKED_BOUNDS = (0, 70, 71, 264)

# outputs and gradients of q, k, v, g and b, of do, these inputs, the chunks and the scale
Rule = Callable[[torch.Tensor, Sequence[torch.Tensor], Chunks, float], Sequence[torch.Tensor]]


def reference_chunks(
    inputs: Sequence[torch.Tensor], chunks: Chunks, scale: float
) -> Iterator[tuple[slice, slice, "ReferenceChunks"]]:
    """Some heads at a time, with all that their chunks compute before states are known.

    Args:
        inputs: q, k, v, g and b. chunks, scale: as `gated_delta` takes them.

    Returns:
        Their key heads, their value heads, and their chunks.
    """
    q, k, v, g, b = inputs
    for shared, heads in heads_at_a_time(k.shape[1], v.shape[1], chunks.slots.count, REFERENCE_PORTION):
        own = q[:, shared], k[:, shared], v[:, heads], g[:, heads], b[:, heads]
        yield shared, heads, ReferenceChunks(*own, chunks, scale)


class ReferenceChunks:
    """The chunks of some heads, tensors [chunks, heads, CHUNK, ...]; names are those of the file's docstring."""

    def __init__(self, q, k, v, g, b, chunks: Chunks, scale: float) -> None:
        self.slots, self.scale = chunks.slots, scale
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
        laid = wide(x.new_zeros(0)).new_zeros(self.slots.count * CHUNK, *x.shape[1:])
        laid.index_copy_(0, self.slots.token, wide(x))
        return laid.view(-1, CHUNK, *x.shape[1:]).transpose(1, 2).contiguous()

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[chunks, heads, CHUNK, n] as [T, heads, n]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots.token)

    def rounds(self) -> list[slice]:
        """The chunks of each round, which needs the states of the one before."""
        starts = self.slots.starts
        return [slice(first, last) for first, last in zip(starts, starts[1:])]

    def scan(self, initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [chunks, heads, F, E] before each chunk, N, and the states [docs, heads, F, E] after the documents."""
        heads, documents = self.v.shape[1], len(self.slots.document)
        shape = heads, self.k.shape[-1], self.v.shape[-1]
        states, n = self.v.new_empty(self.slots.count, *shape), torch.empty_like(self.v)
        s = self.v.new_zeros(documents, *shape)
        if initial is not None:
            s.copy_(initial.index_select(0, self.slots.document))
        fk, decay = self.f * self.k, self.e[:, :, -1:]
        for part in self.rounds():
            now = s[: part.stop - part.start]  # those that go on are the first
            states[part] = now
            n[part] = self.u[part] - self.w[part] @ now
            now.copy_(decay[part] * now + fk[part].mT @ n[part])
        last = torch.empty_like(s).index_copy_(0, self.slots.document, s)
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
        ds = s.new_zeros(len(self.slots.document), *s.shape[1:])
        for part in reversed(self.rounds()):
            now = ds[: part.stop - part.start]
            behind[part] = now
            dn[part] += fk[part] @ now
            now.copy_(decay[part] * now + from_out[part] - self.w[part].mT @ dn[part])
        return behind, dn


def agrees(
    name: str,
    rule: Rule,
    reference: Rule,
    device: torch.device,
    dtype: torch.dtype,
    keys: tuple[int, int],
    values: tuple[int, int],
) -> bool:
    """Whether a rule gives what the reference gives in float64, outputs and all gradients, to twice what 16 bits round.

    Args:
        name: of the rule in the warning that says why it is not used. rule: what is checked. reference: computes the truth.
        device, dtype: of the inputs. keys: K and F. values: H and E.
    """
    draw, tokens = torch.Generator().manual_seed(0), _CHECKED_BOUNDS[-1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, generator=draw).to(device)

    q, k = (torch.nn.functional.normalize(normal(*keys), dim=-1).to(dtype) for _ in range(2))
    v, do = (normal(*values).to(dtype) for _ in range(2))
    inputs = q, k, v, -normal(values[0]).abs(), normal(values[0]).sigmoid().to(dtype)
    chunks, scale = chunks_of(_CHECKED_BOUNDS, device), keys[1] ** -0.5
    truth = reference(do.double(), [x.double() for x in inputs], chunks, scale)
    try:
        found = rule(do, inputs, chunks, scale)
    except Exception as error:  # a kernel that does not compile here, or refuses the shapes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("%s is not used: it failed (%s)", name, reason)
        return False
    worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, truth))
    if worst < 2 * torch.finfo(dtype).eps:
        return True
    logger.warning("%s is not used: it differs from the reference by %.1e", name, worst)
    return False
