"""The gated delta rule: a memory per head that decays, forgets what it held under a key, and learns what the value says.

    S_t = e^g_t S_{t-1} + k_t (b_t (v_t - k_t' e^g_t S_{t-1}))'      o_t = scale S_t' q_t      S = 0 before each document

In chunks of c tokens, with G the running sum of g inside a chunk and D_ij = e^(G_i - G_j) for j <= i:

    T = I + stril(b K K' D)      [U | W] = T^-1 b [V | e^G K]      N = U - W S      P = scale tril(Q K' D)
    O = scale e^G Q S + P N      S+ = e^G_c S + (e^(G_c - G) K)' N

Backward goes through the chunks in reverse with dS, the gradient of a chunk's last state, which is zero behind a document:

    dN = P' dO + e^(G_c - G) K dS      dS- = e^G_c dS + scale (e^G Q)' dO - W' dN      [bU | bW] = T^-T [dN | -dN S']

T tokens, H value heads of E numbers, K key heads of F numbers; H/K consecutive value heads share a key head. Chunks never
cross a document's border. All chunks are computed at once but for the states, which follow one another, those of all
documents side by side. Nothing keeps the states for backward, which makes them again.

Source: Gated Delta Networks, Yang et al. 2024 (arXiv:2412.06464), in the chunked form of DeltaNet (arXiv:2406.06484).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from oribi.kernels.dispatch import INTERPRETED, launch, next_power_of_2, unit_stride, use_triton, wide
from oribi.kernels.gated_delta_chunks import CHUNK, Chunks, heads_at_a_time
from oribi.kernels.gated_delta_kernels import (
    gradient_kernel,
    local_kernel,
    matrices_kernel,
    read_kernel,
    scan_back_kernel,
    scan_kernel,
    solve_kernel,
    vectors_kernel,
)
from oribi.kernels.gated_delta_reference import REFERENCE_PORTION, agrees, reference_chunks

# slots times heads that the kernels compute at a time, 2.8 GB in backward at E = F = 128: fewer heads would leave most of a
# GPU idle while the states of one long document follow one another
KERNEL_PORTION = 2**20
# columns of a tile: matrix units take 16, but with 32 the code that Triton 3.6 makes for Hopper reads behind shared memory
_NARROWEST = 16 if INTERPRETED else 64
# programs that go through the states: below this many each takes half as many columns of them
_SCAN_PROGRAMS = 96


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
    if use_kernels(q) and chunks.tokens:
        return _forward_by_kernels((q, k, v, g, b), chunks, scale, initial, final)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states = []
    for _, heads, part in reference_chunks((q, k, v, g, b), chunks, scale):
        s, n, last = part.scan(None if initial is None else wide(initial[:, heads]))
        out[:, heads] = part.tokens((part.e * part.q) @ s + part.p @ n)
        states.append(last)
    return out, torch.cat(states, 1) if final else None


def _forward_by_kernels(inputs, chunks, scale, initial=None, final=False):
    v, states = inputs[2], []
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for _, heads, part in _kernel_portions(inputs, chunks, scale):
        last = part.scan(None if initial is None else wide(initial[:, heads]).contiguous(), final)
        part.output(out[:, heads])
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
    if use_kernels(q) and chunks.tokens:
        return _backward_by_kernels(do, inputs, chunks, scale)
    grads = _empty_gradients(inputs)
    for shared, heads, part in reference_chunks(inputs, chunks, scale):
        dq, dk, dv, dg, db = part.backward(part.laid_out(do[:, heads]))
        # the value heads of one key head
        grads.dq[:, shared], grads.dk[:, shared] = (
            part.tokens(x.unflatten(1, (shared.stop - shared.start, -1)).sum(2)) for x in (dq, dk)
        )
        grads.dv[:, heads] = part.tokens(dv)
        grads.dg[:, heads], grads.db[:, heads] = (part.tokens(x[..., None])[..., 0] for x in (dg, db))
    return grads


def _empty_gradients(inputs):
    q, k, v, g, b = inputs
    dtypes = q.dtype, k.dtype, v.dtype, wide(g[:0]).dtype, wide(b[:0]).dtype
    return DeltaGradients(*(torch.empty(x.shape, dtype=t, device=x.device) for x, t in zip(inputs, dtypes)))


def _backward_by_kernels(do, inputs, chunks, scale):
    grads = _empty_gradients(inputs)
    for shared, heads, part in _kernel_portions(inputs, chunks, scale):
        part.scan(None, False)
        own = DeltaGradients(grads.dq[:, shared], grads.dk[:, shared], *(x[:, heads] for x in grads[2:]))
        part.backward(unit_stride(do)[:, heads], own)
    return grads


def _forward_and_backward(do, inputs, chunks, scale) -> tuple[torch.Tensor, ...]:
    """The output and all gradients."""
    out, _ = gated_delta_forward(*inputs, chunks, scale)
    return out, *gated_delta_backward(do, inputs, chunks, scale)


def backward_bytes(tokens: int, heads: int, ratio: int, key: int, value: int, kernels: bool) -> int:
    """Device bytes that backward takes beside inputs and gradients.

    Args:
        tokens: T. heads: H. ratio: H / K. key, value: F and E.
        kernels: whether `use_kernels`, in 16 bits; otherwise the reference's, in float32.
    """
    states = key * value / CHUNK  # of a chunk, spread over its tokens
    # states and their gradients; T^-1 and two gradients of matrices; W, N, dN; dq and dk of value heads
    if kernels:
        numbers = 2 * states + 3 * CHUNK + key + 2 * value + 2 * key * (ratio > 1)
        return int(min(tokens * heads, KERNEL_PORTION) * (2 * numbers + 4))
    # states before and behind, and one more for products; chunks' matrices and vectors
    numbers = 3 * states + 6 * CHUNK + 8 * key + 10 * value
    return int(min(tokens * heads, REFERENCE_PORTION) * 4 * numbers)


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


def needs_bounds(x: torch.Tensor) -> bool:
    """Whether the rule asks the host where documents begin, in x's dtype on x's device: its kernels do not."""
    return not use_kernels(x)


def use_kernels(q: torch.Tensor) -> bool:
    """Whether the rule of q runs Triton's kernels: in bfloat16 on Ampere and later, once they have given there what the
    reference gives. Gradients of states may be larger than float16 holds, and products of float32 are not exact on matrix
    units.
    """
    if not use_triton(q):
        return False
    return INTERPRETED or (q.dtype is torch.bfloat16 and _kernels_agree(q.device))


@lru_cache
def _kernels_agree(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] < 8:
        return False

    def kernels(do, *given):
        return _forward_by_kernels(*given)[0], *_backward_by_kernels(do, *given)

    heads = (2, 128), (4, 128)
    return agrees(
        "the gated delta rule in Triton", kernels, _forward_and_backward, device, torch.bfloat16, *heads
    )


def _kernel_portions(
    inputs: Sequence[torch.Tensor], chunks: Chunks, scale: float
) -> Iterator[tuple[slice, slice, "_KernelPortion"]]:
    """Some heads at a time: key heads, value heads, and their launches."""
    q, k, v, g, b = map(unit_stride, inputs)
    for shared, heads in heads_at_a_time(k.shape[1], v.shape[1], len(chunks.table.chunks), KERNEL_PORTION):
        own = q[:, shared], k[:, shared], v[:, heads], g[:, heads], b[:, heads]
        yield shared, heads, _KernelPortion(own, chunks, scale)


class _KernelPortion:
    """The launches for some heads, and what passes between them, [chunks, heads, ...].

    Args:
        inputs: q, k, v, g and b of the heads. chunks, scale: as `gated_delta` takes them.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], chunks: Chunks, scale: float) -> None:
        self.inputs, self.chunks, self.scale = inputs, chunks, scale
        _, k, v, g, b = inputs
        self.key, self.value, self.heads = k.shape[-1], v.shape[-1], v.shape[1]
        self.table, self.count = chunks.table.chunks, len(chunks.table.chunks)
        self.shared = self.heads, self.heads // k.shape[1]
        self.tiles = _columns(self.key, 64), _columns(self.value, 64)
        self.sums = self._buffer(CHUNK, dtype=torch.float32)
        self.inverse = self._buffer(CHUNK, CHUNK)
        self._launch(
            solve_kernel, k, g, b, self.table, self.sums, self.inverse, *_strides(k), g.stride(0), b.stride(0),
            *self.shared, self.key, self.tiles[0], warps=2,
        )  # fmt: skip
        self.w, self.n = self._buffer(CHUNK, self.key), self._buffer(CHUNK, self.value)
        self._launch(
            vectors_kernel, k, v, b, self.table, self.sums, self.inverse, self.w, self.n, *_strides(k, v), b.stride(0),
            *self.shared, self.key, self.value, *self.tiles,
        )  # fmt: skip

    def _buffer(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        v = self.inputs[2]
        return torch.empty(self.count, self.heads, *shape, dtype=dtype or v.dtype, device=v.device)

    def _launch(self, kernel: Callable, *arguments: Any, warps: int = 4, programs: int = 0) -> None:
        """A program per chunk and head if `programs` is 0; otherwise one per columns of a document's head."""
        launch(
            kernel,
            programs or self.count * self.heads,
            *arguments,
            num_warps=warps,
            num_stages=1 + (programs > 0),
        )

    def _columns_of_states(self) -> tuple[int, int]:
        """How many columns of a state one program has, and how many programs there are."""
        most = 64 if self.key <= 128 else 32
        rows = self.chunks.documents * self.heads
        columns = _columns(self.value, most)
        if columns > 16 and rows * -(-self.value // columns) < _SCAN_PROGRAMS:
            columns //= 2
        return columns, rows * -(-self.value // columns)

    def scan(self, initial: torch.Tensor | None, final: bool) -> torch.Tensor | None:
        """Makes states and N; returns the states [docs, heads, F, E] after the documents if `final`."""
        _, k, v, *_ = self.inputs
        self.states, last = self._buffer(self.key, self.value), None
        if final:
            shape = self.chunks.documents, self.heads, self.key, self.value
            last = torch.empty(shape, dtype=torch.float32, device=v.device)
        columns, programs = self._columns_of_states()
        self._launch(
            scan_kernel, k, self.w, self.n, self.sums, self.states, self.sums if initial is None else initial,
            self.sums if last is None else last, *self.chunks.table, *_strides(k), *self.shared, self.key,
            _columns(self.key), self.value, columns, initial is not None, final, programs=programs,
        )  # fmt: skip
        return last

    def output(self, out: torch.Tensor) -> None:
        """Writes the outputs [T, heads, E]."""
        q, k, *_ = self.inputs
        columns = _columns(self.value, 128)
        self._launch(
            read_kernel, q, k, self.n, self.sums, self.states, out, self.table, *_strides(q, k, out), *self.shared,
            self.scale, self.key, self.value, self.tiles[0], columns,
            programs=self.count * self.heads * -(-self.value // columns),
        )  # fmt: skip

    def backward(self, do: torch.Tensor, grads: DeltaGradients) -> None:
        """Writes all gradients, shaped as the inputs of these heads; do [T, heads, E]."""
        q, k, v, _, b = self.inputs
        dn, shape = torch.empty_like(self.n), (self.key, self.value)
        settings = *self.shared, self.scale
        self._launch(
            local_kernel,
            q,
            k,
            do,
            self.sums,
            dn,
            self.table,
            *_strides(q, k, do),
            *settings,
            *shape,
            *self.tiles,
        )
        dstates = torch.empty_like(self.states)
        columns, programs = self._columns_of_states()
        self._launch(
            scan_back_kernel, q, k, self.w, do, dn, self.sums, dstates, *self.chunks.table, *_strides(q, k, do),
            *settings, self.key, _columns(self.key), self.value, columns, programs=programs,
        )  # fmt: skip
        dq, dk, dv, dg, db = grads
        ratio = self.shared[1]
        if ratio > 1:  # those of each value head, before they are added up
            dq, dk = (
                torch.empty(len(q), self.heads, self.key, dtype=q.dtype, device=q.device) for _ in range(2)
            )
        dp, dt = self._buffer(CHUNK, CHUNK), self._buffer(CHUNK, CHUNK)
        self._launch(
            matrices_kernel, k, v, b, do, self.n, dn, self.inverse, self.sums, dp, dt, dv, dg, db, self.table,
            *_strides(k, v), b.stride(0), *_strides(do), *(x.stride(0) for x in (dv, dg, db)), *settings, *shape,
            *self.tiles,
        )  # fmt: skip
        self._launch(
            gradient_kernel, q, k, b, do, self.n, dn, dp, dt, self.sums, self.states, dstates, dq, dk, dg, db,
            self.table, *_strides(q, k), b.stride(0), *_strides(do), *(x.stride(0) for x in (dq, dk, dg, db)),
            *settings, *shape, *self.tiles,
        )  # fmt: skip
        if ratio > 1:
            for whole, part in ((grads.dq, dq), (grads.dk, dk)):
                torch.sum(part.unflatten(1, (-1, ratio)), 2, out=whole)


def _columns(size: int, most: int | None = None) -> int:
    """Width of a tile."""
    whole = max(next_power_of_2(size), _NARROWEST)
    return whole if most is None else min(whole, most)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of tokens and heads."""
    return tuple(x.stride(i) for x in tensors for i in (0, 1))
