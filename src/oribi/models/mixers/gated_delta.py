"""The gated delta rule as a mixer: a memory of fixed size per head in place of keys and values of every token.

    q|k|v|z|b|a = n W_in      q|k|v = silu(conv(q|k|v))      g = -e^A softplus(a + dt_bias)      beta = sigmoid(b)
    o = rule(unit(q), unit(k), v, g, beta)      out = (norm(o) silu(z)) W_out

B rows, S tokens per row, T = B * S, C channels of q|k|v, H value heads of E numbers, K key heads of F numbers. Convolution
and memory start anew with every document. At padding the mixer's input is zero, and with it all that would reach a memory.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.families import Family
from oribi.kernels.causal_conv import causal_conv, causal_conv_backward, causal_conv_forward, window_after
from oribi.kernels.dispatch import wide
from oribi.kernels.gated_delta import (
    backward_bytes,
    gated_delta,
    gated_delta_backward,
    gated_delta_forward,
    needs_bounds,
)
from oribi.kernels.gated_delta_chunks import CHUNK
from oribi.kernels.gated_mlp import gated_mlp, gated_mlp_backward, gated_mlp_forward
from oribi.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from oribi.models.core import Held, Result
from oribi.models.half import Kept
from oribi.models.linear_layers import RMSNorm, project

if TYPE_CHECKING:
    from oribi.models.layers import Batch

# decay and strength of what is learnt: a few rows each, which stay in 16 bits and get an adapter only by name
DECAY_PROJECTIONS = ("in_proj_b", "in_proj_a")
# added to the sum of squares of q and of k before its root
UNIT_EPS = 1e-6


@dataclass
class Remembering:
    """What the rule reads, and what backward needs beside it.

    Args:
        p: q|k|v|z|b|a [T, N]. batch: of the pass.
        raw, rstd: q and k [T, K, F] behind the convolution, and their inverse lengths.
        q, k, v, g, beta: as the rule takes them.
        out: the rule's output [T, H, E]. normed, normed_rstd: its norm, and 1/rms.
    """

    p: torch.Tensor
    batch: "Batch"
    raw: tuple[torch.Tensor, ...]
    rstd: tuple[torch.Tensor, ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    out: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    normed_rstd: torch.Tensor | None = None


class GatedDelta(nn.Module):
    # `models.core.Mixer` says what these are
    attribute, input, output, output_result, row_wise = "linear_attn", "delta_in", "delta_out", "x_mid", False
    masks_padding, window = True, None
    needs_whole_rows = "linear attention, whose memory runs from token to token"
    # products of small matrices. Assumed: they run at a sixth of the speed of a large one
    core_by_products = 6.0
    columns: dict[str, int] = {}
    projections = ("in_proj_qkv", "in_proj_z", "out_proj")
    results = (
        Result("delta_in", ("delta_in.out", "delta_in.lora"), made_by="delta_in"),
        Result("delta_in_xa", ("delta_in.lora",), follows="delta_in"),
        Result("delta", ("delta_out.in",), made_by="core", balanced="keep"),
        Result("x_mid", ("delta_out.out",), made_by="delta_out"),
        Result("delta_out_xa", ("delta_out.lora",), follows="x_mid"),
        Result("delta_out", ("delta_out.out",), made_by="delta_out", before_norm=True),
    )

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        self.index = index
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        key, value, heads = self.key_heads * self.key_dim, self.value_heads * self.value_dim, self.value_heads
        # of q|k|v, z, b and a
        self.widths = [2 * key + value, value, heads, heads]
        self.scale = self.key_dim**-0.5
        for name, size in zip(("in_proj_qkv", "in_proj_z", *DECAY_PROJECTIONS), self.widths):
            self.add_module(name, nn.Linear(config.hidden_size, size, bias=False))
        channels, width = self.widths[0], config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps, 0.0)
        self.out_proj = nn.Linear(value, config.hidden_size, bias=False)

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layers that share an input, and the last one."""
        return {
            "delta_in": [self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a],
            "delta_out": [self.out_proj],
        }

    def holds(self, length: int) -> dict[str, Held]:
        """What the convolution still reads [C, W - 1], and the memory [H, F, E]."""
        return {
            "window": Held((self.widths[0], self.conv1d.kernel_size[0] - 1)),
            "state": Held((self.value_heads, self.key_dim, self.value_dim), torch.float32),
        }

    def core_flop(self, longest: float) -> float:
        """Of the rule in chunks: scores of queries and keys, the solution, and products with states."""
        f, e = self.key_dim, self.value_dim
        per_head = 2 * (2 * CHUNK * f + CHUNK * (f + e) + CHUNK * e + 3 * f * e)
        return float(self.value_heads * per_head)

    @property
    def needs_bounds(self) -> bool:
        """Whether a pack's documents have to be known on the host."""
        return needs_bounds(self.conv1d.weight)

    def core_backward_bytes(self, tokens: int, width: int) -> int:
        """The rule's inputs and gradients, and what it makes between them."""
        own = tokens * width * (2 * self.widths[0] + 4 * self.widths[1])
        # the kernels' on a GPU, for which plans are made; in float16 the reference runs there too
        kernels = width == 2 and self.conv1d.weight.dtype is not torch.float16
        heads = self.value_heads, self.value_heads // self.key_heads
        return int(own + backward_bytes(tokens, *heads, self.key_dim, self.value_dim, kernels))

    def autograd_columns(self) -> int:
        """The convolution's input and output, unit rows and z, the rule's output before and behind its norm."""
        return 2 * self.widths[0] + 2 * self.key_heads * self.key_dim + 3 * self.widths[1]

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        rows, length = x.shape[:2]
        real = batch.real_tokens()
        if real is not None:
            x = x.masked_fill(~real.view(rows, length, 1), 0)
        groups = self.groups()
        qkv, z, b, a = (t.flatten(0, 1) for t in project(groups["delta_in"], x))
        weight, initial = self.conv1d.weight.squeeze(1), None
        if batch.cache is None or hasattr(batch.cache, "leave"):
            start = batch.visibility.doc_start(x.device)
            c = causal_conv(qkv, weight, start, silu=True)
        else:
            c, initial = self._after_cached(qkv.view(rows, length, -1), weight, batch)
        q, k, v = self.heads(c)
        q, k = (rms_norm(t, self._unit(t), UNIT_EPS / self.key_dim) for t in (q, k))
        g, beta = self.decays(a), torch.sigmoid(b)
        chunks = batch.delta_chunks(x.device)
        if batch.cache is None:
            o = gated_delta(q, k, v, g, beta, chunks, self.scale)
        else:
            with torch.no_grad():
                o, state = gated_delta_forward(q, k, v, g, beta, chunks, self.scale, initial, final=True)
            if torch.is_grad_enabled() and v.requires_grad:
                fresh = initial is None
                o = gated_delta(q, k, v, g, beta, chunks, self.scale) if fresh else _NoGradient.apply(o, v)
            if hasattr(batch.cache, "leave"):
                last = batch.visibility.documents(x.device)[0][1:].long() - 1
                window = window_after(qkv, last, start, weight.shape[1])
                batch.cache.leave(self.index, window=window, state=state)
            else:
                batch.cache.update_recurrent_state(state.float(), self.index)
        h = gated_mlp(z, self.norm(o).flatten(1), "silu")
        return project(groups["delta_out"], h.view(rows, length, -1))[0]

    def _after_cached(
        self, qkv: torch.Tensor, weight: torch.Tensor, batch: "Batch"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q|k|v [B, S, C] convolved [T, C] behind what a cache of transformers holds, which gets them; and its memory."""
        cached = batch.cache.layers[self.index]
        initial = cached.recurrent_states[0]
        width = weight.shape[1]
        whole = batch.cache.update_conv_state(qkv.transpose(1, 2), self.index, conv_kernel_size=width)
        whole, length = whole.transpose(1, 2), qkv.shape[1]
        rows, seen = whole.shape[:2]
        start = torch.arange(0, rows * seen, seen, dtype=torch.int32, device=qkv.device).repeat_interleave(
            seen
        )
        c = causal_conv(whole.reshape(rows * seen, -1), weight, start, silu=True)
        return c.view(rows, seen, -1)[:, -length:].flatten(0, 1), initial

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Remembering:
        """Convolution, unit rows and decays of q|k|v|z|b|a."""
        start = batch.visibility.doc_start(p.device)
        qkv, _, b, a = p.split(self.widths, dim=1)
        c = causal_conv_forward(qkv, self.conv1d.weight.squeeze(1), start, silu=True)
        q, k, v = self.heads(c)
        (unit_q, q_rstd), (unit_k, k_rstd) = map(self.unit_rows, (q, k))
        decays, beta = self.decays(a), torch.sigmoid(b)
        return Remembering(p, batch, (q, k), (q_rstd, k_rstd), unit_q, unit_k, v, decays, beta)

    def run(self, prepared: Remembering, kept: Kept) -> torch.Tensor:
        """The rule's output [T, H E], kept or computed, normed and gated."""
        out = kept.take("delta")
        if out is None:
            chunks = prepared.batch.delta_chunks(prepared.p.device)
            inputs = prepared.q, prepared.k, prepared.v, prepared.g, prepared.beta
            out = gated_delta_forward(*inputs, chunks, self.scale)[0].flatten(1)
            kept.put("delta", out)
        prepared.out = out.unflatten(1, (self.value_heads, -1))
        normed, _, prepared.normed_rstd = self.norm.compute(prepared.out)
        prepared.normed = normed.flatten(1)
        return gated_mlp_forward(prepared.p.split(self.widths, dim=1)[1], prepared.normed, "silu")

    def backward(self, prepared: Remembering, dh: torch.Tensor) -> None:
        """Writes the gradient of q|k|v|z|b|a over it."""
        qkv, z, b, a = prepared.p.split(self.widths, dim=1)
        out, normed = prepared.out, prepared.normed
        gated_mlp_backward(dh, z, normed, "silu", dgate=z, dup=normed)
        do = normed.view(out.shape)
        self.norm.backward(do, out, prepared.normed_rstd, out=do)
        prepared.out = prepared.normed = None
        inputs = prepared.q, prepared.k, prepared.v, prepared.g, prepared.beta
        grads = gated_delta_backward(do, inputs, prepared.batch.delta_chunks(qkv.device), self.scale)
        del do
        decay = -self.A_log.to(prepared.g.dtype).exp()
        a.copy_(grads.dg * decay * torch.sigmoid(wide(a) + self.dt_bias.to(prepared.g.dtype)))
        beta = wide(prepared.beta)
        b.copy_(grads.db * beta * (1 - beta))
        dc = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        dq, dk, dv = self.heads(dc)
        for d, x, rstd, place in zip((grads.dq, grads.dk), prepared.raw, prepared.rstd, (dq, dk)):
            rms_norm_backward(d, x, rstd, self._unit(x), out=place)
        dv.copy_(grads.dv)
        del grads
        start = prepared.batch.visibility.doc_start(qkv.device)
        causal_conv_backward(dc, qkv, self.conv1d.weight.squeeze(1), start, silu=True, dx=qkv)

    def decays(self, a: torch.Tensor) -> torch.Tensor:
        """g [..., H], wide, of a."""
        a = wide(a)
        return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    def heads(self, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and k [T, K, F] and v [T, H, E], views of q|k|v [T, C]."""
        key = self.key_heads * self.key_dim
        q, k, v = c.split([key, key, self.widths[1]], dim=1)
        return *(t.unflatten(1, (self.key_heads, -1)) for t in (q, k)), v.unflatten(1, (self.value_heads, -1))

    def unit_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, K, F] with rows of length 1, and 1/rms [T, K]."""
        y, _, rstd = rms_norm_forward(x, self._unit(x), UNIT_EPS / self.key_dim)
        return y, rstd

    def _unit(self, like: torch.Tensor) -> torch.Tensor:
        """The weight with which RMSNorm gives rows of length 1; in 16 bits they would be too long by a thousandth."""
        return _filled(self.key_dim, self.scale, wide(like[:0]).dtype, like.device)


class _NoGradient(torch.autograd.Function):
    """o, through which no gradient goes: a cache holds memories, not how they came about."""

    @staticmethod
    def forward(ctx, o, v):
        return o.clone()

    @staticmethod
    def backward(ctx, do):
        raise ModelError("no gradient goes through the memory that a cache holds: give use_cache=False")


@lru_cache
def _filled(size: int, value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device=device)
