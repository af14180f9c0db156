"""float64 truths of the ops, PyTorch's own form of each in any dtype, and how errors are measured.

The rule for every kernel: its error against the float64 truth of the same inputs is at most twice PyTorch's own error
in that dtype.
"""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import dispatch, nf4
from tests.pairs import pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = dispatch.INTERPRETED or DEVICE == "cuda"
# bfloat16 arithmetic is silently wrong in Triton's interpreter
DTYPES = [torch.float32, torch.float16] + ([] if dispatch.INTERPRETED else [torch.bfloat16])

# the interpreter takes seconds for what a GPU does in microseconds: it has every pair of values, a GPU every product
cases = functools.partial(pairs, whole=not dispatch.INTERPRETED)

needs_kernels = pytest.mark.skipif(
    not ON_TRITON, reason="needs a CUDA device (or TRITON_INTERPRET=1, which test_interpreted.py sets)"
)


HAS_E4M3 = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
needs_e4m3 = pytest.mark.skipif(
    not HAS_E4M3, reason="needs an NVIDIA GPU of compute capability 8.9 or higher"
)


def nf4_packed(dense: torch.Tensor, **settings: object) -> torch.Tensor:
    """A dense weight [N, K] packed as the kernels read it; settings as `nf4.quantize`."""
    codes, state = nf4.quantize(dense, **settings)
    codes.quant_state = state
    return codes


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """L2 norm of x - truth over that of truth, in float64."""
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def outputs_and_gradients(
    op: Callable, inputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The op's outputs and the gradient of every input that requires one."""
    out = op(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in inputs if x.requires_grad]
    return [*out, *torch.autograd.grad(out, wanted, [g.to(o.dtype) for g, o in zip(upstream, out)])]


def assert_twice_as_good(
    op: Callable, plain: Callable, inputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor]
) -> None:
    """Every output and gradient of op errs at most twice as much as `plain` does in the inputs' dtype.

    Args:
        op, plain: the op under test and PyTorch's own form of it, on the same inputs.
        inputs: floating inputs are differentiated.
        upstream: gradient of each output.
    """
    inputs = [x.detach().requires_grad_(x.is_floating_point() and x.requires_grad) for x in inputs]
    exact = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
    ]
    truth = outputs_and_gradients(plain, exact, upstream)
    ours = outputs_and_gradients(op, inputs, upstream)
    theirs = outputs_and_gradients(plain, inputs, upstream)
    for index, (x, y, t) in enumerate(zip(ours, theirs, truth)):
        assert torch.isfinite(x).all(), f"result {index} is not finite"
        # the GPU's fast exp and division are good to a few 1e-7, and PyTorch's few values may be exact by luck
        floor = max(2e-6, torch.finfo(inputs[0].dtype).eps if x.numel() < 16 else 0.0)
        error, allowed = relative_error(x, t), max(2 * relative_error(y, t), floor)
        assert error <= allowed, f"result {index}: error {error:.2e}, PyTorch's own allows {allowed:.2e}"


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """As transformers' eager layers write it."""
    wide = x if x.dtype is torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed * (weight + offset)


def plain_layer_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As Cohere's eager layers write it: no bias, one rounding."""
    wide = x if x.dtype is torch.float64 else x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else weight.to(wide.dtype) * normed).to(x.dtype)


def plain_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """As transformers' eager layers write it, cos and sin in q's dtype."""
    cos, sin = (torch.cat([x, x], -1)[:, None].to(q.dtype) for x in (cos, sin))
    dims = cos.shape[-1]

    def one(x):
        turning, rest = x[..., :dims], x[..., dims:]
        a, b = turning.chunk(2, -1)
        return torch.cat([turning * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    return one(q), one(k)


def plain_gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up by PyTorch's own activations."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "swiglu_clamped":  # as transformers' GptOssExperts writes it
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def plain_loss(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    divisor: int = 1,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Whole logits in the inputs' dtype, then float32 cross-entropy."""
    logits = F.linear(rows, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum") / divisor


def poisoned(*shape: int, dtype: torch.dtype, width: int | None = None) -> torch.Tensor:
    """A buffer full of NaN, so that whatever an op leaves unwritten is seen; as a view of a wider buffer if asked."""
    full = torch.full((*shape[:-1], width or shape[-1]), float("nan"), dtype=dtype, device=DEVICE)
    return full[..., : shape[-1]]
