"""Whether a learning-rate schedule can be made: told before anything is loaded, not when the training begins."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from oribi.errors import ConfigError
from oribi.text import one_of, shown

# what transformers passes itself
_PASSED = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
# schedule -> arguments of which it needs one
_NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
# of torch's, whose function in transformers takes any keyword
_PLATEAU = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")


def require_schedule(kind: Any, arguments: Mapping[str, Any] | str | None) -> None:
    """Find what is wrong with a schedule's arguments.

    Args:
        kind: `lr_scheduler_type`. arguments: `lr_scheduler_kwargs`; a text is JSON.

    Raises:
        ConfigError: the schedule has no such argument, lacks one, or a value is of the wrong kind.
    """
    name = str(getattr(kind, "value", kind))
    if name not in {one.value for one in SchedulerType}:
        return  # transformers names them all
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
    except ValueError as error:
        raise ConfigError(f"lr_scheduler_kwargs = {shown(arguments)}: not JSON ({error})") from error
    takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    names = [one for one in takes if one not in _PASSED]
    if name == "constant_with_warmup":
        names = []
    elif any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        names = list(_PLATEAU) if name == "reduce_lr_on_plateau" else list(given)
    unknown = [one for one in given if one not in names]
    if unknown:
        allowed = one_of(unknown[0], names) if names else "it takes no arguments"
        raise ConfigError(f"lr_scheduler_kwargs: {name} has no {unknown[0]!r}; {allowed}")
    for one, value in given.items():
        kinds = str(takes[one].annotation) if one in takes else "str"
        if isinstance(value, str) and "str" not in kinds:
            raise ConfigError(f"lr_scheduler_kwargs: {one} = {shown(value)}: must be a number")
    needed = _NEEDED.get(name, ())
    if needed and not any(given.get(one) is not None for one in needed):
        example = "min_lr_rate: 0.1" if "min_lr_rate" in needed else f"{needed[0]}: 100"
        raise ConfigError(
            f"lr_scheduler_type = {name} needs {' or '.join(needed)}: lr_scheduler_kwargs: {{{example}}}"
        )
    if len([one for one in ("min_lr", "min_lr_rate") if given.get(one) is not None]) == 2:
        raise ConfigError("lr_scheduler_kwargs: min_lr and min_lr_rate say the same thing; give one of them")
