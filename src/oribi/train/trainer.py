"""STEP 6: train. TRL's SFTTrainer with oribi's data preparation, the model's own loss and a flat optimizer.

It overrides methods of transformers' Trainer, private ones (with a leading underscore) among them, which the supported
versions are tested for; nothing is assigned into another package.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from accelerate.utils import AutocastKwargs
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from oribi.data.packing import pack
from oribi.data.prepare import PreparedData, prepare_dataset
from oribi.errors import ConfigError
from oribi.kernels.adamw import FlatAdamW
from oribi.models.adapter_files import load_adapter, read_record
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.load import load_model
from oribi.save.adapter_files import write_adapter
from oribi.save.base import changed_base
from oribi.save.finite import require_finite
from oribi.streams import say
from oribi.train.arguments import FLAT_OPTIMIZERS, SFTConfig, adopt
from oribi.train.batches import GroupedByLength, rank_loader
from oribi.train.checkpoints import StopOnSignal, any_process, require_writable
from oribi.train.determinism import LEFT_OPEN, deterministic_algorithms, settle_cublas
from oribi.train.extension_points import ModelWatch, changed_step, is_users
from oribi.train.fp8 import switch_on
from oribi.train.graphs import StepGraphs, reason_against
from oribi.train.guard import LossGuard, require_targets
from oribi.train.neftune import EmbeddingNoise
from oribi.train.progress import JsonLog, Progress
from oribi.train.recompute import choose, free_bytes
from oribi.train.resumable import ResumableTrainer
from oribi.train.setup import (
    NOT_COMPILED,
    base_model,
    held,
    kept_as_it_is,
    known_collator,
    leave_held_out,
    logits_of,
    longest_row,
    make_collator,
    require_positions,
    rows_collator,
    say_same_rows,
    say_untrained_ends,
    settle,
    trained_parts,
    without_repeats,
)
from oribi.train.sharding import is_sharded, require_wrapper, sharded
from oribi.train.smaller_steps import SmallerSteps
from oribi.train.utilisation import Utilisation, utilisation_of

logger = logging.getLogger(__name__)

# keywords that were the trainer's before they moved into its arguments
MOVED_KEYWORDS = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    "packing": "packing",
    "dataset_num_proc": "dataset_num_proc",
    "neftune_noise_alpha": "neftune_noise_alpha",
}


class SFTTrainer(ResumableTrainer):
    """`trl.SFTTrainer` for models that `FastLanguageModel` loads; any other causal model works too, unfused.

    Args:
        model: a loaded model with or without adapter, or a name that `FastLanguageModel.from_pretrained` takes.
        args: `oribi.SFTConfig`; `trl.SFTConfig`, `TrainingArguments` and dicts are taken over.
        data_collator: None joins the examples of a batch into one row without padding.
        train_dataset: what `oribi.data.prepare_dataset` takes (rows, files, names) or returns.
        eval_dataset: the same, or a dict of data sets.
        processing_class: the tokenizer.
        tokenizer: older name of processing_class.
        peft_config: adapter to put on a model that has none.
        kwargs: what `trl.SFTTrainer` takes, and the older keywords dataset_text_field, max_seq_length, packing and
            dataset_num_proc, which belong to args now.

    Attributes:
        train_dataset: prepared rows: input_ids, and labels that are not shifted, -100 where nothing is trained.
        data_reports: what preparation found, for "train" and each evaluation set.
        step_runner: if set, runs each micro-batch in place of the usual forward and backward:
            (model, inputs, targets of the step) -> loss.

    Raises:
        ConfigError: two settings contradict each other or the model.
        DataError: the data cannot be read, or no token of it would be trained.
    """

    _tag_names = ["trl", "sft", "oribi"]

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
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ConfigError("tokenizer and processing_class name the same thing; give one of them")
        args = adopt(args)
        if args.deterministic:
            settle_cublas()
        for old, new in MOVED_KEYWORDS.items():
            value = kwargs.pop(old, None)
            if value is not None:
                setattr(args, new, value)
        if isinstance(model, str):
            model, loaded_tokenizer = load_model(
                model,
                max_seq_length=args.max_length or 2048,
                load_in_4bit=False,
                full_finetuning=peft_config is None,
            )
            tokenizer = tokenizer or loaded_tokenizer
        if peft_config is not None:
            model = peft.get_peft_model(model, peft_config)
        processing_class = processing_class or tokenizer
        if processing_class is None:
            raise ConfigError(
                "the tokenizer is missing; pass tokenizer= what from_pretrained returned with the model"
            )
        if args.should_save:
            require_writable(args.output_dir)
        base = base_model(model)
        self.own_loss = isinstance(base, DecoderForCausalLM)
        if self.own_loss and hasattr(model, "_orig_mod"):
            raise ConfigError(
                f"the model went through torch.compile: {NOT_COMPILED}. Pass it as it was before"
            )
        self.step_runner: Callable | None = None
        self._steps_chosen = False
        self._smaller: SmallerSteps | None = None
        self._watch: ModelWatch | None = None
        self._watched_step = -1
        self._predicts = False
        self._writes_checkpoint = False
        self._parameters: int | None = None
        self._utilisation: Utilisation | None = None
        self.data_reports: dict[str, Any] = {}
        self.tokens_seen, self._logged = 0, (0, time.monotonic())
        self._packing, self._trained_parts, self._noise = args.packing, trained_parts(args), None
        self._prepared: list[Dataset | IterableDataset] = []
        self._packs: list[tuple[Dataset, Dataset]] = []
        settle(args, base)
        if args.process_index == 0:
            say_same_rows(train_dataset, eval_dataset)
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            formatting_func = kwargs.pop("formatting_func", None)

            def prepared(rows: Any, name: str) -> Any:
                return self._prepare_dataset(
                    rows, processing_class, args, args.packing, formatting_func, name
                )

            train_dataset = prepared(train_dataset, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: prepared(rows, name) for name, rows in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = prepared(eval_dataset, "eval")
                leave_held_out(base, eval_dataset)
        if args.process_index == 0:
            say_untrained_ends(base, processing_class, self.data_reports.get("train"))
        given = known_collator(data_collator, train_dataset)
        data_collator = make_collator(args, base, processing_class) if given is None else given
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for rows in (train_dataset, *evaluated):
            require_positions(data_collator, rows, args)
        # TRL's own packing, masks and checks of attention kernels are for its collator; batches are made here
        hidden = {
            "packing": False,
            "padding_free": False,
            "assistant_only_loss": False,
            "completion_only_loss": False,
        }
        with held(args, **hidden), kept_as_it_is(model, base, self.own_loss):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self.neftune_noise_alpha = None  # transformers' noise counts a packed row as one document
        if self.own_loss:
            # float16 needs the gradient scaler but not autocast: the decoder computes in its own dtype
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        decode = getattr(processing_class, "decode", None)
        self.guard = LossGuard(self.train_dataset, decode, scaled=self.accelerator.scaler is not None)
        self.stop_on_signal = StopOnSignal(lambda asked: any_process(self, asked))
        self.add_callback(self.guard)
        self.add_callback(self.stop_on_signal)
        self.add_callback(JsonLog())
        for default in (ProgressCallback, PrinterCallback):
            if any(type(callback) is default for callback in self.callback_handler.callbacks):
                self.remove_callback(default)
                self.add_callback(Progress(live=default is ProgressCallback))

    def _send_telemetry(self) -> None:
        """TRL reports each run to the hub; oribi reports nothing."""

    def _prepare_dataset(
        self, dataset, processing_class, args, packing, formatting_func, dataset_name
    ) -> Dataset | IterableDataset:
        if any(dataset is one for one in self._prepared):
            return dataset
        prepared = dataset
        if not isinstance(dataset, PreparedData):
            prepared = prepare_dataset(
                dataset,
                processing_class,
                max_seq_length=args.max_length,
                **self._trained_parts,
                text_field=args.dataset_text_field,
                formatting_func=formatting_func,
                overlong=args.overlong,
                turns=args.turns,
                num_proc=args.dataset_num_proc,
                progress=not args.disable_tqdm,
                # what is not used of a stream shows only while it is read
                announce=print if isinstance(dataset, IterableDataset) and args.process_index == 0 else None,
            )
        if args.process_index == 0 and all(
            report is not prepared.report for report in self.data_reports.values()
        ):
            say(str(prepared.report))
        self.data_reports[dataset_name] = prepared.report
        require_targets(prepared.dataset, dataset_name)
        train_set = dataset_name == "train" or args.eval_packing is None
        result = prepared.dataset
        if dataset_name == "train":
            self.rows = result
        if self._packing if train_set else args.eval_packing:
            if isinstance(result, IterableDataset):
                raise ConfigError(
                    "packing = True needs the whole data set, and this one is a stream; set packing = False"
                )
            result = pack(result, args.max_length, seed=args.seed)
            self._packs.append((result, prepared.dataset))
        self._prepared.append(result)
        return result

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        require_targets(self.train_dataset, "train")
        alpha = self.args.neftune_noise_alpha
        if alpha is not None:
            self._noise = EmbeddingNoise(base_model(self.model).get_input_embeddings(), alpha)
        self._utilisation = utilisation_of(self.model, self.train_dataset)
        self._logged = (self.tokens_seen, time.monotonic())
        deterministic = self.args.deterministic
        if self.args.device.type == "cuda" and self.args.process_index == 0 and not deterministic:
            say(f"oribi: {LEFT_OPEN}")
        try:
            with deterministic_algorithms(deterministic), self.stop_on_signal.listening():
                output = super().train(*args, **kwargs)
        finally:
            self._release_steps()
            if self._noise is not None:
                self._noise.remove()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.stop()
        self.stop_on_signal.leave(f"{self.args.output_dir}/checkpoint-{self.state.global_step}")
        return output

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        build = super()._get_dataloader
        streams = isinstance(dataset, torch.utils.data.IterableDataset)
        # without a count of targets, a row of which nothing is trained would make a mean of nothing
        counted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        shared = self.args.world_size > 1 and not (
            self.accelerator.split_batches or self.is_deepspeed_enabled
        )
        if not (shared and counted and (is_training or streams)):
            return build(dataset, *args, is_training=is_training, **kwargs)
        with held(self.accelerator, prepare=partial(rank_loader, self.accelerator)):
            return build(dataset, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        args = self.args
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return GroupedByLength(sampler, step_rows, args.seed if args.data_seed is None else args.data_seed)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate from 1.13 on takes a model that was evaluated before for one that is wrapped already
        vars(self.model).pop("_is_accelerate_prepared", None)
        prepared = super()._prepare_for_training(*args, **kwargs)
        require_wrapper(self.args, self.model, self.model_wrapped)
        return prepared

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        model = super()._wrap_model(model, training, dataloader)
        if not training or not self.args.fsdp or not self.own_loss or model is not self.model:
            return model
        if self._parameters is None:  # a 4-bit weight tells no more when it is sharded
            self._parameters = model.num_parameters(exclude_embeddings=True)
        handler = self.accelerator.ddp_handler
        options = {} if handler is None else handler.to_kwargs()
        return sharded(model, base_model(model), self.args.device, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        require_finite(self.model)
        self._writes_checkpoint = _internal_call
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        write = self.model.save_pretrained
        if isinstance(self.model, peft.PeftModel):
            template = getattr(self.processing_class, "chat_template", None)
            write = partial(
                write_adapter, self.model, chat_template=template, allow_changed_base=self._writes_checkpoint
            )
        with held(self.model, save_pretrained=write):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        record = read_record(Path(resume_from_checkpoint))
        if record is not None and record.changed and not changed_base(self.model):
            raise ConfigError(
                f"{resume_from_checkpoint} was trained on a base that was changed after it was loaded "
                f"({len(record.changed)} tensors, {record.changed[0]} the first); change it in the same way before resuming"
            )
        with self._whole_adapters(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._whole_adapters(self.model):
            super()._load_best_model()

    def _whole_adapters(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the model loads whole adapters only; transformers looks at nothing that it reads."""
        if not isinstance(model, peft.PeftModel):
            return nullcontext()
        return held(model, load_adapter=partial(load_adapter, model))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        self.guard.keep(self.state.global_step + 1, inputs)
        # a mean of the micro-batch cannot be cut into parts, and nobody knows what a loss of the user's is
        if not self.own_loss or num_items_in_batch is None or is_users(self, "compute_loss"):
            return self._micro_step(model, inputs, num_items_in_batch)
        if self._smaller is None:
            self._smaller = SmallerSteps(
                lambda part, targets: self._micro_step(model, part, targets),
                self._restart_step,
                self.args.world_size,
                plans=self._plans_memory(model),
            )
        return self._smaller(self.state.global_step, inputs, num_items_in_batch)

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], targets: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch, or of a part of one."""
        if self._noise is not None:
            self._noise.measure(inputs)
        if not self._steps_chosen:
            self._choose_steps(model)
        if isinstance(self.step_runner, StepGraphs):
            self._require_same_model()
        if self.step_runner is not None and targets is not None:
            if not model.training:  # asking is cheaper than telling a thousand modules
                model.train()
            return self.step_runner(model, inputs, targets)
        return super().training_step(model, inputs, targets)

    def _restart_step(self) -> None:
        """After a shortage of memory: gradients are zero, memory is free, and the next micro-step plans anew."""
        self._release_steps()
        self.model.zero_grad()  # accelerate's optimizer ignores the call between two steps
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _plans_memory(self, model: nn.Module) -> bool:
        """Whether what layers keep follows from the free memory; the plan takes weights for whole and lying still."""
        base = base_model(model)
        choice = getattr(getattr(base, "oribi", None), "checkpointing", False)
        return choice in (True, "auto", "oribi", "unsloth", "memory") and not is_sharded(base)

    def _release_steps(self) -> None:
        """Frees recorded graphs and what layers keep from step to step; the next training chooses again."""
        self._stop_graphs()
        self._steps_chosen = False
        if self.own_loss:
            base_model(self.model).use_fp8(False)
            base_model(self.model).release()

    def _stop_graphs(self, reason: str | None = None) -> None:
        """Frees recorded graphs; steps run as usual from now on. A reason is said."""
        if not isinstance(self.step_runner, StepGraphs):
            return
        self.step_runner = None
        vars(self.model_wrapped).pop("zero_grad", None)
        if reason is not None:
            logger.warning(
                "no CUDA graphs from step %d on: %s; steps run as usual", self.state.global_step + 1, reason
            )

    def _require_same_model(self) -> None:
        """Before a recorded step: stops the recording where it would leave out what the user has added since."""
        first = self.state.global_step != self._watched_step
        self._watched_step = self.state.global_step
        # adapters are compared once per optimizer step, hooks are looked for in every micro-step
        reason = changed_step(self) if first else None
        if reason is None and (self._watch.changed() if first else self._watch.hooked()):
            reason = self._watch.reason()
        if reason is not None:
            self._stop_graphs(reason)

    def _choose_steps(self, model: nn.Module) -> None:
        """Once, before the first step: what layers keep for backward, and how steps are computed."""
        self._steps_chosen = True
        base = base_model(model)
        if not self.own_loss:
            return
        # how a CPU is spared is nothing to read about in every run
        level = logging.INFO if base.device.type == "cuda" else logging.DEBUG
        longest = longest_row(self.train_dataset) or self.args.max_length
        tokens = self.args.per_device_train_batch_size * longest
        reliance = 1.0
        if self._smaller is not None:
            tokens, reliance = max(tokens // self._smaller.parts, longest), self._smaller.reliance
        if self._plans_memory(model):
            least = base.oribi.checkpointing == "memory"
            budget = 0 if least else int(reliance * free_bytes(base.device))
            logger.log(level, choose(base, tokens, longest, budget))
        elif is_sharded(base) and base.oribi.checkpointing == "memory":
            base.set_recompute_policy("memory")
        if self.args.fp8:
            logger.info(switch_on(base))
        if self.step_runner is None:
            scaled = self.accelerator.scaler is not None
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            reason = reason_against(model, base, optimizer, tokens, self.args.world_size, scaled)
            if reason is None and self._noise is not None:
                reason = "noise is drawn anew in every step"
            if reason is None:
                self._watch = ModelWatch(model)
                reason = changed_step(self) or self._watch.reason()
            if reason is None:
                self.step_runner = StepGraphs(model, base, optimizer)
                if "zero_grad" not in vars(model):
                    # the same effect without a walk over all modules in every step
                    model.zero_grad = optimizer.zero_grad
            logger.log(
                level, "steps run as recorded CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # transformers counts the parameters anew in every step
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # None: they are formed when they are read
        needs_logits = self.label_smoother is not None or self.compute_loss_func is not None or None
        inputs = {
            **inputs,
            "use_cache": False,
            "output_logits": needs_logits if return_outputs else bool(needs_logits),
        }
        if num_items_in_batch is not None:
            # a step whose examples were all cut down to their prompts has nothing to learn, which is no error
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        # past TRL's, which asks for per-token probabilities: Trainer's takes the loss that the model computes
        return super(trl.SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens, since = self._logged
            self._logged = (self.tokens_seen, time.monotonic())
            speed = (self.tokens_seen - tokens) / max(self._logged[1] - since, 1e-9)
            logs["tokens_per_second"] = speed
            if self._utilisation is not None:
                logs["mfu"] = self._utilisation.of(speed / self.args.world_size)
            logs["num_tokens"] = self.tokens_seen
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        args, model = self.args, self.model if model is None else model
        bits = FLAT_OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim)))
        if self.optimizer_cls_and_kwargs is not None or is_users(self, "get_optimizer_cls_and_kwargs"):
            bits = None
        if bits is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if args.embedding_learning_rate is None:
                return super().create_optimizer(model)
            kind, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = kind(self._parameter_groups(model), **options)
            return self.optimizer
        # who clips in a way of their own gets the gradients before the optimizer does
        clips_itself = is_users(self, "_clip_grad_norm") or "clip_grad_norm_" in vars(self.accelerator)
        self.optimizer = FlatAdamW(
            self._parameter_groups(model),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=None if clips_itself else args.max_grad_norm or None,
            bits=bits,
        )
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trained parameters by learning rate and weight decay."""
        decayed = set(self.get_decay_parameter_names(model))
        base, embedding_rate = base_model(model), self.args.embedding_learning_rate
        ends = {
            id(p) for m in (base.get_input_embeddings(), base.get_output_embeddings()) for p in m.parameters()
        }
        # by kind, not by value: a run that goes on may change the values, and its optimizer's groups stay the same
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((id(parameter) in ends, name in decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": embedding_rate if at_end and embedding_rate is not None else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (at_end, decays), parameters in groups.items()
        ]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        # the flat optimizer clips within its step, where the norm costs no pass over the gradients of its own
        flat = self._clipping_optimizer()
        return super()._clip_grad_norm(model) if flat is None else flat.last_grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor | float:
        flat = self._clipping_optimizer()
        if flat is not None:
            return (
                flat.last_grad_norm
            )  # a step whose norm is not finite is left out; the guard sees it at the next log
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.require_norm(norm, self.state.global_step + 1, self.model, self.args)
        return norm

    def _clipping_optimizer(self) -> FlatAdamW | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, FlatAdamW) and inner.max_grad_norm is not None else None
