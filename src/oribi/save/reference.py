"""What the trained model says, computed once: the reference that every exported file is compared with.

S tokens, V vocabulary, K places whose next token is compared.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from oribi.models.decoder import DecoderForCausalLM
from oribi.models.generate import inference_mode_of
from oribi.models.unwrap import base_model
from oribi.save.probes import Rows, pack_rows
from oribi.save.stream import streamed_logits
from oribi.tensors import TensorSource

ANSWER_TOKENS = 24
_MAX_ANSWER_LOGITS = 100_000_000  # 400 MB of float32
_TOP = 10  # likeliest tokens of a place that are kept of an answer


@dataclass(frozen=True)
class GreedyAnswer:
    """One greedy answer.

    Args:
        prompt: token ids.
        tokens: of the answer, the end token included.
        stopped: whether it ended by itself.
    """

    prompt: list[int]
    tokens: list[int]
    stopped: bool


class Trained:
    """The trained model's next-token probabilities on rows and its greedy answers to prompts.

    Args:
        model: PEFT's or plain; it is put into evaluation mode and back.
        rows: what probabilities are compared on.
        prompts: token ids; each is answered greedily.
        stops: ids of the tokens that end an answer.
    """

    def __init__(
        self, model: nn.Module, rows: Rows, prompts: list[list[int]] = (), stops: list[int] = ()
    ) -> None:
        self.model, self.rows = model, rows
        self.inner = base_model(model)
        self.config = self.inner.config
        vocab_size = self.config.get_text_config().vocab_size
        self.stops = {id for id in stops if id < vocab_size}
        self.device = next(self.inner.parameters()).device
        floats = [p.dtype for p in self.inner.parameters() if p.is_floating_point()]
        self.dtype = next((d for d in (torch.bfloat16, torch.float16) if d in floats), torch.float32)
        self.base: TensorSource | None = None  # another than the trained one, with the adapter merged into it
        self.bare: TensorSource | None = None  # that base without the adapter
        self.signatures: Any = None  # what the first export asked of it for probes.json
        most = _MAX_ANSWER_LOGITS // vocab_size // ANSWER_TOKENS
        self.answers = self._generate(prompts[: max(most, 1)])
        self._set_places()
        self._take(self.evaluate(self.pack, self.keep))
        self.loss = loss_of(self.logprobs, rows)

    def _take(self, logits: torch.Tensor) -> None:
        """What logits [K, V] at the compared places say: `logprobs` on the rows, the answers, `said`, the likeliest tokens of
        their places, and `ends`, the log-probabilities [V] at the last token of each.

        The answers are those of one pass over all of them, which is how the files are asked: at near ties, generating token
        by token may have chosen differently.
        """
        on_rows, along = self.split(logits)
        parts = self.answer_logits(logits)
        self.logprobs = on_rows.log_softmax(-1)
        self.answers = [_as_found(answer, found, self.stops) for answer, found in zip(self.answers, along)]
        self.ends = [
            part[len(answer.tokens) - 1].float().log_softmax(-1).cpu()
            for part, answer in zip(parts, self.answers)
        ]
        self.said = [likeliest(part[: len(answer.tokens)]) for part, answer in zip(parts, self.answers)]
        self._set_places()

    def _set_places(self) -> None:
        """`pack`: the rows, and the answers behind their prompts; `keep` [K]: the compared places of the rows, then those of the
        answers."""
        documents = self.rows.documents + [a.prompt + a.tokens[:-1] for a in self.answers]
        self.pack = pack_rows(documents, self.rows.origin, held_out=self.rows.held_out)
        starts = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0).tolist()
        places = (self.rows.targets() != -100).nonzero().flatten().tolist()
        self.compared = len(places)  # places of rows
        for start, answer in zip(starts[len(self.rows.documents) :], self.answers):
            first = start + len(answer.prompt) - 1
            places += range(first, first + len(answer.tokens))
        self.keep = torch.tensor(places, device=self.device)
        self.ids, self.positions = self.pack.ids.to(self.device), self.pack.positions.to(self.device)

    def split(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
        """Logits [K, V] -> those on the rows, float32, and the likeliest tokens along every answer."""
        along = [part.argmax(-1).tolist() for part in self.answer_logits(logits)]
        return logits[: self.compared].float(), along

    def answer_logits(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Logits [K, V] -> those [n, V] along every answer."""
        return list(logits[self.compared :].split([len(answer.tokens) for answer in self.answers]))

    def evaluate(self, rows: Rows, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The model's logits [K, V] on rows, at the places of `keep` [K] or at all."""
        ids, positions = rows.ids.to(self.device), rows.positions.to(self.device)
        if self.base is not None:
            return streamed_logits(self.config, self.base, ids, positions, self.dtype, keep)
        with inference_mode_of(self.model), torch.no_grad():
            if not isinstance(self.inner, DecoderForCausalLM):
                return logits_by_document(self.model, rows, keep)
            places = 0 if keep is None else keep
            found = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=places)
            return found.logits[0]

    def streamed(self, source: TensorSource) -> torch.Tensor:
        """Logits [K, V] of weights on the disk at the same places."""
        return streamed_logits(self.config, source, self.ids, self.positions, self.dtype, self.keep)

    def on_base(self, merged: TensorSource, bare: TensorSource) -> "Trained":
        """The same adapter on another base: what a file merged into that base must say.

        Its loss may not be much worse than that of the model as trained, whose `loss` is kept for comparison.

        Args:
            merged, bare: the other base with the adapter and without.
        """
        moved = copy.copy(self)
        moved._take(self.streamed(merged))
        moved.base, moved.bare, moved.signatures = merged, bare, None
        return moved

    def _generate(self, prompts: list[list[int]]) -> list[GreedyAnswer]:
        if not prompts:
            return []
        longest = max(map(len, prompts))
        pad = next(iter(self.stops), 0)
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        own = self.inner.generation_config  # may sample, or punish repetitions
        settings = GenerationConfig(
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=pad,
            suppress_tokens=own.suppress_tokens,
        )
        self.inner.generation_config = settings
        try:
            with torch.no_grad():
                out = self.model.generate(input_ids=ids, attention_mask=real)
        finally:
            self.inner.generation_config = own
        answers = []
        for prompt, tokens in zip(prompts, out[:, longest:].tolist()):
            end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
            kept = tokens if end is None else tokens[: end + 1]
            answers.append(GreedyAnswer(prompt, kept, end is not None))
        return answers


def _as_found(answer: GreedyAnswer, likeliest: list[int], stops: set[int]) -> GreedyAnswer:
    """An answer up to the first place where another token is the likeliest, with that token."""
    pairs = enumerate(zip(answer.tokens, likeliest))
    end = next((i for i, (told, found) in pairs if told != found), len(likeliest) - 1)
    return GreedyAnswer(answer.prompt, likeliest[: end + 1], likeliest[end] in stops)


def likeliest(logits: torch.Tensor) -> list[dict[int, float]]:
    """The likeliest tokens of each place and their log-probabilities, from logits or log-probabilities [n, V]."""
    top = logits.float().log_softmax(-1).topk(min(_TOP, logits.shape[-1]), dim=-1)
    return [dict(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]


def logits_by_document(model: nn.Module, rows: Rows, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [K, V] of a model that takes no packs, at the places of `keep` [K] or at all."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = []
        start = 0
        for row in rows.documents:
            logits = model(input_ids=torch.tensor([row], device=device)).logits[0]
            if keep is not None:
                inside = keep[(keep >= start) & (keep < start + len(row))] - start
                logits = logits[inside]
            parts.append(logits)
            start += len(row)
        return torch.cat(parts)


def loss_of(logprobs: torch.Tensor, rows: Rows) -> float:
    """Mean loss of the compared tokens, from the log-probabilities at their places."""
    targets = rows.targets().to(logprobs.device)
    return F.nll_loss(logprobs, targets[targets != -100]).item()
