"""How good a model is on rows it was not trained on: loss per trained token, perplexity, and whether it stops by itself.

The functions measure any model, for reports and `oribi eval`; `PredictingTrainer` is the part of the trainer that evaluates.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.data.turns import turns_of
from oribi.errors import ConfigError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.generate import Answer, answers, inference_mode_of
from oribi.models.unwrap import base_model
from oribi.train.setup import temporarily
from oribi.train.several import ProcessesTrainer, forget_preparation

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
class Prompt:
    """Token ids of a prompt, its text without special tokens, and the answer of the data, empty where there is none.

    `turns` are its roles and texts; None where they are not known.
    """

    ids: list[int]
    text: str
    expected: str = ""
    turns: list[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the answer of the data and the model's answer.

    `rewards` are the answer's scores by function, `turns` roles and texts of the prompt.
    """

    prompt: str
    expected: str
    said: str
    tokens: int
    stopped: bool
    rewards: dict[str, float | None] | None = None
    turns: list[tuple[str, str]] | None = None


def held_out_loss(model: nn.Module, rows: Dataset, limit: int | None = None) -> HeldOut:
    """Mean loss of the labelled tokens of prepared rows.

    Args:
        model: with or without adapter, in any mode.
        rows: input_ids and labels, not shifted, -100 where nothing is trained.
        limit: use only the first rows, this many.
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
    """Mean loss of a text, read in windows."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # longer than the model on purpose
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    rows = Dataset.from_dict({"input_ids": parts, "labels": [list(part) for part in parts]})
    return held_out_loss(model, rows)


def prompts_of_rows(tokenizer: Any, rows: Dataset, count: int) -> list[Prompt]:
    """The prompts of the first rows whose labels begin after one.

    Args:
        tokenizer: of the model. rows: as in `held_out_loss`. count: the most.
    """
    found = []
    for row in rows:
        if len(found) == count:
            break
        ids, labels = row["input_ids"], row["labels"]
        first = next((i for i, label in enumerate(labels) if label != -100 and i), None)
        if first is None or all(label != -100 for label in labels[1:]):
            continue  # plain text: there is no prompt to answer
        last = next((i for i in range(first, len(ids)) if labels[i] == -100), len(ids))
        prompt = list(ids[:first])
        expected = _text(tokenizer, ids[first:last])
        found.append(Prompt(prompt, _text(tokenizer, prompt), expected, turns_of(tokenizer, prompt)))
    return found


def answer_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 128
) -> list[Answer]:
    """Greedy answers of a model in any mode, which it keeps.

    Args:
        model, tokenizer: as loaded. prompts: to answer. max_new_tokens: the longest answer.
    """
    with inference_mode_of(model):
        return answers(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=max_new_tokens)


def answer_rows(
    model: nn.Module, tokenizer: Any, rows: Dataset, count: int, max_new_tokens: int = 128
) -> list[Sample]:
    """Greedy answers to the first held-out rows that have a prompt.

    Args:
        model, tokenizer: as loaded. rows: as in `held_out_loss`. count: how many. max_new_tokens: the longest answer.
    """
    prompts = prompts_of_rows(tokenizer, rows, count)
    return samples_of(prompts, answer_prompts(model, tokenizer, prompts, max_new_tokens))


def samples_of(prompts: Sequence[Prompt], said: Sequence[Answer]) -> list[Sample]:
    """Prompts with their answers, as files and reports show them."""
    return [
        Sample(prompt.text, prompt.expected, one.text.strip(), one.tokens, one.stopped, turns=prompt.turns)
        for prompt, one in zip(prompts, said, strict=True)
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


class EvaluatingTrainer(ProcessesTrainer):
    """transformers' `Trainer` whose evaluation loss is a mean over all that its batches counted, in all processes.

    Attributes:
        _evaluated: of each batch of an evaluation, the sum of its losses and what it counted [2].
    """

    _evaluated: list[torch.Tensor]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        forget_preparation(self.model)
        if self._evaluated:
            # a mean of the batches' means would overweight batches that count little
            total, counted = self.accelerator.reduce(torch.stack(self._evaluated).sum(0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(counted, 1.0)
        return output


class PredictingTrainer(EvaluatingTrainer):
    """transformers' `Trainer` whose evaluations call losses as its training does."""

    own_loss: bool
    _packs: list[tuple[Dataset, Dataset]]  # packed rows, and the examples that they were made of
    _predicts = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        counted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not (self.own_loss or counted and "labels" in inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        inputs = self._prepare_inputs(inputs)
        if isinstance(rows, Dataset) and self.args.context_parallel == 1:
            inputs = without_repeats(inputs, self.accelerator, rows, self.args.per_device_eval_batch_size)
        labels, logits = inputs["labels"], None
        targets = (inputs.get("shift_labels", labels[..., 1:]) != -100).sum()
        counted = self._get_num_items_in_batch(
            [inputs], self.args.device
        )  # over all processes, as in training
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(
                model, dict(inputs), return_outputs=not prediction_loss_only, num_items_in_batch=counted
            )
        if not prediction_loss_only:
            loss, logits = loss[0], logits_of(loss[1])
        # training's losses carry the number of processes as a factor, and their mean is taken
        share = targets if counted is None else torch.as_tensor(counted).clamp(min=1) / self._loss_factor
        self._evaluated.append(torch.stack([loss.float() * share, targets.float()]))
        return loss.detach(), logits, None if prediction_loss_only else labels

    def _wants_rows(self) -> bool:
        """Whether an evaluation hands out logits: each example is a row of its own then, in the order of the data."""
        return self.compute_metrics is not None or self._predicts

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if not self._wants_rows():
            return super().get_eval_dataloader(eval_dataset)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            given = self.eval_dataset[given]
        rows = self._unpacked(given)
        with temporarily(self, data_collator=rows_collator(self.data_collator)):
            return super().get_eval_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with temporarily(self, data_collator=rows_collator(self.data_collator)):
            return super().get_test_dataloader(self._unpacked(test_dataset))

    def _unpacked(self, dataset: Any) -> Any:
        """The examples that a packed evaluation set was made of."""
        return next((rows for packs, rows in self._packs if packs is dataset), dataset)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        if self.args.context_parallel > 1:
            raise ConfigError(
                "predict gives the logits of whole rows, and processes share them: call it with context_parallel = 1"
            )
        with temporarily(self, _predicts=True):
            return super().predict(test_dataset, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        # evaluated in order, whatever the order of training
        return SequentialSampler(eval_dataset) if isinstance(sampler, LengthGroupedSampler) else sampler


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits that compute_loss returned beside the loss: a model's output, (loss, logits, ...), or the logits."""
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[1] if isinstance(outputs, tuple) else outputs


def rows_collator(collator: Any) -> Any:
    """A collator that keeps each example in a row of its own."""
    if not isinstance(collator, PackCollator):
        return collator
    return PaddedCollator(collator.pad_token_id)


def without_repeats(
    inputs: dict[str, Any], accelerator: Accelerator, rows: Any, batch_size: int
) -> dict[str, Any]:
    """An evaluation batch whose rows count once: accelerate fills the last batches of several processes with the first rows.

    Args:
        inputs: a batch as the collators make it.
        accelerator: knows whether the batch is one of the last, and how many rows were left for these.
        rows: the data set, read in order.
        batch_size: rows of a process's batch.

    Returns:
        The batch, nothing labelled in rows that another batch has.
    """
    state = accelerator.gradient_state
    last = state.end_of_dataloader and state.remainder > 0
    if accelerator.num_processes == 1 or accelerator.split_batches or not last:
        return inputs
    before = accelerator.process_index * batch_size
    own = min(max(state.remainder - before, 0), batch_size)
    labels = inputs["labels"].clone()
    if inputs.get("cu_seq_lens_q") is None:
        labels[own:] = -100
    else:
        first = len(rows) - state.remainder + before
        packs = "seq_lengths" in rows.column_names
        documents = sum(len(rows[i]["seq_lengths"]) if packs else 1 for i in range(first, first + own))
        labels[:, inputs["cu_seq_lens_q"][documents] :] = -100
    return {**inputs, "labels": labels}
