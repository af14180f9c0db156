"""What two processes load together, for test_load_together.py: `python -m tests.models.load_together MODEL`.

Each process prints what it found as a line of JSON on standard error; the first one also on standard output.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import oribi.models.load as load
from oribi.models.load_together import LoadTogether
from oribi.tensors import SafetensorsSource
from tests.train.two_gpus import fingerprints

CPU = torch.device("cpu")
RANK = int(os.environ["RANK"])


class CountedSource(SafetensorsSource):
    """Counts the large tensors that it reads; `fails` names one that it cannot."""

    fails = ""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.read_names: list[str] = []
        found.append(self)

    def read(self, name: str, *given: Any) -> torch.Tensor:
        if "proj" in name:
            self.read_names.append(name)
        if self.fails and self.fails in name:
            raise OSError(f"{name}: the disk\nis gone")
        return super().read(name, *given)


found: list[CountedSource] = []


@contextmanager
def patched(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def scales(model: torch.nn.Module) -> list[torch.Tensor]:
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    return [t for s in states for t in (s.absmax, s.offset, s.code, s.state2.absmax, s.state2.code)]


def same(path: str, in_parts: bool, bits: str) -> dict[str, Any]:
    """Whether a model that is loaded together equals one that is loaded alone, and what was read for it."""
    settings = {"dtype": "float32", "device_map": CPU, "load_in_4bit": bits == "nf4"}
    found.clear()
    model, _ = load.load_model(path, together=LoadTogether(CPU, in_parts), **settings)
    read = [name for source in found for name in source.read_names]
    alone, _ = load.load_model(path, **settings)
    whole = [
        (a, b) for a, b in zip(model.parameters(), alone.parameters()) if not getattr(a, "is_sharded", False)
    ]
    states = [
        [p.quant_state for p in one.parameters() if hasattr(p, "quant_state")] for one in (model, alone)
    ]
    told = ("shape", "dtype", "blocksize", "quant_type", "nested")
    return {
        "read": read,
        "layers": fingerprints(model) == fingerprints(alone),
        "whole": all(torch.equal(a, b) for a, b in whole),
        "scales": all(torch.equal(a, b) for a, b in zip(scales(model), scales(alone), strict=True)),
        "states": all(getattr(a, n) == getattr(b, n) for a, b in zip(*states, strict=True) for n in told),
        "identity": model.oribi.identity == alone.oribi.identity,
        "in_parts": model.model.shards is not None,
        "notes": [note for note in model.oribi.notes if "sharded" in note],
    }


def ended(path: str) -> list[str]:
    try:
        load.load_model(path, dtype="float32", device_map=CPU, together=LoadTogether(CPU, True))
        return ["loaded"]
    except Exception as error:
        return [type(error).__name__, str(error)]


def fail(*given: Any, **named: Any) -> None:
    raise ValueError("no such thing")


def main(path: str) -> None:
    dist.init_process_group("gloo")
    result: dict[str, Any] = {}
    with patched(
        load,
        "open_weights",
        lambda location, hub, names, *more: CountedSource([location.directory / "model.safetensors"], names),
    ):
        for in_parts in (False, True):
            for bits in ("nf4", "16bit"):
                result[f"{in_parts}-{bits}"] = same(path, in_parts, bits)
        # the second process fails before the first tensor, at one of its own, and after the last one
        CountedSource.fails = result["True-nf4"]["read"][-1] if RANK == 1 else ""
        result["a tensor"] = ended(path)
        CountedSource.fails = ""
        for name in ("open_model", "identify"):
            with patched(load, name, fail if RANK == 1 else getattr(load, name)):
                result[name] = ended(path)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, result)
    if RANK == 0:
        print(json.dumps(every), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
