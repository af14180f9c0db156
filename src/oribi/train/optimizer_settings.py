"""Whether an optimizer takes the settings that stand beside it: told before anything is loaded, and none is passed over."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from oribi.config import OPTIMIZERS, SETTINGS
from oribi.errors import ConfigError
from oribi.text import shown

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_READ = (*ADAM, "learning_rate", "weight_decay", "warmup_steps")
# an argument of an optimizer that takes it changes with one of these values, whatever its kind
_PROBES = ("0.25", "3", "true")
_FAILURES = (ImportError, ValueError, TypeError, RuntimeError)


def optimizer_text(arguments: Mapping[str, Any] | str | None) -> str | None:
    """`optim_args` as transformers reads them: "momentum=0.9,nesterov=True"."""
    if arguments is None or isinstance(arguments, str):
        return arguments
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def require_optimizer(args: Any) -> None:
    """Find what is wrong with an optimizer and its settings.

    Args:
        args: training arguments, or a run's config: optim, optim_args, adam_beta1 and so on.

    Raises:
        ConfigError: the optimizer is not installed, a setting would have no effect on it, or a value is refused.
    """
    name, text = str(getattr(args.optim, "value", args.optim)), optimizer_text(args.optim_args)
    if name not in OPTIMIZERS:
        return  # transformers names them all; those that need the model are made later
    values = {key: getattr(args, key) for key in _READ}
    given = dict(part.partition("=")[::2] for part in (text or "").replace(" ", "").split(",") if part)

    def made(optim_args: str | None = text, **changes: float) -> tuple[Any, dict[str, Any]]:
        asked = SimpleNamespace(optim=OptimizerNames(name), optim_args=optim_args, **(values | changes))
        return Trainer.get_optimizer_cls_and_kwargs(asked)

    def takes(key: str) -> bool:
        others = {other: value for other, value in given.items() if other != key}
        usual = made(optimizer_text(others))
        for value in (given[key], *_PROBES):
            try:
                if made(optimizer_text({**others, key: value})) != usual:
                    return True
            except _FAILURES:  # it was read
                return True
        return False

    try:
        idle = [f"{key} = {shown(given[key])}" for key in given if key == "weight_decay" or not takes(key)]
        if not idle:
            kind, settings = made()
            kind([torch.nn.Parameter(torch.zeros(1))], **settings)
    except _FAILURES as error:
        raise ConfigError(
            f"optim = {name}" + (f", optim_args = {text}" if text else "") + f": {error}"
        ) from error
    if idle:
        raise ConfigError(
            f"optim_args: {', '.join(idle)}: optim = {name} does not take it; learning rate, betas, epsilon and weight decay have keys of "
            "their own"
        )
    idle = [
        f"{key} = {values[key]:g}"
        for key in ADAM
        if values[key] != SETTINGS[key].default and made(**{key: SETTINGS[key].default}) == made()
    ]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: optim = {name} does not use it; leave it out")
