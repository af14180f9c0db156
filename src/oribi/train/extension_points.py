"""What a user has put in the way of a training step, and what a recorded step would therefore leave out.

A recorded step replays kernels. It runs no Python: neither methods of a trainer's subclass, nor hooks, nor a forward that was
replaced. Each is a documented way to change a training, so that steps run as usual where one of them is the user's.
"""

from itertools import repeat
from operator import contains
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from oribi.models.projections import any_module_hooked

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
