"""Short convolution: a gated depthwise convolution over the last few tokens, as a module and as a core.

    b|c|x = n W_in      h[t] = c[t] sum over j < W of w[W-1-j] b[t-j] x[t-j]      out = h W_out

B rows, S tokens per row, T = B * S, D hidden size, W width of the kernel. The sum stays inside a document.

Source: LFM2 Technical Report, Liquid AI 2025 (arXiv:2511.23404).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.families import Family
from oribi.kernels.causal_conv import (
    causal_conv,
    causal_conv_backward,
    causal_conv_forward,
    window_after,
)
from oribi.kernels.visibility import Visibility
from oribi.models.core import Held, Result
from oribi.models.half import Kept
from oribi.models.linear_layers import project

if TYPE_CHECKING:
    from oribi.models.layers import Batch


@dataclass
class Convolving:
    """b, c and x [T, D], views of what W_in made, and where each token's document starts, [T] int32."""

    b: torch.Tensor
    c: torch.Tensor
    x: torch.Tensor
    doc_start: torch.Tensor


class ShortConv(nn.Module):
    # `models.core.Mixer` says what these are
    attribute, input, output, output_result, row_wise = "conv", "bcx", "conv_out", "x_mid", False
    projections, needs_bounds = ("in_proj", "out_proj"), False
    masks_padding, window = False, None  # it masks what W_in makes, whose bias would pass otherwise
    needs_whole_rows = "a convolution over neighbouring tokens"
    core_by_products = 1.0  # of nothing: `core_flop` is 0
    results = (
        Result("bcx", ("bcx.out", "bcx.lora"), made_by="bcx"),
        Result("bcx_xa", ("bcx.lora",), follows="bcx"),
        Result("x_mid", ("conv_out.out",), made_by="conv_out"),
        Result("conv_out_xa", ("conv_out.lora",), follows="x_mid"),
        Result("conv_out", ("conv_out.out",), made_by="conv_out", before_norm=True),
    )

    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        size, self.width, bias = config.hidden_size, config.conv_L_cache, config.conv_bias
        self.index, self.columns = index, {}
        self.in_proj = nn.Linear(size, 3 * size, bias=bias)
        self.conv = nn.Conv1d(size, size, self.width, groups=size, bias=bias)
        self.out_proj = nn.Linear(size, size, bias=bias)

    def groups(self) -> dict[str, list[nn.Module]]:
        """The linear layer that makes b, c and x, and the one after the convolution."""
        return {"bcx": [self.in_proj], "conv_out": [self.out_proj]}

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution's weight [D, W] and bias [D]."""
        return self.conv.weight[:, 0], self.conv.bias

    def holds(self, length: int) -> dict[str, Held]:
        """b x of the last W - 1 tokens."""
        return {"window": Held((self.conv.out_channels, self.width - 1))}

    def core_flop(self, longest: float) -> float:
        """0: it takes as long as it takes to read its operands, a hundredth of the products around it."""
        return 0.0

    def core_backward_bytes(self, tokens: int, width: int) -> int:
        """0: gradients take the place of what they are made of."""
        return 0

    def autograd_columns(self) -> int:
        """b, c and x."""
        return 3 * self.conv.out_channels

    def forward(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        groups, shape = self.groups(), x.shape
        p = project(groups["bcx"], x)[0].flatten(0, -2)
        if (padding := batch.visibility.padding()) is not None:
            p = p.masked_fill(padding, 0)
        b, c, x = p.chunk(3, dim=1)
        before = self._remember(batch, b, x)
        weight, bias = self.kernel()
        if batch.visibility.past == 0:
            h = causal_conv(x, weight, batch.visibility.doc_start(x.device), bias, before=b, after=c)
        else:
            rows = Visibility(*before.shape[:2])
            y = causal_conv(before.flatten(0, 1), weight, rows.doc_start(x.device), bias).view(before.shape)
            h = y[:, -batch.visibility.length :].flatten(0, 1) * c
        return project(groups["conv_out"], h.view(shape))[0]

    def _remember(self, batch: "Batch", b: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """Writes the inputs b x to the cache; returns them, [B, S + W, D], behind those that it held of tokens before."""
        cache, visibility = batch.cache, batch.visibility
        if cache is None:
            return None
        if hasattr(cache, "leave"):  # of oribi's own loop
            last, start = visibility.documents(x.device)[0][1:].long() - 1, visibility.doc_start(x.device)
            cache.leave(self.index, window=window_after(x, last, start, self.width, b))
            return None
        u = (b * x).unflatten(0, (visibility.batch, visibility.length)).transpose(1, 2)
        return cache.update_conv_state(u, self.index, conv_kernel_size=self.width).transpose(1, 2)

    def prepare(self, p: torch.Tensor, batch: "Batch", fresh: bool) -> Convolving:
        """b, c and x, views of p, which is made zero at padding."""
        if (padding := batch.visibility.padding()) is not None:
            p.masked_fill_(padding, 0)
        return Convolving(*p.chunk(3, dim=1), batch.visibility.doc_start(p.device))

    def run(self, prepared: Convolving, kept: Kept) -> torch.Tensor:
        """h [T, D], which takes as long to read as to make: it is never kept."""
        weight, bias = self.kernel()
        return causal_conv_forward(
            prepared.x, weight, prepared.doc_start, bias, before=prepared.b, after=prepared.c
        )

    def backward(self, prepared: Convolving, dh: torch.Tensor) -> None:
        """Writes the gradient of b|c|x over it; dh is overwritten too."""
        weight, bias = self.kernel()
        b, c, x = prepared.b, prepared.c, prepared.x
        causal_conv_backward(
            dh, x, weight, prepared.doc_start, bias, before=b, after=c, dx=x, dbefore=b, dafter=c
        )
