"""Generation by oribi's own loop: prompts into the cache, then one token of every row at a time.

Nothing waits for a GPU from token to token: steps are replayed in blocks, and whether all rows have ended is read a block
later. On a CPU the same steps run as they are, rows that have ended are left out, and the loop ends with the last row.
"""

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from oribi.models.decoding.prefill import prefill
from oribi.models.decoding.request import Request
from oribi.models.decoding.state import DecodingState
from oribi.models.decoding.step import DecodingStep

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)


def continue_prompts(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    """The prompts with their continuations, as transformers' loop returns them.

    Args:
        decoder: the model, in inference mode.
        request: what `generate` asks for.

    Returns:
        [B, S + n] int64, n the new tokens of the longest row; behind its end a row has padding.
    """
    with torch.inference_mode():
        new = _run(decoder, request)
        if request.streamer is not None:
            request.streamer.end()
    return torch.cat([request.ids, new.to(request.ids.device)], dim=1)


def _run(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    device, dtype = request.ids.device, decoder.model.norm.weight.dtype
    vocab_size = decoder.config.vocab_size if request.choice.penalises else 0
    rows = len(request.prompts)
    state = DecodingState(
        decoder.model.layers, rows, request.longest, request.new_tokens, vocab_size, dtype, device
    )
    if state.seen is not None:
        state.seen.copy_(request.seen(vocab_size))
    ends = torch.tensor(request.ends, device=device) if request.ends else None
    step = DecodingStep(decoder, state, request.choice, ends, request.pad)
    step.take(prefill(decoder, state, request.prompts))
    done, prompt = _Rows(request, state), max(map(len, request.prompts))
    for new in range(1, request.new_tokens):
        if done.check(new):
            break
        step(request.longest, prompt + new)
    else:
        done.check(request.new_tokens)
    return done.result()


class _Rows:
    """The rows of a batch as they end: those that have ended are left out of the steps.

    Args:
        request: of the batch. state: of its rows.
    """

    def __init__(self, request: Request, state: DecodingState) -> None:
        self._request, self._state = request, state
        self._rows = list(range(len(request.prompts)))  # of the batch, at each place of the state
        self._out = torch.full_like(state.out, request.pad)
        self._new = 0

    def check(self, new: int) -> bool:
        """Looks at the rows after `new` tokens; True if all have ended."""
        request, state = self._request, self._state
        self._new = new
        if request.streamer is not None:
            request.streamer.put(state.token.cpu())
        if request.criteria:
            ids = torch.cat([request.ids, state.out[:, :new]], dim=1)
            for criterion in request.criteria:
                state.finished |= criterion(ids, None)
        if not (request.ends or request.criteria):
            return False
        ended = state.finished.tolist()
        if all(ended):
            return True
        live = [place for place, end in enumerate(ended) if not end]
        moves = request.streamer is None and not request.criteria and 2 * len(live) <= len(ended)
        if moves:
            self._save()
            state.keep(live)
            self._rows = [self._rows[place] for place in live]
        return False

    def _save(self) -> None:
        self._out[self._rows] = self._state.out

    def result(self) -> torch.Tensor:
        """[B, n] int64, the new tokens."""
        self._save()
        return self._out[:, : self._new].clone()


@lru_cache(maxsize=64)
def say_once(reason: str) -> None:
    """Logs why transformers' loop generates, the first time in a process that this is the reason."""
    logger.warning("generate: transformers' own loop, which is slower, because %s", reason)
