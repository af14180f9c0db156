"""How much device memory a training run takes, from its config alone: no weights, no GPU.

    peak = weights + adapter and gradients + optimizer + max over moments of (kept activations + temporary tensors)

The moments are the loss, when every layer's kept results are there, and each layer's backward, when those of the layers
above are gone. Bytes are those of `account.py`; what each layer keeps is decided by `plan.py`, as in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import psutil
import torch

from oribi.config import RunConfig
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.memory.account import (
    LIBRARY_BYTES,
    LayerAccount,
    LayerShape,
    StepAccount,
    layer_shape,
    trained_bytes,
)
from oribi.memory.architecture import Architecture, OutsideFamilyTable, architecture_of
from oribi.memory.gpus import Gpu
from oribi.memory.plan import MARGIN, plan
from oribi.models.fused_layer import policy
from oribi.models.half import Keep
from oribi.models.host_memory import buffer_size
from oribi.models.unfused import UnfusedSizes

HOST_LIMIT = 0.9  # share of the free host memory that may be pinned
CONTEXT = int(0.6 * 2**30)  # the CUDA driver's own, outside PyTorch's allocator
GROUP_NAMES = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"), "down": ("down_proj",),
}  # fmt: skip
FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Estimate:
    """Device memory of one training run.

    Args:
        parts: bytes of weights, adapter, gradients, optimizer, activations, in work, and libraries, at the peak.
        at: the moment of the peak: "the loss" or "a layer's backward".
        keeps: what each layer keeps.
        trainable: trained parameters.
        tokens, longest: of a micro-batch, and of its longest document.
        measured: whether a run of this kind was measured; the others are sums of what autograd keeps.
        host: pinned host memory, in bytes, of what waits there between forward and backward.
    """

    parts: dict[str, int]
    at: str
    keeps: Sequence[Keep]
    trainable: int
    tokens: int
    longest: int
    measured: bool = True
    host: int = 0

    @property
    def peak(self) -> int:
        """Allocated bytes at the peak."""
        return sum(self.parts.values())


@dataclass
class Training:
    """One run as memory sees it.

    Args:
        architecture: the model, in the run's compute dtype.
        config: the run.
        host_bytes: host memory that activations may wait in.
    """

    architecture: Architecture
    config: RunConfig
    host_bytes: int = 64 * 2**30

    @cached_property
    def adapted(self) -> dict[str, int]:
        """Leaf name of each adapted linear layer -> its LoRA parameters in one layer."""
        c = self.config
        if c.full_finetuning:
            return {}
        found: dict[str, int] = {}
        for name, module in self.architecture.decoder.model.layers[0].named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            leaf = name.rpartition(".")[2]
            if c.target_modules == ["all-linear"] or {leaf, *FUSED_NAMES.get(leaf, ())} & set(
                c.target_modules
            ):
                found[leaf] = c.lora_r * (module.in_features + module.out_features)
        return found

    @cached_property
    def whole(self) -> int:
        """Parameters trained whole beside the adapter."""
        a = self.architecture
        return a.embedding * self.trains_embedding + a.head * self.trains_head

    @property
    def trains_embedding(self) -> bool:
        """Whether the embeddings are trained whole, which a tied head is with them."""
        saved = set(self.config.modules_to_save)
        named = "embed_tokens" in {*saved, *self.config.target_modules}
        return self.config.full_finetuning or named or (self.architecture.tied and "lm_head" in saved)

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained whole."""
        if self.architecture.tied:
            return self.trains_embedding
        return self.config.full_finetuning or "lm_head" in self.config.modules_to_save

    @property
    def trainable(self) -> int:
        a, c = self.architecture, self.config
        if c.full_finetuning:
            return a.parameters
        pairs = len(a.decoder.model.layers) * sum(self.adapted.values())
        if "lm_head" in c.target_modules and not self.trains_head:  # LoRA on the head
            pairs += c.lora_r * sum(a.decoder.lm_head.weight.shape)
        return pairs + self.whole

    @property
    def by_hand(self) -> bool:
        """Whether `fused_layer` trains it; else PyTorch's autograd keeps what it needs."""
        c = self.config
        return not (c.full_finetuning or c.lora_dropout or c.use_dora)

    @property
    def checkpointed(self) -> bool:
        """Whether layers that autograd differentiates are computed again in backward."""
        return self.config.gradient_checkpointing not in ("off", "speed")

    def fixed(self) -> dict[str, int]:
        """Bytes that stay through training."""
        c, width = self.config, self.architecture.decoder.dtype.itemsize
        full = c.full_finetuning
        return {
            "weights": self.architecture.weight_bytes(c.load_in_4bit and not full),
            "adapter": 0 if full else self.trainable * 4,  # float32
            **trained_bytes(self.trainable, c.optim, width if full else 4),
        }

    @cached_property
    def shape(self) -> LayerShape:
        """Sizes of a layer with the adapter, on a GPU."""
        ranks = {
            group: [self.config.lora_r] * sum(name in self.adapted for name in names)
            for group, names in GROUP_NAMES.items()
        }
        return layer_shape(self.architecture.decoder, ranks, torch.device("cuda"))

    def step(self, tokens: int, longest: int) -> StepAccount:
        """The account of a micro-batch."""
        layer = LayerAccount(self.shape, tokens, longest)
        return StepAccount(layer, self.architecture.config.vocab_size, self.trains_head)

    def keeps(self, step: StepAccount, memory_bytes: int) -> list[Keep]:
        """What each layer keeps on a device with this much memory, as training decides it."""
        layers, choice = len(self.architecture.decoder.model.layers), self.config.gradient_checkpointing
        if choice in ("off", "speed"):
            return [Keep()] * layers
        if choice == "balanced":
            return [policy("balanced", step.layer.shape.layer.results())] * layers
        budget = 0 if choice == "memory" else usable(memory_bytes) - sum(self.fixed().values())
        return plan(step, layers, budget, self.host_bytes)

    def estimate(
        self,
        tokens: int,
        longest: int,
        memory_bytes: int,
        least: bool = False,
        keeps: Sequence[Keep] | None = None,
    ) -> Estimate:
        """The peak for a micro-batch.

        Args:
            tokens: of a micro-batch. longest: of its longest document.
            memory_bytes: of the device.
            least: with as little kept as the setting allows, to see whether it fits at all.
            keeps: what each layer keeps; None takes what training would choose.
        """
        fixed, step = self.fixed(), self.step(tokens, longest)
        layers = len(self.architecture.decoder.model.layers)
        if not self.by_hand:
            keeps = [Keep()] * layers
            moments = step.moments_by_autograd(
                layers, self.checkpointed, bool(self.config.lora_dropout), self.config.use_dora
            )
        else:
            automatic = self.config.gradient_checkpointing == "auto"
            keeps = keeps or self.keeps(step, 0 if least and automatic else memory_bytes)
            moments = step.moments(keeps)
            fixed["weights"] += sum(keep["weights"] == "keep" for keep in keeps) * step.layer.weight_bytes
            frozen = not self.trains_embedding and not self.architecture.tied
            if keeps[0]["x"] == "host" and frozen:  # `apply_plan` moves it
                fixed["weights"] -= self.architecture.embedding * self.architecture.decoder.dtype.itemsize
        peak = max(moments, key=lambda moment: moment.bytes)
        parts = {**fixed, "activations": peak.kept, "in work": peak.working, "libraries": LIBRARY_BYTES}
        host = sum(buffer_size(size) for keep in keeps for size in step.layer.in_host(keep))
        return Estimate(parts, peak.name, keeps, self.trainable, tokens, longest, self.by_hand, host)

    def fits(self, tokens: int, longest: int, memory_bytes: int) -> bool:
        """Whether a micro-batch trains on a device with this much memory, and with this host's."""
        found = self.estimate(tokens, longest, memory_bytes, least=True)
        return found.peak <= usable(memory_bytes) and found.host <= HOST_LIMIT * self.host_bytes


def usable(memory_bytes: int) -> int:
    """Bytes of a device that tensors may take."""
    return int(memory_bytes * (1 - MARGIN)) - CONTEXT


def largest_batch(training: Training, memory_bytes: int) -> int:
    """Most rows of max_seq_length in a micro-batch; 0 where not even one fits."""
    longest = training.config.max_seq_length
    return _largest(lambda rows: training.fits(rows * longest, longest, memory_bytes), 4096)


def largest_context(training: Training, memory_bytes: int) -> int:
    """Longest row of a micro-batch of one, in steps of 256 tokens, within the model's positions."""
    positions = training.architecture.config.max_position_embeddings
    steps = _largest(lambda n: training.fits(n * 256, n * 256, memory_bytes), max(positions // 256, 1))
    return min(steps * 256, positions)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    low, high = 0, limit + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def refuse_what_cannot_fit(config: RunConfig, environment: Environment) -> None:
    """Before anything is loaded: stop a run on a GPU whose memory it cannot fit.

    Raises:
        ConfigError: as `require_fit`.
    """
    if environment.device.type != "cuda":
        return
    try:
        training = training_of(config, psutil.virtual_memory().available)
    except OutsideFamilyTable as outside:
        require_weights_fit(outside.sizes, config, environment)
        return
    require_fit(training, environment.device_name, environment.memory_bytes)


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What a run computes in, on a GPU."""
    return {"float16": torch.float16, "float32": torch.float32}.get(config.dtype, torch.bfloat16)


def training_of(config: RunConfig, host_bytes: int) -> Training:
    """A run by its config and the host memory that activations may wait in.

    Raises:
        ModelError: there is no such model.
        OutsideFamilyTable: oribi's decoder does not cover it.
    """
    architecture = architecture_of(
        config.model,
        dtype=compute_dtype(config),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return Training(architecture, config, host_bytes)


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
    rows, longest = config.per_device_train_batch_size, config.max_seq_length
    if training.fits(rows * longest, longest, memory_bytes):
        return
    found = training.estimate(rows * longest, longest, memory_bytes, least=True)
    needed, place, room = found.peak, gpu_name, usable(memory_bytes)
    if needed <= room:
        needed, place, room = found.host, "this machine's host memory", int(HOST_LIMIT * training.host_bytes)
    proposals = _proposals(training, memory_bytes)
    raise ConfigError(
        f"{config.model} with {rows} x {longest} tokens needs about {needed / 2**30:.1f} GiB and {place} has "
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
        changed = Training(training.architecture, other, training.host_bytes)
        tokens = config.per_device_train_batch_size * config.max_seq_length
        if changed.fits(tokens, config.max_seq_length, memory_bytes):
            found.append(f"{name}: {str(value).lower()}")
    return found


def estimate_run(training: Training, gpu: Gpu) -> Estimate:
    """The peak of a run's micro-batch on a GPU of the table."""
    longest = training.config.max_seq_length
    tokens = training.config.per_device_train_batch_size * longest
    return training.estimate(tokens, longest, gpu.memory_bytes)
