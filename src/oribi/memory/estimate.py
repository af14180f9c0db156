"""How much device memory a training run takes, from its config alone: no weights, no GPU.

    peak = weights + adapter and gradients + optimizer + max over moments of (kept activations + what is in work)

The moments are the loss, when every layer's kept results are there, and each layer's backward, when those of the layers
above are gone. What a layer keeps is `models/fused_layer.py`'s, decided as in training by `train/recompute.py`; buffers
are those of `kernels/lora.py` and `kernels/cross_entropy.py`. T tokens of a micro-batch, D hidden, I MLP, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import psutil
import torch

from oribi.config import RunConfig
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.kernels.adamw import FLAT_OPTIMIZERS
from oribi.kernels.cross_entropy import CHUNK_BYTES, CHUNK_ROWS
from oribi.memory.architecture import Architecture, OutsideFamilyTable, architecture_of
from oribi.memory.gpus import Gpu
from oribi.memory.plan import MARGIN, attention_portions, plan
from oribi.models.fused_layer import POLICIES
from oribi.models.half import MLP_TOKENS, Keep
from oribi.models.host_memory import buffer_size
from oribi.models.unfused import UnfusedSizes

# cuBLAS workspaces of two streams, rotary tables, batches: what three runs of Llama-3.2-1B and Qwen2.5-0.5B on an H100
# took beyond the sums below, within 4 MiB of each other
LIBRARIES = 131 * 2**20
# a layer's backward takes so much more than the tensors named below: Llama-3.1-8B on an H100, keeping all and nothing
BACKWARD_FACTOR = 1.25
HOST_LIMIT = 0.9  # share of the free host memory that may be pinned
CONTEXT = int(0.6 * 2**30)  # the CUDA driver's own, outside PyTorch's allocator
SPARE_STEP = 64  # `kernels.lora` rounds the spare columns of a group up to this
FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"), "down": ("down_proj",),
}  # fmt: skip


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
        a, names = self.architecture, set(self.config.modules_to_save) | set(self.config.target_modules)
        return a.embedding * ("embed_tokens" in names) + (a.head or a.embedding) * ("lm_head" in names)

    @property
    def trainable(self) -> int:
        if self.config.full_finetuning:
            return self.architecture.parameters
        return len(self.architecture.decoder.model.layers) * sum(self.adapted.values()) + self.whole

    @property
    def by_hand(self) -> bool:
        """Whether `fused_layer` trains it; else PyTorch's autograd keeps what it needs."""
        c = self.config
        return not (c.full_finetuning or c.lora_dropout or c.use_dora)

    def fixed(self) -> dict[str, int]:
        """Bytes that stay through training."""
        a, c = self.architecture, self.config
        width = a.decoder.dtype.itemsize
        weights = a.weight_bytes(c.load_in_4bit and not c.full_finetuning)
        trained_width = width if c.full_finetuning else 4  # an adapter is float32
        bits = FLAT_OPTIMIZERS.get(c.optim, 32)
        state = self.trainable * (2 + 8 / 256 if bits == 8 else 8)
        return {
            "weights": weights,
            "adapter": 0 if c.full_finetuning else self.trainable * 4,
            "gradients": self.trainable * trained_width,
            "optimizer": int(state),
        }

    def spare(self, group: str) -> int:
        """Columns that a group's buffers have beside their own."""
        layer = self.architecture.decoder.model.layers[0]
        modules = [
            (name.rpartition(".")[2], module)
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in GROUPS[group]
        ]
        columns = sum(self.config.lora_r for leaf, _ in modules if leaf in self.adapted)
        columns += any(module.bias is not None for _, module in modules)
        return -(-columns // SPARE_STEP) * SPARE_STEP

    @cached_property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """Group -> (N, K, P) of its weights and spare columns."""
        config, attn = self.architecture.config, self.architecture.decoder.model.layers[0].self_attn
        d, inner = config.hidden_size, config.intermediate_size
        shapes = {
            "qkv": (sum(attn.sizes), d), "o": (d, attn.sizes[0]), "gate_up": (2 * inner, d), "down": (d, inner),
        }  # fmt: skip
        return {name: (*shape, self.spare(name)) for name, shape in shapes.items()}

    def weight_buffer(self, group: str) -> int:
        """Bytes of a group's dequantised weights with its adapter beside them."""
        n, k, p = self.groups[group]
        return (n + p) * (k + p) * self.architecture.decoder.dtype.itemsize

    def results(self, tokens: int) -> dict[str, int]:
        """Bytes of what a layer may keep, by the names of `Keep`."""
        config, decoder = self.architecture.config, self.architecture.decoder
        width, attn = decoder.dtype.itemsize, decoder.model.layers[0].self_attn
        hidden = tokens * config.hidden_size * width
        found = {
            "x": hidden,
            "qkv": tokens * (self.groups["qkv"][0] + self.groups["qkv"][2]) * width,
            "attention": tokens * attn.sizes[0] * width,
            "x_mid": hidden,
            "gate_up": tokens * (self.groups["gate_up"][0] + self.groups["gate_up"][2]) * width,
        }
        if decoder.model.layers[0].norms != "pre":
            found |= {"o": hidden, "down": hidden}
        return found

    def kept(self, keep: Keep, tokens: int) -> int:
        """Device bytes that a layer keeps from forward to backward."""
        config, width = self.architecture.config, self.architecture.decoder.dtype.itemsize
        # attention's log-sum-exp, and x A^T of each group, go with the result that they belong to
        beside = 0 if keep["attention"] == "recompute" else tokens * 4 * config.num_attention_heads
        for name, of in (("qkv", "qkv"), ("o", "x_mid"), ("gate_up", "gate_up"), ("down", "gate_up")):
            beside += tokens * self.groups[name][2] * width * (keep[of] != "recompute")
        return beside + sum(b for name, b in self.results(tokens).items() if keep[name] == "keep")

    def in_host(self, keep: Keep, tokens: int) -> list[int]:
        """Bytes of each of a layer's results that waits in host memory."""
        return [one for name, one in self.results(tokens).items() if keep[name] == "host"]

    def in_backward(self, keep: Keep, tokens: int, arriving: int) -> int:
        """Device bytes of a layer's backward beside what it kept; `arriving` come back meanwhile, for the layer below."""
        width, config = self.architecture.decoder.dtype.itemsize, self.architecture.config
        d, inner = config.hidden_size, config.intermediate_size
        portion = min(tokens, MLP_TOKENS)
        spare = self.groups["gate_up"][2] + self.groups["down"][2]
        size = width * (tokens * d + portion * (2 * d + inner + spare))
        if keep["weights"] != "keep":
            size += self.weight_buffer("gate_up") + self.weight_buffer("down")
            size += self.weight_buffer("qkv") * (keep["qkv"] == "recompute")
            size += self.weight_buffer("o") * (keep["x_mid"] == "recompute")
        for name, one in self.results(tokens).items():
            place = keep[name]
            part = portion / tokens if name in ("gate_up", "down") and place == "recompute" else 1
            size += part * one * (place != "keep")  # made there, or back from the host
        return arriving + int(max(BACKWARD_FACTOR * size, self.in_attention_backward(keep, tokens)))

    def in_attention_backward(self, keep: Keep, tokens: int) -> int:
        """Device bytes of attention's backward, which takes more than the MLP's portions on long rows."""
        width, d = self.architecture.decoder.dtype.itemsize, self.architecture.config.hidden_size
        attn = self.architecture.decoder.model.layers[0].self_attn
        sizes = attn.sizes
        portions = attention_portions(attn, tokens)
        # dy, the gradients of x_mid, a, q, k and v; for a group of heads that of q in float32, of k and v by query head
        size = tokens * width * (2 * d + sizes[0] + sum(sizes) + 4 * sizes[0] // portions)
        results = self.results(tokens)
        # what only the MLP needs is gone
        return size + sum(results[name] for name in ("x", "qkv", "attention") if keep[name] != "keep")

    def by_autograd(self, tokens: int) -> int:
        """Bytes that PyTorch's autograd keeps of one layer."""
        config, decoder = self.architecture.config, self.architecture.decoder
        width, sizes = decoder.dtype.itemsize, decoder.model.layers[0].self_attn.sizes
        d, inner = config.hidden_size, config.intermediate_size
        rooms = 2 * d + sizes[0] + inner + sum(p for _, _, p in self.groups.values())
        numbers = rooms + 3 * d + 3 * sum(sizes) + sizes[0] + 3 * inner
        dropped = (2 * d + sizes[0] + inner) * 2 if self.config.lora_dropout else 0
        return tokens * width * (numbers + dropped)

    def in_loss(self, tokens: int) -> int:
        """Bytes of the loss: a chunk of logits, and the hidden states with their gradients."""
        a = self.architecture
        width, vocab = a.decoder.dtype.itemsize, a.config.vocab_size
        rows = min(max(min(CHUNK_ROWS, CHUNK_BYTES // (vocab * width)) // 128, 1) * 128, tokens)
        size = rows * vocab * width + 4 * tokens * a.config.hidden_size * width
        if self.config.full_finetuning or "lm_head" in {
            *self.config.modules_to_save,
            *self.config.target_modules,
        }:
            size += (
                vocab * a.config.hidden_size * (4 + width)
            )  # its gradient in float32, and the head in 16 bit
        return size

    def keeps(self, tokens: int, longest: int, memory_bytes: int) -> list[Keep]:
        """What each layer keeps on a device of so much memory, as training decides it."""
        layers, choice = len(self.architecture.decoder.model.layers), self.config.gradient_checkpointing
        if choice in ("false", "speed"):
            return [Keep()] * layers
        if choice == "balanced":
            return [POLICIES["balanced"]] * layers
        budget = 0 if choice == "memory" else usable(memory_bytes) - sum(self.fixed().values())
        return plan(self.architecture.decoder, tokens, longest, budget, self.host_bytes)

    def estimate(self, tokens: int, longest: int, memory_bytes: int, least: bool = False) -> Estimate:
        """The peak for a micro-batch.

        Args:
            tokens: of a micro-batch. longest: of its longest document.
            memory_bytes: of the device.
            least: with as little kept as the setting allows, to see whether it fits at all.
        """
        fixed = self.fixed()
        layers = len(self.architecture.decoder.model.layers)
        automatic = self.config.gradient_checkpointing in ("oribi", "true")
        if not self.by_hand:
            checkpointed = self.config.gradient_checkpointing not in ("false", "speed")
            one, keeps = self.by_autograd(tokens), [Keep()] * layers
            kept = [self.results(tokens)["x"] if checkpointed else one] * layers
            work = [one * (2 if checkpointed else 1) + self.weight_buffer("gate_up")] * layers
            leaving = 0
        else:
            keeps = self.keeps(tokens, longest, 0 if least and automatic else memory_bytes)
            kept = [self.kept(keep, tokens) for keep in keeps]
            away = [sum(self.in_host(keep, tokens)) for keep in keeps]
            work = [self.in_backward(keep, tokens, below) for keep, below in zip(keeps, [0, *away])]
            # `HostMemory` holds the sources of the last two layers that it copies until backward begins
            leaving = sum([one for one in away if one][-2:])
            fixed["weights"] += sum(
                sum(map(self.weight_buffer, GROUPS)) for keep in keeps if keep["weights"] == "keep"
            )
            frozen = not self.whole and not self.architecture.tied
            if keeps[0]["x"] == "host" and frozen:  # `recompute.choose` moves it
                fixed["weights"] -= self.architecture.embedding * self.architecture.decoder.dtype.itemsize
        moments = [("the loss", sum(kept), self.in_loss(tokens) + leaving)]
        moments += [("a layer's backward", sum(kept[: i + 1]), work[i]) for i in range(layers)]
        at, activations, working = max(moments, key=lambda moment: moment[1] + moment[2])
        parts = {**fixed, "activations": activations, "in work": working, "libraries": LIBRARIES}
        host = sum(buffer_size(size) for keep in keeps for size in self.in_host(keep, tokens))
        return Estimate(parts, at, keeps, self.trainable, tokens, longest, self.by_hand, host)

    def fits(self, tokens: int, longest: int, memory_bytes: int) -> bool:
        """Whether a micro-batch trains on a device of so much memory, beside this host's."""
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
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(config.dtype, torch.bfloat16)
    try:
        architecture = architecture_of(
            config.model,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except OutsideFamilyTable as outside:
        require_weights_fit(outside.sizes, config, dtype, environment)
        return
    training = Training(architecture, config, psutil.virtual_memory().available)
    require_fit(training, environment.device_name, environment.memory_bytes)


def require_weights_fit(
    sizes: UnfusedSizes | None, config: RunConfig, dtype: torch.dtype, environment: Environment
) -> None:
    """Refuse a run of a model outside the family table whose weights alone are too large.

    Raises:
        ConfigError: they are above the device's memory.
    """
    if sizes is None:
        return  # loading says what is wrong
    parts = sizes.parts(dtype.itemsize, config.load_in_4bit and not config.full_finetuning)
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
        ("gradient_checkpointing", "oribi", config.gradient_checkpointing in ("false", "speed", "balanced")),
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
