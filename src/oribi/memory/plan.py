"""Gradient checkpointing by budget: what each layer keeps for backward, chosen from the memory that is free.

Every result that a layer keeps saves the work of computing it again. With M bytes to spend, the results that save the
most time a byte come first, in as many layers as they fit; of what is left out, as much waits in host memory as can be
copied beside the computation, and the rest is computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

from oribi.kernels.attention import head_groups
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.half import MLP_TOKENS, Keep, Place
from oribi.models.mixers.attention import Attention

# share of the device's memory that no plan counts on: fragments, library workspaces, a longer batch
MARGIN = 0.06
# a layer's forward also dequantises, attends and norms: it takes so many times as long as its matrix products, and copies
# to host memory have that long (measured: 8B, 2 x 2048 tokens on an H100)
FORWARD_BY_PRODUCTS = 1.3
# where nothing can be measured: an H100 copies 49 GB/s to pinned memory while it multiplies at 650 TFLOP/s
HOST_BYTES_PER_FLOP = 49e9 / 650e12
# share of the host's free memory that activations may take
HOST_SHARE = 0.4
# moving a byte through device memory takes as long as this much arithmetic: 3.0 TB/s beside 650 TFLOP/s
FLOP_PER_DEVICE_BYTE = 650e12 / 3.0e12


@dataclass(frozen=True)
class Item:
    """One result of a layer.

    Args:
        name: its field of `Keep`.
        bytes: device memory in one layer.
        flop: arithmetic of computing it again.
    """

    name: str
    bytes: int
    flop: float


def items(decoder: DecoderForCausalLM, tokens: int, longest: int) -> list[Item]:
    """What a layer can keep, the best bargain first.

    Args:
        decoder: the model.
        tokens: tokens of a micro-batch. longest: tokens of its longest document.
    """
    config, layer = decoder.config, decoder.model.layers[0]
    width = decoder.dtype.itemsize
    hidden, attn = config.hidden_size, layer.self_attn
    heads_width = attn.sizes[0]
    inner = 2 * config.intermediate_size
    # matrix products run about twice as fast as attention does
    attention_flop = 2 * 2.0 * tokens * longest * heads_width
    found = [
        Item("attention", tokens * (heads_width * width + 4 * config.num_attention_heads), attention_flop),
        Item("qkv", tokens * sum(attn.sizes) * width, 2.0 * tokens * hidden * sum(attn.sizes)),
        Item("x_mid", tokens * hidden * width, 2.0 * tokens * heads_width * hidden),
        Item("gate_up", tokens * inner * width, 2.0 * tokens * hidden * inner),
    ]
    if layer.norms != "pre":  # a norm after a projection wants the projection's output
        found += [
            Item("o", tokens * hidden * width, 2.0 * tokens * heads_width * hidden),
            Item("down", tokens * hidden * width, tokens * hidden * inner),
        ]
    weights = config.hidden_size * (sum(attn.sizes) + heads_width + 3 * config.intermediate_size)
    # forward and backward each read half a byte of codes and write the weights
    found.append(Item("weights", weights * width, 2.0 * weights * (0.5 + width) * FLOP_PER_DEVICE_BYTE))
    return sorted(found, key=lambda item: -item.flop / item.bytes)


def plan(
    decoder: DecoderForCausalLM,
    tokens: int,
    longest: int,
    free_bytes: int,
    host_bytes: int | None = None,
    host_bytes_per_flop: float = HOST_BYTES_PER_FLOP,
) -> list[Keep]:
    """One `Keep` a layer that fits the memory.

    Args:
        decoder: the model.
        tokens, longest: as in `items`.
        free_bytes: device memory free for training's activations and workspace.
        host_bytes: free host memory; None asks this machine.
        host_bytes_per_flop: of copies to host memory beside the layers' arithmetic, as `measured_host_speed` gives it.
    """
    if host_bytes is None:
        host_bytes = psutil.virtual_memory().available
    layers = len(decoder.model.layers)
    spare = free_bytes - workspace_bytes(decoder, tokens)
    inputs = tokens * decoder.config.hidden_size * decoder.dtype.itemsize
    wanted = items(decoder, tokens, longest)
    attention = next(item.flop for item in wanted if item.name == "attention")
    # what can be copied out while the layers' forward computes
    forward = layers * (FORWARD_BY_PRODUCTS * forward_flop(decoder, tokens) + attention / 2)
    host = min(host_bytes_per_flop * forward, HOST_SHARE * host_bytes)
    if spare >= layers * inputs:
        places = {"x": spread(layers, 0, layers)}
        spare -= layers * inputs
    else:
        places = {"x": spread(0, layers, layers)}
        host -= layers * inputs
    for item in wanted:
        fits, out, taken = shares(item, spare, host, layers)
        if item.name == "gate_up" and last_waits_free(decoder, tokens):
            fits = max(fits, 1)
        spare -= taken
        host -= out * item.bytes
        places[item.name] = spread(fits, out, layers)
    return [Keep(**dict(zip(places, one))) for one in zip(*places.values())]


def shares(item: Item, spare: float, host: float, layers: int) -> tuple[int, int, float]:
    """How many layers keep a result on the device, how many in host memory, and the device memory that this takes.

    Args:
        item: the result. spare, host: bytes left on the device, and for the host.
        layers: of the model.
    """
    fits = min(layers, int(max(spare, 0) // item.bytes))
    if item.name == "weights" or fits == layers:
        return fits, 0, fits * item.bytes
    # coming back, two lie on the device; the workspace has room for all but the widest
    back = 2 * item.bytes if item.name == "gate_up" else 0
    beside = int(max(spare - back, 0) // item.bytes)
    out = min(layers - beside, int(max(host, 0) // item.bytes))
    if (back and spare < back) or beside + out <= fits:
        return fits, 0, fits * item.bytes
    return beside, out, beside * item.bytes + back


def spread(fits: int, out: int, layers: int) -> list[Place]:
    """Where each layer's result of one kind is, if the device takes `fits` of them and the host `out`.

    The host's are spread over all layers, whose work hides the copies. The last layer's result is the first to be
    needed: it never leaves, and lies where a returning one would.
    """
    if out == layers > 1:
        fits, out = 1, layers - 1
    hosts = {i * max(layers - 1, 1) // out for i in range(out)}
    others = [i for i in range(layers) if i not in hosts]
    kept = set(others[len(others) - fits :])
    return ["host" if i in hosts else "keep" if i in kept else "recompute" for i in range(layers)]


def forward_flop(decoder: DecoderForCausalLM, tokens: int) -> float:
    """Arithmetic of one layer's linear layers in forward."""
    config, attn = decoder.config, decoder.model.layers[0].self_attn
    weights = sum(attn.sizes) + attn.sizes[0] + 3 * config.intermediate_size
    return 2.0 * tokens * config.hidden_size * weights


def attention_portions(attn: Attention, tokens: int) -> int:
    """Portions of its heads in which a layer's attention runs backward."""
    queries, kv_heads = tokens * attn.sizes[0] // attn.head_dim, attn.sizes[1] // attn.head_dim
    return head_groups("flash", queries, kv_heads)


def last_waits_free(decoder: DecoderForCausalLM, tokens: int) -> bool:
    """Whether the last layer's gate|up, which its backward makes first anyhow, can stay through the loss at no cost."""
    config, width = decoder.config, decoder.dtype.itemsize
    kept = tokens * 2 * config.intermediate_size * width
    beside = loss_bytes(decoder, tokens) + kept <= backward_bytes(decoder, tokens)
    return tokens <= MLP_TOKENS and beside  # more are made in portions


def workspace_bytes(decoder: DecoderForCausalLM, tokens: int) -> int:
    """Device memory of one layer's backward and of the loss, whichever is more."""
    return max(backward_bytes(decoder, tokens), loss_bytes(decoder, tokens))


def loss_bytes(decoder: DecoderForCausalLM, tokens: int) -> int:
    """Device memory of the loss of so many tokens."""
    return tokens * decoder.config.hidden_size * decoder.dtype.itemsize * 3 + 2 * 256 * 2**20


def backward_bytes(decoder: DecoderForCausalLM, tokens: int) -> int:
    """Device memory of one layer's backward on so many tokens, what it computes again included."""
    config, width = decoder.config, decoder.dtype.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    attn = decoder.model.layers[0].self_attn
    qkv, heads = sum(attn.sizes), attn.sizes[0]
    mlp = tokens * (5 * hidden + heads + qkv) + min(tokens, MLP_TOKENS) * 3 * (hidden + inner)
    # attention's backward adds up the gradient of q in float32, and those of k and v by query head
    attention = tokens * (3 * hidden + 2 * heads + 4 * heads // attention_portions(attn, tokens) + 2 * qkv)
    activations = width * max(mlp, attention)
    return activations + width * hidden * (3 * inner + qkv)


def free_bytes(device: torch.device) -> int:
    """Memory that training may use: what is free, on a GPU also what the allocator holds without using it."""
    if device.type != "cuda":
        return int(HOST_SHARE * psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    usable = free + torch.cuda.memory_reserved(device) - allocated
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    return int(min(usable, allowed - allocated) - MARGIN * allowed)


@lru_cache
def measured_host_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes that a GPU copies to pinned host memory in the time of one operation of a large matrix product.

    Machines differ: the same GPU may have half the host link. Takes about 50 ms, once a process.
    """
    matrix = torch.randn(4096, 4096, device=device).to(dtype)
    host = torch.empty(matrix.shape, dtype=dtype, pin_memory=True)

    def seconds(work: Callable[[], object]) -> float:
        work()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        for mark in marks:
            mark.record()
            work()
        torch.cuda.synchronize(device)
        return min(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1e3

    rate = host.nbytes / seconds(lambda: host.copy_(matrix, non_blocking=True))
    return rate / (2 * 4096**3 / seconds(lambda: matrix @ matrix))


def choose(decoder: DecoderForCausalLM, tokens: int, longest: int, budget: int | None = None) -> str:
    """Sets every layer's `keep` for batches of this size, and says in one line what was chosen.

    Args:
        decoder: the model.
        tokens, longest: as in `items`.
        budget: bytes for activations and workspace; None measures what is free, 0 keeps the least there is.
    """
    budget = free_bytes(decoder.device) if budget is None else budget
    device = decoder.device
    speed = measured_host_speed(device, decoder.dtype) if device.type == "cuda" else HOST_BYTES_PER_FLOP
    keeps = plan(decoder, tokens, longest, budget, host_bytes_per_flop=speed)
    freed = decoder.offload_embedding() if keeps[0]["x"] == "host" else 0
    decoder.set_recompute_policy(keeps)
    names = ["x", *(item.name for item in items(decoder, tokens, longest))]
    also = f"; the embedding's {freed / 2**30:.1f} GiB wait in host memory" if freed else ""
    return f"{describe(keeps, names)}, for {tokens} tokens and {budget / 2**30:.1f} GiB{also}"


def describe(keeps: list[Keep], names: list[str]) -> str:
    """A plan in words: where the named results are, and in how many layers."""
    places = {}
    for place in ("keep", "host", "recompute"):
        counts = {name: sum(keep[name] == place for keep in keeps) for name in names}
        places[place] = [
            name if count == len(keeps) else f"{name} ({count} of {len(keeps)} layers)"
            for name, count in counts.items()
            if count
        ]
    words = {"keep": "on the device", "host": "in host memory", "recompute": "computed again"}
    return "activations: " + "; ".join(f"{words[p]} {', '.join(n)}" for p, n in places.items() if n)
