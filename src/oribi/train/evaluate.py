"""How good a model is on rows it was not trained on: loss a trained token, perplexity, and whether it knows when to stop."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.generate import answers, inference_mode_of
from oribi.models.unwrap import base_model

BATCH_TOKENS = 4096  # of one forward; only the loss is kept


@dataclass(frozen=True)
class HeldOut:
    """Loss of one model on held-out rows.

    Args:
        loss: mean over all trained tokens, in nats.
        tokens, rows: trained tokens, and rows.
    """

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # above, a float is infinite

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answer that the data gives and the model's."""

    prompt: str
    expected: str
    said: str
    tokens: int
    stopped: bool


def held_out_loss(model: nn.Module, rows: Dataset, limit: int | None = None) -> HeldOut:
    """Mean loss of the labelled tokens of prepared rows.

    Args:
        model: with or without adapter, in any mode.
        rows: input_ids and labels, not shifted, -100 where nothing is trained.
        limit: the first so many rows only.
    """
    base = base_model(model)
    own = isinstance(base, DecoderForCausalLM)
    collate = PackCollator() if own else PaddedCollator(0)
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad(), inference_mode_of(model):
        for batch in _batches(rows):
            inputs = {
                name: value.to(base.device) if torch.is_tensor(value) else value
                for name, value in collate(batch).items()
            }
            targets = int((inputs["labels"][..., 1:] != -100).sum())
            if not targets:
                continue
            extra = {"output_logits": False} if own else {}
            loss = model(**inputs, use_cache=False, **extra).loss
            total += loss.double().cpu() * targets
            tokens += targets
    return HeldOut(float(total) / max(tokens, 1), tokens, len(rows))


def text_loss(model: nn.Module, tokenizer: Any, text: str, window: int = 512) -> HeldOut:
    """Mean loss of a text, read in windows of so many tokens."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # longer than the model on purpose
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    rows = Dataset.from_dict({"input_ids": parts, "labels": [list(part) for part in parts]})
    return held_out_loss(model, rows)


def answer_rows(
    model: nn.Module, tokenizer: Any, rows: Dataset, count: int, max_new_tokens: int = 128
) -> list[Sample]:
    """Greedy answers to the first held-out rows whose labels begin after a prompt.

    Args:
        model, tokenizer: as loaded.
        rows: as in `held_out_loss`.
        count: how many.
        max_new_tokens: the longest answer.
    """
    prompts, texts = [], []
    for row in rows:
        if len(prompts) == count:
            break
        ids, labels = row["input_ids"], row["labels"]
        first = next((i for i, label in enumerate(labels) if label != -100 and i), None)
        if first is None or all(label != -100 for label in labels[1:]):
            continue  # plain text: there is no prompt to answer
        last = next((i for i in range(first, len(ids)) if labels[i] == -100), len(ids))
        prompts.append(list(ids[:first]))
        texts.append([_text(tokenizer, ids[:first]), _text(tokenizer, ids[first:last])])
    with inference_mode_of(model):
        said = answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return [
        Sample(prompt, expected, one.text.strip(), one.tokens, one.stopped)
        for (prompt, expected), one in zip(texts, said)
    ]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def stop_rate(samples: Sequence[Sample]) -> float | None:
    """Share of answers that ended by themselves; None without answers."""
    return sum(sample.stopped for sample in samples) / len(samples) if samples else None


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, where the model has an adapter on it."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield


def _batches(rows: Dataset) -> Iterator[list[dict[str, list[int]]]]:
    batch, size = [], 0
    for row in rows:
        length = len(row["input_ids"])
        if batch and size + length > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append({"input_ids": row["input_ids"], "labels": row["labels"]})
        size += length
    if batch:
        yield batch
