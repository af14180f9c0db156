"""Tiny checkpoints on disk, as the hub has them."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models.tiny import tiny_config, tiny_pair
from tests.save.tiny_export import byte_level_tokenizer


def checkpoint(
    directory: Path, model_type: str = "llama", *, shard_size: str = "5GB", dtype=None, **changes: object
) -> PreTrainedModel:
    """Writes a random model of a family with a tokenizer; returns transformers' model of it in float32."""
    config = tiny_config(model_type, **{"vocab_size": 384, "eos_token_id": 2, **changes})
    theirs = tiny_pair(config)[1].eval()
    saved = theirs if dtype is None else theirs.to(dtype)
    saved.save_pretrained(directory, max_shard_size=shard_size)
    byte_level_tokenizer().save_pretrained(directory)
    return theirs.float()


def edit_config(directory: Path, **changes: object) -> None:
    """Changes fields of config.json; None removes one."""
    path = directory / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def edit_tensors(directory: Path, change) -> None:
    """Rewrites model.safetensors with `change(tensors)`, which edits the dict in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
