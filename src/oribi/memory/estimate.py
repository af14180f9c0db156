"""How much device memory a training run takes, from its config alone: no weights, no GPU.

    peak = weights + adapter and gradients + optimizer + max over moments of (kept activations + temporary tensors)

The moments are the loss, when every layer's kept results are there, and each layer's backward, when those of the layers
above are gone. Bytes are those of `account.py`; what each layer keeps is decided by `plan.py`, as in training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from oribi.config import RunConfig
from oribi.kernels.context_attention import chunk_tokens
from oribi.lora.expert_targets import resolve_all, why_layers_only
from oribi.lora.starts import PRINCIPAL_RANKS
from oribi.lora.targets import resolve_layers
from oribi.memory.account import (
    LIBRARY_BYTES,
    StepAccount,
    generation_bytes,
    step_account,
    trained_bytes,
)
from oribi.memory.architecture import Architecture, architecture_of
from oribi.memory.gpus import Gpu
from oribi.memory.layer_shape import LayerShape, layer_shapes
from oribi.memory.plan import HOST_BYTES_PER_FLOP, MARGIN, plan
from oribi.models.core import Keep
from oribi.models.fused_layer import policy
from oribi.models.host_memory import buffer_size
from oribi.models.layers import DecoderLayer

HOST_LIMIT = 0.9  # share of the free host memory that may be pinned
# of a token and word of the vocabulary: logits in 16 bits, their logarithms and both gradients
LOGITS_BYTES = 14
ANSWERS = "answers' cache"
HELD_OUT_PROMPTS = 6  # that an evaluation answers where no file says which
SCALES_SHARE = 33  # of the bytes of a 4-bit layer: one of scales beside 32 of codes
CONTEXT = int(0.6 * 2**30)  # the CUDA driver's own, outside PyTorch's allocator


@dataclass(frozen=True)
class Estimate:
    """Device memory of one training run.

    Args:
        parts: bytes of weights, adapter, gradients, optimizer, activations, temporary, and libraries, at the peak.
        at: the moment of the peak: "the loss", "a layer's backward" or "an evaluation's answers".
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
        host_bytes: host memory that activations may wait in, of all processes of a machine.
        shards: processes that share the frozen weights of the layers.
        processes: of the machine, a GPU each.
    """

    architecture: Architecture
    config: RunConfig
    host_bytes: int = 64 * 2**30
    shards: int = 1
    processes: int = 1

    @property
    def host_share(self) -> int:
        """Host memory of one process."""
        return self.host_bytes // self.processes

    @cached_property
    def adapted(self) -> dict[str, int]:
        """Name of each adapted linear layer among the layers -> its LoRA parameters."""
        c = self.config
        if c.full_finetuning:
            return {}
        return {
            name: self.rank_of(f"model.layers.{name}") * (module.in_features + module.out_features)
            for name, module in self.architecture.decoder.model.layers.named_modules()
            if isinstance(module, torch.nn.Linear)
            and check_target_module_exists(self._targets, f"model.layers.{name}")
        }

    @cached_property
    def adapted_stacks(self) -> dict[str, int]:
        """Name of each adapted stack of experts, or other parameter, among the layers -> its LoRA parameters."""
        wanted = () if self.config.full_finetuning else self._targets.target_parameters or ()
        found = {}
        for name, parameter in self.architecture.decoder.model.layers.named_parameters():
            if any(f".model.layers.{name}".endswith(f".{one}") for one in wanted):
                *stack, rows, columns = parameter.shape
                found[name] = self.rank_of(f"model.layers.{name}") * math.prod(stack) * (rows + columns)
        return found

    @cached_property
    def _targets(self) -> LoraConfig:
        """What attaching makes of the run's target_modules and of what goes with them."""
        c, decoder = self.config, self.architecture.decoder
        targets = c.target_modules if c.target_modules != ["all-linear"] else "all-linear"
        layers = resolve_layers(decoder, c.layers_to_transform, c.finetune_last_n_layers)
        layers_only = why_layers_only(c.lora_dropout, c.use_dora, c.init_lora_weights)
        given = {
            "exclude_modules": c.exclude_modules or None,
            "target_parameters": c.target_parameters or None,
        }
        targets, saved = resolve_all(
            decoder, targets, c.modules_to_save, [], self.architecture.tied, layers, layers_only, given
        )
        if targets == "all-linear":  # which PEFT replaces by their names
            targets = [name for name, one in decoder.named_modules() if isinstance(one, torch.nn.Linear)]
        return LoraConfig(target_modules=targets, modules_to_save=saved, layers_to_transform=layers, **given)

    def rank_of(self, name: str) -> int:
        """The rank of a linear layer's pair, as PEFT reads rank_pattern."""
        pattern, c = self.config.rank_pattern or {}, self.config
        halves = PRINCIPAL_RANKS if c.load_in_4bit and c.init_lora_weights.startswith("pissa") else 1
        return halves * pattern.get(get_pattern_key(list(pattern), name), c.lora_r)

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
        pairs = sum(self.adapted.values()) + sum(self.adapted_stacks.values())
        if "lm_head" in c.target_modules and not self.trains_head:  # LoRA on the head
            pairs += self.rank_of("lm_head") * sum(a.decoder.lm_head.weight.shape)
        rows = len({*c.new_tokens, *c.trainable_tokens})
        tables = (not self.trains_embedding) + (not a.tied and not self.trains_head)
        return pairs + self.whole + rows * tables * a.config.hidden_size

    @property
    def sequences_per_row(self) -> int:
        """Sequences of a batch's row: a better and a worse answer are two."""
        return 2 if self.config.stage in ("dpo", "orpo", "reward") else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: of grpo a prompt and the answer that is drawn to it."""
        c = self.config
        return c.max_prompt_length + c.max_completion_length if c.stage == "grpo" else c.max_seq_length

    def tokens_of(self, rows: int, longest: int) -> int:
        """Tokens of a micro-batch of so many rows; where processes share them, those of one process."""
        tokens, context = rows * self.sequences_per_row * longest, self.config.context_parallel
        return tokens if context == 1 else 2 * chunk_tokens(tokens, context)

    @property
    def described_batch(self) -> str:
        """A micro-batch in words."""
        rows, pairs = self.config.per_device_train_batch_size, self.sequences_per_row == 2
        context = self.config.context_parallel
        shared = f", shared by {context} GPUs" if context > 1 else ""
        return f"{rows}{' x 2 answers' if pairs else ''} x {self.longest} tokens{shared}"

    def of_stage(self, tokens: int) -> dict[str, int]:
        """Bytes beside those of a supervised step: logits that a loss forms, and the cache of the answers that are drawn."""
        c, a = self.config, self.architecture
        if c.stage == "orpo":
            return {"logits": LOGITS_BYTES * tokens * a.config.vocab_size}
        if c.stage != "grpo":
            return {}
        answers = tokens // self.longest * c.gradient_accumulation_steps
        return {ANSWERS: generation_bytes(a.decoder, answers, self.longest)}

    def samples(self) -> int:
        """Bytes of the answers to the run's `sample_prompts`, which are freed before training goes on."""
        c = self.config
        if c.sample_prompts is None:
            return 0
        path = Path(c.sample_prompts)
        rows = len(path.read_text(errors="replace").splitlines()) if path.is_file() else HELD_OUT_PROMPTS
        return generation_bytes(self.architecture.decoder, max(rows, 1), c.max_seq_length + c.sample_tokens)

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
            "weights": self._weights(c.load_in_4bit and not full),
            "adapter": 0 if full else self.trainable * 4,  # float32
            **trained_bytes(self.trainable, c.optim, width if full else 4),
        }

    def _weights(self, load_in_4bit: bool) -> int:
        """Device bytes of the weights; as `train.shards` has them where processes share them."""
        a = self.architecture
        whole = a.weight_bytes(load_in_4bit, self.config.keep_in_16bit)
        if not self.config.full_finetuning:
            whole -= a.waiting_bytes
        if self.shards == 1:
            return whole
        width, layers = a.decoder.dtype.itemsize, len(a.decoder.model.layers)
        ends = (a.embedding + a.head) * width
        scales = (whole - ends) // SCALES_SHARE if load_in_4bit else 0
        split = whole - ends - scales
        on_host = 0 if a.tied or self.trains_embedding else a.embedding * width
        return split // self.shards + 2 * split // layers + scales + ends - on_host

    @cached_property
    def shapes(self) -> list[LayerShape]:
        """Sizes of each layer with the adapter, on a GPU."""
        decoder = self.architecture.decoder
        names = {module: name for name, module in decoder.model.layers.named_modules()}

        def ranks(layer: DecoderLayer) -> dict[str, list[int]]:
            found = {
                group: [
                    self.rank_of(f"model.layers.{names[module]}")
                    for module in modules
                    if names[module] in self.adapted
                ]
                for core, _, _ in layer.parts()
                for group, modules in core.groups().items()
            }
            own = [one for one in self.adapted_stacks if one.startswith(f"{names[layer]}.")]
            return found | {one.rpartition(".")[2]: [self.rank_of(f"model.layers.{one}")] for one in own}

        return layer_shapes(decoder, ranks, torch.device("cuda"))

    def step(self, tokens: int, longest: int) -> StepAccount:
        """The account of a micro-batch."""
        shared = self.config.context_parallel
        return step_account(self.architecture.decoder, self.shapes, tokens, longest, shared, self.trains_head)

    def keeps(self, step: StepAccount, memory_bytes: int, least: bool, host_speed: float) -> list[Keep]:
        """What each layer keeps, as training decides it; arguments are those of `estimate`."""
        choice = self.config.gradient_checkpointing
        if choice in ("off", "speed"):
            return [Keep()] * len(step.layers)
        if choice == "balanced":
            return [policy("balanced", layer.shape.layer.results()) for layer in step.layers]
        taken = sum(self.fixed().values()) + sum(self.of_stage(step.layers[0].tokens).values())
        free = 0 if least else max(usable(memory_bytes) - taken, 0)
        return plan(step, 0 if choice == "memory" else free, self.host_share, host_speed, free)

    def estimate(
        self,
        tokens: int,
        longest: int,
        memory_bytes: int,
        least: bool = False,
        keeps: Sequence[Keep] | None = None,
        host_speed: float = HOST_BYTES_PER_FLOP,
    ) -> Estimate:
        """The peak for a micro-batch.

        Args:
            tokens: of a micro-batch. longest: of its longest document.
            memory_bytes: of the device.
            least: with as little kept as the setting allows, to see whether it fits at all.
            keeps: what each layer keeps; None takes what training would choose.
            host_speed: bytes that the device copies to the host in the time of one operation, as `Gpu.host_bytes_per_flop`.
        """
        fixed, step = self.fixed(), self.step(tokens, longest)
        if not self.by_hand:
            keeps = [Keep()] * len(step.layers)
            moments = step.moments_by_autograd(
                self.checkpointed, bool(self.config.lora_dropout), self.config.use_dora
            )
        else:
            keeps = keeps or self.keeps(step, memory_bytes, least, host_speed)
            moments = step.moments(keeps)
            fixed["weights"] += sum(
                layer.weight_bytes for layer, keep in zip(step.layers, keeps) if keep["weights"] == "keep"
            )
            frozen = not self.trains_embedding and not self.architecture.tied
            if keeps[0]["x"] == "host" and frozen and self.shards == 1:  # `apply_plan` moves it
                fixed["weights"] -= self.architecture.embedding * self.architecture.decoder.dtype.itemsize
        peak = max(moments, key=lambda moment: moment.bytes)
        parts = {**fixed, "activations": peak.kept, "temporary": peak.working, "libraries": LIBRARY_BYTES}
        parts |= self.of_stage(tokens)
        moment, samples = peak.name, self.samples()
        if samples > peak.bytes:  # nothing is kept for a backward while they are drawn
            parts |= {"activations": 0, "temporary": 0, ANSWERS: samples}
            moment = "an evaluation's answers"
        host = sum(
            buffer_size(size) for layer, keep in zip(step.layers, keeps) for size in layer.in_host(keep)
        )
        if not self.config.full_finetuning:
            host += self.architecture.waiting_bytes
        return Estimate(parts, moment, keeps, self.trainable, tokens, longest, self.by_hand, host)

    def fits(self, tokens: int, longest: int, memory_bytes: int) -> bool:
        """Whether a micro-batch trains on a device with this much memory, and with this host's."""
        found = self.estimate(tokens, longest, memory_bytes, least=True)
        return found.peak <= usable(memory_bytes) and found.host <= HOST_LIMIT * self.host_share


def usable(memory_bytes: int) -> int:
    """Bytes of a device that tensors may take."""
    return int(memory_bytes * (1 - MARGIN)) - CONTEXT


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What a run computes in, on a GPU."""
    return {"float16": torch.float16, "float32": torch.float32}.get(config.dtype, torch.bfloat16)


def training_of(config: RunConfig, host_bytes: int, gpus: int = 1, on_machine: int | None = None) -> Training:
    """A run by its config, the host memory of a machine, and the GPUs that it trains on.

    Args:
        config: of the run. host_bytes: that activations of all processes of a machine may wait in.
        gpus: that train together. on_machine: those of them in one machine; None: all.

    Raises:
        ModelError: there is no such model.
        OutsideFamilyTable: oribi's decoder does not cover it.
    """
    architecture = architecture_of(
        config.model,
        dtype=compute_dtype(config),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        train_for=config.train_for,
    )
    return Training(architecture, config, host_bytes, gpus if config.fsdp else 1, on_machine or gpus)


def estimate_run(training: Training, gpu: Gpu) -> Estimate:
    """The peak of a run's micro-batch on a GPU of the table."""
    longest = training.longest
    tokens = training.tokens_of(training.config.per_device_train_batch_size, longest)
    return training.estimate(tokens, longest, gpu.memory_bytes, host_speed=gpu.host_bytes_per_flop)
