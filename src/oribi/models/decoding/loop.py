"""Generation by oribi's own loop: prompts into the cache, then one token of every row at a time.

Nothing waits for a GPU from token to token: steps are replayed in blocks, and whether all rows have ended is read a block
later. On a CPU the same steps run as they are, rows that have ended are left out, and the loop ends with the last row.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from oribi.kernels.lora_linear import weights_kept
from oribi.models.decoding.prefill import prefill
from oribi.models.decoding.request import Request
from oribi.models.decoding.state import DecodingState
from oribi.models.decoding.step import DecodingStep

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)

BLOCK = 8  # steps that a GPU is given before it is asked whether all rows have ended


def continue_prompts(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    """The prompts with their continuations, as transformers' loop returns them.

    Args:
        decoder: the model, in inference mode.
        request: what `generate` asks for.

    Returns:
        [B, S + n] int64, n the new tokens of the longest row; behind its end a row has padding.
    """
    with torch.inference_mode():
        new = _in_waves(decoder, request)
        if request.streamer is not None:
            request.streamer.end()
    return torch.cat([request.ids, new], dim=1)


def _in_waves(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    """New tokens [B, n], as many rows at a time as memory holds."""
    rows = len(request.prompts)
    most = decoder.rows_that_fit(request.longest)
    if rows > most:
        # of what is kept, nothing may fit these rows
        decoder.model.sessions.clear()
        most = max(decoder.rows_that_fit(request.longest), 1)
    parts, start = [], 0
    while start < rows:
        part = request.part(start, min(start + most, rows))
        try:
            parts.append(_on_gpu(decoder, part) if request.ids.is_cuda else _on_cpu(decoder, part))
        except torch.OutOfMemoryError:
            decoder.model.sessions.clear()
            torch.cuda.empty_cache()
            most = len(part.prompts) // 2
            if most < 1 or request.streamer is not None or request.criteria:
                raise
            logger.warning("generate: memory is short; %d rows at a time", most)
            continue
        start += len(part.prompts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=request.pad) for part in parts])


def _on_cpu(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    vocab_size = decoder.config.vocab_size if request.choice.penalises else 0
    state = DecodingState(
        decoder.model.layers, len(request.prompts), request.longest, request.new_tokens, vocab_size,
        decoder.model.norm.weight.dtype, request.ids.device,
    )  # fmt: skip
    step = DecodingStep(decoder, state, request.choice, request.end_tokens(), request.pad)
    _begin(decoder, request, state, step)
    prompt = max(map(len, request.prompts))
    return _watched(
        request, state, lambda new: step(request.longest, prompt + new), leaves_out=not request.choice.samples
    )


def _begin(decoder: "DecoderForCausalLM", request: Request, state: DecodingState, step: DecodingStep) -> None:
    """The prompts, and the first new token of each row."""
    if state.seen is not None:
        state.seen[: len(request.prompts)] = request.seen(state.seen.shape[1])
    hidden = prefill(decoder, state, request.prompts)
    step.take(F.pad(hidden, (0, 0, 0, len(state.row) - len(hidden))))


def _on_gpu(decoder: "DecoderForCausalLM", request: Request) -> torch.Tensor:
    rows = len(request.prompts)
    # packed weights are read as they are, or dequantised in a step of many rows: a session keeps no 16-bit copies of them
    with weights_kept(False):
        session = decoder.model.sessions.open(decoder, request)
        state = session.state
        _begin(decoder, request, state, session.step)
    if request.criteria:  # which look at the tokens
        return _watched(request, state, lambda _: session.advance(), leaves_out=False)
    block = 1 if request.streamer is not None else BLOCK
    # what the host reads: the tokens of a step, and whether all rows have ended
    copies = [torch.empty(rows + 1, dtype=torch.int64, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)]

    def ended(index: int) -> bool:
        """Waits for a block's copy, and streams its token."""
        events[index % 2].synchronize()
        *tokens, over = copies[index % 2].tolist()
        if request.streamer is not None:
            request.streamer.put(torch.tensor(tokens))
        return bool(over)

    new, index = 1, 0
    while True:
        copies[index % 2].copy_(
            torch.cat([state.token[:rows], state.finished.all()[None]]), non_blocking=True
        )
        events[index % 2].record()
        # the GPU has this block's work, and is asked about the one before
        if index and ended(index - 1):
            break
        if new >= request.new_tokens:
            ended(index)
            break
        for _ in range(min(block, request.new_tokens - new)):
            session.advance()
            new += 1
        index += 1
    steps = int(state.count[:rows].max()) if request.ends else new
    return state.out[:rows, :steps].clone()


def _watched(
    request: Request, state: DecodingState, step: Callable[[int], None], leaves_out: bool
) -> torch.Tensor:
    """New tokens [B, n] of a loop that looks at every token.

    Args:
        step: called with the number of new tokens that there are.
        leaves_out: whether rows that have ended may leave the state. Draws stay transformers' only where all rows take part.
    """
    rows = _Rows(request, state, leaves_out)
    new = 1
    while not rows.ended(new) and new < request.new_tokens:
        step(new)
        new += 1
    return rows.result()


class _Rows:
    """The rows of a batch as they end.

    Args:
        request: of the batch. state: of its rows. leaves_out: whether rows that have ended leave the state.
    """

    def __init__(self, request: Request, state: DecodingState, leaves_out: bool) -> None:
        self._request, self._state = request, state
        self._leaves_out = leaves_out and request.streamer is None and not request.criteria
        self._rows = list(range(len(request.prompts)))  # of the batch, at each place of the state
        shape = len(request.prompts), request.new_tokens
        self._out = torch.full(shape, request.pad, device=request.ids.device)
        self._new = 0

    def ended(self, new: int) -> bool:
        """Looks at the rows after `new` tokens; True if all have ended."""
        request, state, count = self._request, self._state, len(self._rows)
        self._new = new
        if request.streamer is not None:
            request.streamer.put(state.token[:count].cpu())
        if request.criteria:
            ids = torch.cat([request.ids, state.out[:count, :new]], dim=1)
            for criterion in request.criteria:
                state.finished[:count] |= criterion(ids, None)
        if not (request.ends or request.criteria):
            return False
        finished = state.finished[:count].tolist()
        if all(finished):
            return True
        live = [place for place, over in enumerate(finished) if not over]
        if self._leaves_out and 2 * len(live) <= count:
            self._save()
            state.keep(live)
            self._rows = [self._rows[place] for place in live]
        return False

    def _save(self) -> None:
        self._out[self._rows] = self._state.out[: len(self._rows), : self._out.shape[1]]

    def result(self) -> torch.Tensor:
        """[B, n] int64, the new tokens."""
        self._save()
        return self._out[:, : self._new].clone()


@lru_cache(maxsize=64)
def say_once(reason: str) -> None:
    """Logs why transformers' loop generates, the first time in a process that this is the reason."""
    logger.warning("generate: transformers' own loop, which is slower, because %s", reason)
