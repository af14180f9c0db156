"""Sharded 4-bit codes: what processes gather equals what they loaded, byte for byte, also where the bytes look like NaNs.

`python -m oribi.selftest.gathered_codes cpu|cuda`, with torchrun's variables set, is one of the processes.
"""

import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig

from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.layer_shards import split_layers
from oribi.selftest.comparison import Comparison, failed
from oribi.selftest.processes import run_together

GROUP = "sharded codes"
ROUNDS = 3  # forward and back, as in three steps


def compare_gathered_codes() -> Iterator[Comparison]:
    """Two gloo processes on the CPU, and two GPUs if the machine has them."""
    names = {"cpu": "2 processes, gloo"}
    if torch.cuda.device_count() > 1:
        names["cuda"] = "2 GPUs, NCCL"
    for device, name in names.items():
        try:
            said, _ = run_together(["-m", "oribi.selftest.gathered_codes", device], on_gpus=device == "cuda")
            differing, checked = said.splitlines()[-1].split()
            yield Comparison(GROUP, name, float(differing), 0.0, f"differing bytes, of {int(checked):,}")
        except Exception as error:
            yield failed(GROUP, name, error)


def decoder_of_all_words() -> DecoderForCausalLM:
    """A decoder whose frozen weights contain every 16-bit word and 32-bit NaNs, as 4-bit codes can."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=576, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    decoder = build(config, device="cpu")
    generator = torch.Generator().manual_seed(11)
    for module in decoder.model.layers.modules():
        if isinstance(module, nn.Linear):
            # as many bytes as NF4 has; those of a square matrix are exactly all 16-bit words
            codes = _words(module.weight.numel() // 2, generator)
            module.weight = nn.Parameter(codes.view(-1, 1), requires_grad=False)
    return decoder.requires_grad_(False)


def _words(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` bytes: every 16-bit word, as far as they fit, then 32-bit NaNs of both signs, quiet and signalling."""
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    payload = torch.randint(1, 2**23, (max(count - len(words), 0) // 4 + 1,), generator=generator)
    signs = torch.randint(0, 2, payload.shape, generator=generator) << 31
    nans = (payload | 0x7F800000 | signs).to(torch.int32)
    return torch.cat([words, nans.view(torch.uint8)])[:count].clone()


def differing_bytes(device: torch.device) -> tuple[int, int]:
    """How many gathered bytes differ from the loaded ones, and how many were compared, forward and backward."""
    differing = checked = 0
    for lockstep in (False, True):  # where memory can be read directly, both ways
        layers = decoder_of_all_words().model.layers
        linear = [[m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]
        loaded = [[m.weight.to(device) for m in modules] for modules in linear]
        shards = split_layers(list(layers), device, dist.group.WORLD, lockstep)
        forward = [(i, 1) for i in range(len(layers))]
        backward = [(i, -1) for i in reversed(range(len(layers)))]
        for index, step in (forward + backward) * ROUNDS:
            shards.gather(index, step)
            for module, weight in zip(linear[index], loaded[index]):
                differing += int((module.weight != weight).sum())
                checked += weight.numel()
    return differing, checked


def main(kind: str) -> None:
    """Prints both counts, summed over all processes."""
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    counts = torch.tensor(differing_bytes(device), device=device)
    dist.all_reduce(counts)
    if dist.get_rank() == 0:
        print(*counts.tolist(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
