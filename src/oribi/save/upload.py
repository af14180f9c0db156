"""Uploading a finished folder to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from oribi.save.accepted import Accepted
from oribi.text import say


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
