"""Whether a run fits a device: refused before anything is loaded, with settings that would fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil

from oribi.config import RunConfig
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.launch import processes_here, processes_on_machine
from oribi.memory.architecture import OutsideFamilyTable
from oribi.memory.estimate import (
    HOST_LIMIT,
    Training,
    compute_dtype,
    training_of,
    usable,
)
from oribi.models.unfused import UnfusedSizes

MOST_GPUS = 8  # of a machine
# each expert has pairs of its own, 40 million numbers a rank in a model of 30B; settings with fewer, the mildest first
FEWER_PAIRS = {"lora_r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def refuse_what_cannot_fit(config: RunConfig, environment: Environment) -> None:
    """Before anything is loaded: stop a run on a GPU whose memory it cannot fit.

    Raises:
        ConfigError: as `require_fit`.
    """
    if environment.device.type != "cuda":
        return
    try:
        free = psutil.virtual_memory().available
        training = training_of(config, free, processes_here(), processes_on_machine())
    except OutsideFamilyTable as outside:
        require_weights_fit(outside.sizes, config, environment)
        return
    require_fit(training, _named(environment), environment.left_bytes)


def _named(environment: Environment) -> str:
    """The GPU, with what it lacks for others' sake."""
    held = environment.others_bytes / 2**30
    return environment.device_name + (f", of which other programs hold {held:.1f} GiB," if held else "")


def loads_in_parts(config: RunConfig, environment: Environment) -> bool:
    """Whether each process keeps only its part of the layers from the beginning: where its GPU cannot hold all of them beside
    other programs, or where the processes share the memory of a host."""
    if not config.fsdp or config.full_finetuning or processes_here() == 1:
        return False
    if environment.device.type != "cuda":
        return True
    try:
        whole = training_of(config, psutil.virtual_memory().available).fixed()
    except OutsideFamilyTable:
        return False
    return sum(whole.values()) > usable(environment.left_bytes)


def require_weights_fit(sizes: UnfusedSizes | None, config: RunConfig, environment: Environment) -> None:
    """Refuse a run of a model outside the family table whose weights alone are too large.

    Raises:
        ConfigError: they are above the device's memory.
    """
    if sizes is None:
        return  # loading says what is wrong
    parts = sizes.parts(compute_dtype(config).itemsize, config.load_in_4bit and not config.full_finetuning)
    needed, free = sum(parts.values()), usable(environment.left_bytes)
    if needed > free:
        named = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts.items() if size)
        raise ConfigError(
            f"the weights of {config.model} alone take {needed / 2**30:.1f} GiB ({named}) and {_named(environment)} has "
            f"{free / 2**30:.1f} GiB for it. Take a smaller model"
            + ("; experts stay in 16 bits under load_in_4bit" if parts["experts"] else "")
        )


def require_fit(training: Training, gpu_name: str, memory_bytes: int) -> None:
    """Refuse a run that cannot fit, with what would.

    Raises:
        ConfigError: even with as little kept as the settings allow, the peak is above the device's memory.
    """
    config = training.config
    rows, longest = config.per_device_train_batch_size, training.longest
    tokens = training.tokens_of(rows, longest)
    if training.fits(tokens, longest, memory_bytes):
        return
    found = training.estimate(tokens, longest, memory_bytes, least=True)
    needed, place, room = found.peak, gpu_name, usable(memory_bytes)
    if needed <= room:
        needed, room = found.host, int(HOST_LIMIT * training.host_share)
        place = "this machine's host memory"
        if training.processes > 1:
            place += f", shared by {training.processes} processes,"
    proposals = _proposals(training, memory_bytes)
    raise ConfigError(
        f"{config.model} with {training.described_batch} needs about {needed / 2**30:.1f} GiB and {place} has "
        f"{room / 2**30:.1f} GiB for it. "
        + (
            f"What fits: {'; or '.join(proposals)}"
            if proposals
            else "No setting of this model fits; take a smaller one"
        )
    )


def _proposals(training: Training, memory_bytes: int) -> list[str]:
    """Settings that fit, the mildest first."""
    config, found = training.config, []
    effective = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = largest_batch(training, memory_bytes)
    if 0 < rows < config.per_device_train_batch_size:
        rows = max(n for n in range(1, rows + 1) if effective % n == 0)
        found.append(
            f"per_device_train_batch_size: {rows} with gradient_accumulation_steps: {effective // rows} (the same "
            "effective batch)"
        )
    context = largest_context(training, memory_bytes)
    if not rows and context:
        found.append(f"max_seq_length: {context} with per_device_train_batch_size: 1")
        count = gpus_for_a_row(training, memory_bytes)
        if count is not None:
            found.append(
                f"context_parallel: {count} with gpus: {count} and per_device_train_batch_size: 1, which share each row"
            )
    changes = [
        ("gradient_checkpointing", "auto", config.gradient_checkpointing in ("off", "speed", "balanced")),
        ("load_in_4bit", True, not config.load_in_4bit and not config.full_finetuning),
        ("full_finetuning", False, config.full_finetuning),
    ]
    changes += [(name, value, bool(training.adapted_stacks)) for name, value in FEWER_PAIRS.items()]
    for name, value, applies in changes:
        if not applies:
            continue
        other = replace(
            config, **{name: value}, **({"load_in_4bit": True} if name == "full_finetuning" else {})
        )
        changed = replace(training, config=other)
        tokens = changed.tokens_of(config.per_device_train_batch_size, changed.longest)
        if changed.fits(tokens, changed.longest, memory_bytes):
            found.append(f"{name}: {str(value).lower().replace(chr(39), '')}")
    if found:
        return found
    gpus = gpus_needed(training, memory_bytes)
    if gpus is not None:
        return [f"fsdp: true with gpus: {gpus}, on {gpus} such GPUs"]
    gpus = gpus_for_a_row(training, memory_bytes, fsdp=True)
    if gpus is None:
        return []
    return [
        f"fsdp: true and context_parallel: {gpus} with gpus: {gpus} and per_device_train_batch_size: 1, on {gpus} such GPUs"
    ]


def gpus_for_a_row(training: Training, memory_bytes: int, fsdp: bool = False) -> int | None:
    """GPUs that share a row which one of them cannot train on; None where that cannot be, or more than MOST_GPUS.

    Args:
        training: the run. memory_bytes: of a GPU. fsdp: whether they share the frozen weights, too.
    """
    first = training.config.context_parallel + 1
    counts = (n for n in range(first, MOST_GPUS + 1) if n >= training.processes)
    return next((n for n in counts if row_fits(training, memory_bytes, n, n, fsdp)), None)


def row_fits(training: Training, memory_bytes: int, gpus: int, context: int, fsdp: bool) -> bool:
    """Whether GPUs of a machine, of which `context` share each row, can train on the longest row alone."""
    config = training.config
    if context > 1 and not can_share_rows(training) or fsdp and not can_shard(config):
        return False
    other = replace(config, context_parallel=context, fsdp=fsdp or config.fsdp)
    shards = gpus if fsdp else training.shards
    shared = replace(training, config=other, shards=shards, processes=gpus)
    return shared.fits(shared.tokens_of(1, shared.longest), shared.longest, memory_bytes)


def can_share_rows(training: Training) -> bool:
    """Whether GPUs can share the rows of a run."""
    layers = training.architecture.decoder.model.layers
    return training.config.stage == "sft" and not any(layer.mixer.needs_whole_rows for layer in layers)


def can_shard(config: RunConfig) -> bool:
    """Whether GPUs can share the frozen weights of a run."""
    return not (config.full_finetuning or config.use_dora or config.stage != "sft")


def gpus_needed(training: Training, memory_bytes: int) -> int | None:
    """GPUs that together hold a run whose frozen weights they share; None where that cannot be, or more than MOST_GPUS."""
    config = training.config
    if not can_shard(config):
        return None
    tokens = training.tokens_of(config.per_device_train_batch_size, training.longest)
    for count in range(max(training.shards + 1, 2), MOST_GPUS + 1):
        shared = replace(training, config=replace(config, fsdp=True), shards=count, processes=count)
        if shared.fits(tokens, training.longest, memory_bytes):
            return count
    return None


def ways_to_share(training: Training, gpus: int, memory_bytes: int) -> dict[str, Any]:
    """The settings with which so many GPUs of a machine hold a run of one row each: none where each holds it alone.

    Frozen weights are shared before rows are, and a row by as few GPUs as it takes. Where nothing suffices, what holds the longest
    rows.
    """
    if training.fits(training.tokens_of(1, training.longest), training.longest, memory_bytes) or gpus == 1:
        return {}
    counts = [count for count in range(2, gpus + 1) if gpus % count == 0]
    tried = [(True, 1), *((False, count) for count in counts), *((True, count) for count in counts)]
    for fsdp, context in tried:
        if row_fits(training, memory_bytes, gpus, context, fsdp):
            break
    else:
        fsdp, context = can_shard(training.config), gpus if can_share_rows(training) else 1
    return ({"fsdp": True} if fsdp else {}) | ({"context_parallel": context} if context > 1 else {})


def largest_batch(training: Training, memory_bytes: int) -> int:
    """Most rows of max_seq_length in a micro-batch; 0 where not even one fits."""
    longest = training.longest
    return _largest(
        lambda rows: training.fits(training.tokens_of(rows, longest), longest, memory_bytes), 4096
    )


def largest_context(training: Training, memory_bytes: int) -> int:
    """Longest row of a micro-batch of one, in steps of 256 tokens, within the model's positions."""
    positions = training.architecture.config.max_position_embeddings
    steps = _largest(
        lambda n: training.fits(training.tokens_of(1, n * 256), n * 256, memory_bytes),
        max(positions // 256, 1),
    )
    return min(steps * 256, positions)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    low, high = 0, limit + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
