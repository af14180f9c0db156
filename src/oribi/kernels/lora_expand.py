"""The LoRA term added to what a product gave: out = residual + product + xa (sB)^T, in one pass over the result.

T tokens, N out features, P LoRA columns. The sum is formed in float32 and rounded once, so that an adapter's small term is
not rounded away beside a large residual.
"""

import torch

from oribi.kernels.dispatch import jit, launch, tl, use_triton, wide


def expand(
    xa: torch.Tensor,
    scaled_b: torch.Tensor,
    residual: torch.Tensor | None,
    product: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + product + xa @ scaled_b^T in one pass over the result.

    Args:
        xa: [T, P].
        scaled_b: [N, P], strided in any way.
        residual, product: [T, N] or None for zero, rows may be strided.
        out: [T, N] for the result, rows may be strided; may be residual or product.

    Returns:
        [T, N] in xa's dtype.
    """
    if residual is None:
        residual, product = product, None
    if not use_triton(xa):
        sum_ = wide(xa) @ wide(scaled_b).t()
        for one in (residual, product):
            sum_ = sum_ if one is None else sum_.add_(one)
        return sum_.to(xa.dtype) if out is None else out.copy_(sum_)
    tokens, n = xa.shape[0], scaled_b.shape[0]
    if out is None:
        out = xa.new_empty(tokens, n)
    first, second = (out if one is None else one for one in (residual, product))
    columns = -(-n // 128)
    launch(
        _expand_kernel, columns * -(-tokens // 64), out, xa, scaled_b, first, second, tokens, n, columns,
        out.stride(0), xa.stride(0), *scaled_b.stride(), first.stride(0), second.stride(0),
        xa.shape[1], residual is not None, product is not None, 64, 128, 16 if xa.shape[1] % 64 else 64, num_warps=4,
    )  # fmt: skip
    return out


@jit
def _expand_kernel(
    out, xa, b, first, second, tokens, n, columns, out_stride, low_stride, b_stride_n, b_stride_p, first_stride,
    second_stride, P: tl.constexpr, ADD_FIRST: tl.constexpr, ADD_SECOND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    t_in, c_in = t < tokens, c < n
    sum_ = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in tl.static_range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        s = tl.load(xa + t[:, None].to(tl.int64) * low_stride + p[None, :], mask=t_in[:, None], other=0.0)
        at = b + c[None, :].to(tl.int64) * b_stride_n + p[:, None].to(tl.int64) * b_stride_p
        w = tl.load(at, mask=c_in[None, :], other=0.0)
        sum_ = tl.dot(s, w, sum_, input_precision="ieee")
    inside = t_in[:, None] & c_in[None, :]
    if ADD_FIRST:
        at = first + t[:, None].to(tl.int64) * first_stride + c[None, :]
        sum_ += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD_SECOND:
        at = second + t[:, None].to(tl.int64) * second_stride + c[None, :]
        sum_ += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + t[:, None].to(tl.int64) * out_stride + c[None, :]
    tl.store(at, sum_.to(out.dtype.element_ty), mask=inside)
