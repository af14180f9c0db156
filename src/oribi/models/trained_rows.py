"""Rows that are taken out of a layer's tokens, and the gradients that go back to all of them.

T tokens, D hidden size.
"""

import torch

from oribi.models.linear_layers import RMSNorm


def taken(of_all: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """These rows of [T, ...]; None: all."""
    return of_all if rows is None else of_all.index_select(0, rows)


def put_back(gradient: torch.Tensor, rows: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The gradient [tokens, ...] of what `taken` took rows of; a row that comes more than once must have a gradient of zero."""
    if rows is None:
        return gradient
    return gradient.new_zeros(tokens, *gradient.shape[1:]).index_copy_(0, rows, gradient)


def norm_backward(
    norm: RMSNorm | None, dn: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor | None, dresidual: torch.Tensor,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of x [T, D], which the residual stream and norm(x), whose gradient is dn, share; rstd is 1/rms of x."""
    if norm is None:
        torch.add(dn, dresidual, out=out)
    else:
        norm.backward(dn, x, rstd, dresidual=dresidual, out=out)
