"""How long a training step takes on a GPU of the table, from arithmetic, memory traffic and a constant a layer.

Each of the three was fitted once on an H100: products run at 66 % of the data sheet's rate, memory at 90 %, and the small
kernels of a layer (norms, rope, LoRA's packing, attention's set-up) take 0.48 ms beside them. Four runs came out within 6 %: Llama-3.1-8B
2 x 2048 258 ms, Llama-3.2-1B 2 x 2048 54.6 ms and 2 x 512 19.7 ms, Qwen2.5-0.5B 1 x 2048 23.5 ms. Other GPUs were not
measured: the same shares of their data sheets are assumed.
"""

import math
from dataclasses import dataclass

from oribi.memory.estimate import Estimate, Training
from oribi.memory.gpus import Gpu
from oribi.memory.plan import items

PRODUCT_SHARE, BANDWIDTH_SHARE = 650 / 989, 3.0 / 3.35
# attention's operations take so many times as long: 582 and 514 TFLOP/s in forward and backward of 32,768 tokens
ATTENTION_BY_PRODUCTS = 1.22
# rounding counted, products of frozen weights in fp8 take so much less time: Llama-3.1-8B 2 x 2048, 178 and 237 ms a step
FP8_SPEED = 1.5
SECONDS_A_LAYER = 0.48e-3
# bytes a token and layer that norms, rope, activations and residuals move in forward, in units of the widths, and how
# many times as much forward and backward are together
ELEMENTWISE_PASSES = 3.5
LOSS_PASSES = 4  # over the logits: written, read twice, written as gradient


@dataclass(frozen=True)
class Duration:
    """Time of one optimizer step and what it is made of, in seconds.

    Args:
        products: matrix products and attention. traffic: what memory bandwidth bounds. overhead: the constant a layer.
        tokens: of the step.
        measured: whether this GPU was measured.
    """

    products: float
    traffic: float
    overhead: float
    tokens: int
    measured: bool

    @property
    def step(self) -> float:
        return self.products + self.traffic + self.overhead

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def duration(training: Training, estimate: Estimate, gpu: Gpu) -> Duration:
    """Time of one optimizer step of a run on a GPU."""
    a, config, tokens = training.architecture, training.config, estimate.tokens
    c, layers = a.config, a.config.num_hidden_layers
    attn = a.decoder.model.layers[0].self_attn
    width, heads_width = a.decoder.dtype.itemsize, attn.sizes[0]
    forward = 2.0 * a.linear_weights * tokens
    backward = forward * (2 if config.full_finetuning else 1)
    head = 4.0 * a.embedding * tokens
    # forward 2, backward 5: half of it is masked
    attention = ATTENTION_BY_PRODUCTS * 7.0 * tokens * estimate.longest * heads_width * layers
    again = _recomputed(training, estimate)
    linear = (forward + backward) / (FP8_SPEED if config.fp8 else 1)
    products = (linear + head + attention + again) / (gpu.tflops * 1e12 * PRODUCT_SHARE)
    moved = width * (8 * c.hidden_size + 2 * sum(attn.sizes) + 3 * c.intermediate_size)
    traffic = ELEMENTWISE_PASSES * moved * tokens * layers + LOSS_PASSES * c.vocab_size * tokens * width
    if (
        config.load_in_4bit and not config.full_finetuning
    ):  # codes read and weights written, forward and backward
        again_share = sum(keep["weights"] != "keep" for keep in estimate.keeps) / layers
        traffic += 2 * again_share * a.linear_weights * (0.5 + width)
    bandwidth = gpu.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE
    micro = config.gradient_accumulation_steps
    optimizer = 24.0 * estimate.trainable / bandwidth
    return Duration(
        micro * products,
        micro * traffic / bandwidth + optimizer,
        micro * SECONDS_A_LAYER * layers,
        micro * tokens,
        gpu.name == "H100",
    )


def _recomputed(training: Training, estimate: Estimate) -> float:
    """Arithmetic that backward repeats, attention's counted as products."""
    if not estimate.measured:
        checkpointed = training.config.gradient_checkpointing not in ("false", "speed")
        return 2.0 * training.architecture.linear_weights * estimate.tokens * checkpointed
    found = items(training.architecture.decoder, estimate.tokens, estimate.longest)
    return sum(
        item.flop
        for item in found
        if item.name not in ("weights", "down")
        for keep in estimate.keeps
        if keep[item.name] == "recompute"
    )


def steps_of(training: Training, tokens: int | None, rows: int | None) -> int | None:
    """Optimizer steps of the whole run; None where neither max_steps nor the data says.

    Args:
        tokens: of the prepared training data. rows: its examples.
    """
    config = training.config
    if config.max_steps > 0:
        return config.max_steps
    if tokens is None or rows is None:
        return None
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if config.packing:
        rows = math.ceil(tokens / (0.98 * config.max_seq_length))  # best fit leaves about two per cent free
    return math.ceil(math.ceil(rows / batch) * config.num_train_epochs)
