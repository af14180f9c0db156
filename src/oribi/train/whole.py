"""The trained model whole again, after a training whose processes shared its weights."""

from pathlib import Path
from typing import Any

import torch

from oribi.memory.plan import free_device_bytes
from oribi.models.load import load_model
from oribi.models.unwrap import base_model
from oribi.run_record import FORM_FOLDERS
from oribi.text import say_notes


def whole_again(trainer: Any) -> Any:
    """The trained model in this process: its base is read from the files again, its adapter from what the run saved.

    Where the GPU cannot hold it, it lies in host memory, where measuring and exporting take longer.

    Args:
        trainer: of a training that is over, with a checkpoint or a saved adapter of its last step.
    """
    base = base_model(trainer.model)
    source, device = base.oribi, base.device
    base.release()
    if device.type == "cuda" and base.model.shards.whole_bytes > free_device_bytes(device):
        device = torch.device("cpu")
        say_notes(["the whole model does not fit on this GPU: it is measured and exported in host memory"])
    folder = Path(trainer.args.output_dir)
    checkpoint = folder / f"checkpoint-{trainer.state.global_step}"
    model, _ = load_model(
        str(checkpoint if checkpoint.is_dir() else folder / FORM_FOLDERS["lora"]),
        max_seq_length=source.max_seq_length,
        dtype=base.model.norm.weight.dtype,
        load_in_4bit=source.load_in_4bit,
        device_map=device,
        trust_remote_code=source.hub.trust_remote_code,
    )
    held_out = getattr(source, "held_out", None)
    if held_out is not None:
        base_model(model).oribi.held_out = held_out
    return model
