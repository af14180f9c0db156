"""Times every kernel and those of installed peers, and prints one table.

    python benchmarks/ops.py [--model 8b|1b|0.5b|gemma2-9b|tiny] [--tokens 4096] [--device cuda|cpu] [--only nf4]

GB/s count each operand once, read or written; "of copy" is the fraction of the bandwidth of a large device copy measured in
the same run. Matrix products, attention and the loss count FLOP instead. Between calls, a buffer larger than the L2 cache is
overwritten. Every number is a median.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from oribi.kernels import (
    attention,
    cross_entropy,
    dispatch,
    flash_attention_3,
    fp8,
    gated_delta,
    gated_mlp,
    nf4,
    rms_norm,
    rope,
)
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.attention import Visibility
from oribi.kernels.gated_delta_chunks import Chunks, chunks_of
from oribi.kernels.lora import Projection


@dataclass(frozen=True)
class Model:
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_layers: int
    rank: int = 16


MODELS = {
    "8b": Model(4096, 14336, 32, 8, 128, 128256, 32),
    "1b": Model(2048, 8192, 32, 8, 64, 128256, 16),
    "0.5b": Model(896, 4864, 14, 2, 64, 151936, 24),
    "gemma2-9b": Model(3584, 14336, 16, 8, 256, 256000, 42),
    "tiny": Model(128, 256, 4, 2, 32, 1000, 2),
}


@dataclass
class Case:
    """One timed call: bytes moved or floating-point operations done, whichever bounds it."""

    op: str
    peer: str
    run: Callable[[], Any]
    bytes: float = 0.0
    flop: float = 0.0


class Bench:
    """Times calls on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.flush = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        if self.device == "cpu":
            return statistics.median(self._host_seconds(run) for _ in range(self.repeats))
        events = []
        for _ in range(self.repeats):
            self.flush.zero_()  # also lets the host run ahead of the timed launch
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)

    @staticmethod
    def _host_seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def copy_bandwidth(self) -> float:
        source = torch.empty(2**29 if self.device == "cuda" else 2**22, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))


def peer(module: str, name: str) -> Any | None:
    """An attribute of an optional package, or None with the reason printed."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a peer may fail in any way when it is imported
        print(f"# {module}.{name}: not timed ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
        return None


def backward_of(output: torch.Tensor | tuple, upstream: Any) -> Callable[[], None]:
    return lambda: torch.autograd.backward(output, upstream, retain_graph=True)


def norm_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x, residual, dy = (torch.randn(tokens, m.hidden_size, device=device).to(dtype) for _ in range(3))
    weight = torch.ones(m.hidden_size, device=device, dtype=dtype)
    size = x.numel() * x.element_size()
    _, total, rstd = rms_norm.rms_norm_forward(x, weight, 1e-5, residual=residual)
    yield Case("rms_norm forward", "oribi", lambda: rms_norm.rms_norm_forward(x, weight, 1e-5), 2 * size)
    yield Case(
        "rms_norm + residual forward", "oribi",
        lambda: rms_norm.rms_norm_forward(x, weight, 1e-5, residual=residual), 4 * size,
    )  # fmt: skip
    yield Case(
        "rms_norm + residual backward", "oribi",
        lambda: rms_norm.rms_norm_backward(dy, total, rstd, weight, dresidual=residual), 4 * size,
    )  # fmt: skip
    yield Case(
        "rms_norm backward with dweight", "oribi",
        lambda: rms_norm.rms_norm_backward(dy, total, rstd, weight, weight_grad=True), 3 * size,
    )  # fmt: skip
    heads = torch.randn(tokens, m.num_heads, m.head_dim, device=device).to(dtype)
    head_weight = torch.ones(m.head_dim, device=device, dtype=dtype)
    yield Case(
        "rms_norm of heads forward", "oribi",
        lambda: rms_norm.rms_norm_forward(heads, head_weight, 1e-6), 2 * heads.numel() * heads.element_size(),
    )  # fmt: skip
    yield Case("rms_norm forward", "torch", lambda: F.rms_norm(x, weight.shape, weight, 1e-5), 2 * size)
    grad_x = x.clone().requires_grad_()
    if liger := peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"):
        yield Case("rms_norm forward", "liger", lambda: liger.apply(x, weight, 1e-5), 2 * size)
        out = liger.apply(grad_x, weight, 1e-5, 0.0, "llama", False)
        yield Case("rms_norm backward with dweight", "liger", backward_of(out, dy), 3 * size)
    if unsloth := peer("unsloth.kernels.rms_layernorm", "Fast_RMS_Layernorm"):
        yield Case("rms_norm forward", "unsloth", lambda: unsloth.apply(x, weight, 1e-5, False), 2 * size)


def rope_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    width = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    qkv = torch.randn(tokens, width, device=device).to(dtype)
    q = qkv[:, : m.num_heads * m.head_dim].unflatten(1, (-1, m.head_dim))
    k = qkv[:, q.shape[1] * m.head_dim : -m.num_kv_heads * m.head_dim].unflatten(1, (-1, m.head_dim))
    angle = torch.randn(tokens, m.head_dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    moved = 2 * (q.numel() + k.numel()) * q.element_size() + 2 * cos.numel() * 4
    yield Case("rope in place", "oribi", lambda: rope.rope_forward(q, k, cos, sin, out=(q, k)), moved)
    if liger := peer("liger_kernel.ops.rope", "LigerRopeFunction"):
        q4, k4 = (x.contiguous()[None].transpose(1, 2) for x in (q, k))
        cos2, sin2 = (torch.cat([x, x], -1)[None].to(dtype) for x in (cos, sin))
        yield Case("rope in place", "liger", lambda: liger.apply(q4, k4, cos2, sin2), moved)


def mlp_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    both = torch.randn(tokens, 2 * m.intermediate_size, device=device).to(dtype)
    gate, up = both.chunk(2, 1)
    dh = torch.randn(tokens, m.intermediate_size, device=device).to(dtype)
    h, (dgate, dup) = torch.empty_like(dh), torch.empty_like(both).chunk(2, 1)
    size = dh.numel() * dh.element_size()
    for activation in ("silu", "gelu_tanh"):
        yield Case(
            f"gated_mlp {activation} forward", "oribi",
            lambda a=activation: gated_mlp.gated_mlp_forward(gate, up, a, out=h), 3 * size,
        )  # fmt: skip
        yield Case(
            f"gated_mlp {activation} backward", "oribi",
            lambda a=activation: gated_mlp.gated_mlp_backward(dh, gate, up, a, dgate=dgate, dup=dup, h=h), 6 * size,
        )  # fmt: skip
    gate, up = gate.contiguous(), up.contiguous()
    yield Case("gated_mlp silu forward", "torch", lambda: F.silu(gate) * up, 3 * size)
    if liger := peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"):
        yield Case("gated_mlp silu forward", "liger", lambda: liger.apply(gate, up), 3 * size)
    if forward := peer("unsloth.kernels.swiglu", "swiglu_fg_kernel"):
        backward = peer("unsloth.kernels.swiglu", "swiglu_DWf_DW_dfg_kernel")
        yield Case("gated_mlp silu forward", "unsloth", lambda: forward(gate[None], up[None]), 3 * size)
        yield Case("gated_mlp silu backward", "unsloth", lambda: backward(dh, gate, up), 6 * size)


def packed(n: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    weight, state = nf4.quantize((torch.randn(n, k, device=device) * 0.02).to(dtype))
    weight.quant_state = state
    return weight


def nf4_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    unsloth = peer("unsloth.kernels.utils", "fast_dequantize")
    bitsandbytes = peer("bitsandbytes.functional", "dequantize_4bit")
    kv = m.num_kv_heads * m.head_dim
    groups = {
        "q": [(m.num_heads * m.head_dim, m.hidden_size)],
        "q, k, v": [(m.num_heads * m.head_dim, m.hidden_size), (kv, m.hidden_size), (kv, m.hidden_size)],
        "gate, up": [(m.intermediate_size, m.hidden_size)] * 2,
        "down": [(m.hidden_size, m.intermediate_size)],
    }
    for name, shapes in groups.items():
        weights = [packed(*shape, dtype, device) for shape in shapes]
        count = sum(n * k for n, k in shapes)
        moved = count * (2 + 0.5 + 1 / 64 + 4 / 64 / 256)
        rows, k = sum(n for n, _ in shapes), shapes[0][1]
        room = torch.empty(rows, k + 64, dtype=dtype, device=device)[:, :k]
        op = f"nf4 {name} {rows}x{k}"
        yield Case(op, "oribi", lambda w=weights: nf4.dequantize(w, dtype), moved)
        yield Case(
            f"{op} into wider rows", "oribi", lambda w=weights, o=room: nf4.dequantize(w, dtype, o), moved
        )
        if bitsandbytes:
            yield Case(
                op, "bitsandbytes", lambda w=weights: [bitsandbytes(x, x.quant_state) for x in w], moved
            )
        if unsloth:
            yield Case(op, "unsloth", lambda w=weights: [unsloth(x, x.quant_state) for x in w], moved)


def fp8_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    n, k = 2 * m.intermediate_size, m.hidden_size
    weights = [packed(n // 2, k, dtype, device) for _ in range(2)]
    x = torch.randn(tokens, k, device=device).to(dtype)
    rounded = fp8.rounded_weights([Projection(weight) for weight in weights])
    yield Case(
        f"e4m3 rows {tokens}x{k}", "oribi", lambda: fp8.quantize_rows(x), x.numel() * (1 + x.element_size())
    )
    for transposed in (False, True):
        yield Case(
            f"nf4 to e4m3 {n}x{k}{', transposed' * transposed}", "oribi",
            lambda t=transposed: fp8.dequantize_e4m3(weights, rounded.inverse, t), n * k * (1 + 0.5 + 1 / 64),
        )  # fmt: skip
    flop = 2.0 * tokens * n * k
    codes = fp8.quantize_rows(x)
    yield Case(
        f"product {tokens}x{n}x{k}", "oribi, e4m3",
        lambda: fp8.product(*codes, rounded.plain, rounded.scales[:, :n], dtype), flop=flop,
    )  # fmt: skip
    dense = nf4.dequantize(weights, dtype)
    yield Case(f"product {tokens}x{n}x{k}", f"torch, {dtype}", lambda: x @ dense.t(), flop=flop)


def attention_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    width = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    qkv = torch.randn(1, tokens, width, device=device).to(dtype)
    sizes = [heads * m.head_dim for heads in (m.num_heads, m.num_kv_heads, m.num_kv_heads)]
    q, k, v = (x.unflatten(2, (-1, m.head_dim)) for x in qkv.split(sizes, 2))
    bounds = [0, tokens // 5, tokens // 2, tokens]
    longest = max(b - a for a, b in zip(bounds, bounds[1:]))
    pack = torch.tensor(bounds, dtype=torch.int32, device=device)
    kinds = {
        "one row": (Visibility(1, tokens), None, tokens**2 / 2),
        "pack of 3": (
            Visibility(1, tokens, cu_seqlens=pack, max_length=longest),
            None,
            sum((b - a) ** 2 for a, b in zip(bounds, bounds[1:])) / 2,
        ),
        "window": (Visibility(1, tokens), tokens // 4, tokens**2 * 7 / 32),
    }
    backends = ["reference"] if device == "cpu" else ["flash", "triton"]
    if device == "cuda" and flash_attention_3.installed():
        backends.append("flash3")
    for name, (visibility, window, pairs) in kinds.items():
        dense = device == "cuda" and name == "one row" and torch.cuda.get_device_capability()[0] >= 9
        for backend in [*backends, *(["cudnn"] if dense else [])]:
            softcap = 50.0 if backend == "triton" else None  # which is what that one is for
            how = attention.Attend(backend, m.head_dim**-0.5, window, softcap, visibility)
            out, saved = attention.attention_forward(q, k, v, how)
            flop = 4.0 * pairs * m.num_heads * m.head_dim
            op = f"attention, {name} of {tokens}"
            yield Case(
                f"{op}, forward", backend, lambda h=how: attention.attention_forward(q, k, v, h), flop=flop
            )
            yield Case(
                f"{op}, backward", backend,
                lambda h=how, o=out, s=saved: attention.attention_backward(o, q, k, v, o, s, h), flop=2.5 * flop,
            )  # fmt: skip


def softcap_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Gemma 2's attention (soft cap 50, window 4096) beside PyTorch's flex_attention, one row and a pack of 3."""
    softcap, window = 50.0, min(4096, tokens)
    q, k, v = (
        torch.randn(1, tokens, heads, m.head_dim, device=device).to(dtype).requires_grad_()
        for heads in (m.num_heads, m.num_kv_heads, m.num_kv_heads)
    )
    dout = torch.randn_like(q)
    backend = "reference" if device == "cpu" else "triton"
    # on a CPU it has no backward
    flex = peer("torch.nn.attention.flex_attention", "flex_attention") if device == "cuda" else None
    compiled = torch.compile(flex) if flex else None
    for name, bounds in (("one row", [0, tokens]), ("pack of 3", [0, tokens // 5, tokens // 2, tokens])):
        pack = torch.tensor(bounds, dtype=torch.int32, device=device)
        lengths = [b - a for a, b in zip(bounds, bounds[1:])]
        visibility = Visibility(
            1, tokens, cu_seqlens=pack if len(lengths) > 1 else None, max_length=max(lengths)
        )
        how = attention.Attend(backend, m.head_dim**-0.5, window, softcap, visibility)
        flop = 4.0 * m.num_heads * m.head_dim * sum(_pairs(n, window) for n in lengths)
        op = f"soft cap, {name} of {tokens}"
        out, saved = attention.attention_forward(q, k, v, how)

        def ours(how: attention.Attend = how) -> None:
            out, saved = attention.attention_forward(q, k, v, how)
            attention.attention_backward(dout, q, k, v, out, saved, how)

        yield Case(
            f"{op}, forward", "oribi", lambda h=how: attention.attention_forward(q, k, v, h), flop=flop
        )
        yield Case(f"{op}, forward and backward", "oribi", ours, flop=3.5 * flop)
        if compiled is None:
            continue
        make, mask = _flex_mask(pack, tokens, window, device)

        def theirs(mask: Any = mask) -> torch.Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return compiled(
                *heads_first, score_mod=lambda score, *_: softcap * torch.tanh(score / softcap),
                block_mask=mask, scale=m.head_dim**-0.5, enable_gqa=True,
            ).transpose(1, 2)  # fmt: skip

        try:
            error = (theirs() - out.view(q.shape)).abs().max().item()
        except Exception as reason:  # a head may be too large for its tiles
            print(
                f"# flex_attention, {name}: failed ({type(reason).__name__}: {str(reason).splitlines()[0][:80]})"
            )
            continue
        print(f"# {op}: flex_attention differs from oribi by at most {error:.1e}")
        yield Case(f"{op}, forward", "torch, flex", theirs, flop=flop)
        yield Case(
            f"{op}, forward and backward", "torch, flex",
            lambda run=theirs: torch.autograd.grad(run(), (q, k, v), dout), flop=3.5 * flop,
        )  # fmt: skip
        yield Case(f"its mask, {name}, once a batch", "torch, flex", make)


def _pairs(tokens: int, window: int) -> float:
    """Pairs of query and key of a causal document with a sliding window."""
    full = min(tokens, window)
    return full * (full + 1) / 2 + (tokens - full) * window


def _flex_mask(pack: torch.Tensor, tokens: int, window: int, device: str) -> tuple[Callable[[], Any], Any]:
    """What makes flex_attention's block mask of documents and a window, and the mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = pack.diff().long()
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query - key < window) & (document[query] == document[key])

    create = torch.compile(create_block_mask) if device == "cuda" else create_block_mask

    def make() -> Any:
        return create(seen, None, None, tokens, tokens, device=device)

    return make, make()


def loss_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    rows = torch.randn(tokens, m.hidden_size, device=device).to(dtype)
    head = (torch.randn(m.vocab_size, m.hidden_size, device=device) * 0.02).to(dtype)
    targets = torch.randint(0, m.vocab_size, (tokens,), device=device)
    some = targets.clone()
    some[torch.rand(tokens, device=device) < 0.6] = -100
    labelled = int((some != -100).sum())
    flop = 4.0 * tokens * m.vocab_size * m.hidden_size
    op = f"loss and dx, V {m.vocab_size}"
    yield Case(
        op, "oribi", lambda: cross_entropy.linear_cross_entropy_forward(rows, head, targets), flop=flop
    )
    yield Case(
        f"{op}, {labelled} of {tokens} labelled", "oribi",
        lambda: cross_entropy.linear_cross_entropy_forward(rows, head, some), flop=flop * labelled / tokens,
    )  # fmt: skip
    size, columns = cross_entropy.logits_shape(tokens, m.vocab_size, rows.element_size())
    chunk = torch.randn(min(size, tokens), columns, dtype=rows.dtype, device=device)[:, : m.vocab_size]
    losses = torch.empty(len(chunk), device=device)
    yield Case(
        f"its kernel alone, {len(chunk)} rows", "oribi",
        lambda: cross_entropy._loss_and_gradient(chunk, targets[: len(chunk)], losses, None, 1.0, True),
        3 * chunk.numel() * chunk.element_size(),
    )  # fmt: skip
    x = rows.clone().requires_grad_()

    def whole() -> None:
        F.cross_entropy(F.linear(x, head).float(), targets).backward()

    if tokens * m.vocab_size < 2**31:
        yield Case(op, "torch, whole logits", whole, flop=flop)
    if liger := peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):
        yield Case(op, "liger", lambda: liger.apply(x, head, targets), flop=flop)


def adamw_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    q, kv, d, i = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.hidden_size, m.intermediate_size
    pairs = [(q, d), (kv, d), (kv, d), (d, q), (i, d), (i, d), (d, i)] * m.num_layers
    shapes = [shape for n, k in pairs for shape in ((m.rank, k), (n, m.rank))]
    count = sum(a * b for a, b in shapes)

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    # norm: g; update: w, g, m, v read, w, g, m, v written
    for bits, state in ((8, 2), (32, 8)):
        op = f"adamw {bits} bit, {count / 1e6:.0f}M in {len(shapes)} tensors"
        everything, update = count * (4 + 16 + 2 * state), count * (12 + 2 * state)
        optimizer = FlatAdamW(parameters(), bits=bits, max_grad_norm=1.0)
        yield Case(op, "oribi, clips and zeroes", optimizer.step, everything)
        if device == "cuda":
            yield Case(op, "the same in a graph", captured(optimizer.step), everything)
        if bits == 8:
            if eight := peer("bitsandbytes.optim", "AdamW8bit"):
                yield Case(op, "bitsandbytes", eight(parameters(), lr=1e-3).step, update)
            continue
        for kind in ("fused", "foreach"):
            made = parameters()
            capturable = {"capturable": True} if device == "cuda" else {}
            theirs = torch.optim.AdamW(made, lr=1e-3, **{kind: True}, **capturable)

            def clipped(
                made: list[torch.nn.Parameter] = made, theirs: torch.optim.Optimizer = theirs
            ) -> None:
                torch.nn.utils.clip_grad_norm_(made, 1.0, foreach=True)
                theirs.step()
                torch._foreach_zero_([p.grad for p in made])

            yield Case(op, f"torch, {kind}", theirs.step, update)
            yield Case(op, f"torch, {kind}, clips and zeroes", clipped, everything)
            if device == "cuda":
                yield Case(op, "the same in a graph", captured(clipped), everything)


def delta_cases(m: Model, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The gated delta rule of Qwen3.5-9B (16 key heads, 32 value heads, 128 wide): two rows, and a pack of many documents."""
    key_heads, heads, width = (16, 32, 128) if device == "cuda" else (2, 4, 32)
    q, k = (
        F.normalize(torch.randn(tokens, key_heads, width, device=device), dim=-1).to(dtype) for _ in range(2)
    )
    v, do = (torch.randn(tokens, heads, width, device=device).to(dtype) for _ in range(2))
    g, b = -torch.rand(tokens, heads, device=device), torch.rand(tokens, heads, device=device).to(dtype)
    scale, inputs = width**-0.5, (q, k, v, g, b)
    theirs = peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule") if device == "cuda" else None
    flop = 2.0 * tokens * heads * width * (5 * gated_delta.CHUNK + 3 * width)
    for name, bounds in (
        (f"2 rows of {tokens // 2}", [0, tokens // 2, tokens]),
        ("a pack of 20", [tokens * i // 20 for i in range(21)]),
    ):
        chunks = chunks_of(bounds, torch.device(device))

        def forward(chunks: Chunks = chunks) -> Any:
            return gated_delta.gated_delta_forward(*inputs, chunks, scale)

        def backward(chunks: Chunks = chunks) -> Any:
            return gated_delta.gated_delta_backward(do, inputs, chunks, scale)

        def reference(run: Callable[[], Any]) -> Any:
            with dispatch.reference_only():
                return run()

        for what, run, work in (
            ("forward", forward, flop),
            ("backward, states made again", backward, 3 * flop),
        ):
            op = f"delta rule, {name}, {what}"
            yield Case(op, "oribi", run, flop=work)
            if device == "cuda":
                yield Case(op, "oribi, reference", lambda run=run: reference(run), flop=work)
        if theirs is None:
            continue
        rows = [x[None].detach().requires_grad_() for x in inputs]
        offsets = torch.tensor(bounds, device=device)

        def apart(rows: list = rows, offsets: torch.Tensor = offsets) -> torch.Tensor:
            return theirs(*rows, scale=scale, cu_seqlens=offsets, cu_seqlens_cpu=offsets.cpu())[0]

        yield Case(f"delta rule, {name}, forward", "fla", lambda run=apart: run().detach(), flop=flop)
        out = apart()
        yield Case(f"delta rule, {name}, backward", "fla", backward_of(out, do[None]), flop=3 * flop)
    if device == "cuda":
        yield from _launches_of(backward)


def _launches_of(run: Callable[[], Any]) -> Iterator[Case]:
    """Each kernel of the delta rule alone, with the arguments that a call gives it."""
    launch, found = gated_delta.launch, []

    def record(*arguments: Any, **options: Any) -> None:
        found.append((arguments, options))
        launch(*arguments, **options)

    gated_delta.launch = record
    try:
        run()
    finally:
        gated_delta.launch = launch
    for arguments, options in found:
        name = arguments[0].__name__
        yield Case(f"its {name} alone", "oribi", lambda a=arguments, o=options: launch(*a, **o))


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of a call: its time on the GPU without the host's."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


CASES = {
    "rms_norm": norm_cases,
    "rope": rope_cases,
    "gated_mlp": mlp_cases,
    "nf4": nf4_cases,
    "fp8": fp8_cases,
    "attention": attention_cases,
    "softcap": softcap_cases,
    "cross_entropy": loss_cases,
    "gated_delta": delta_cases,
    "adamw": adamw_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=CASES, help="one kernel")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --model tiny runs the references")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        dtype = torch.float16
    bench = Bench(device, arguments.repeats)
    ceiling = bench.copy_bandwidth()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"# {name}, torch {torch.__version__}, {dtype}, {arguments.model}, {arguments.tokens} tokens")
    print(f"# copy: {ceiling / 1e9:.0f} GB/s")
    print(f"| {'op':<52} | {'implementation':<30} | {'us':>9} | {'rate':>13} | {'of copy':>7} |")
    print(f"|{'-' * 54}|{'-' * 32}|{'-' * 11}|{'-' * 15}|{'-' * 9}|")
    for op, cases in CASES.items():
        if arguments.only in (None, op):
            for case in cases(MODELS[arguments.model], arguments.tokens, dtype, device):
                report(case, bench, ceiling)


def report(case: Case, bench: Bench, ceiling: float) -> None:
    try:
        seconds = bench.seconds(case.run)
    except Exception as error:
        if case.peer.startswith("oribi"):
            raise
        print(f"# {case.op}, {case.peer}: failed ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
        return
    if case.bytes:
        rate = f"{case.bytes / seconds / 1e9:8.0f} GB/s"
        share = f"{case.bytes / seconds / ceiling:7.0%}"
    elif not case.flop:
        rate = share = ""
    else:
        rate, share = f"{case.flop / seconds / 1e12:6.0f} TFLOP/s", ""
    print(f"| {case.op:<52} | {case.peer:<30} | {seconds * 1e6:9.1f} | {rate:>13} | {share:>7} |", flush=True)


if __name__ == "__main__":
    main()
