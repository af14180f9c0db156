"""The prompts of a batch through the decoder: packs without padding, equal prompts once, keys and values into the cache.

On a CPU what all prompts begin with, instructions or examples, is read once as well. T tokens of a pack, P of that beginning,
K key/value heads, E head_dim, C slots of a layer.
"""

import math
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from oribi.models.decoding.state import DecodingState
from oribi.models.mixers.attention import Attention

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

PACK_TOKENS = 8192  # of one forward; a longer prompt is alone in its own
SHARED_TOKENS = 32  # from so many on, what all prompts begin with is read once
MOST_PADDED = 1.3  # the longest ending of a forward is at most so many times as long as the shortest, so that few tokens pad


class PromptCache:
    """Writes what mixers hold of a pack to the places of the rows that begin with its prompts.

    Args:
        state: of the rows.
        prompts: the prompts of the pack, in order. rows: the rows that begin with each.
    """

    def __init__(self, state: DecodingState, prompts: list[tuple[int, ...]], rows: list[list[int]]) -> None:
        self._state, self._prompts, self._rows = state, prompts, rows
        self._places: dict[int, tuple[torch.Tensor, ...]] = {}
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_seq_length(self) -> int:
        """0: every pack begins at the beginning."""
        return 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [1, K, T, E] of a layer, and returns them: the prompts see nothing else."""
        state = self._state
        source, row, slot = self._of(state.slots[index])
        for cache, new in zip(state.held[index].values(), (keys, values)):
            cache[row, :, slot] = new[0].transpose(0, 1).index_select(0, source)
        return keys, values

    def leave(self, index: int, **held: torch.Tensor) -> None:
        """Writes what a mixer holds after the prompts, [prompts of the pack, ...] by its name in `Mixer.holds`."""
        if self._ends is None:
            device = self._state.token.device
            counts = torch.tensor([len(rows) for rows in self._rows])
            prompt = torch.arange(len(counts)).repeat_interleave(counts)
            rows = torch.tensor([row for rows in self._rows for row in rows])
            self._ends = prompt.to(device), rows.to(device)
        prompt, rows = self._ends
        for name, values in held.items():
            tensor = self._state.held[index][name]
            tensor[rows] = values.index_select(0, prompt).to(tensor.dtype)

    def _of(self, slots: int) -> tuple[torch.Tensor, ...]:
        """Tokens of the pack, and the row and slot of each."""
        if slots not in self._places:
            found, start = [], 0
            for prompt, rows in zip(self._prompts, self._rows):
                length = len(prompt)
                positions = torch.arange(max(length - slots, 0), length)
                found += [
                    torch.stack([start + positions, torch.full_like(positions, row), positions % slots])
                    for row in rows
                ]
                start += length
            device = self._state.token.device
            self._places[slots] = tuple(torch.cat(found, dim=1).to(device))
        return self._places[slots]


class EndingCache:
    """Writes keys and values of prompts' endings to the places of their rows, where those of their beginning are already.

    Args:
        state: of the rows. beginning: P.
        lengths: of the endings, each one row of the forward. rows: the rows that begin with each prompt.
    """

    def __init__(
        self, state: DecodingState, beginning: int, lengths: list[int], rows: list[list[int]]
    ) -> None:
        self._state, self._beginning = state, beginning
        self._first = torch.tensor([of_prompt[0] for of_prompt in rows])
        places = [
            (ending, place, row)
            for ending, (length, of_prompt) in enumerate(zip(lengths, rows))
            for row in of_prompt
            for place in range(length)
        ]
        self._ending, self._place, self._row = torch.tensor(places).unbind(1)

    def get_seq_length(self) -> int:
        """P."""
        return self._beginning

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [endings, K, S, E] of a layer, and returns them behind those of the beginning."""
        whole = []
        for cache, new in zip(self._state.held[index].values(), (keys, values)):
            cache[self._row, :, self._place + self._beginning] = new[self._ending, :, self._place]
            whole.append(torch.cat([cache[self._first, :, : self._beginning], new], dim=2))
        return whole[0], whole[1]


def prefill(
    decoder: "DecoderForCausalLM", state: DecodingState, prompts: list[tuple[int, ...]]
) -> torch.Tensor:
    """Fills the cache with the prompts.

    Args:
        decoder: the model. state: gets keys, values and lengths of the first rows. prompts: of each of these rows.

    Returns:
        Hidden states [B, D] of each row's last token, after the last norm.
    """
    device = state.token.device
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    beginning = shared_beginning(decoder, list(rows)) if device.type == "cpu" else 0
    read = _read_packs if not beginning else partial(_read_endings, beginning=beginning)
    hidden, order = read(decoder, state, rows)
    count = len(prompts)
    state.length[:count] = torch.tensor([len(prompt) for prompt in prompts], device=device)
    back = torch.tensor(order, device=device).argsort()
    return torch.cat(hidden).index_select(0, back)


def shared_beginning(decoder: "DecoderForCausalLM", prompts: list[tuple[int, ...]]) -> int:
    """P: how many tokens all prompts begin with; 0 where they are too few, or a layer holds something else than every token."""
    shared = len(os.path.commonprefix(prompts)) if len(prompts) > 1 else 0
    shared = min(shared, min(map(len, prompts)) - 1)  # each prompt's last token is read in its row
    if shared < SHARED_TOKENS or any(rotary.needs_length for rotary in decoder.model.rotary.values()):
        return 0
    mixers = [layer.mixer for layer in decoder.model.layers]
    return shared if all(type(mixer) is Attention and mixer.window is None for mixer in mixers) else 0


def _read_packs(
    decoder: "DecoderForCausalLM", state: DecodingState, rows: dict[tuple[int, ...], list[int]]
) -> tuple[list[torch.Tensor], list[int]]:
    """Hidden states of last tokens, and the row of each."""
    device, model = state.token.device, decoder.model
    hidden: list[torch.Tensor] = []
    order: list[int] = []
    for pack in packs(list(rows)):
        bounds = [0]
        for prompt in pack:
            bounds.append(bounds[-1] + len(prompt))
        ids = torch.tensor([token for prompt in pack for token in prompt], device=device)[None]
        positions = torch.cat([torch.arange(len(prompt)) for prompt in pack]).to(device)[None]
        several = len(pack) > 1
        output = model(
            input_ids=ids,
            position_ids=positions if several else None,
            cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32, device=device) if several else None,
            max_length_q=max(map(len, pack)),
            past_key_values=PromptCache(state, pack, [rows[prompt] for prompt in pack]),
            use_cache=True,
            return_dict=True,
        )
        last = [end - 1 for prompt, end in zip(pack, bounds[1:]) for _ in rows[prompt]]
        hidden.append(output.last_hidden_state[0].index_select(0, torch.tensor(last, device=device)))
        order += [row for prompt in pack for row in rows[prompt]]
    return hidden, order


def _read_endings(
    decoder: "DecoderForCausalLM",
    state: DecodingState,
    rows: dict[tuple[int, ...], list[int]],
    beginning: int,
) -> tuple[list[torch.Tensor], list[int]]:
    """The same, of prompts whose first P tokens are equal: these once, then the others as rows padded at their end."""
    prompts = list(rows)
    first = prompts[0][:beginning]
    everywhere = [row for of_prompt in rows.values() for row in of_prompt]
    _read_packs(decoder, state, {first: everywhere})
    hidden: list[torch.Tensor] = []
    order: list[int] = []
    for pack in packs([prompt[beginning:] for prompt in prompts], MOST_PADDED):
        whole = [first + ending for ending in pack]
        lengths, of_pack = [len(ending) for ending in pack], [rows[prompt] for prompt in whole]
        # causal attention does not look at what is behind a token: any token pads
        ids = torch.tensor([ending + (0,) * (max(lengths) - len(ending)) for ending in pack])
        output = decoder.model(
            input_ids=ids,
            past_key_values=EndingCache(state, beginning, lengths, of_pack),
            use_cache=True,
            return_dict=True,
        )
        last = [(ending, lengths[ending] - 1) for ending, found in enumerate(of_pack) for _ in found]
        hidden.append(output.last_hidden_state[tuple(torch.tensor(last).T)])
        order += [row for found in of_pack for row in found]
    return hidden, order


def packs(prompts: list[tuple[int, ...]], most_apart: float = math.inf) -> Iterator[list[tuple[int, ...]]]:
    """The prompts in portions of at most PACK_TOKENS, those of about one length together.

    Args:
        prompts: token ids. most_apart: how many times as long as a portion's shortest prompt its longest may be.
    """
    pack, tokens = [], 0
    for prompt in sorted(prompts, key=len):
        if pack and (tokens + len(prompt) > PACK_TOKENS or len(prompt) > most_apart * len(pack[0])):
            yield pack
            pack, tokens = [], 0
        pack.append(prompt)
        tokens += len(prompt)
    yield pack
