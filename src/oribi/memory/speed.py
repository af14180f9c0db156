"""How long a training step takes on a GPU of the table, and what share of a GPU's arithmetic a running one uses.

The time of a step is arithmetic, memory traffic and a constant per layer. Each of the three was fitted once on an H100:
products run at 66 % of the data sheet's rate, memory at 90 %, and the small kernels of a layer (norms, rope, LoRA's
packing, attention's set-up) take 0.48 ms beside them. Other GPUs were not measured: the same shares of their data sheets
are assumed.

Model FLOPs utilisation (MFU) is the arithmetic that training needs, as a share of what the data sheet promises. For one
token, N weights of linear layers, H the width of all heads and C tokens that it attends to need

    4 N_frozen + 6 N_trained + 12 H C per layer

The head counts for labelled tokens only, since the loss skips the others; what is computed a second time,
dequantisation, norms and the optimizer do not count. Tokens are those of the batch, padding included.
Source: Chowdhery et al. 2022, PaLM, appendix B, less the weight gradients that frozen weights do without.
"""

import math
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch import nn

from oribi.environment import detect
from oribi.memory.account import needed_flop_per_token
from oribi.memory.architecture import Architecture
from oribi.memory.estimate import Estimate, Training
from oribi.memory.experts_shape import multiplied
from oribi.memory.gpus import PRODUCT_SHARE, Gpu, recognise
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.experts import Experts

BANDWIDTH_SHARE = 3.0 / 3.35
# rounding counted, products of frozen weights in fp8 take this fraction of the time: Llama-3.1-8B 2 x 2048, 178 and 237 ms per step
FP8_SPEED = 1.5
SECONDS_PER_LAYER = 0.48e-3
# bytes that norms, rope, activations and residuals move per token and layer in forward, in units of the widths, and how
# many times as much forward and backward are together
ELEMENTWISE_PASSES = 3.5
LOSS_PASSES = 4  # over the logits: written, read twice, written as gradient
OPTIMIZER_BYTES = 24  # moved per trained parameter


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step and what they are made of.

    Args:
        products: matrix products and attention. traffic: what memory bandwidth bounds. overhead: the constant per layer.
        tokens: of the step.
        measured: whether this GPU was measured.
    """

    products: float
    traffic: float
    overhead: float
    tokens: int
    measured: bool

    @property
    def seconds(self) -> float:
        return self.products + self.traffic + self.overhead

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(training: Training, estimate: Estimate, gpu: Gpu) -> StepTime:
    """Time of one optimizer step of a run on a GPU."""
    a, config, tokens = training.architecture, training.config, estimate.tokens
    c, layers = a.config, training.step(tokens, estimate.longest).layers
    width = a.decoder.dtype.itemsize
    # a product with a frozen weight has one product beside it in backward, one with a trained weight two
    linear = 2.0 * a.linear_weights * tokens * (3 if config.full_finetuning else 2)
    head = 4.0 * a.embedding * tokens
    # two products forward, five backward, which forms the scores again
    attention = 3.5 * sum(layer.core_flop for layer in layers)
    flop = (
        linear * (share_of_time_in_fp8(a) if config.fp8 else 1)
        + head
        + attention
        + _recomputed(training, estimate)
    )
    moved = width * sum(
        8 * shape.hidden + shape.columns(2 * [f"{shape.mixer.input}.out"] + shape.mlp_terms)
        for shape in (layer.shape for layer in layers)
    )
    traffic = ELEMENTWISE_PASSES * moved * tokens + LOSS_PASSES * c.vocab_size * tokens * width
    if config.load_in_4bit and not config.full_finetuning:
        traffic += sum(
            layer.shape.dequantised_traffic * (keep["weights"] != "keep") + layer.shape.experts_traffic
            for layer, keep in zip(layers, estimate.keeps)
        )
    bandwidth = gpu.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE
    micro = config.gradient_accumulation_steps
    if config.stage in ("dpo", "kto") or config.stage == "grpo" and config.beta:
        flop += linear / 2 + head / 2 + attention / 3.5  # the reference's forward
    if config.stage == "grpo":  # each token of the answers reads the weights
        traffic += (
            config.max_completion_length * a.weight_bytes(config.load_in_4bit, config.keep_in_16bit) / micro
        )
    return StepTime(
        products=micro * flop / (gpu.tflops * 1e12 * PRODUCT_SHARE),
        traffic=(micro * traffic + OPTIMIZER_BYTES * estimate.trainable) / bandwidth,
        overhead=micro * SECONDS_PER_LAYER * len(layers),
        tokens=micro * tokens,
        measured=gpu.name == "H100" and config.stage == "sft",
    )


def share_of_time_in_fp8(a: Architecture) -> float:
    """What is left of the time of linear layers and experts where fp8 rounds the former alone."""
    found = [(isinstance(module, Experts), weights) for _, module, weights, _ in multiplied(a.decoder.model)]
    experts = sum(weights for is_expert, weights in found if is_expert) / sum(weights for _, weights in found)
    return experts + (1 - experts) / FP8_SPEED


def _recomputed(training: Training, estimate: Estimate) -> float:
    """Arithmetic that backward repeats, the mixers' own in units of matrix products."""
    layers = training.step(estimate.tokens, estimate.longest).layers
    if not estimate.measured:
        return training.checkpointed * sum(layer.product_flop for layer in layers)
    return sum(
        result.flop
        for layer, keep in zip(layers, estimate.keeps)
        for result in layer.results.values()
        if keep[result.name] == "recompute"
    )


def optimizer_steps(training: Training, tokens: int | None, rows: int | None) -> int | None:
    """Optimizer steps of the whole run; None where neither max_steps nor the data says.

    Args:
        tokens: of the prepared training data. rows: its examples, of grpo its prompts.
    """
    config = training.config
    if config.max_steps > 0:
        return config.max_steps
    if tokens is None or rows is None:
        return None
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows *= config.num_generations or 1
    if config.packing:
        rows = math.ceil(tokens / (0.98 * config.max_seq_length))  # best fit leaves about two per cent free
    return math.ceil(math.ceil(rows / batch) * config.num_train_epochs)


@dataclass(frozen=True)
class Utilisation:
    """From speed to utilisation on one kind of GPU.

    Args:
        flop_per_token: needed forward and backward.
        peak_flops: of one GPU per second, 16-bit tensor arithmetic, dense.
    """

    flop_per_token: float
    peak_flops: float

    def of(self, tokens_per_second: float) -> float:
        """MFU, 0 to 1, of one GPU at this speed."""
        return self.flop_per_token * tokens_per_second / self.peak_flops


def utilisation_of(decoder: nn.Module, rows: Any) -> Utilisation | None:
    """How to compute the MFU of a training; None for models, rows and GPUs that it is not known for.

    Args:
        decoder: the trained model, taken out of its wrappers; only oribi's decoder is counted.
        rows: prepared rows or packs; a stream's are not known before they come.
    """
    here = detect()
    if not isinstance(decoder, DecoderForCausalLM) or not isinstance(rows, Dataset) or not len(rows):
        return None
    if not {"input_ids", "labels"} <= set(rows.column_names):
        return None
    if here.device.type != "cuda" or decoder.dtype not in (torch.bfloat16, torch.float16):
        return None
    gpu = recognise(here.device_name, here.memory_bytes)
    if gpu is None:
        return None
    trained_share, document_length = shape_of(rows)
    needed = needed_flop_per_token(decoder, trained_share, document_length)
    return Utilisation(needed, gpu.tflops * 1e12)


def shape_of(rows: Dataset) -> tuple[float, float]:
    """What the arithmetic of prepared rows (one document each) or packs (with seq_lengths) depends on.

    Returns:
        Share of the tokens that have a label, 0 to 1, and the mean length of the document that a token stands in.
    """
    columns = rows.with_format("arrow")[:]
    labels = compute.list_flatten(columns["labels"])
    trained = compute.sum(compute.not_equal(labels, -100)).as_py() or 0
    if "seq_lengths" in rows.column_names:
        lengths = compute.list_flatten(columns["seq_lengths"])
    else:
        lengths = compute.list_value_length(columns["input_ids"])
    lengths = compute.cast(lengths, "float64")
    tokens = compute.sum(lengths).as_py()
    return trained / tokens, compute.sum(compute.multiply(lengths, lengths)).as_py() / tokens
