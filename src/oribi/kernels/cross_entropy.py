"""Cross-entropy from hidden states and the head, without ever holding the logits.

    z = cap tanh(l / cap), l = logit_scale (x W^T + b)  (z = l without a cap)
    loss = sum over labelled rows of (logsumexp(z) - z[target]) / divisor

T rows, V vocabulary, D hidden size. The gradient is formed in the forward pass, a chunk of rows at a time, in place of
the chunk's logits: (softmax(z) - onehot) (1 - (z / cap)^2), then dx = that times W. The factor logit_scale / divisor
and the loss's own gradient come last, in float32, so that float16 gradients do not vanish. Rows labelled -100 cost
nothing, except in a CUDA graph, whose shapes may not depend on the labels.

Source: gradient in the forward as in Liger (arXiv:2410.10989).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from oribi.errors import DataError
from oribi.kernels.dispatch import jit, launch, next_power_of_2, tl, use_triton, wide

IGNORED = -100
CHUNK_ROWS = 1024
# a chunk's logits: 1024 rows of Llama's or Qwen's vocabulary in 16 bit, fewer rows of Gemma's
CHUNK_BYTES = 320 * 2**20


def linear_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    divisor: torch.Tensor | int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    labelled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the head's logits, differentiable in rows, weight and bias.

    Args:
        rows: [T, D] hidden states in 16 or 32 bit, or [n, D], those of `labelled` alone.
        weight: [V, D] head; cast to rows' dtype if it differs.
        targets: [T] int64 in [0, V), or -100 where nothing is trained on.
        bias: [V] or None.
        divisor: what the summed loss is divided by; a tensor is never read by the host. None: the labelled rows.
        softcap: logits become softcap * tanh(logits / softcap).
        logit_scale: factor on the logits, before the cap.
        labelled: what `labelled_rows` gave for these targets, for callers who asked before the forward pass.

    Returns:
        Loss, scalar float32.

    Raises:
        DataError: a target is outside the vocabulary (inside a CUDA graph the loss becomes NaN instead).
    """
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return _LinearCrossEntropy.apply(
        rows, weight, bias, targets, divisor, softcap, logit_scale, labelled, torch.is_grad_enabled()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, targets, divisor, softcap, logit_scale, labelled, grad_enabled):
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        result = linear_cross_entropy_forward(
            rows, weight, targets, bias=bias, divisor=divisor, softcap=softcap, logit_scale=logit_scale,
            labelled=labelled, rows_grad=needs[0], weight_grad=needs[1], bias_grad=needs[2],
        )  # fmt: skip
        ctx.save_for_backward(result.drows, result.dweight, result.dbias, result.factor)
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        *gradients, factor = ctx.saved_tensors
        scaled = (
            None if g is None else scale_gradient(g, dloss * factor, dtype)
            for g, dtype in zip(gradients, ctx.dtypes)
        )
        return (*scaled, None, None, None, None, None, None)


class LossAndGradients(NamedTuple):
    """What `linear_cross_entropy_forward` returns; each gradient is still to be multiplied by dloss * factor.

    loss scalar float32; drows [T, D] in rows' dtype; dweight [V, D], dbias [V] float32; factor scalar float32.
    """

    loss: torch.Tensor
    drows: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    factor: torch.Tensor


@torch.no_grad()
def linear_cross_entropy_forward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    divisor: torch.Tensor | int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    labelled: torch.Tensor | None = None,
    every_row: bool = False,
    rows_grad: bool = True,
    weight_grad: bool = False,
    bias_grad: bool = False,
) -> LossAndGradients:
    """Loss and unscaled gradients.

    Args:
        every_row: run all rows, whatever their labels, without asking the GPU; so it is inside a CUDA graph.
        rows_grad, weight_grad, bias_grad: which gradients to form.
        The others are those of `linear_cross_entropy`.
    """
    vocab_size = weight.shape[0]
    weight = weight.to(rows.dtype)
    if labelled is None and not every_row:
        labelled = labelled_rows(targets, vocab_size)
    everything = labelled is None or len(labelled) == len(rows)
    if everything and len(targets) > len(rows):
        targets = targets[labelled]
    count = len(rows) if everything else len(labelled)
    accumulator = wide(rows[:0]).dtype
    losses = torch.empty(count, dtype=accumulator, device=rows.device)
    drows = dweight = dbias = None
    if rows_grad:
        drows = torch.empty_like(rows) if everything else torch.zeros_like(rows)
    if weight_grad:
        dweight = torch.zeros_like(weight, dtype=accumulator)
    if bias_grad:
        dbias = torch.zeros_like(bias, dtype=accumulator)
    gradient = rows_grad or weight_grad or bias_grad
    size, columns = logits_shape(count, vocab_size, rows.element_size())
    buffer = torch.empty(min(size, count), columns, dtype=rows.dtype, device=rows.device)
    # oneDNN's bfloat16 product reads one column too many of an odd number: which must not be NaN
    buffer[:, vocab_size:] = 0
    buffer = buffer[:, :vocab_size]
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        x, y = (rows[part], targets[part]) if everything else (rows[labelled[part]], targets[labelled[part]])
        logits = buffer[: len(x)]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias.to(rows.dtype), x, weight.t(), out=logits)
        _loss_and_gradient(logits, y, losses[part], softcap, logit_scale, gradient)
        if rows_grad and everything:
            torch.mm(logits, weight, out=drows[part])
        elif rows_grad:
            drows.index_copy_(0, labelled[part], logits.mm(weight))
        if weight_grad:
            dweight += logits.t().mm(x)
        if bias_grad:
            dbias += logits.sum(0, dtype=accumulator)
    divisor = _divisor_tensor(divisor, targets, losses, count, labelled is None)
    return LossAndGradients(losses.sum() / divisor, drows, dweight, dbias, logit_scale / divisor)


def labelled_rows(targets: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Indices of the rows that are trained on, [labelled] int64; None inside a CUDA graph, where all rows are run.

    The one host synchronisation of the loss: a caller who asks before the forward pass finds the GPU idle.

    Raises:
        DataError: a target is neither -100 nor in [0, vocab_size).
    """
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    labelled = (targets != IGNORED).nonzero().view(-1)
    chosen = targets[labelled]
    outside = ((chosen < 0) | (chosen >= vocab_size)).nonzero().view(-1)
    if len(outside):
        raise DataError(
            f"label {int(chosen[outside[0]])} at position {int(labelled[outside[0]])} is outside the vocabulary: "
            f"labels must be -100 or from 0 to {vocab_size - 1}"
        )
    return labelled


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, S] as targets of the positions before them; the last position of a row has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor (a float32 scalar tensor) in dtype, multiplied in float32.

    PyTorch's own product of a 16-bit tensor and a scalar tensor would round the factor to 16 bit first.
    """
    if not use_triton(gradient) or not gradient.is_contiguous():
        return (wide(gradient) * factor).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    launch(_scale_kernel, -(-out.numel() // 1024), gradient, factor, out, out.numel(), 1024, num_warps=4)
    return out


def _loss_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    gradient: bool,
) -> None:
    """Write each row's loss; overwrite logits with their gradient (before logit_scale) if asked."""
    if not use_triton(logits):
        _reference(logits, targets, losses, softcap, logit_scale, gradient)
        return
    vocab_size = logits.shape[1]
    lanes = min(next_power_of_2(-(-vocab_size // 8)), 2048)
    launch(
        _kernel, len(logits), logits, targets, losses, logits.stride(0), vocab_size, float(logit_scale),
        0.0 if softcap is None else float(softcap), lanes, softcap is not None, gradient,
        num_warps=min(max(lanes // 64, 1), 32),
    )  # fmt: skip


def _reference(logits, targets, losses, softcap, logit_scale, gradient):
    z = wide(logits) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    total = z.logsumexp(-1)
    ignored = targets == IGNORED
    index = targets.masked_fill(ignored, 0)[:, None]
    losses.copy_((total - z.gather(1, index)[:, 0]).masked_fill(ignored, 0.0))
    if gradient:
        d = torch.exp(z - total[:, None])
        d.scatter_add_(1, index, d.new_full(index.shape, -1.0))
        if softcap is not None:
            d *= 1 - (z / softcap).square()
        logits.copy_(d.masked_fill(ignored[:, None], 0.0))


# A row's logits are read twice, and 32 warps per program leave one row to a multiprocessor: the rows in flight on an
# H100 (132 rows of 256 KB) then stay in its L2 cache between the two readings.
@jit(do_not_specialize=["vocab_size"])
def _kernel(
    logits_ptr, target_ptr, loss_ptr, row_stride, vocab_size, logit_scale, softcap,
    LANES: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * row_stride
    # rows are padded to whole vectors of 8, so a lane may touch its vector if it touches one logit
    lane = tl.arange(0, LANES)
    col = lane[:, None] * 8 + tl.arange(0, 8)[None, :]
    if target == -100:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            nothing = tl.zeros([LANES, 8], dtype=logits_ptr.dtype.element_ty)
            for start in range(0, vocab_size, LANES * 8):
                tl.store(logits_ptr + start + col, nothing, mask=(start + lane * 8 < vocab_size)[:, None])
    else:
        known = (target >= 0) & (target < vocab_size)
        chosen = tl.load(logits_ptr + tl.where(known, target, 0)).to(tl.float32) * logit_scale
        if SOFTCAP:
            chosen = softcap * _tanh(chosen / softcap)
        # each lane has its own running maximum and sum: no barrier inside the loop
        top = tl.full([LANES], -1e38, dtype=tl.float32)
        total = tl.zeros([LANES], dtype=tl.float32)
        for start in range(0, vocab_size, LANES * 8):
            inside = (start + lane * 8 < vocab_size)[:, None]
            z = tl.load(logits_ptr + start + col, mask=inside, other=0.0).to(tl.float32) * logit_scale
            if SOFTCAP:
                z = softcap * _tanh(z / softcap)
            z = tl.where(start + col < vocab_size, z, -float("inf"))
            higher = tl.maximum(top, tl.max(z, axis=1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
            top = higher
        peak = tl.max(top, axis=0)
        log_sum = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
        tl.store(loss_ptr + row, tl.where(known, log_sum - chosen, float("nan")))
        if GRADIENT:
            for start in range(0, vocab_size, LANES * 8):
                inside = (start + lane * 8 < vocab_size)[:, None]
                z = tl.load(logits_ptr + start + col, mask=inside, other=0.0).to(tl.float32) * logit_scale
                slope = 1.0
                if SOFTCAP:
                    t = _tanh(z / softcap)
                    z = softcap * t
                    slope = 1.0 - t * t
                p = tl.where(start + col < vocab_size, tl.exp(z - log_sum), 0.0)
                d = tl.where(start + col == target, p - 1.0, p) * slope
                tl.store(logits_ptr + start + col, d.to(logits_ptr.dtype.element_ty), mask=inside)


@jit
def _tanh(x):
    # the device library's tanh does not run in Triton's interpreter
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < count)


def logits_shape(count: int, vocab_size: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of the buffer that holds a chunk of logits.

    Args:
        count: rows that are trained on. vocab_size: V. element_size: bytes of a logit.
    """
    most = max(min(CHUNK_ROWS, CHUNK_BYTES // (vocab_size * element_size)) // 128, 1) * 128
    # as few chunks as the limit allows, equal, in multiples of a matrix tile's 128 rows
    chunks = max(-(-count // most), 1)
    rows = -(-max(count, 1) // (chunks * 128)) * 128
    # rows start on a multiple of 64 elements: vector loads and tensor cores need aligned rows at any vocabulary size
    return rows, -(-vocab_size // 64) * 64


def _divisor_tensor(divisor, targets, losses, count, every_row) -> torch.Tensor:
    if divisor is None and every_row:
        divisor = (targets != IGNORED).sum().clamp_min(1)
    elif divisor is None:
        divisor = max(count, 1)
    if isinstance(divisor, torch.Tensor):
        return divisor.to(device=losses.device, dtype=losses.dtype, non_blocking=True)
    return torch.full((), float(divisor), dtype=losses.dtype, device=losses.device)
