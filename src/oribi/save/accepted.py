"""Keywords of other libraries' saving calls, so that scripts run as they are.

A keyword that would change the result is honoured or refused; one that tunes the other library's own way of saving has
nothing to tune here and is taken without effect.
"""

from dataclasses import dataclass
from typing import Any

from oribi.errors import ConfigError
from oribi.text import did_you_mean

_EITHER = ("token", "is_main_process", "state_dict", "save_function", "max_shard_size", "safe_serialization", "variant",
           "save_peft_format", "tags", "temporary_location", "maximum_memory_usage", "private", "push_to_hub")  # fmt: skip
MERGED_KEYWORDS = (*_EITHER, "datasets", "calibration_dataset", "num_calibration_samples", "max_seq_length")
GGUF_KEYWORDS = (*_EITHER, "first_conversion", "save_method", "imatrix_file", "merge_is_disposable")
_HUB = ("use_temp_dir", "commit_message", "commit_description", "create_pr", "revision")
PUSH_MERGED_KEYWORDS = (*MERGED_KEYWORDS, *_HUB)
PUSH_GGUF_KEYWORDS = (*GGUF_KEYWORDS, *_HUB)


@dataclass(frozen=True)
class Accepted:
    """The keywords that have an effect."""

    is_main_process: bool = True
    push_to_hub: bool = False
    save_method: str | None = None
    token: str | None = None
    private: bool | None = None
    tags: tuple[str, ...] = ()
    commit_message: str | None = None
    commit_description: str | None = None
    create_pr: bool = False
    revision: str | None = None


def read_accepted(given: dict[str, Any], known: tuple[str, ...], call: str) -> Accepted:
    """The keywords of a call.

    Raises:
        ConfigError: an unknown keyword, or one that asks for what oribi does not do.
    """
    for key in given:
        if key not in known:
            raise ConfigError(f"{call} has no keyword {key!r}{did_you_mean(key, known)}")
    refusals = {
        "state_dict": "oribi saves the model's own weights; load the state into the model first",
        "variant": "oribi writes the files' standard names",
        "imatrix_file": "oribi quantises without an importance matrix",
    }
    for key, reason in refusals.items():
        if given.get(key) is not None:
            raise ConfigError(f"{call}: {key} = {str(given[key])[:60]!r} is not supported: {reason}")
    if given.get("safe_serialization", True) in (False, None):
        raise ConfigError(f"{call}: oribi writes safetensors; safe_serialization=False is not supported")
    effective = {key: value for key, value in given.items() if key in Accepted.__dataclass_fields__}
    effective["tags"] = tuple(given.get("tags") or ())
    effective["token"] = given.get("token") or None
    return Accepted(**effective)
