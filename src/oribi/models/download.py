"""Fetching a model's files from the Hugging Face hub, and what to do where that fails."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from oribi.errors import ModelError
from oribi.text import nearest

# folders of further copies of the weights
_ELSEWHERE = ["original/*", "onnx/*", "coreml/*", "openvino/*", "gguf/*"]


@dataclass(frozen=True)
class HubOptions:
    """How to ask the hub for a model.

    Args:
        token: access token. revision: branch, tag or commit. cache_dir: where downloads are kept.
        local_files_only: whether to stay off the network. force_download: whether to download what is there already.
        subfolder: of a repository or a directory.
        trust_remote_code: whether code that comes with the model is downloaded and may run.
    """

    token: str | bool | None = None
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""
    trust_remote_code: bool = False


def missing_folder(name: str) -> str:
    """That there is no such folder, and the one beside it that was probably meant."""
    path = Path(name)
    try:
        beside = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]
    except OSError:
        beside = []
    near = nearest(path.name, beside) if path.name else None
    hint = f"; did you mean {path.with_name(near)}?" if near and near != path.name else ""
    return f"there is no {'file' if path.suffix == '.gguf' else 'folder'} {name}{hint}"


def download(name: str, options: HubOptions, patterns: list[str]) -> str:
    """Files of a hub repository whose names fit the patterns, fetched where they are not in the cache; returns their folder.

    Raises:
        ModelError: naming what to do.
    """
    if options.subfolder:
        patterns = [f"{options.subfolder}/{pattern}" for pattern in patterns]
    try:
        return snapshot_download(
            name,
            token=options.token,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            force_download=options.force_download,
            allow_patterns=patterns,
            ignore_patterns=None if options.subfolder else _ELSEWHERE,
        )
    except _HUB_ERRORS as error:
        raise ModelError(_explain(name, options, error)) from error


_HUB_ERRORS = (HfHubHTTPError, HFValidationError, EntryNotFoundError, LocalEntryNotFoundError, OSError)
_EXPLANATIONS: list[tuple[type[Exception], Callable[[str, HubOptions], str]]] = [
    (
        GatedRepoError,
        lambda name, o: (
            f"{name} is gated: accept its terms on its page of the hub, then log in with `hf auth login`, set HF_TOKEN, or "
            "pass token= in Python"
        ),
    ),
    (RevisionNotFoundError, lambda name, o: f"{name} has no revision {o.revision!r}"),
    (
        RepositoryNotFoundError,
        lambda name, o: (
            f"{missing_folder(name)}, and the hub has no model {name!r}, or it is private: log in with `hf auth login`, "
            "set HF_TOKEN, or pass token= in Python"
        ),
    ),
    (HFValidationError, lambda name, o: f"{name!r} is neither a directory nor a possible name on the hub"),
    (
        LocalEntryNotFoundError,
        lambda name, o: (
            f"{missing_folder(name)}, it is not in the hub's cache, and the hub could not be reached"
        ),
    ),
]


def _explain(name: str, options: HubOptions, error: Exception) -> str:
    for kind, message in _EXPLANATIONS:
        if isinstance(error, kind):
            return message(name, options)
    return f"{name!r} could not be fetched from the hub: {error}"
