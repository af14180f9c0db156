"""What a generation holds from token to token: keys and values of every layer, and where each row stands.

B rows, K key/value heads, E head_dim, C slots of a layer, V vocabulary, N new tokens. The token at position p of a row lies
in slot p mod C: no slot holds padding, and a layer with a window has no more slots than the window is long.
"""

from collections.abc import Sequence

import psutil
import torch

from oribi.kernels.nf4_linear import new_counters
from oribi.models.layers import DecoderLayer

SLOT_STEP = 256  # slots are a multiple of this many, so that requests of about one length share a state

_SHARE = 0.8  # of the free memory; the rest is for prompts


def slots_for(layer: DecoderLayer, length: int) -> int:
    """Slots of a layer's cache for rows of `length` tokens."""
    window = layer.self_attn.window
    return length if window is None else min(length, window)


def cache_bytes(layers: Sequence[DecoderLayer], rows: int, length: int, itemsize: int) -> int:
    """Bytes of the keys and values of `rows` rows of `length` tokens.

    Args:
        layers: of the decoder. rows, length: of the batch. itemsize: bytes of a number.
    """
    return sum(2 * rows * slots_for(one, length) * one.self_attn.sizes[1] * itemsize for one in layers)


def rows_that_fit(
    layers: Sequence[DecoderLayer], length: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Rows whose cache and logits fit in what is free on a device.

    Args:
        layers: of the decoder. length: tokens of a row. vocab_size: V. dtype, device: of the cache.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    # logits in both dtypes, their probabilities and the random numbers
    row = cache_bytes(layers, 1, length, dtype.itemsize) + vocab_size * (dtype.itemsize + 4 * 4)
    return int(_SHARE * free / row)


class DecodingState:
    """Tensors that one token's step reads and writes in place; their addresses never change.

    Args:
        layers: of the decoder.
        rows: B. length: most tokens of a row, prompt and new ones. new_tokens: N.
        vocab_size: V where it matters which tokens a row has, else 0.
        dtype, device: of keys and values.

    Attributes:
        keys, values: [B, K, C, E] of each layer. row: [B] int64, the first entry of each row, which is its place.
        token: [B] int64, the last token of each row, which is not cached yet.
        length: [B] int64, cached tokens, and so the position of `token`.
        finished: [B] bool. count: [B] int64, new tokens up to the one that ended the row.
        out: [B, N] int64, new tokens. step: [1] int64, how many there are.
        counters: of the kernels, which leave them zero.
        seen: [B, V] bool, the tokens that a row has; None without V.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        rows: int,
        length: int,
        new_tokens: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.dtype, self.counters = dtype, new_counters(device)
        self.slots = [slots_for(layer, length) for layer in layers]
        # zeros: a masked slot is multiplied by 0, which must not meet a nan
        shapes = [(rows, layer.self_attn.sizes[1] // layer.self_attn.head_dim, slots, layer.self_attn.head_dim)
                  for layer, slots in zip(layers, self.slots)]  # fmt: skip
        self.keys = [zeros(*shape, dtype=dtype) for shape in shapes]
        self.values = [zeros(*shape, dtype=dtype) for shape in shapes]
        self.row = torch.arange(rows, device=device)
        self.token, self.length, self.count = zeros(rows), zeros(rows), zeros(rows)
        self.finished = zeros(rows, dtype=torch.bool)
        self.out, self.step = zeros(rows, new_tokens), zeros(1)
        self.seen = zeros(rows, vocab_size, dtype=torch.bool) if vocab_size else None

    def reset(self, rows: int = 0) -> None:
        """Nothing is cached; the first `rows` rows are to be continued, and the others have ended."""
        for tensor in (self.token, self.length, self.count, self.out, self.step):
            tensor.zero_()
        self.finished.fill_(True)
        self.finished[:rows] = False
        if self.seen is not None:
            self.seen.zero_()

    @property
    def by_row(self) -> list[torch.Tensor]:
        """All tensors with an entry per row, which move when a row moves."""
        seen = [] if self.seen is None else [self.seen]
        return [*self.keys, *self.values, self.token, self.length, self.count, self.finished, self.out, *seen]

    def take(self, token: torch.Tensor, ends: torch.Tensor | None, pad: int) -> None:
        """Appends a token to every row.

        Args:
            token: [B] int64. ends: [E] int64, tokens that end a row; None if none does. pad: what an ended row gets.
        """
        if ends is not None:
            token = token.masked_fill(self.finished, pad)
        self.token.copy_(token)
        self.out.index_copy_(1, self.step, token[:, None])
        self.step += 1
        self.count += ~self.finished
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        if ends is not None:
            self.finished |= (token[:, None] == ends).any(1)  # `isin` waits for many ends

    def keep(self, rows: list[int]) -> None:
        """Makes these rows, in ascending order, the first ones, and all that there are from now on."""
        index = torch.tensor(rows, device=self.token.device)
        moved = [tensor.index_select(0, index) for tensor in self.by_row]
        self.row = self.row[: len(rows)]
        n = len(self.keys)
        self.keys, self.values = moved[:n], moved[n : 2 * n]
        self.token, self.length, self.count, self.finished, self.out = moved[2 * n : 2 * n + 5]
        if self.seen is not None:
            self.seen = moved[-1]
