"""Keywords of other libraries' saving calls, so that scripts run as they are; pushing an export to the Hugging Face hub.

A keyword that would change the result is honoured or refused; one that tunes the other library's own way of saving has
nothing to tune here and is taken without effect. What is pushed is written and checked here first.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from oribi.errors import ConfigError
from oribi.text import did_you_mean, say

_EITHER = ("token", "is_main_process", "state_dict", "save_function", "max_shard_size", "safe_serialization", "variant",
           "save_peft_format", "tags", "temporary_location", "maximum_memory_usage", "private", "push_to_hub")  # fmt: skip
MERGED_KEYWORDS = (*_EITHER, "datasets", "calibration_dataset", "num_calibration_samples", "max_seq_length")
GGUF_KEYWORDS = (*_EITHER, "first_conversion", "save_method", "imatrix_file", "merge_is_disposable")
_COMMIT = ("commit_message", "commit_description", "create_pr", "revision", "use_temp_dir")
_REFUSED = {
    "state_dict": "oribi saves the model's own weights; load the state into the model first",
    "variant": "oribi writes the files' standard names",
    "imatrix_file": "oribi quantises without an importance matrix",
}


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
    for key, reason in _REFUSED.items():
        if given.get(key) is not None:
            raise ConfigError(f"{call}: {key} = {str(given[key])[:60]!r} is not supported: {reason}")
    if given.get("safe_serialization", True) in (False, None):
        raise ConfigError(f"{call}: oribi writes safetensors; safe_serialization=False is not supported")
    effective = {key: value for key, value in given.items() if key in Accepted.__dataclass_fields__}
    effective["tags"] = tuple(given.get("tags") or ())
    effective["token"] = given.get("token") or None
    return Accepted(**effective)


def push(
    save: Callable[..., Any], known: tuple[str, ...], model: nn.Module, repo_id: str, tokenizer: Any, method: Any,
    *, api: Any = None, **keywords: Any,
) -> str | None:  # fmt: skip
    """Save a model into a temporary folder and upload that.

    Args:
        save: `save_merged` or `save_gguf`, with its tokenizer and method.
        known: the keywords of other libraries that it takes.
        repo_id, api, keywords: as for `push_merged`.
    """
    own = {key: value for key, value in keywords.items() if key in (*known, *_COMMIT)}
    options = read_accepted(own, (*known, *_COMMIT), f"push: {repo_id}")
    passed = {key: value for key, value in keywords.items() if key not in (*_COMMIT, "push_to_hub")}
    with tempfile.TemporaryDirectory(prefix="oribi-") as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        if save(model, folder, tokenizer, method, **passed) is None:
            return None
        return upload_folder(folder, repo_id, options, api)


def upload_folder(folder: Path, repo_id: str, options: Accepted, api: Any = None) -> str:
    """Create the repository if need be and upload a folder as one commit.

    Args:
        folder: what is uploaded, whole.
        repo_id: "user/name", or a name under the token's user.
        options: token, private, commit_message, commit_description, create_pr, revision.
        api: a `huggingface_hub.HfApi`; None makes one.

    Returns:
        The commit's address.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(token=options.token)
    repo = api.create_repo(repo_id, private=options.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        commit_message=options.commit_message or "Trained with oribi",
        commit_description=options.commit_description,
        create_pr=options.create_pr,
        revision=options.revision,
    )
    say(f"oribi: uploaded {folder.name} to {commit.commit_url}")
    return commit.commit_url
