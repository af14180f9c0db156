"""Model FLOPs utilisation (MFU): the arithmetic that training needs, as a share of what the GPU's data sheet promises.

N weights of linear layers, W width of all heads together, C tokens that a token attends to. For one token, a product with
a weight takes 2 FLOP forward and 2 for the gradient of its input, and 2 more for the gradient of the weight if it is
trained. So a step needs, for each token:

    4 N_frozen + 6 N_trained + 12 W C a layer

where 12 W C are attention's two products forward and four backward, and C is half the document's length under a causal
mask, or the window if that is less. The usual "6 N a token" is the case in which every weight is trained. The head counts
for labelled tokens only, since the loss skips the others. What is computed a second time, dequantisation, norms and the
optimizer are work but not progress: they do not count. Tokens are those of the batch, padding included.

Source: Chowdhery et al. 2022, PaLM, appendix B, less the weight gradients that frozen weights do without.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch import nn

from oribi.environment import detect
from oribi.memory.gpus import recognise
from oribi.models.decoder import DecoderForCausalLM


@dataclass(frozen=True)
class DataShape:
    """What the arithmetic of a data set depends on.

    Args:
        trained_share: share of the tokens that have a label, 0 to 1.
        document_length: mean length of the document that a token stands in, in tokens.
    """

    trained_share: float
    document_length: float


@dataclass(frozen=True)
class Utilisation:
    """From speed to utilisation on one kind of GPU.

    Args:
        flop_per_token: needed forward and backward.
        peak_flops: of one GPU a second, 16-bit tensor arithmetic, dense.
    """

    flop_per_token: float
    peak_flops: float

    def of(self, tokens_per_second: float) -> float:
        """MFU, 0 to 1, of one GPU at this speed."""
        return self.flop_per_token * tokens_per_second / self.peak_flops


def utilisation_of(decoder: nn.Module, rows: Any) -> Utilisation | None:
    """How to reckon the MFU of a training; None on a GPU whose peak is not known, and where rows or model do not tell.

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
    return None if gpu is None else Utilisation(flop_per_token(decoder, shape_of(rows)), gpu.tflops * 1e12)


def shape_of(rows: Dataset) -> DataShape:
    """The shape of prepared rows (one document each) or packs (with seq_lengths)."""
    columns = rows.with_format("arrow")[:]
    labels = compute.list_flatten(columns["labels"])
    trained = compute.sum(compute.not_equal(labels, -100)).as_py() or 0
    if "seq_lengths" in rows.column_names:
        lengths = compute.list_flatten(columns["seq_lengths"])
    else:
        lengths = compute.list_value_length(columns["input_ids"])
    lengths = compute.cast(lengths, "float64")
    tokens = compute.sum(lengths).as_py()
    return DataShape(trained / tokens, compute.sum(compute.multiply(lengths, lengths)).as_py() / tokens)


def flop_per_token(decoder: DecoderForCausalLM, shape: DataShape) -> float:
    """FLOP that one token needs forward and backward, by the formula above."""
    total, head = 0.0, decoder.get_output_embeddings()
    in_head = {id(module) for module in head.modules()}
    for name, module in decoder.named_modules():
        # PEFT keeps the original of a module that it trains in full
        if isinstance(module, nn.Linear) and "original_module" not in name:
            share = shape.trained_share if id(module) in in_head else 1.0
            passes = 3 if module.weight.requires_grad else 2
            total += share * passes * 2 * module.in_features * module.out_features
    for layer in decoder.model.layers:
        seen = shape.document_length / 2
        if layer.self_attn.window is not None:
            seen = min(seen, layer.self_attn.window)
        total += 12 * layer.self_attn.sizes[0] * seen
    return total
