"""How the next token is chosen from the logits: transformers' processors in their order, on the device, without a wait.

B rows, V vocabulary. The processors that look at nothing but the scores are transformers' own objects. Behind top-k, all
further ones see the candidates alone instead of the whole vocabulary. Draws follow `torch.manual_seed`, and are transformers'
where all tokens are candidates and, on a GPU, the rows fill their bucket.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from oribi.models.decoding.state import DecodingState

# those whose result depends on the scores alone, and that only drop or scale candidates
_OF_CANDIDATES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_AT_LEAST = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# candidates beyond k that top-k keeps where their scores equal the k-th, as those of 16-bit logits do; a CPU looks at all
# tokens where these are not enough, and a GPU, which nobody waits for, lets go of further ones
_TIES = 32
# candidates among which top-p alone looks first, where the host may see whether they hold all that it keeps
_NUCLEUS = 1024
_ROUNDING = 1e-5  # of a sum of probabilities in float32


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Args:
        samples: whether they are drawn rather than the most likely ones.
        processors: transformers' processors, in the order in which they apply.
        prompt_width: columns of the prompts with their padding, which minimum lengths count.
        by_host: whether processors, or whoever asked for their scores, see the tokens as they come, so that no recorded step
            chooses.
    """

    samples: bool
    processors: tuple[LogitsProcessor, ...]
    prompt_width: int
    by_host: bool = False

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens a row has already."""
        return not self.by_host and any(
            isinstance(p, RepetitionPenaltyLogitsProcessor) for p in self.processors
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for choices that a recorded step serves alike."""
        if self.by_host:
            return ("by host",)
        names = ((type(p).__name__, *_values(p)) for p in self.processors)
        width = self.prompt_width if any(isinstance(p, _AT_LEAST) for p in self.processors) else 0
        return self.samples, width, *names

    def tokens(self, logits: torch.Tensor, state: "DecodingState") -> torch.Tensor:
        """The next token of each row.

        Args:
            logits: [B, V] float32.
            state: tells which tokens a row has and how many are new.

        Returns:
            [B] int64.
        """
        scores, ids = logits, None
        for index, processor in enumerate(self.processors):
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                penalised = torch.where(scores < 0, scores * processor.penalty, scores / processor.penalty)
                scores = torch.where(state.seen, penalised, scores)
            elif isinstance(
                processor, SuppressTokensLogitsProcessor
            ):  # whose own call waits where there are many
                scores = scores.index_fill(1, processor.suppress_tokens.to(scores.device), -math.inf)
            elif isinstance(processor, _AT_LEAST):
                early = state.step < _least_new(processor, self.prompt_width)
                scores = torch.where(early, scores.index_fill(1, processor.eos_token_id, -math.inf), scores)
            else:
                rest = self.processors[index:]
                if ids is None and self.samples and all(isinstance(p, _OF_CANDIDATES) for p in rest):
                    scores, ids, done = _candidates(scores, processor)
                    if done:
                        continue
                scores = processor(None, scores)
        if not self.samples:
            return scores.max(-1).indices  # a CPU's argmax takes three times as long
        place = draw(scores)
        return place if ids is None else ids.gather(1, place[:, None])[:, 0]


def draw(scores: torch.Tensor) -> torch.Tensor:
    """A column of each row, with the probabilities of the scores' softmax, from PyTorch's generator of their device.

    Args:
        scores: [B, V] float32.

    Returns:
        [B] int64; of all rows at once, what `torch.multinomial` draws from the same state of the generator.
    """
    probabilities = scores.softmax(-1)
    if not scores.is_cuda:
        return torch.multinomial(probabilities, 1)[:, 0]
    # the first of exponential events comes from each with just its rate's share: as `multinomial`, without its wait
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


def _candidates(
    scores: torch.Tensor, processor: LogitsProcessor
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The scores [B, C] that a processor can keep, their ids [B, C], and whether it has been applied.

    All scores and no ids where the candidates are not known without looking at the scores. Between equal scores top-p
    decides by the order in which they are sorted, as in transformers, where it is any.
    """
    if isinstance(processor, TopKLogitsWarper) and processor.top_k + _TIES < scores.shape[1]:
        found, ids = scores.topk(processor.top_k + _TIES)
        if scores.is_cuda or bool((found[:, -1] < found[:, processor.top_k - 1]).all()):
            return found, ids, False
    # on a GPU, looking would be a wait
    if isinstance(processor, TopPLogitsWarper) and not scores.is_cuda and scores.shape[1] > _NUCLEUS:
        found, ids = scores.topk(_NUCLEUS)
        probabilities = (found - scores.logsumexp(-1, keepdim=True)).exp()
        outside = 1 - probabilities.sum(-1, keepdim=True)
        if bool((outside + _ROUNDING < 1 - processor.top_p).all()):
            # the least likely ones first
            dropped = outside + probabilities.flip(-1).cumsum(-1).flip(-1) <= 1 - processor.top_p
            dropped[:, 0] = False
            return found.masked_fill(dropped, -math.inf), ids, True
    return scores, None, False


def _least_new(processor: LogitsProcessor, prompt_width: int) -> int:
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length - prompt_width
    return processor.min_new_tokens + processor.prompt_length_to_skip - prompt_width


def _values(processor: LogitsProcessor) -> tuple[Any, ...]:
    """What distinguishes a processor from others of its class."""
    values = sorted(vars(processor).items())
    return tuple(
        (n, str(v.tolist() if torch.is_tensor(v) else v)) for n, v in values if n != "prompt_ignore_length"
    )


def read_choice(
    samples: bool, processors: Sequence[LogitsProcessor], prompt_width: int, by_host: bool = False
) -> Choice:
    """How a call of `generate` chooses its tokens.

    Args:
        samples: do_sample.
        processors: as `generate` prepared them.
        prompt_width: columns of the prompts with their padding.
        by_host: whether the host sees to it anyway; else it does where a processor is not known here.
    """
    known = (*_OF_CANDIDATES, *_AT_LEAST, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor)
    unusual = any(
        type(p) not in known
        or getattr(p, "filter_value", -math.inf) != -math.inf
        or getattr(p, "min_tokens_to_keep", 1) != 1
        for p in processors
    )
    return Choice(samples, tuple(processors), prompt_width, by_host or unusual)
