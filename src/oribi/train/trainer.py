"""STEP 6: train. transformers' Trainer with oribi's data preparation, the model's own loss and a flat optimizer.

It overrides methods of transformers' Trainer, private ones (with a leading underscore) among them, which the supported
versions are tested for; nothing is assigned into another package.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import transformers
from accelerate.utils import AutocastKwargs
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from oribi.errors import ConfigError
from oribi.lora.eva import directions_wanted, start_from_rows, take_ranks, waits_for_rows
from oribi.memory.speed import Utilisation, utilisation_of
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.unwrap import base_model
from oribi.run_record import require_writable
from oribi.text import say_notes
from oribi.train.arguments import SFTConfig, adopt
from oribi.train.context import join_context
from oribi.train.determinism import fix_order_of_cublas
from oribi.train.evaluate import PredictingTrainer
from oribi.train.guard import require_targets
from oribi.train.requantise import RequantisingTrainer
from oribi.train.resume import Resumed, adapter_config_of
from oribi.train.rows import RowsTrainer, batches_for_start, choose_collator, unpack_rectangles
from oribi.train.run_trainer import RunTrainer
from oribi.train.setup import fit_arguments, model_and_tokenizer
from oribi.train.shards import shard
from oribi.train.step import EmbeddingNoise, StepTrainer

logger = logging.getLogger(__name__)

# keywords that were the trainer's before they moved into its arguments
MOVED_KEYWORDS = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    "packing": "packing",
    "dataset_num_proc": "dataset_num_proc",
    "neftune_noise_alpha": "neftune_noise_alpha",
}


class SFTTrainer(StepTrainer, RowsTrainer, RequantisingTrainer, PredictingTrainer, RunTrainer):
    """transformers' `Trainer` for models that `FastLanguageModel` loads; any other causal model works too, unfused.

    It takes what `trl.SFTTrainer` takes. Data preparation, batches, the optimizer step, checkpoints and resuming are oribi's.

    Args:
        model: a loaded model with or without adapter, or a name that `FastLanguageModel.from_pretrained` takes.
        args: `oribi.SFTConfig`; a `trl.SFTConfig`, `TrainingArguments` or a dict is converted.
        data_collator: None joins the examples of a batch into one row without padding.
        train_dataset: what `oribi.data.prepare_dataset` takes (rows, files, names) or returns.
        eval_dataset: the same, or a dict of data sets.
        processing_class: the tokenizer.
        tokenizer: older name of processing_class.
        peft_config: adapter to put on a model that has none.
        formatting_func: makes the text of an example, or a list of texts of a batch, from rows.
        quantization_config: of a model that is given by its name; load it with `FastLanguageModel.from_pretrained` instead.
        kwargs: other arguments of `transformers.Trainer`, and the older keywords dataset_text_field, max_seq_length,
            packing, dataset_num_proc and neftune_noise_alpha, which belong to args now.

    Attributes:
        train_dataset: prepared rows: input_ids, and labels that are not shifted, -100 where nothing is trained.
        data_reports: what preparation found, for "train" and each evaluation set.
        step_runner: if set, runs each micro-batch in place of the usual forward and backward:
            (model, inputs, targets of the step) -> loss.

    Raises:
        ConfigError: two settings contradict each other or the model.
        DataError: the data cannot be read, or no token of it would be trained.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SFTConfig | transformers.TrainingArguments | dict[str, Any] | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        peft_config: peft.PeftConfig | None = None,
        formatting_func: Callable | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = adopt(args)
        if args.deterministic:
            fix_order_of_cublas()
        for old, new in MOVED_KEYWORDS.items():
            value = kwargs.pop(old, None)
            if value is not None:
                setattr(args, new, value)
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config is not taken here; load the model with FastLanguageModel.from_pretrained(..., "
                "quantization_config=...), or load_in_4bit=True, and pass it"
            )
        model, processing_class = model_and_tokenizer(model, args, processing_class, tokenizer, peft_config)
        if train_dataset is None:
            raise ConfigError("train_dataset is missing; pass the rows, files or names to train on")
        if args.should_save:
            require_writable(args.output_dir)
        base = base_model(model)
        self.own_loss = isinstance(base, DecoderForCausalLM)
        fit_arguments(args, base)
        if data_collator is None:
            unpack_rectangles(args, base)
        self._utilisation: Utilisation | None = None
        self.data_reports: dict[str, Any] = {}
        self.tokens_seen, self._logged = 0, (0, time.monotonic())
        self._prepared: list[Dataset | IterableDataset] = []
        self._packs: list[tuple[Dataset, Dataset]] = []
        self._formatting_func = formatting_func
        rows, evaluated = self._prepare_data(args, base, processing_class, train_dataset, eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=choose_collator(data_collator, args, base, processing_class, rows, evaluated),
            train_dataset=rows,
            eval_dataset=evaluated,
            processing_class=processing_class,
            **kwargs,
        )
        self.neftune_noise_alpha = None  # transformers' noise counts a packed row as one document
        if self.own_loss:
            base.model.context = join_context(self) if args.context_parallel > 1 else None
            # float16 needs the gradient scaler but not autocast: the decoder computes in its own dtype
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        if hasattr(model, "add_model_tags"):  # of what is pushed to the hub
            model.add_model_tags(["oribi", "sft"])
        self._add_callbacks(getattr(processing_class, "decode", None))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        require_targets(self.train_dataset, "train")
        alpha = self.args.neftune_noise_alpha
        if alpha is not None:
            self._noise = EmbeddingNoise(base_model(self.model).get_input_embeddings(), alpha)
        self._utilisation = utilisation_of(base_model(self.model), self.train_dataset)
        self._logged = (self.tokens_seen, time.monotonic())
        self.step_counts = Counter()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._release_steps()
            if self._noise is not None:
                self._noise.remove()

    def _compare(self, resumed: Resumed) -> None:
        if waits_for_rows(self.model) and (stored := adapter_config_of(resumed.path)) is not None:
            take_ranks(self.model, stored)
        super()._compare(resumed)

    def _start(self, resumed: Resumed | None) -> None:
        super()._start(resumed)
        if waits_for_rows(self.model):
            batches = batches_for_start(self._all_rows(), directions_wanted(self.model), self.args.seed)
            said = start_from_rows(self.model, batches)
            say_notes([said] if self.is_world_process_zero() else [])

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        model = super()._wrap_model(model, training, dataloader)
        if not training or not self.args.fsdp or not self.own_loss or model is not self.model:
            return model
        if self._parameters is None:  # a 4-bit weight tells no more when it is sharded
            self._parameters = model.num_parameters(exclude_embeddings=True)
        shard(model, base_model(model), self.args.device)
        return model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens, since = self._logged
            self._logged = (self.tokens_seen, time.monotonic())
            speed = (self.tokens_seen - tokens) / max(self._logged[1] - since, 1e-9)
            logs |= {"tokens_per_second": speed, "num_tokens": self.tokens_seen}
            if self._utilisation is not None:
                logs["mfu"] = self._utilisation.of(speed / self.args.world_size)
        if "train_loss" in logs:  # the last line
            logs |= {f"micro_steps_{how}": count for how, count in self.step_counts.items()}
        super().log(logs, start_time)
