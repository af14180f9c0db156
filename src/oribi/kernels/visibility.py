"""Which tokens of a batch belong together: its documents, its padding, and what is cached before it.

B rows, S queries per row.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from oribi.kernels.context_attention import SharedRow


@dataclass
class Visibility:
    """Which keys each query may see; one object serves all layers of a forward.

    Args:
        batch, length: rows and queries per row.
        past: cached keys before the first query.
        real: [B, past + length] bool, False at padding; None if nothing is padded.
        cu_seqlens: [docs + 1] int32 offsets of packed documents (batch is 1), else None.
        max_length: tokens of the longest document.
        tail: whether the queries are exactly the last of the keys, as in a chunk of a row that processes share; `past` keys of
            the first document then come before them, and no others.
        shared: the row that processes share, of which these tokens are one process's part.
    """

    batch: int
    length: int
    past: int = 0
    real: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_length: int = 0
    tail: bool = False
    shared: "SharedRow | None" = None
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict, repr=False)
    _bounds: list[int] | None = field(default=None, repr=False)
    _slots: torch.Tensor | None = field(default=None, repr=False)
    _starts: torch.Tensor | None = field(default=None, repr=False)
    _rows: "Visibility | None" = field(default=None, repr=False)
    _doc_start: torch.Tensor | None = field(default=None, repr=False)
    _key_starts: torch.Tensor | None = field(default=None, repr=False)

    @property
    def uniform(self) -> bool:
        """Packed documents are all equally long: known on the host, without reading cu_seqlens."""
        return self.cu_seqlens is not None and self.max_length * (len(self.cu_seqlens) - 1) == self.length

    def slots(self) -> torch.Tensor:
        """[S] int64: where each token of a pack lies if its documents are rows of max_length, one below the other."""
        if self._slots is None:
            starts = self.cu_seqlens.long()
            documents = torch.arange(len(starts) - 1, device=starts.device)
            document = documents.repeat_interleave(starts.diff(), output_size=self.length)
            place = torch.arange(self.length, device=starts.device) - starts[document]
            self._slots = document * self.max_length + place
        return self._slots

    def documents(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Offsets [docs + 1] int32 of the documents, each dense row being one, and the length of the longest."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens, self.max_length
        if self._starts is None:
            end = self.batch * self.length
            self._starts = torch.arange(0, end + 1, self.length, dtype=torch.int32, device=device)
        return self._starts, self.length

    def key_documents(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """As `documents`, of the keys: in a tail, the first document has `past` of them before its first query."""
        starts, longest = self.documents(device)
        if not (self.past and self.tail):
            return starts, longest
        if self._key_starts is None:
            self._key_starts = torch.cat([starts[:1], starts[1:] + self.past])
        # the first document may be shorter than the longest one: a bound is enough
        return self._key_starts, longest + self.past

    def doc_start(self, device: torch.device) -> torch.Tensor:
        """[B * S] int32: the first token of each token's document, each dense row being one; in a tail [keys], of each key's."""
        if self._doc_start is None:
            starts, _ = self.key_documents(device)
            tokens = self.batch * self.length + self.past * self.tail
            self._doc_start = starts[:-1].repeat_interleave(starts.diff(), output_size=tokens)
        return self._doc_start

    def padding(self) -> torch.Tensor | None:
        """[B * S, 1] bool, True at queries that are padding; None where nothing is."""
        return None if self.real is None else ~self.real[:, -self.length :].bool().reshape(-1, 1)

    def bounds(self) -> list[int]:
        """Document offsets on the host; synchronises once per forward if they lie on a GPU."""
        if self._bounds is None:
            self._bounds = self.cu_seqlens.tolist()
        return self._bounds

    def mask(self, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[B or 1, 1, S, keys] bool, True where a query may look; keys are the last `keys` slots of the row.

        A static cache hands out more slots than tokens so far; its first slot is position 0.
        """
        if (keys, window) not in self._masks:
            total = self.past + self.length
            first = max(total - keys, 0)
            key = torch.arange(first, first + keys, device=device)
            query = torch.arange(self.past, total, device=device)[:, None]
            seen = key <= query
            if window is not None:
                seen &= query - key < window
            seen = seen[None, None]
            if self.real is not None:
                real = F.pad(self.real.bool(), (0, max(keys - total, 0)))[:, first : first + keys]
                # a padded query sees itself: a row that sees nothing has no softmax
                seen = seen & real[:, None, None, :] | (query == key)
            self._masks[(keys, window)] = seen
        return self._masks[(keys, window)]
