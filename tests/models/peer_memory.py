"""One of two processes that read each other's layers: `python -m tests.models.peer_memory cpu|cuda`, with torchrun's variables set.

On a GPU both share the first one, so that one is enough to see reads from another process recorded in a CUDA graph.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn

from oribi.graph_capture import record
from oribi.models import peer_memory
from oribi.models.layer_shards import LayerShards, split_layers
from oribi.selftest.gathered_codes import decoder_of_all_words


def sums_of_layers(shards: LayerShards, linear: list[list[nn.Module]]) -> torch.Tensor:
    """Of the bytes of each layer, weighed by their place, on the way forward and back, int64 [2 layers]."""
    order = [(i, 1) for i in range(len(linear))] + [(i, -1) for i in reversed(range(len(linear)))]
    found = []
    for index, step in order:
        shards.gather(index, step)
        codes = torch.cat([module.weight.view(-1) for module in linear[index]]).to(torch.int64)
        found.append((codes * torch.arange(1, len(codes) + 1, device=codes.device)).sum())
    shards.flush()
    return torch.stack(found)


def main(kind: str) -> None:
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", 0)
    dist.init_process_group("gloo")
    if kind == "cuda":
        peer_memory._sees_others = lambda every, gpu: True
    layers = list(decoder_of_all_words().model.layers)
    linear = [[m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]
    loaded = [torch.cat([m.weight.view(-1) for m in modules]).to(device, torch.int64) for modules in linear]
    sums = [(codes * torch.arange(1, len(codes) + 1, device=device)).sum() for codes in loaded]
    expected = torch.stack([*sums, *reversed(sums)])
    shards = split_layers(layers, device, dist.group.WORLD)
    result = {"lockstep": shards.lockstep, "share": shards.own_bytes / shards.whole_bytes}
    # one process reads alone, the other not at all
    if dist.get_rank() == 0:
        result["alone"] = torch.equal(sums_of_layers(shards, linear), expected)
    dist.barrier()
    if kind == "cuda":
        sums_of_layers(shards, linear)
        pool = torch.cuda.graph_pool_handle()
        graph, found = record(lambda: sums_of_layers(shards, linear), pool, device)
        result["recorded"] = []
        for _ in range(3):
            for buffer in shards._buffers:
                buffer.zero_()
            found.zero_()
            graph.replay()
            result["recorded"].append(torch.equal(found, expected))
            result["after"] = torch.equal(sums_of_layers(shards, linear), expected)
    every = [None, None]
    dist.all_gather_object(every, result)
    if dist.get_rank() == 0:
        print(json.dumps(every), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
