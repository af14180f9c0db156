"""The part of a trainer that makes several processes train one model, whatever computes the loss."""

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback

from oribi.errors import TrainingError
from oribi.launch import processes_here
from oribi.models.load_together import LoadTogether
from oribi.models.unwrap import is_sharded
from oribi.train.checkpoints import StopOnSignal, any_process
from oribi.train.exchange import Exchange
from oribi.train.setup import temporarily


def load_together(device: torch.device, in_parts: bool, timeout: float) -> LoadTogether | None:
    """Connects the processes of a run before its model is loaded; None where there is one.

    Args:
        device: where this process computes.
        in_parts: whether each keeps only its part of the layers; all do where one has to.
        timeout: seconds to wait for the other processes.
    """
    if processes_here() == 1:
        return None
    PartialState(
        cpu=device.type == "cpu", timeout=timedelta(seconds=timeout)
    )  # transformers takes this group over
    every = [in_parts] * processes_here()
    dist.all_gather_object(every, in_parts)  # GPUs may have different programs beside this one
    return LoadTogether(device, any(every))


class RequireExchange(TrainerCallback):
    """Stops a training whose processes would each train alone.

    Args:
        trainer: asked for its exchange before each optimizer step.
    """

    def __init__(self, trainer: "ProcessesTrainer") -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        exchange = self.trainer.exchange
        if exchange is not None and not exchange.is_reduced:
            raise TrainingError(
                f"the gradients of {args.world_size} processes were not exchanged, so that each would train alone: "
                f"{type(self.trainer).__name__}.training_step has to call super().training_step"
            )


class ProcessesTrainer(Trainer):
    """transformers' `Trainer` whose processes exchange gradients in one sum, without a wrapper around the model.

    Attributes:
        exchange: the connection of the training that runs; None in a single process, and where DeepSpeed or accelerate's
            FSDP connects them.
        stop_on_signal: tells the others that this process was asked to stop.
    """

    exchange: Exchange | None = None
    stop_on_signal: StopOnSignal

    @property
    def exchanges(self) -> bool:
        """Whether there are several processes that oribi connects."""
        elsewhere = (
            self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or getattr(self, "is_distributed_loading_by_transformers", False)
        )
        return self.args.world_size > 1 and not elsewhere

    @property
    def _loss_factor(self) -> int:
        """What transformers multiplies a loss with whose targets are those of all processes, of which a mean is taken."""
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        forget_preparation(self.model)
        if not self.exchanges:
            return super()._prepare_for_training(*args, **kwargs)
        # accelerate places the model, as it does for an evaluation, and puts no DistributedDataParallel around it
        place = partial(_place, self.accelerator.prepare_model)
        with temporarily(self.accelerator, prepare_model=place):
            prepared = super()._prepare_for_training(*args, **kwargs)
        forget_preparation(self.model)
        self.exchange = Exchange(
            [p for p in self.model.parameters() if p.requires_grad],
            getattr(self.optimizer, "optimizer", self.optimizer),
            self.args.device,
            float(self.args.ddp_timeout),
        )
        # the checkpoint has been read; and a backend takes its memory now, before a plan counts what is free
        self.exchange.begin(self.model)
        if not any(isinstance(one, RequireExchange) for one in self.callback_handler.callbacks):
            self.add_callback(RequireExchange(self))
        return prepared

    def _begin_part(self) -> None:
        """Before a micro-batch."""
        if self.exchange is not None:
            self.exchange.begin_step()

    def _exchange_gradients(self) -> None:
        """After a micro-batch, before clipping and unscaling: the last one of a step is followed by the exchange."""
        if self.exchange is not None and self.accelerator.sync_gradients:
            self.exchange.reduce(self.stop_on_signal.asked is not None)

    def _agree(self, found: Any) -> list[Any]:
        """What each process found, in all of them, which have to ask at the same time."""
        return [found] if self.exchange is None else self.exchange.agree(found)

    def _stop_asked(self, asked: bool) -> bool:
        """After a step, whether any process was asked to stop; all of them learn it in the same step."""
        if self.exchange is None:
            return any_process(self, asked)
        control = self.control
        waits_anyway = control.should_log or control.should_save or control.should_evaluate
        return self.exchange.asked_to_stop(waits_anyway or control.should_training_stop)


def forget_preparation(model: nn.Module) -> None:
    """Takes off the mark of a model that a trainer has used before.

    accelerate from 1.13 on takes a marked model for one that is wrapped already, also where it was only evaluated; the processes of
    the next trainer would each train alone.
    """
    vars(model).pop("_is_accelerate_prepared", None)


def _place(prepare_model: Any, model: nn.Module, device_placement: bool | None = None, **_: Any) -> nn.Module:
    """accelerate's preparation of a model for evaluation; what is sharded lies where it has to."""
    if is_sharded(model):
        device_placement = False
    return prepare_model(model, device_placement=device_placement, evaluation_mode=True)
