"""The part of the trainer that evaluates and predicts: losses over all targets, and logits of one example per row."""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from oribi.train.setup import held, logits_of, rows_collator, without_repeats


class PredictingTrainer(Trainer):
    """transformers' `Trainer` whose evaluations call losses as its training does."""

    own_loss: bool
    _packs: list[tuple[Dataset, Dataset]]  # packed rows, and the examples that they were made of
    _predicts = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self.own_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        inputs = self._prepare_inputs(inputs)
        if isinstance(rows, Dataset):
            inputs = without_repeats(inputs, self.accelerator, rows, self.args.per_device_eval_batch_size)
        labels, logits = inputs["labels"], None
        targets = (labels[..., 1:] != -100).sum()
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
        share = targets if counted is None else torch.as_tensor(counted).clamp(min=1) / self._loss_factor()
        self._evaluated.append(torch.stack([loss.float() * share, targets.float()]))
        return loss.detach(), logits, None if prediction_loss_only else labels

    def _loss_factor(self) -> int:
        return self.args.world_size if self.args.average_tokens_across_devices else 1

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
        with held(self, data_collator=rows_collator(self.data_collator)):
            return super().get_eval_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with held(self, data_collator=rows_collator(self.data_collator)):
            return super().get_test_dataloader(self._unpacked(test_dataset))

    def _unpacked(self, dataset: Any) -> Any:
        """The examples that a packed evaluation set was made of."""
        return next((rows for packs, rows in self._packs if packs is dataset), dataset)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        with held(self, _predicts=True):
            return super().predict(test_dataset, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        # evaluated in order, whatever the order of training
        return SequentialSampler(eval_dataset) if isinstance(sampler, LengthGroupedSampler) else sampler

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            # over all targets: a mean of the batches' means would overweight batches with few of them
            total, targets = self.accelerator.reduce(torch.stack(self._evaluated).sum(0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(targets, 1.0)
        return output
