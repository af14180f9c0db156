"""Generation by oribi's own loop: prompts into the cache, then one token of every row at a time.

Nothing waits for a GPU from token to token: steps are replayed in blocks, and whether all rows have ended is read a block
later. On a CPU the same steps run as they are, rows that have ended are left out, and the loop ends with the last row.
"""

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers.generation.utils import GenerateDecoderOnlyOutput

from oribi.kernels.lora_linear import weights_kept
from oribi.models.decoding.prefill import prefill
from oribi.models.decoding.request import Request
from oribi.models.decoding.state import DecodingState
from oribi.models.decoding.step import DecodingStep
from oribi.models.decoding.watched import watched

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)

BLOCK = 8  # steps that a GPU is given before it is asked whether all rows have ended


def continue_prompts(
    decoder: "DecoderForCausalLM", request: Request
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The prompts with their continuations, as transformers' loop returns them.

    Args:
        decoder: the model, in inference mode.
        request: what `generate` asks for.

    Returns:
        [B, S + n] int64, n the new tokens of the longest row; behind its end a row has padding. With them, where they are
        asked for, scores and logits of each new token, [B, V] float32.
    """
    with torch.inference_mode():
        new = _in_waves(decoder, request)
        if request.streamer is not None:
            request.streamer.end()
    sequences, outputs = torch.cat([request.ids, new], dim=1), request.outputs
    if outputs is None:
        return sequences
    found = {name: None if each is None else tuple(each) for name, each in vars(outputs).items()}
    return GenerateDecoderOnlyOutput(sequences=sequences, **found)


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
            if most < 1 or request.together:
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
        decoder.model.last_norm.weight.dtype, request.ids.device,
    )  # fmt: skip
    step = DecodingStep(decoder, state, request.choice, request.end_tokens(), request.pad)
    _begin(decoder, request, state, step)
    prompt = max(map(len, request.prompts))
    return watched(
        request, state, step, lambda new: step(request.longest, prompt + new),
        leaves_out=not (request.choice.samples or request.together),
    )  # fmt: skip


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
    if request.criteria or request.choice.by_host:  # which look at the tokens
        return watched(request, state, session.step, lambda _: session.advance(), leaves_out=False)
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
