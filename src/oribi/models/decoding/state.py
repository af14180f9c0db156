"""What a generation holds from token to token: what every layer's mixer holds, and where each row stands.

B rows, C slots of a layer, V vocabulary, N new tokens. Of mixers that hold each token, attention for one, the token at
position p of a row lies in slot p mod C: no slot holds padding, and a layer with a window has no more slots than the window
is long.
"""

from collections.abc import Sequence
from itertools import islice

import psutil
import torch

from oribi.kernels.nf4_linear import new_counters
from oribi.models.layers import DecoderLayer

SLOT_STEP = 256  # slots are a multiple of this many, so that requests of about one length share a state

_SHARE = 0.8  # of the free memory; the rest is for prompts


def cache_bytes(layers: Sequence[DecoderLayer], rows: int, length: int, itemsize: int) -> int:
    """Bytes of what the mixers hold of `rows` rows of `length` tokens.

    Args:
        layers: of the decoder. rows, length: of the batch. itemsize: bytes of a number.
    """
    return rows * sum(held.bytes(itemsize) for one in layers for held in one.mixer.holds(length).values())


def row_bytes(layers: Sequence[DecoderLayer], length: int, vocab_size: int, itemsize: int) -> int:
    """Bytes of a row of `length` tokens: what the mixers hold, and while a token is chosen.

    Args:
        layers: of the decoder. length: tokens. vocab_size: V. itemsize: bytes of a number.
    """
    # logits in both dtypes, their probabilities and the random numbers
    return cache_bytes(layers, 1, length, itemsize) + vocab_size * (itemsize + 4 * 4)


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
    return int(_SHARE * free / row_bytes(layers, length, vocab_size, dtype.itemsize))


class DecodingState:
    """Tensors that one token's step reads and writes in place; their addresses never change.

    Args:
        layers: of the decoder.
        rows: B. length: most tokens of a row, prompt and new ones. new_tokens: N.
        vocab_size: V where it matters which tokens a row has, else 0.
        dtype, device: of the model.

    Attributes:
        held: of each layer, what its mixer holds by name, [B, ...]. slots: C of each layer; 0 where there are none.
        row: [B] int64, the first entry of each row, which is its place.
        token: [B] int64, the last token of each row, which is not cached yet.
        length: [B] int64, cached tokens, and so the position of `token`.
        finished: [B] bool. count: [B] int64, new tokens up to the one that ended the row.
        out: [B, N] int64, new tokens. step: [1] int64, how many there are.
        counters: of the kernels, which leave them zero.
        seen: [B, V] bool, the tokens that a row has; None without V.
        per_layer: inputs of each layer [B, N] of the token of this step, where layers have any.
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
        self._held = [layer.mixer.holds(length) for layer in layers]
        self.slots = [
            next((one.shape[one.slots] for one in of_layer.values() if one.slots is not None), 0)
            for of_layer in self._held
        ]
        # zeros: a masked slot is multiplied by 0, which must not meet a nan
        self.held = [
            {name: zeros(rows, *one.shape, dtype=one.dtype or dtype) for name, one in of_layer.items()}
            for of_layer in self._held
        ]
        self.per_layer: tuple[torch.Tensor, ...] = ()
        self.row = torch.arange(rows, device=device)
        self.token, self.length, self.count = zeros(rows), zeros(rows), zeros(rows)
        self.finished = zeros(rows, dtype=torch.bool)
        self.out, self.step = zeros(rows, new_tokens), zeros(1)
        self.seen = zeros(rows, vocab_size, dtype=torch.bool) if vocab_size else None

    def reset(self, rows: int = 0) -> None:
        """Nothing is cached; the first `rows` rows are to be continued, and the others have ended."""
        for tensor in (self.token, self.length, self.count, self.out, self.step):
            tensor.zero_()
        for tensors, of_layer in zip(self.held, self._held):
            for name, tensor in tensors.items():
                if of_layer[name].slots is None:
                    tensor.zero_()
        self.finished.fill_(True)
        self.finished[:rows] = False
        if self.seen is not None:
            self.seen.zero_()

    @property
    def by_row(self) -> list[torch.Tensor]:
        """All tensors with an entry per row, which move when a row moves."""
        held = [tensor for of_layer in self.held for tensor in of_layer.values()]
        seen = [] if self.seen is None else [self.seen]
        return [self.token, self.length, self.count, self.finished, self.out, *held, *seen]

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
        moved = iter([tensor.index_select(0, index) for tensor in self.by_row])
        self.row = self.row[: len(rows)]
        self.token, self.length, self.count, self.finished, self.out = islice(moved, 5)
        self.held = [{name: next(moved) for name in of_layer} for of_layer in self.held]
        if self.seen is not None:
            self.seen = next(moved)
