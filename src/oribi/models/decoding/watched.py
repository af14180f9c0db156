"""The loop where the host looks at every token: on a CPU, and for processors, criteria and outputs that want to see them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from oribi.models.decoding.request import Request
from oribi.models.decoding.state import DecodingState
from oribi.models.decoding.step import DecodingStep


def watched(
    request: Request,
    state: DecodingState,
    step: DecodingStep,
    advance: Callable[[int], None],
    leaves_out: bool,
) -> torch.Tensor:
    """New tokens [B, n].

    Args:
        request: of the rows. state: after the prompts. step: of the state.
        advance: takes the step; called with the number of new tokens that there are.
        leaves_out: whether rows that have ended may leave the state. Draws stay transformers' only where all rows take part.
    """
    rows = _Rows(request, state, leaves_out)
    new = 0
    while True:
        if request.choice.by_host:
            _choose(request, state, step, new)
        new += 1
        if rows.ended(new) or new >= request.new_tokens:
            return rows.result()
        advance(new)


def _choose(request: Request, state: DecodingState, step: DecodingStep, new: int) -> None:
    """Takes the next tokens as transformers' loop does, from the logits that the step has left."""
    count, outputs = len(request.prompts), request.outputs
    ids = all_ids(request, state, new)
    with torch.inference_mode(False), torch.no_grad():  # others may keep what they are given
        logits = step.logits[:count].clone()
        if outputs is not None and outputs.logits is not None:
            outputs.logits.append(logits.clone())
        scores = logits
        for processor in request.choice.processors:
            scores = processor(ids, scores)
        if outputs is not None and outputs.scores is not None:
            outputs.scores.append(scores)
    if request.choice.samples:
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
    else:
        token = scores.argmax(-1)
    state.take(F.pad(token, (0, len(state.row) - count)), step.ends, step.pad)


def all_ids(request: Request, state: DecodingState, new: int) -> torch.Tensor:
    """[B, S + new] int64: prompts as they were given, and new tokens; no inference tensor."""
    found = torch.cat([request.ids, state.out[: len(request.prompts), :new]], dim=1)
    with torch.inference_mode(False):
        return found.clone()


class _Rows:
    """The rows of a batch as they end.

    Args:
        request: of the batch. state: of its rows. leaves_out: whether rows that have ended leave the state.
    """

    def __init__(self, request: Request, state: DecodingState, leaves_out: bool) -> None:
        self._request, self._state = request, state
        self._leaves_out = leaves_out
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
            ids, scores = all_ids(request, state, new), request.scores
            for criterion in request.criteria:
                state.finished[:count] |= criterion(ids, scores)
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
