"""CUDA graphs of the micro-step: forward and backward of one batch shape, recorded once and replayed.

A small model's step is bound by the host that launches its kernels, not by the GPU that runs them. A recorded step is
one launch. What a graph fixes are addresses and shapes: batches are copied into its own input buffers, padded to one of a few
shapes (`train/step_shapes.py`), and gradients go into the flat optimizer's buffers.

A recorded step runs no Python: neither methods of a trainer's subclass, nor hooks, nor a replaced forward. Each is a
documented way to change a training; `changed_step` and `ModelWatch` find them, and steps then run as usual.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from operator import contains
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from oribi.graph_capture import RecordingFailed, record
from oribi.kernels.adamw import FlatAdamW
from oribi.lora.starts import FirstHalf
from oribi.memory.account import linear_weights
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.linear_layers import any_module_hooked
from oribi.train.step_shapes import KNOWN, Sizes, empty_batch, fill_buffers, padded_sizes, sizes_of

logger = logging.getLogger(__name__)

# arithmetic of a token per weight, forward and backward with recomputation
FLOP_PER_WEIGHT = 6.0
# recorded steps that are kept; they share the memory of their activations
MAX_GRAPHS = 64
# arithmetic of a micro-batch above which launching its kernels is hidden behind running them: about 0.7 s of an H100
HOST_BOUND_FLOP = 4e14
# and below this much the launches cost more than lengthening a pack does
PADDED_FLOP = 1e14
# times that sizes must be expected to come again to be recorded: recording takes as long as so many usual steps, and as so many
# that are padded to a larger recorded one
PAYS, PAYS_WHERE_HELD = 4, 20


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    targets: torch.Tensor
    loss: torch.Tensor


class StepGraphs:
    """Runs micro-steps of one model, from a recorded graph where one fits.

    The first batch of a shape runs as usual, unless a recorded shape holds it. A shape that comes again is recorded if it
    will come often enough in what is left. Results are those of the usual path: the same kernels on the same numbers.

    Args:
        model: the trained model.
        decoder: the decoder inside it.
        optimizer: its optimizer, whose gradient buffers stay where they are.
        loss_factor: of the loss: several processes take the mean of their gradients, and the targets are those of all.
        left: tells how many micro-steps are left; None: there is no end.
        counts: counts micro-steps by how they ran: "replayed", "recorded" (and replayed), "eager".
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: DecoderForCausalLM,
        optimizer: FlatAdamW,
        loss_factor: int = 1,
        left: Callable[[], float] | None = None,
        counts: Counter[str] | None = None,
    ) -> None:
        self._model, self._decoder, self._optimizer = model, decoder, optimizer
        self._failed, self._loss_factor = False, loss_factor
        self._left = left or (lambda: float("inf"))
        self._needs_bounds = any(layer.mixer.needs_bounds for layer in decoder.model.layers)
        self._rotary = [one for one in decoder.model.rotary.values() if one.needs_length]
        self._flop_per_token = FLOP_PER_WEIGHT * linear_weights(decoder)
        self._recorded: OrderedDict[Sizes, _Recorded] = OrderedDict()
        self._seen: Counter[Sizes] = Counter()
        self._ran: set[Sizes] = set()  # as usual steps
        self._pool = torch.cuda.graph_pool_handle()
        self.counts = Counter() if counts is None else counts

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: torch.Tensor | int,
        trained_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss (detached scalar float32) of one micro-batch, its gradients added to the parameters' `.grad`.

        Args:
            model: ignored; trainers hand over the model they hold.
            inputs: a batch on the GPU as the collators make it.
            targets: labelled tokens of the whole optimizer step.
            trained_rows: [n] rows of hidden states whose next token is trained; None asks the labels.
        """
        self._optimizer.attach_grads()  # zero_grad may have taken them from the parameters
        targets = torch.as_tensor(targets, device=inputs["input_ids"].device, dtype=torch.float32).clamp(
            min=1
        )
        if self._loss_factor > 1:
            targets = targets / self._loss_factor
        sizes = self._sizes(inputs, trained_rows)
        if sizes is None:
            self.counts["eager"] += 1
            rows = {} if trained_rows is None else {"trained_rows": trained_rows}
            return self._run({**inputs, **rows}, targets)
        self._seen[sizes] += 1
        used = sizes if sizes in self._recorded else self._holding(sizes_of(inputs, trained_rows))
        if self._pays(sizes, PAYS if used is None else PAYS_WHERE_HELD):
            used = sizes
        if used in self._recorded:
            self._recorded.move_to_end(used)
            recorded = self._recorded[used]
            fill_buffers(recorded.inputs, inputs, trained_rows)
            recorded.targets.copy_(targets, non_blocking=True)
            self.counts["replayed"] += 1
        else:
            buffers = empty_batch(inputs, sizes)
            fill_buffers(buffers, inputs, trained_rows)
            # kernels of a shape are compiled and loaded before it is recorded
            recorded = self._record(buffers, sizes, targets) if used and sizes in self._ran else None
            self.counts["eager" if recorded is None else "recorded"] += 1
            if recorded is None:
                self._ran.add(sizes)
                return self._run(buffers, targets)
        self._finish_copies()
        recorded.graph.replay()
        return recorded.loss.clone()

    def _sizes(self, inputs: dict[str, Any], trained_rows: torch.Tensor | None) -> Sizes | None:
        """Of the graph that is for batches like this one; None where none can be, or none would come again."""
        if self._needs_bounds and "cu_seq_lens_q" in inputs:  # a mixer asks the host for the documents
            return None
        if not set(inputs) <= KNOWN:  # padding, say, which the host has to look at
            return None
        pads = inputs["input_ids"].numel() * self._flop_per_token < PADDED_FLOP
        return padded_sizes(sizes_of(inputs, trained_rows), pads, self._same_angles)

    def _holding(self, batch: Sizes) -> Sizes | None:
        """The smallest recorded sizes that hold a batch."""
        holding = (
            sizes
            for sizes in self._recorded
            if sizes.holds(batch) and self._same_angles(batch.longest, sizes.longest)
        )
        return min(holding, key=lambda sizes: (sizes.length, sizes.trained), default=None)

    def _pays(self, sizes: Sizes, times: int) -> bool:
        """Whether sizes that came before are likely to come so many times more."""
        seen = self._seen[sizes]
        return not self._failed and seen > 1 and seen / self._seen.total() * self._left() >= times

    def _same_angles(self, longest: int, bound: int) -> bool:
        return all(rotary.set_of(longest) == rotary.set_of(bound) for rotary in self._rotary)

    def _run(self, inputs: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        loss = self._model(**inputs, use_cache=False, output_logits=False, num_items_in_batch=targets).loss
        loss.backward()
        self._finish_copies()
        return loss.detach()

    def _finish_copies(self) -> None:
        """No copy on another stream may reach into a recording, or over its end."""
        for copies in (self._decoder.model.host_memory, self._decoder.model.shards):
            if copies is not None:
                copies.flush()

    def _record(self, inputs: dict[str, Any], sizes: Sizes, targets: torch.Tensor) -> _Recorded | None:
        if len(self._recorded) >= MAX_GRAPHS:
            self._recorded.popitem(last=False)
        targets = targets.clone()
        self._finish_copies()
        torch.cuda.empty_cache()  # the usual steps' cache and the graph's pool do not share memory
        try:
            graph, loss = record(lambda: self._run(inputs, targets), self._pool, targets.device)
        except RecordingFailed as failure:
            # most often a loss that somebody keeps with its whole graph, which ties gradients to another stream
            self._failed = True
            logger.warning("no CUDA graphs: recording a step failed (%s); steps run as usual", failure)
            return None
        self._recorded[sizes] = _Recorded(graph, inputs, targets, loss)
        return self._recorded[sizes]


def reason_against(
    model: nn.Module, decoder: nn.Module, optimizer: object, tokens: int, lockstep: bool, loss_scaled: bool
) -> str | None:
    """Why steps of this training are not recorded, or None if they are.

    Args:
        model, decoder: the trained model and the decoder in it.
        optimizer: the optimizer, unwrapped.
        tokens: tokens of a micro-batch. lockstep: whether processes gather each layer together. loss_scaled: whether float16
            scales its loss.
    """
    if not isinstance(decoder, DecoderForCausalLM):
        return "the model is not oribi's decoder"
    if decoder.device.type != "cuda":
        return "there is no GPU"
    if not isinstance(optimizer, FlatAdamW):
        return 'the optimizer moves its gradients; choose optim="adamw_8bit"'
    if lockstep:
        return "processes gather each layer together while it computes"
    if loss_scaled:
        return "float16 changes its loss scale from step to step"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout draws new random numbers in every step"
    if tokens * FLOP_PER_WEIGHT * linear_weights(decoder) > HOST_BOUND_FLOP:
        return "the GPU is the limit, not the host"
    return None


# methods of transformers' Trainer that run inside a micro-step
STEP_METHODS = (
    "compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager", "_prepare_inputs", "_prepare_input",
    "_prepare_context_parallel_inputs",
)  # fmt: skip
LIBRARIES = ("oribi", "transformers")
# packages whose modules compute what their weights say, and nothing beside it
MODULE_LIBRARIES = (*LIBRARIES, "torch", "peft", "bitsandbytes")


def is_users(trainer: Any, name: str) -> bool:
    """Whether a trainer's method is neither oribi's nor transformers'."""
    if name in vars(trainer):
        return True
    return getattr(getattr(type(trainer), name), "__module__", "").partition(".")[0] not in LIBRARIES


def changed_step(trainer: Any) -> str | None:
    """What of a trainer changes the loss or the inputs of a micro-step; None if nothing does."""
    for name in STEP_METHODS:
        if hasattr(type(trainer), name) and is_users(trainer, name):
            return f"{name} is your own"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is given"
    if trainer.label_smoother is not None:
        return "label_smoothing_factor is set"
    if "backward" in vars(trainer.accelerator):
        return "the accelerator's backward is your own"
    if trainer.args.torch_empty_cache_steps is not None:
        return "torch_empty_cache_steps is set"
    return None


class ModelWatch:
    """Notices what a recorded step of a model would leave out, and what has changed since it was recorded.

    Args:
        model: the trained model, which stays the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules())
        # the same dictionaries are filled when a hook is registered
        self._hooks = [
            hooks
            for _, module in self._modules
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        self._attributes = [vars(module) for _, module in self._modules]
        # quantised codes can neither be trained nor have a gradient, and each look at one takes 10 us: bitsandbytes
        # answers it in Python
        self._parameters = [
            (name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()
        ]
        self._tuners = [module for _, module in self._modules if isinstance(module, BaseTunerLayer)]
        self._handles = -1  # the first look looks
        self._dropouts = [module for _, module in self._modules if isinstance(module, nn.Dropout)]
        self._state = self._adapter_state()

    def hooked(self) -> bool:
        """Whether a module or a parameter has a hook: two numbers are compared where none was registered since the last
        look, because every hook of PyTorch's has a handle, and handles are numbered.
        """
        if self._handles == RemovableHandle.next_id:
            return False
        found = (
            any(self._hooks)
            or any_module_hooked()
            or any(_is_hooked(parameter) for _, parameter in self._parameters)
        )
        if not found:
            self._handles = RemovableHandle.next_id
        return found

    def changed(self) -> bool:
        """Whether `reason` may have one to give: cheap enough for every step."""
        return (
            self.hooked()
            or any(map(contains, self._attributes, repeat("forward")))
            or _watched_by_torch() is not None
            or self._state != self._adapter_state()
        )

    def reason(self) -> str | None:
        """Why a step of the model must not be recorded, or not be replayed any more; None if it may."""
        if any_module_hooked():
            return "hooks are registered for all modules"
        for name, module in self._modules:
            found = module._forward_hooks or module._forward_pre_hooks
            if found or module._backward_hooks or module._backward_pre_hooks:
                return f"{_named(name)} has a hook"
            if "forward" in vars(module):
                return f"forward of {_named(name)} was replaced"
            if type(module).__module__.partition(".")[0] not in MODULE_LIBRARIES:
                return f"{_named(name)} is a {type(module).__name__} of your own"
        for name, parameter in self._parameters:
            if _is_hooked(parameter):
                return f"{name} has a hook on its gradient"
        if self._state != self._adapter_state():
            return "adapters were switched, scaled, frozen or unfrozen"
        return _watched_by_torch()

    def _adapter_state(self) -> list[Any]:
        return [
            [dict(vars(tuner).get("scaling", ())) for tuner in self._tuners],
            [(t._active_adapter, t._disable_adapters, len(t.merged_adapters)) for t in self._tuners],
            [dropout.p for dropout in self._dropouts],
            [parameter.requires_grad for _, parameter in self._parameters],
        ]


def _is_hooked(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a hook that may do what a recording cannot."""
    hooks = (parameter._backward_hooks or {}).values()
    return bool(parameter._post_accumulate_grad_hooks) or any(type(hook) is not FirstHalf for hook in hooks)


def _watched_by_torch() -> str | None:
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection is on"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of PyTorch's watches every operation"
    return None


def _named(name: str) -> str:
    return name or "the model"
