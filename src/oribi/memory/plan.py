"""Gradient checkpointing by budget: what each layer keeps for backward, chosen from the memory that is free.

A result that a layer keeps need not be computed again. The results that save the most time per byte come first, each in
as many layers as the budget allows; of what does not fit, as much waits in host memory as can be copied beside the
computation, and the rest is computed again. Bytes and arithmetic are those of `account.py`; here are the rates.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import psutil
import torch

from oribi.launch import processes_on_machine
from oribi.memory.account import KeptResult, LayerAccount, StepAccount, step_account
from oribi.memory.layer_shape import layer_shapes
from oribi.models.core import Keep, Place
from oribi.models.decoder import DecoderForCausalLM

# share of the device's memory that no plan counts on: fragments, library workspaces, a longer batch
MARGIN = 0.06
# a layer's forward also dequantises and norms: without attention, it takes this many times as long as its products, and
# copies to host memory have that long (measured: 8B, 2 x 2048 tokens on an H100)
FORWARD_BY_PRODUCTS = 1.3
# where nothing can be measured: an H100 copies 49 GB/s to pinned memory while it multiplies at 650 TFLOP/s
HOST_BYTES_PER_FLOP = 49e9 / 650e12
# share of the host's free memory that activations may take
HOST_SHARE = 0.4
_WORDS = {"keep": "kept on the device:", "host": "moved to host memory:", "recompute": "recomputed:"}
# what a reader of the log calls them; others have names that speak for themselves
_RESULTS = {
    "x": "layer inputs", "x_mid": "MLP inputs", "gate_up": "MLP gate and up", "qkv": "attention inputs",
    "attention": "attention outputs", "weights": "16-bit copies of weights",
}  # fmt: skip
# moving a byte through device memory takes as long as this much arithmetic: 3.0 TB/s beside 650 TFLOP/s
FLOP_PER_DEVICE_BYTE = 650e12 / 3.0e12


def plan(
    step: StepAccount,
    budget: int,
    host_bytes: int | None = None,
    host_bytes_per_flop: float = HOST_BYTES_PER_FLOP,
    free: int = 0,
) -> list[Keep]:
    """One `Keep` per layer, such that the step fits the budget if any plan does.

    Args:
        step: the account of a micro-batch.
        budget: device bytes for kept results and workspace; 0 keeps the least there is.
        host_bytes: free host memory; None asks this machine, whose processes share it.
        host_bytes_per_flop: of copies to host memory beside the layers' arithmetic, as `measured_host_speed` gives it.
        free: device bytes that are free where the budget is 0. If the host's link hides the copies of all results, one more
            buffer is used of them, and nothing but weights is made twice.
    """
    if host_bytes is None:
        host_bytes = psutil.virtual_memory().available // processes_on_machine()
    layers = len(step.layers)
    inputs, spare = layers * step.input_bytes, budget - step.workspace - step.always
    # what can be copied while the layers' forward computes
    forward = sum(FORWARD_BY_PRODUCTS * layer.product_flop + layer.core_flop for layer in step.layers)
    host = min(host_bytes_per_flop * forward, HOST_SHARE * host_bytes)
    if spare >= inputs:
        places = spread(layers, 0, layers)
        spare -= inputs
    else:
        places = spread(0, layers, layers)
        host -= inputs
    keeps = [Keep(x=place) for place in places]
    results = sum(sum(layer.in_host(_all_in_host(layer))) - step.input_bytes for layer in step.layers[:-1])
    widest = max(layer.results["gate_up"].bytes for layer in step.kinds)
    hides_all = budget == 0 and host >= results and free >= step.workspace + step.always + 2 * widest
    for layer, one in by_bargain(step.kinds):
        of_kind = step.kinds[layer]
        kept, out, taken = _shares(one, spare, host, len(of_kind), hides_all)
        if one.name == "gate_up" and of_kind[-1] == layers - 1 and step.last_gate_up_is_free:
            kept = max(kept, 1)
        spare -= taken
        host -= out * one.bytes
        for index, place in zip(of_kind, spread(kept, out, len(of_kind))):
            keeps[index][one.name] = place
    return keeps


def by_bargain(kinds: Iterable[LayerAccount]) -> list[tuple[LayerAccount, KeptResult]]:
    """What layers of each kind can keep beside their input, by the time that it saves per byte, the most first."""
    found = []
    for layer in kinds:
        dequantising = layer.shape.dequantised_traffic * FLOP_PER_DEVICE_BYTE
        weights = KeptResult("weights", layer.weight_bytes, 0, dequantising, False)
        found += [(layer, weights), *((layer, one) for one in layer.results.values() if one.name != "x")]
    return sorted(found, key=lambda pair: pair[1].flop / (pair[1].bytes + pair[1].beside), reverse=True)


def _shares(
    one: KeptResult, spare: float, host: float, layers: int, hides_all: bool = False
) -> tuple[int, int, float]:
    """How many layers keep a result on the device, how many in host memory, and the device memory that this takes.

    Args:
        one: the result. spare, host: bytes left on the device, and for the host.
        layers: of the model.
        hides_all: whether all results can wait in host memory, for which no budget asks.
    """
    size = one.bytes + one.beside
    fits = min(layers, int(max(spare, 0) // size))
    if one.name == "weights" or fits == layers:
        return fits, 0, fits * size
    # coming back, two lie on the device; the workspace has place for all but the widest
    back = 2 * one.bytes if one.name == "gate_up" and not hides_all else 0
    beside = int(max(spare - back, 0) // size)
    out = min(layers - beside, int(max(host, 0) // one.bytes))
    if (back and spare < back) or beside + out <= fits:
        return fits, 0, fits * size
    return beside, out, beside * size + out * one.beside + back


def _all_in_host(layer: LayerAccount) -> Keep:
    return Keep(dict.fromkeys(layer.results, "host"))


def spread(kept: int, out: int, layers: int) -> list[Place]:
    """Where each layer's result of one kind is, if the device keeps `kept` of them and the host `out`.

    The host's are spread over all layers, whose work hides the copies. The last layer's result is the first to be
    needed: it never leaves, and lies where a returning one would.
    """
    if out == layers > 1:
        kept, out = 1, layers - 1
    hosts = {i * max(layers - 1, 1) // out for i in range(out)}
    others = [i for i in range(layers) if i not in hosts]
    keeps = set(others[len(others) - kept :])
    return ["host" if i in hosts else "keep" if i in keeps else "recompute" for i in range(layers)]


def free_device_bytes(device: torch.device) -> int:
    """Memory that training may use: what is free, on a GPU also what the allocator holds without using it."""
    if device.type != "cuda":
        return int(HOST_SHARE * psutil.virtual_memory().available // processes_on_machine())
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


def apply_plan(
    decoder: DecoderForCausalLM,
    tokens: int,
    longest: int,
    budget: int | None = None,
    context: int = 1,
    agree: Callable[[list[Keep]], list[Keep]] | None = None,
) -> str:
    """Sets every layer's `keep` for batches of this size, and says in one line what was chosen.

    Args:
        decoder: the model.
        tokens: of a micro-batch. longest: of its longest document.
        budget: as in `plan`; None measures what is free.
        context: processes that share a row, of which `tokens` are this one's.
        agree: gives all processes one plan; None: each has its own.
    """
    budget = free_device_bytes(decoder.device) if budget is None else budget
    device = decoder.device
    speed = measured_host_speed(device, decoder.dtype) if device.type == "cuda" else HOST_BYTES_PER_FLOP
    step = step_account(decoder, layer_shapes(decoder), tokens, longest, context)
    free = 0 if budget else free_device_bytes(decoder.device)
    keeps = plan(step, budget, host_bytes_per_flop=speed, free=free)
    keeps = keeps if agree is None else agree(keeps)
    freed = decoder.offload_embedding() if keeps[0]["x"] == "host" else 0
    decoder.set_recompute_policy(keeps)
    also = f"; the embedding's {freed / 2**30:.1f} GiB wait in host memory" if freed else ""
    return f"{describe(keeps)}, for {tokens} tokens and {budget / 2**30:.1f} GiB{also}"


def describe(keeps: Sequence[Keep]) -> str:
    """A plan in words: where the named results are, and in how many of the layers that have them."""
    counts = {
        place: Counter(name for keep in keeps for name in keep if keep[name] == place) for place in _WORDS
    }
    having = Counter(name for keep in keeps for name in keep)
    named = {
        place: [
            _RESULTS.get(name, name)
            if counts[place][name] == having[name]
            else f"{_RESULTS.get(name, name)} ({counts[place][name]} of {having[name]} layers)"
            for name in having
            if counts[place][name]
        ]
        for place in _WORDS
    }
    found = "; ".join(f"{_WORDS[place]} {', '.join(names)}" for place, names in named.items() if names)
    return f"activations: {found or 'all kept'}"
