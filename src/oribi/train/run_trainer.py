"""What every training of a run has, whatever is trained: guard, signals, log and progress; adapters that are whole on disk."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from oribi.errors import ConfigError
from oribi.models.adapter_files import read_record
from oribi.models.load_adapter import load_adapter
from oribi.models.pretrained import DecoderPreTrainedModel
from oribi.save.adapter_files import write_adapter
from oribi.save.base import changed_base
from oribi.save.trained import require_finite
from oribi.text import say, say_notes
from oribi.train.best import EarlyStop, describe_best
from oribi.train.checkpoints import StopOnSignal
from oribi.train.determinism import LEFT_OPEN, deterministic_algorithms
from oribi.train.guard import LossGuard
from oribi.train.progress import JsonLog, Progress
from oribi.train.resumable import ResumableTrainer
from oribi.train.setup import temporarily
from oribi.train.several import ProcessesTrainer


class RunTrainer(ProcessesTrainer, ResumableTrainer):
    """transformers' `Trainer` that can be watched, stopped and resumed.

    Attributes:
        guard: stops at values that are not finite.
        stop_on_signal: ends a training after the step that runs.
    """

    guard: LossGuard
    stop_on_signal: StopOnSignal
    _writes_checkpoint = False

    def _add_callbacks(self, decode: Callable | None, searches: bool = True) -> None:
        """Guard, signals, log and progress; oribi's progress takes the place of transformers'."""
        scaled = self.accelerator.scaler is not None
        self.guard = LossGuard(
            self.train_dataset, decode, scaled=scaled, searches=searches, agree=self._agree
        )
        self.stop_on_signal = StopOnSignal(self._stop_asked)
        self.add_callback(self.guard)
        self.add_callback(self.stop_on_signal)
        self.add_callback(JsonLog())
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStop(self.args.early_stopping_patience))
        for default in (ProgressCallback, PrinterCallback):
            if any(type(callback) is default for callback in self.callback_handler.callbacks):
                self.remove_callback(default)
                self.add_callback(Progress(live=default is ProgressCallback))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        deterministic = self.args.deterministic
        if self.args.device.type == "cuda" and self.args.process_index == 0 and not deterministic:
            say(f"oribi: {LEFT_OPEN}")
        try:
            with deterministic_algorithms(deterministic), self.stop_on_signal.listening():
                output = super().train(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if self.exchange is None:
                raise
            failure = self.exchange.failure(error)
            if failure is error:
                raise
            raise failure from error
        finally:
            self.exchange = None
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.stop()
        best = describe_best(self.state, self.args)
        if best is not None and self.is_world_process_zero():
            say_notes([best])
        self.stop_on_signal.end_program(f"{self.args.output_dir}/checkpoint-{self.state.global_step}")
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        require_finite(self.model)
        self._writes_checkpoint = _internal_call
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        write = self.model.save_pretrained
        if self._writes_checkpoint and isinstance(self.model, DecoderPreTrainedModel):
            write = partial(
                PreTrainedModel.save_pretrained, self.model
            )  # it is resumed from as the model has it
        if isinstance(self.model, peft.PeftModel):
            template = getattr(self.processing_class, "chat_template", None)
            write = partial(
                write_adapter, self.model, chat_template=template, allow_changed_base=self._writes_checkpoint,
                selected_adapters=self._adapters_to_save(),
            )  # fmt: skip
        with temporarily(self.model, save_pretrained=write):
            super()._save(output_dir, state_dict)

    def _adapters_to_save(self) -> list[str] | None:
        """Names of the adapters that go into files; None writes all."""
        return None

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
        return temporarily(model, load_adapter=partial(load_adapter, model))
