"""Pushing an export to the Hugging Face hub: written and checked here first, then uploaded as it is."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from oribi.save.accepted import PUSH_GGUF_KEYWORDS, PUSH_MERGED_KEYWORDS, Accepted, read_accepted
from oribi.save.export_gguf import save_gguf
from oribi.save.export_merged import save_merged
from oribi.save.upload import upload_folder

_ONLY_HERE = ("commit_message", "commit_description", "create_pr", "revision", "use_temp_dir", "push_to_hub")


def push_merged(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    api: Any = None,
    **keywords: Any,
) -> str | None:
    """Save as `save_merged` does and upload the folder.

    Args:
        model, tokenizer, save_method: as for `save_merged`.
        repo_id: "user/name", or a name under the token's user; created if it does not exist.
        api: a `huggingface_hub.HfApi`; None makes one with `token`.
        keywords: of `save_merged`, and token, private, commit_message, commit_description, create_pr, revision, tags.

    Returns:
        The commit's address; None in processes that are not the main one.

    Raises:
        ConfigError, ExportError: as `save_merged`; nothing is uploaded then.
    """
    return _push(save_merged, PUSH_MERGED_KEYWORDS, (model, tokenizer, save_method), repo_id, api, keywords)


def push_gguf(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    *,
    api: Any = None,
    **keywords: Any,
) -> str | None:
    """Save as `save_gguf` does and upload the folder; arguments as for `push_merged` and `save_gguf`."""
    return _push(
        save_gguf, PUSH_GGUF_KEYWORDS, (model, tokenizer, quantization_method), repo_id, api, keywords
    )


def _push(
    save: Any, known: tuple[str, ...], what: tuple, repo_id: str, api: Any, keywords: dict[str, Any]
) -> str | None:
    own = {key: value for key, value in keywords.items() if key in known}
    options: Accepted = read_accepted(own, known, f"push: {repo_id}")
    model, tokenizer, method = what
    with tempfile.TemporaryDirectory(prefix="oribi-") as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        passed = {key: value for key, value in keywords.items() if key not in _ONLY_HERE}
        if save(model, folder, tokenizer, method, **passed) is None:
            return None
        return upload_folder(folder, repo_id, options, api)
