"""Whether a run fits a device: refused before anything is loaded, with settings that would fit."""

from dataclasses import replace

import psutil

from oribi.config import RunConfig
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.launch import processes_here
from oribi.memory.architecture import OutsideFamilyTable
from oribi.memory.estimate import (
    HOST_LIMIT,
    Training,
    compute_dtype,
    largest_batch,
    largest_context,
    training_of,
    usable,
)
from oribi.models.unfused import UnfusedSizes

MOST_GPUS = 8  # of a machine


def refuse_what_cannot_fit(config: RunConfig, environment: Environment) -> None:
    """Before anything is loaded: stop a run on a GPU whose memory it cannot fit.

    Raises:
        ConfigError: as `require_fit`.
    """
    if environment.device.type != "cuda":
        return
    try:
        training = training_of(config, psutil.virtual_memory().available, processes_here())
    except OutsideFamilyTable as outside:
        require_weights_fit(outside.sizes, config, environment)
        return
    require_fit(training, environment.device_name, environment.memory_bytes)


def loads_in_parts(config: RunConfig, environment: Environment) -> bool:
    """Whether each process keeps only its part of the layers from the beginning: where one GPU cannot hold all of them, or
    where the processes share the memory of a host."""
    if not config.fsdp or config.full_finetuning or processes_here() == 1:
        return False
    if environment.device.type != "cuda":
        return True
    try:
        whole = training_of(config, psutil.virtual_memory().available).fixed()
    except OutsideFamilyTable:
        return False
    return sum(whole.values()) > usable(environment.memory_bytes)


def require_weights_fit(sizes: UnfusedSizes | None, config: RunConfig, environment: Environment) -> None:
    """Refuse a run of a model outside the family table whose weights alone are too large.

    Raises:
        ConfigError: they are above the device's memory.
    """
    if sizes is None:
        return  # loading says what is wrong
    parts = sizes.parts(compute_dtype(config).itemsize, config.load_in_4bit and not config.full_finetuning)
    needed, free = sum(parts.values()), usable(environment.memory_bytes)
    if needed > free:
        named = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts.items() if size)
        raise ConfigError(
            f"the weights of {config.model} alone take {needed / 2**30:.1f} GiB ({named}) and {environment.device_name} has "
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
        needed, place, room = found.host, "this machine's host memory", int(HOST_LIMIT * training.host_bytes)
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
    for name, value, applies in changes:
        if not applies:
            continue
        other = replace(
            config, **{name: value}, **({"load_in_4bit": True} if name == "full_finetuning" else {})
        )
        changed = Training(training.architecture, other, training.host_bytes, training.shards)
        tokens = changed.tokens_of(config.per_device_train_batch_size, changed.longest)
        if changed.fits(tokens, changed.longest, memory_bytes):
            found.append(f"{name}: {str(value).lower()}")
    gpus = None if found else gpus_needed(training, memory_bytes)
    return found if gpus is None else [f"fsdp: true with gpus: {gpus}, on {gpus} such GPUs"]


def gpus_for_a_row(training: Training, memory_bytes: int) -> int | None:
    """GPUs that share a row which one of them cannot train on; None where that cannot be, or more than MOST_GPUS."""
    config, layers = training.config, training.architecture.decoder.model.layers
    if config.stage != "sft" or any(layer.mixer.needs_whole_rows for layer in layers):
        return None
    for count in range(config.context_parallel + 1, MOST_GPUS + 1):
        other = replace(config, context_parallel=count)
        shared = Training(training.architecture, other, training.host_bytes, training.shards)
        if shared.fits(shared.tokens_of(1, shared.longest), shared.longest, memory_bytes):
            return count
    return None


def gpus_needed(training: Training, memory_bytes: int) -> int | None:
    """GPUs that together hold a run whose frozen weights they share; None where that cannot be, or more than MOST_GPUS."""
    config = training.config
    if config.full_finetuning or config.use_dora or config.stage != "sft":
        return None
    tokens = training.tokens_of(config.per_device_train_batch_size, training.longest)
    for count in range(max(training.shards + 1, 2), MOST_GPUS + 1):
        shared = Training(training.architecture, replace(config, fsdp=True), training.host_bytes, count)
        if shared.fits(tokens, training.longest, memory_bytes):
            return count
    return None
