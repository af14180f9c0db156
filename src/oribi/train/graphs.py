"""CUDA graphs of the micro-step: forward and backward of one batch shape, recorded once and replayed.

A small model's step is bound by the host that launches its kernels, not by the GPU that runs them. A recorded step is
one launch. What a graph fixes are addresses and shapes: batches are copied into its own input buffers, documents are
padded to a fixed number of them and a bounded length, and gradients go into the flat optimizer's buffers.

A recorded step runs no Python: neither methods of a trainer's subclass, nor hooks, nor a replaced forward. Each is a
documented way to change a training; `changed_step` and `ModelWatch` find them, and steps then run as usual.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from itertools import repeat
from operator import contains
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from oribi.graph_capture import RecordingFailed, record
from oribi.kernels.adamw import FlatAdamW
from oribi.memory.account import linear_weights
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.linear_layers import any_module_hooked

logger = logging.getLogger(__name__)

# arithmetic of a token per weight, forward and backward with recomputation
FLOP_PER_WEIGHT = 6.0
# recorded shapes that are kept; each holds its activations
MAX_GRAPHS = 16
# arithmetic of a micro-batch above which launching its kernels is hidden behind running them: about 0.7 s of an H100
HOST_BOUND_FLOP = 4e14
# and below this much the launches cost more than padding packs to a few lengths does
PADDED_FLOP = 5e13
TENSOR_INPUTS = ("input_ids", "labels", "position_ids", "cu_seq_lens_q")
# what a graph needs no copy of: the keys' documents are the queries'
OTHER_INPUTS = ("cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    targets: torch.Tensor
    loss: torch.Tensor


class StepGraphs:
    """Runs micro-steps of one model, from a recorded graph where one fits.

    The first batch of a shape runs as usual, the second is recorded, later ones are replayed. Results are those of the
    usual path: the same kernels on the same numbers.

    Args:
        model: the trained model.
        decoder: the decoder inside it.
        optimizer: its optimizer, whose gradient buffers stay where they are.
        loss_factor: of the loss: several processes take the mean of their gradients, and the targets are those of all.
    """

    def __init__(
        self, model: nn.Module, decoder: DecoderForCausalLM, optimizer: FlatAdamW, loss_factor: int = 1
    ) -> None:
        self._model, self._decoder, self._optimizer = model, decoder, optimizer
        self._failed, self._loss_factor = False, loss_factor
        self._needs_bounds = any(layer.mixer.needs_bounds for layer in decoder.model.layers)
        self._flop_per_token = FLOP_PER_WEIGHT * linear_weights(decoder)
        self._recorded: OrderedDict[tuple, _Recorded | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, model: nn.Module, inputs: dict[str, Any], targets: torch.Tensor | int) -> torch.Tensor:
        """Loss (detached scalar float32) of one micro-batch, its gradients added to the parameters' `.grad`.

        Args:
            model: ignored; trainers hand over the model they hold.
            inputs: a batch on the GPU as the collators make it.
            targets: labelled tokens of the whole optimizer step.
        """
        self._optimizer.attach_grads()  # zero_grad may have taken them from the parameters
        targets = torch.as_tensor(targets, device=inputs["input_ids"].device, dtype=torch.float32).clamp(
            min=1
        )
        if self._loss_factor > 1:
            targets = targets / self._loss_factor
        if self._needs_bounds and "cu_seq_lens_q" in inputs:  # a mixer asks the host for the documents
            return self._run(inputs, targets)
        if not set(inputs) <= {*TENSOR_INPUTS, *OTHER_INPUTS}:  # padding, say, which the host has to look at
            return self._run(inputs, targets)
        pads = inputs["input_ids"].numel() * self._flop_per_token < PADDED_FLOP
        inputs, shape = fixed_shape(inputs, pads)
        longest = dict(shape)["longest"]
        if longest:
            inputs["max_length_q"] = longest
        recorded = self._recorded.get(shape)
        if recorded is None and shape in self._recorded and not self._failed:
            recorded = self._record(inputs, shape, targets)
        if recorded is None:
            self._recorded[shape] = None
            return self._run(inputs, targets)
        self._recorded.move_to_end(shape)
        for name, buffer in recorded.inputs.items():
            if torch.is_tensor(buffer):
                buffer.copy_(inputs[name], non_blocking=True)
        recorded.targets.copy_(targets, non_blocking=True)
        self._finish_copies()
        recorded.graph.replay()
        return recorded.loss.clone()

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

    def _record(self, inputs: dict[str, Any], shape: tuple, targets: torch.Tensor) -> _Recorded | None:
        kept = [key for key, recorded in self._recorded.items() if recorded is not None]
        if len(kept) >= MAX_GRAPHS:
            del self._recorded[kept[0]]
        own = {name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()}
        own_targets = targets.clone()
        self._finish_copies()
        torch.cuda.empty_cache()  # the usual steps' cache and the graph's pool do not share memory
        try:
            graph, loss = record(lambda: self._run(own, own_targets), self._pool, own_targets.device)
        except RecordingFailed as failure:
            # most often a loss that somebody keeps with its whole graph, which ties gradients to another stream
            self._failed = True
            logger.warning("no CUDA graphs: recording a step failed (%s); steps run as usual", failure)
            return None
        self._recorded[shape] = _Recorded(graph, own, own_targets, loss)
        return self._recorded[shape]


def fixed_shape(inputs: dict[str, Any], pads: bool = False) -> tuple[dict[str, torch.Tensor], tuple]:
    """A batch with its documents padded to a fixed number, and the key under which its graph is kept.

    Args:
        inputs: a batch; `cu_seq_lens_q` [docs + 1] and `max_length_q` where it is a pack.
        pads: lengthen a pack by a document without labels to one of eight lengths an octave, 6 % on average.

    Returns:
        Tensors of the batch, and its shape as sorted (name, size) pairs with "longest", a bound on the documents.
    """
    kept = {name: inputs[name] for name in TENSOR_INPUTS if inputs.get(name) is not None}
    longest = 0
    if "cu_seq_lens_q" in kept:
        bounds, tokens = kept["cu_seq_lens_q"], kept["input_ids"].shape[1]
        documents, longest = len(bounds) - 1, int(inputs["max_length_q"])
        step = max(_power_of_two(tokens) // 16, 64)
        padding_tokens = -tokens % step if pads and "position_ids" in kept else 0
        if padding_tokens:
            kept.update(_lengthened(kept, padding_tokens))
            bounds, tokens, documents = kept["cu_seq_lens_q"], tokens + padding_tokens, documents + 1
            longest = max(longest, padding_tokens)
        if (
            longest * documents != tokens
        ):  # documents of one length are dense rows, whose shape must stay exact
            padding = bounds[-1:].expand(_power_of_two(documents) - documents)
            kept["cu_seq_lens_q"] = torch.cat([bounds, padding])  # empty documents at the end
            longest = min(_power_of_two(longest), tokens)
    shape = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    return kept, tuple(sorted({**shape, "longest": longest}.items()))


def _lengthened(pack: dict[str, torch.Tensor], padding_tokens: int) -> dict[str, torch.Tensor]:
    """The pack with one more document of `padding_tokens` tokens that nothing is learnt from."""
    ids, bounds = pack["input_ids"], pack["cu_seq_lens_q"]
    longer = {
        "input_ids": F.pad(ids, (0, padding_tokens)),
        "position_ids": torch.cat(
            [pack["position_ids"], torch.arange(padding_tokens, device=ids.device)[None]], dim=1
        ),
        "cu_seq_lens_q": torch.cat([bounds, bounds[-1:] + padding_tokens]),
    }
    if "labels" in pack:
        longer["labels"] = F.pad(pack["labels"], (0, padding_tokens), value=-100)
    return longer


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


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
            or any(p._backward_hooks or p._post_accumulate_grad_hooks for _, p in self._parameters)
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
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
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


def _watched_by_torch() -> str | None:
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection is on"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of PyTorch's watches every operation"
    return None


def _named(name: str) -> str:
    return name or "the model"
