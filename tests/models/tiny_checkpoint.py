"""Tiny checkpoints on disk, as the hub has them."""

import json
from pathlib import Path

import torch
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
    if type(theirs.config) is not type(
        config
    ):  # a text decoder that transformers has within a larger model alone
        config.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return theirs.float()


def mxfp4_checkpoint(directory: Path, **changes: object) -> None:
    """Writes a random gpt-oss model in the layout of its releases: experts in MXFP4, whatever else in bfloat16."""
    checkpoint(directory, "gpt_oss", dtype=torch.bfloat16, **changes)
    torch.manual_seed(3)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith((".gate_up_proj", "experts.down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = torch.randint(120, 126, blocks.shape[:3], dtype=torch.uint8)

    edit_tensors(directory, pack)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})


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
