"""Each op on this machine compared with float64; it may err at most twice as much as PyTorch's own form in the same dtype.

T tokens, D hidden size, N out features, V vocabulary, H heads, E head_dim. Each token chooses CHOSEN of EXPERTS.
"""

from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F

from oribi.environment import detect
from oribi.kernels import nf4
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.attention import Visibility, attention
from oribi.kernels.causal_conv import causal_conv
from oribi.kernels.cross_entropy import linear_cross_entropy
from oribi.kernels.expert_linear import StackProjection, expert_linear
from oribi.kernels.expert_stack import PackedStack, dequantize_stack
from oribi.kernels.gated_mlp import gated_mlp
from oribi.kernels.lora import Projection
from oribi.kernels.lora_linear import lora_linear
from oribi.kernels.mxfp4 import MX_BLOCK, MXFP4Stack
from oribi.kernels.output_gate import output_gate
from oribi.kernels.rms_norm import rms_norm
from oribi.kernels.rope import rope
from oribi.kernels.routing import RouterRule, choose, sort_by_expert, weigh
from oribi.selftest.comparison import Comparison, failed

GROUP = "kernels"
T, D, N, V, H, E = 67, 128, 192, 1000, 4, 32  # T is no multiple of any block
DOCUMENTS = [5, 40, 1, 21]
EXPERTS, CHOSEN = 6, 2
FLOOR = 2e-6  # of the limit: a GPU's fast exp and division are exact to a few 1e-7


def compare_kernels(device: torch.device) -> Iterator[Comparison]:
    """Outputs and gradients of every op in float32 and in the machine's training dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    dtypes = dict.fromkeys([torch.float32, detect().dtype])
    for name, ours, plain, inputs in _ops(normal, device):
        for dtype in dtypes:
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            try:
                error, allowed = _errors(ours, plain, [x.to(dtype) for x in inputs])
                yield Comparison(GROUP, label, error, allowed, "limit: twice PyTorch's own error")
            except Exception as error:
                yield failed(GROUP, label, error)
    for dtype in dtypes:
        yield _compare_nf4(normal(N, D), dtype)
        yield from _compare_stacks(normal(EXPERTS, N, D), dtype)
    yield _compare_adamw(normal)


def _ops(normal: Callable, device: torch.device) -> Iterator[tuple]:
    """Name, op, PyTorch's own form of it, and the inputs to differentiate."""
    yield "rms_norm", lambda x, w: rms_norm(x, w, 1e-6), _plain_norm, [normal(T, D), normal(D)]
    angles = normal(T, E // 2)
    cos, sin = angles.cos(), angles.sin()
    yield (
        "rope", lambda q, k: rope(q, k, cos, sin), lambda q, k: (_plain_rope(q, cos, sin), _plain_rope(k, cos, sin)),
        [normal(T, H, E), normal(T, H // 2, E)],
    )  # fmt: skip
    yield "output_gate", output_gate, lambda a, g: a * torch.sigmoid(g), [normal(T, H, E), normal(T, H, E)]
    inputs = [normal(T, N), normal(T, N)]
    yield "gated_mlp", lambda g, u: gated_mlp(g, u, "silu"), lambda g, u: F.silu(g) * u, inputs
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1)).to(device)
    targets[::3] = -100
    yield (
        "cross_entropy", lambda x, w: linear_cross_entropy(x, w, targets, divisor=T),
        lambda x, w: F.cross_entropy(_wide(F.linear(x, w)), targets, reduction="sum") / T,
        [normal(T, D), normal(V, D) * 0.1],
    )  # fmt: skip
    base = normal(N, D) * 0.1
    yield (
        "lora", lambda x, a, b: lora_linear(x, [Projection(base.to(x.dtype), None, a, b, 2.0)])[0],
        lambda x, a, b: F.linear(x, base.to(x.dtype)) + 2.0 * F.linear(F.linear(x, a), b),
        [normal(T, D), normal(8, D) * 0.1, normal(N, 8) * 0.1],
    )  # fmt: skip
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(device, torch.int32)
    start = Visibility(1, T, cu_seqlens=bounds, max_length=max(DOCUMENTS)).doc_start(device)
    yield (
        "causal convolution of packed documents", lambda x, w: causal_conv(x, w, start, silu=True), _plain_convolution,
        [normal(T, D), normal(D, 4)],
    )  # fmt: skip

    def packed(q, k, v):
        visibility = Visibility(1, T, cu_seqlens=bounds, max_length=max(DOCUMENTS))
        return attention(q[None], k[None], v[None], visibility, E**-0.5)[0]

    inputs = [normal(T, H, E), normal(T, 2, E), normal(T, 2, E)]
    yield "attention of packed documents", packed, _plain_attention, inputs
    yield from _expert_ops(normal, device)


def _expert_ops(normal: Callable, device: torch.device) -> Iterator[tuple]:
    """The weights of chosen experts, and the products of rows with their experts' matrices, of which one gets no row."""
    rule = RouterRule("softmax", CHOSEN, normalise=True)
    logits = normal(T, EXPERTS)
    logits[:, 3] = -20
    experts = choose(logits, rule)
    routing = sort_by_expert(experts, EXPERTS)
    ids = routing.of_rows(experts)
    yield (
        "weights of the chosen experts", lambda logits: weigh(logits, experts, rule),
        lambda logits: F.normalize(_wide(logits).softmax(-1).gather(1, experts), p=1, dim=1).to(logits.dtype), [logits],
    )  # fmt: skip
    base = normal(EXPERTS, N, D) * 0.1

    def ours(x, a, b):
        projection = StackProjection(base.to(x.dtype), a, b, 2.0)
        return expert_linear(x[routing.tokens], projection, ids, routing.offs)

    def plain(x, a, b):
        pairs = zip(base.to(x.dtype), a.chunk(EXPERTS), b.view(N, -1, EXPERTS).unbind(2))
        parts = zip(x[routing.tokens].split(torch.bincount(ids, minlength=EXPERTS).tolist()), pairs)
        return torch.cat([F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b) for x, (w, a, b) in parts])

    factors = [normal(EXPERTS * 8, D) * 0.1, normal(N, 8 * EXPERTS) * 0.1]
    yield "products with experts and their lora", ours, plain, [normal(T, D), *factors]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cos, sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    outputs = []
    for one in zip(*(x.split(DOCUMENTS) for x in (q, k, v))):
        heads = [x.repeat_interleave(H // x.shape[1], 1).transpose(0, 1) for x in one]
        seen = torch.ones(len(one[0]), len(one[0]), dtype=torch.bool, device=q.device).tril()
        scores = (heads[0] @ heads[1].transpose(1, 2) * E**-0.5).masked_fill(~seen, -torch.inf)
        outputs.append((_wide(scores).softmax(-1).to(q.dtype) @ heads[2]).transpose(0, 1))
    return torch.cat(outputs)


def _plain_convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    before = weight.shape[1] - 1
    parts = [F.pad(one.t()[None], (before, 0)) for one in x.split(DOCUMENTS)]
    return F.silu(torch.cat([F.conv1d(p, weight[:, None], groups=len(weight))[0].t() for p in parts]))


def _errors(ours: Callable, plain: Callable, inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Error and limit of the output or gradient that comes closest to its limit."""
    truth = _results(plain, [x.double() for x in inputs])
    found, theirs = _results(ours, inputs), _results(plain, inputs)
    worst = (0.0, FLOOR)
    for mine, own, exact in zip(found, theirs, truth):
        scale = exact.norm().clamp_min(1e-30)
        # PyTorch may hit a single value exactly by chance
        floor = max(FLOOR, torch.finfo(inputs[0].dtype).eps if exact.numel() == 1 else 0.0)
        error = ((mine.double() - exact).norm() / scale).item()
        allowed = max(2 * ((own.double() - exact).norm() / scale).item(), floor)
        if not error / allowed <= worst[0] / worst[1]:
            worst = (error, allowed)
    return worst


def _results(op: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of an op and the gradients of its inputs under a fixed upstream gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.linspace(-1, 1, out.numel() + 1)[1:].to(out).reshape(out.shape) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def _compare_nf4(weight: torch.Tensor, dtype: torch.dtype) -> Comparison:
    name = f"nf4 dequantisation as bitsandbytes, {str(dtype).removeprefix('torch.')}"
    packed, state = bnb.quantize_4bit(
        weight.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    packed.quant_state = state
    found, expected = nf4.dequantize([packed], dtype), bnb.dequantize_4bit(packed, state)
    return Comparison(GROUP, name, (found.float() - expected.float()).abs().max().item(), 0.0, "to the bit")


def _compare_stacks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[Comparison]:
    """Stacks of experts in NF4, beside bitsandbytes' values of each matrix, and in MXFP4, beside the format's table."""
    count, rows, columns = weight.shape
    label = str(dtype).removeprefix("torch.")
    stack = PackedStack.empty((count, rows, columns), 2, True, weight.device)
    expected = []
    for place, matrix in enumerate(weight.view(2 * count, -1, columns)):
        codes, state = bnb.quantize_4bit(
            matrix.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        stack.put(place, codes, state)
        expected.append(bnb.dequantize_4bit(codes, state))
    found = dequantize_stack(stack, dtype).view(2 * count, -1, columns)
    error = (found.float() - torch.stack(expected).float()).abs().max().item()
    yield Comparison(GROUP, f"nf4 stacks as bitsandbytes, {label}", error, 0.0, "to the bit")
    codes = (weight * 1000).int().remainder(256)[..., ::2].to(torch.uint8)
    scales = (weight[..., ::MX_BLOCK] * 5).int().add(125).to(torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=weight.device)
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    powers = torch.exp2(scales.double() - 127).repeat_interleave(MX_BLOCK, -1)
    exact = table[halves & 7] * torch.where(halves > 7, -powers, powers)
    found = dequantize_stack(MXFP4Stack((count, rows, columns), 2, codes, scales), dtype)
    error = (found.double() - exact.to(dtype).double()).abs().max().item()
    yield Comparison(GROUP, f"mxfp4 stacks as the format says, {label}", error, 0.0, "to the bit")


def _compare_adamw(normal: Callable) -> Comparison:
    start = normal(N, D)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    flat, plain = FlatAdamW([ours], bits=32, **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        gradient = normal(N, D)
        for parameter, optimizer in ((ours, flat), (theirs, plain)):
            parameter.grad = gradient.clone()
            optimizer.step()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    return Comparison(GROUP, "adamw, 5 steps, as torch's", error, 1e-6)
