"""States and steps that a GPU keeps from one generation to the next, each step recorded as a CUDA graph.

A recorded step is one launch instead of hundreds. What it fixes are addresses and shapes: the places of a batch (a bucket),
the slots of the cache, the weights. Trained factors are read where they lie, or packed again when a generation begins.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from oribi.graph_capture import RecordingFailed, record
from oribi.models.decoding.request import Request
from oribi.models.decoding.state import SLOT_STEP, DecodingState
from oribi.models.decoding.step import DecodingStep
from oribi.models.linear_layers import every_module

if TYPE_CHECKING:
    from oribi.models.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)

# places of a batch; a larger one has a multiple of the last
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MOST_SESSIONS = 2  # with the adapter and without it, say


def bucket_for(rows: int) -> int:
    """Places for so many rows."""
    return next((size for size in BUCKETS if size >= rows), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


@dataclass
class Session:
    """A state, the step that changes it, and its recording.

    Args:
        state, step: of the bucket. longest: as the step wants it. length, new_tokens: most of a row.
        graph: None where the step could not be recorded, or not yet.
    """

    state: DecodingState
    step: DecodingStep
    longest: int
    length: int
    new_tokens: int
    graph: torch.cuda.CUDAGraph | None = None

    def record(self, pool: Any) -> None:
        """Records the step, after one run that compiles its kernels; random numbers go on as if nothing had happened."""
        device = self.state.token.device
        before = torch.cuda.get_rng_state(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.step(self.longest)
        torch.cuda.current_stream(device).wait_stream(side)
        self.state.reset()
        try:
            self.graph, _ = record(lambda: self.step(self.longest), pool, device)
        except RecordingFailed as failure:
            logger.warning("generate: no CUDA graph of a token's step (%s); its launches are slower", failure)
        torch.cuda.set_rng_state(before, device)

    def advance(self) -> None:
        """One token of every row."""
        if self.graph is None:
            self.step(self.longest)
        else:
            self.graph.replay()


@dataclass
class Sessions:
    """Those of one model; copies and files of the model have none."""

    _kept: OrderedDict[tuple, Session] = field(default_factory=OrderedDict)
    _pool: Any = None

    def __deepcopy__(self, memo: dict) -> "Sessions":
        return Sessions()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": OrderedDict(), "_pool": None}

    def clear(self) -> None:
        """Frees them."""
        self._kept.clear()
        self._pool = None

    def open(self, decoder: "DecoderForCausalLM", request: Request) -> Session:
        """A session for a request, its first rows being the request's, and its factors those of now."""
        rows = len(request.prompts)
        key = (*_identity(decoder, request), bucket_for(rows))
        session = self._kept.get(key)
        if session is None or session.length < request.longest or session.new_tokens < request.new_tokens:
            before = self._kept.pop(key, None)
            sizes = _sizes(decoder, request, bucket_for(rows), before)
            session = before = None  # freed before its successor is made
            while len(self._kept) >= MOST_SESSIONS:
                self._kept.popitem(last=False)
            session = self._kept[key] = _make(decoder, request, bucket_for(rows), *sizes)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            session.record(self._pool)
        else:
            session.step.refresh()
        self._kept.move_to_end(key)
        session.state.reset(rows)
        return session


def _sizes(
    decoder: "DecoderForCausalLM", request: Request, bucket: int, before: Session | None
) -> tuple[int, int]:
    """Tokens of a row, and new ones, that a session is made for.

    A conversation grows with each answer. One that outgrows its session gets twice its tokens, where they fit in memory and
    the model has positions for them: so it is recorded a few times, not once per `SLOT_STEP` tokens.
    """
    length, new_tokens = (-(-n // SLOT_STEP) * SLOT_STEP for n in (request.longest, request.new_tokens))
    if before is None:
        return length, new_tokens
    new_tokens = max(new_tokens, before.new_tokens)
    positions = getattr(decoder.config, "max_position_embeddings", None) or length
    longer = max(length, min(2 * before.length, positions))
    return (longer if decoder.rows_that_fit(longer) >= bucket else length), new_tokens


def _make(
    decoder: "DecoderForCausalLM", request: Request, bucket: int, length: int, new_tokens: int
) -> Session:
    device, dtype = request.ids.device, decoder.model.last_norm.weight.dtype
    vocab_size = decoder.config.vocab_size if request.choice.penalises else 0
    state = DecodingState(decoder.model.layers, bucket, length, new_tokens, vocab_size, dtype, device)
    step = DecodingStep(decoder, state, request.choice, request.end_tokens(), request.pad)
    return Session(state, step, request.longest, length, new_tokens)


def _identity(decoder: "DecoderForCausalLM", request: Request) -> tuple:
    """What a recorded step fixes beside the sizes."""
    found = (p for module in every_module(decoder) for p in module._parameters.values() if p is not None)
    weights = tuple(p.data_ptr() for p in found)
    factors = tuple((0 if p.a is None else p.a.data_ptr(), p.scale) for p in request.projections)
    # of longrope, which has one set of frequencies up to some length and another beyond
    rope = tuple(rotary.set_of(request.longest) for rotary in decoder.model.rotary.values())
    return request.choice.key, request.ends, request.pad, weights, factors, rope
