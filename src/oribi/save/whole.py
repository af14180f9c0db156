"""The trained model whole again, where processes share its weights."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from oribi.memory.plan import free_device_bytes
from oribi.models.load import load_model
from oribi.models.unwrap import base_model, is_sharded
from oribi.save.adapter_files import write_adapter
from oribi.text import say_notes


def whole_model(model: nn.Module) -> nn.Module:
    """The model itself or, where this process has a part of it, a whole one in this process alone.

    Its base is read from the files again, and its adapter taken over. Where the GPU cannot hold it, it lies in host memory, where
    measuring and exporting take longer.

    Args:
        model: trained, with its adapter.

    Raises:
        ExportError: the adapter is not finite, or its base was changed after it was loaded.
    """
    if not is_sharded(model):
        return model
    base = base_model(model)
    source, device = base.oribi, base.device
    base.release()
    if device.type == "cuda" and base.model.shards.whole_bytes > free_device_bytes(device):
        device = torch.device("cpu")
        say_notes(["the whole model does not fit on this GPU: it is measured and exported in host memory"])
    with tempfile.TemporaryDirectory(prefix="oribi-") as folder:
        write_adapter(model, Path(folder))
        whole, _ = load_model(
            folder,
            max_seq_length=source.max_seq_length,
            dtype=base.model.norm.weight.dtype,
            load_in_4bit=source.load_in_4bit,
            device_map=device,
            trust_remote_code=source.hub.trust_remote_code,
        )
    held_out = getattr(source, "held_out", None)
    if held_out is not None:
        base_model(whole).oribi.held_out = held_out
    return whole
