"""Trainings of test_two_gpus.py, one after the other: `python -m tests.train.two_gpus MODEL FOLDER cpu|cuda MODE:BITS ...`.

MODE is one, ddp, sharded, sharded-lockstep (layers are gathered together), context (both GPUs share each row) or
context-sharded, BITS nf4 or 16bit. The first process prints what each found as a line of JSON.
"""

import gc
import hashlib
import json
import os
import random
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import nn

from oribi.lora.attach import attach_lora
from oribi.models import layer_shards
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.trainer import SFTTrainer

STEPS, ROWS_PER_STEP, LONGEST = 6, 4, 256


def rows(vocab_size: int) -> Dataset:
    """As many rows of random ids as the steps take; half of each is trained."""
    draw = random.Random(7)
    found = []
    for _ in range(STEPS * ROWS_PER_STEP):
        ids = [draw.randrange(3, vocab_size) for _ in range(draw.randint(LONGEST // 2, LONGEST))]
        half = len(ids) // 2
        found.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return Dataset.from_list(found)


def fingerprints(decoder: nn.Module) -> list[str]:
    """A hash of each layer's frozen matrices; those of a sharded model are gathered one layer at a time."""
    found = []
    for index, layer in enumerate(decoder.model.layers):
        if decoder.model.shards is not None:
            decoder.model.shards.gather(index)
        digest = hashlib.sha256()
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                weight = module.weight.detach().as_subclass(torch.Tensor).contiguous().view(-1)
                digest.update(weight.view(torch.uint8).cpu().numpy())
        found.append(digest.hexdigest())
    return found


def train(path: str, folder: str, device: str, mode: str, bits: str) -> dict[str, Any]:
    """One training; what it logged, and how many layers' frozen matrices it changed."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    model, tokenizer = load_model(path, dtype=dtype, load_in_4bit=bits == "nf4", max_seq_length=LONGEST)
    loaded = fingerprints(model)
    model = attach_lora(model, r=16, lora_alpha=16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
    shares = mode.startswith("context")
    args = SFTConfig(
        output_dir=folder, max_steps=STEPS, learning_rate=1e-4, warmup_steps=0,
        # rows that are shared lie in packs of two documents, so that a chunk has a single one or several
        per_device_train_batch_size=2 if shares else 1,
        gradient_accumulation_steps=ROWS_PER_STEP if mode == "one" else ROWS_PER_STEP // 2,
        context_parallel=2 if shares else 1,
        lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True}, fsdp=True if "sharded" in mode else None,
    )  # fmt: skip
    data = rows(model.get_base_model().config.vocab_size)
    trainer = SFTTrainer(model, args, train_dataset=data, tokenizer=tokenizer)
    trainer.remove_callback(Progress)
    trainer.train()
    decoder = model.get_base_model()
    sharded = decoder.model.shards is not None
    log = trainer.state.log_history
    return {
        "mode": mode,
        "bits": bits,
        "sharded": sharded,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "tokens_per_second": max(entry.get("tokens_per_second", 0.0) for entry in log),
        "layers": len(loaded),
        "changed_layers": sum(a != b for a, b in zip(loaded, fingerprints(decoder))),
        "own_mib": (decoder.model.shards.own_bytes if sharded else _frozen_bytes(decoder.model.layers))
        / 2**20,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0,
    }


def _frozen_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def main(path: str, folder: str, device: str, *trainings: str) -> None:
    for index, training in enumerate(trainings):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        mode, bits = training.split(":")
        alone = patch.object(layer_shards, "peer_memory", lambda *_: None)
        with alone if "lockstep" in mode else nullcontext():
            found = train(path, f"{folder}/{index}", device, mode, bits)
        gc.collect()
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
