"""The one account of bytes and arithmetic in training; plan, estimate, speed and utilisation ask it.

T tokens of a micro-batch, D hidden size, I MLP size, H width of all query heads together, V vocabulary. A group of
linear layers that share their input has weights [N, K] and P columns beside them, which hold LoRA factors and biases
(`kernels/lora.py`). What a layer keeps between forward and backward is decided by `Keep`, of results that
the layer's halves list (`models/half.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from oribi.kernels.adamw import FLAT_OPTIMIZERS
from oribi.kernels.adamw_step import BLOCK
from oribi.kernels.attention import head_groups
from oribi.kernels.cross_entropy import logits_shape
from oribi.kernels.lora import padded_columns
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.fused_layer import LAYER_INPUT, policy
from oribi.models.half import MLP_TOKENS, Core, Keep
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import read

# cuBLAS workspaces of two streams, rotary tables and batches. Fitted: what three runs of Llama-3.2-1B and Qwen2.5-0.5B
# on an H100 took beyond the sums below, within 4 MiB of each other
LIBRARY_BYTES = 131 * 2**20
# a layer's backward takes more than the tensors named below. Fitted: Llama-3.1-8B on an H100, keeping all and nothing
BACKWARD_FACTOR = 1.25
# attention's arithmetic takes as long as this much of a matrix product: 582 and 514 TFLOP/s in forward and backward of
# 32,768 tokens on an H100
ATTENTION_BY_PRODUCTS = 1.22


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    Args:
        layer: the layer, with or without weights.
        width: bytes of a number.
        ranks: group -> ranks of the adapted linear layers in it.
        device: that it trains on.
        windows: of each layer of the model, in tokens; None sees everything before it.
    """

    layer: DecoderLayer
    width: int
    ranks: Mapping[str, Sequence[int]]
    device: torch.device
    windows: Sequence[int | None]

    @cached_property
    def cores(self) -> list[Core]:
        """The mixer and the MLP."""
        return [core for core, _, _ in self.layer.parts()]

    @cached_property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """Group -> (N, K, P)."""
        return {
            name: (
                sum(module.out_features for module in modules),
                modules[0].in_features,
                padded_columns(sum(self.ranks[name]) + any(m.bias is not None for m in modules), self.device),
            )
            for core in self.cores
            for name, modules in core.groups().items()
        }

    @property
    def hidden(self) -> int:
        """D."""
        return self.groups[self.cores[0].output][0]

    @property
    def heads(self) -> int:
        """H."""
        return self.layer.self_attn.sizes[0]

    @property
    def num_heads(self) -> int:
        return self.heads // self.layer.self_attn.head_dim

    def columns(self, terms: Sequence[str]) -> int:
        """Numbers per token, in the words of `models.half.Result`."""
        sizes = {"hidden": self.hidden, "heads": self.num_heads}
        for name, (n, k, p) in self.groups.items():
            sizes |= {f"{name}.out": n, f"{name}.in": k, f"{name}.lora": p}
        return sum(sizes[term] for term in terms)

    def weight_buffer(self, group: str) -> int:
        """Bytes of a group's dequantised weights with their LoRA factors beside them."""
        n, k, p = self.groups[group]
        return (n + p) * (k + p) * self.width

    @property
    def dequantised_traffic(self) -> float:
        """Bytes that forward and backward move to dequantise the weights: half a byte of codes read, a number written."""
        return 2 * (0.5 + self.width) * sum(n * k for n, k, _ in self.groups.values())

    def product_flop(self, group: str) -> int:
        """Arithmetic of a group's forward for one token: S = x A^T, and [x, S] [W, sB]^T."""
        n, k, p = self.groups[group]
        return 2 * (k * p + n * (k + p))

    def attention_flop(self, longest: float) -> float:
        """Arithmetic of attention's forward for one token of a document of `longest`, the mean over the layers."""
        # a token attends to half of its document, or to the window if that is less
        attended = [longest / 2 if window is None else min(longest / 2, window) for window in self.windows]
        return 4.0 * self.heads * sum(attended) / len(attended)


def layer_shape(
    decoder: DecoderForCausalLM,
    ranks: Mapping[str, Sequence[int]] | None = None,
    device: torch.device | None = None,
) -> LayerShape:
    """The sizes of a model's layers.

    Args:
        decoder: with LoRA attached, or not.
        ranks: group -> ranks of the adapted linear layers in it; None reads the adapter that is attached.
        device: that it trains on; None is where it lies.
    """
    layers = decoder.model.layers
    if ranks is None:
        groups = {
            name: modules for core, _, _ in layers[0].parts() for name, modules in core.groups().items()
        }
        ranks = {name: _attached_ranks(modules) for name, modules in groups.items()}
    windows = [layer.self_attn.window for layer in layers]
    return LayerShape(layers[0], decoder.dtype.itemsize, ranks, device or decoder.device, windows)


def _attached_ranks(modules: Sequence[nn.Module]) -> list[int]:
    return [p.a.shape[0] for p in map(read, modules) if p is not None and p.a is not None]


@dataclass(frozen=True)
class KeptResult:
    """A result of a layer's forward that its backward needs, with those that follow it.

    Args:
        name: its entry of `Keep`.
        bytes: of the tensor that is kept on the device or waits in host memory.
        beside: bytes that stay on the device with it, wherever it is; 0 when it is computed again.
        flop: arithmetic of computing it again, attention's in units of matrix products.
        row_wise: whether it is computed again in portions of the tokens.
    """

    name: str
    bytes: int
    beside: int
    flop: float
    row_wise: bool


@dataclass(frozen=True)
class LayerAccount:
    """Bytes and arithmetic of one layer on one micro-batch.

    Args:
        shape: of the layer.
        tokens: T. longest: tokens of the longest document.
    """

    shape: LayerShape
    tokens: int
    longest: int

    @cached_property
    def results(self) -> dict[str, KeptResult]:
        """What the layer may keep, by the names of `Keep`."""
        s, found = self.shape, {}
        listed = [(LAYER_INPUT, False)]
        for core, _, post in s.layer.parts():
            listed += [
                (one, core.row_wise) for one in core.results if post is not None or not one.before_norm
            ]
        for one, row_wise in listed:
            if one.follows is not None:
                continue
            beside, again = 0, 0.0
            if one.made_by == "attention":
                again = ATTENTION_BY_PRODUCTS * s.attention_flop(self.longest)
            elif one.made_by is not None:
                again = s.product_flop(one.made_by)
            for other, _ in listed:
                if other.follows == one.name:
                    beside += s.columns(other.columns) * (other.itemsize or s.width)
                    group = other.name.removesuffix("_xa")
                    if group in s.groups and group != one.made_by:  # x A^T that no product brings
                        again += 2 * s.columns([f"{group}.in"]) * s.columns([f"{group}.lora"])
            kept = s.columns(one.columns) * s.width
            sizes = (self.tokens * size for size in (kept, beside, again))
            found[one.name] = KeptResult(one.name, *sizes, row_wise)
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer's dequantised weights, where they are kept from step to step."""
        return sum(map(self.shape.weight_buffer, self.shape.groups))

    @property
    def product_flop(self) -> int:
        """Arithmetic of the linear layers' forward."""
        return self.tokens * sum(map(self.shape.product_flop, self.shape.groups))

    def kept(self, keep: Keep) -> int:
        """Device bytes from forward to backward, without dequantised weights."""
        return sum(
            one.bytes * (keep[one.name] == "keep") + one.beside * (keep[one.name] != "recompute")
            for one in self.results.values()
        )

    def in_host(self, keep: Keep) -> list[int]:
        """Bytes of each result that waits in host memory."""
        return [one.bytes for one in self.results.values() if keep[one.name] == "host"]

    def backward(self, keep: Keep) -> int:
        """Device bytes of the layer's backward beside what it kept."""
        s, tokens, portion = self.shape, self.tokens, min(self.tokens, MLP_TOKENS)
        size = tokens * s.hidden * s.width  # dy
        for core in s.cores:
            used = {core.input: keep[core.input], core.output: keep[core.output_result or core.output]}
            if core.row_wise:  # of a portion: its input, the gradient of its output, and h
                terms = [
                    f"{core.input}.in",
                    f"{core.input}.lora",
                    f"{core.output}.out",
                    f"{core.output}.lora",
                ]
                size += portion * s.columns([*terms, f"{core.output}.in"]) * s.width
            if keep["weights"] != "keep":
                # those of a mixer are needed at the same time only where its results are computed again
                needed = [name for name, place in used.items() if core.row_wise or place == "recompute"]
                size += sum(map(s.weight_buffer, needed))
        for one in self.results.values():
            place = keep[one.name]
            if place != "keep":  # made there, or back from the host
                in_portions = one.row_wise and place == "recompute"
                size += one.bytes * portion // tokens if in_portions else one.bytes
        return int(max(BACKWARD_FACTOR * size, self._attention_backward(keep)))

    def _attention_backward(self, keep: Keep) -> int:
        """Device bytes of attention's backward, which takes more than the MLP's portions on long rows."""
        s, tokens, attention = self.shape, self.tokens, self.shape.layer.self_attn
        portions = head_groups("flash", tokens * s.num_heads, attention.sizes[1] // attention.head_dim)
        # dy, the gradients of x_mid, a, q, k and v; for a group of heads that of q in float32, of k and v by query head
        size = tokens * s.width * (2 * s.hidden + s.heads + sum(attention.sizes) + 4 * s.heads // portions)
        # what only the MLP needs is gone
        needed = ("x", "qkv", "attention")
        return size + sum(self.results[name].bytes for name in needed if keep[name] != "keep")

    def by_autograd(self, dropout: bool = False, dora: bool = False, mask_bytes: int = 1) -> int:
        """Bytes that PyTorch's autograd keeps of a layer that is not differentiated by hand.

        Args:
            dropout: whether the inputs of LoRA are dropped, each linear layer's on its own. dora: whether LoRA is DoRA.
            mask_bytes: of an element of a dropout's mask, 1 on a GPU.
        """
        s, attention = self.shape, self.shape.layer.self_attn
        (_, inner, _), qkv = s.groups["down"], sum(attention.sizes)
        adapted = [(s.groups[group], len(ranks)) for group, ranks in s.ranks.items()]
        # inputs of the norms, q, k, v and the output of attention, gate and up
        numbers = 2 * s.hidden + qkv + s.heads + 2 * inner + sum(map(sum, s.ranks.values()))
        numbers += 2 * s.hidden * (s.layer.norms != "pre")
        if attention.qk_norm or len(attention.groups()["qkv"]) == 1:
            numbers += (qkv + s.heads) // 2  # q and k before their norms, too, or beside v in one tensor
        if dropout:
            dropped = sum(k * count for (_, k, _), count in adapted)
            return self.tokens * (s.width * (numbers + dropped) + mask_bytes * dropped)
        numbers += 2 * s.hidden + inner  # inputs of the linear layers; o's is the output of attention
        if dora:  # the output of LoRA, and what its magnitude multiplies
            numbers += 2 * sum(n for (n, _, _), count in adapted if count)
        return self.tokens * s.width * numbers


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be highest.

    Args:
        name: "the loss" or "a layer's backward".
        kept: bytes of what layers keep for backward. working: bytes in use beside it.
    """

    name: str
    kept: int
    working: int

    @property
    def bytes(self) -> int:
        return self.kept + self.working


@dataclass(frozen=True)
class StepAccount:
    """Bytes of one micro-batch's forward and backward through all layers and the loss.

    Args:
        layer: the account of one layer.
        vocab_size: V.
        trains_head: whether the head is trained whole.
    """

    layer: LayerAccount
    vocab_size: int
    trains_head: bool = False

    @cached_property
    def loss(self) -> int:
        """Bytes of the loss: a chunk of logits, and the hidden states with their gradients."""
        shape = self.layer.shape
        rows, columns = logits_shape(self.layer.tokens, self.vocab_size, shape.width)
        size = shape.width * (min(rows, self.layer.tokens) * columns + 4 * self.layer.tokens * shape.hidden)
        if self.trains_head:  # its gradient in float32, and the head in 16 bit
            size += self.vocab_size * shape.hidden * (4 + shape.width)
        return size

    def moments(self, keeps: Sequence[Keep]) -> list[Moment]:
        """Every moment that may be the peak, for what each layer keeps; weights that are kept are no part of it."""
        away = [sum(self.layer.in_host(keep)) for keep in keeps]
        # `HostMemory` holds the sources of the last two layers that it copies until backward begins
        leaving = sum([one for one in away if one][-2:])
        found, kept = [], 0
        for keep, arriving in zip(keeps, [0, *away]):  # for the layer below
            kept += self.layer.kept(keep)
            found.append(Moment("a layer's backward", kept, arriving + self.layer.backward(keep)))
        return [Moment("the loss", kept, self.loss + leaving), *found]

    def moments_by_autograd(self, layers: int, checkpointed: bool, dropout: bool, dora: bool) -> list[Moment]:
        """The same where PyTorch's autograd differentiates the layers."""
        one = self.layer.by_autograd(dropout, dora)
        kept = self.layer.results["x"].bytes if checkpointed else one
        work = one * (2 if checkpointed else 1) + self.layer.shape.weight_buffer("gate_up")
        moments = {"the loss": self.loss, "a layer's backward": work}
        return [Moment(name, layers * kept, working) for name, working in moments.items()]

    @property
    def workspace(self) -> int:
        """Device bytes of the loss, and of the backward of a layer that keeps nothing there, whichever is more."""
        return max(self.layer.backward(self.nothing_kept), self.loss)

    @property
    def nothing_kept(self) -> Keep:
        """Of a layer that keeps nothing on the device."""
        return policy("memory", self.layer.shape.layer.results())

    @property
    def last_gate_up_is_free(self) -> bool:
        """Whether the last layer's gate|up, which its backward makes first, can stay through the loss at no cost."""
        gate_up = self.layer.results["gate_up"]
        beside = self.loss + gate_up.bytes + gate_up.beside <= self.layer.backward(self.nothing_kept)
        return self.layer.tokens <= MLP_TOKENS and beside  # more are made in portions


def trained_bytes(trainable: int, optimizer: str, width: int = 4) -> dict[str, int]:
    """Bytes of the trained parameters' gradients and of the optimizer's states.

    Args:
        trainable: trained parameters.
        optimizer: its name in transformers.
        width: bytes of a gradient; an adapter is float32.
    """
    # two codes of a byte, and two float32 scales a block; two moments in float32
    bits = FLAT_OPTIMIZERS.get(optimizer, 32)
    state = 2 + 8 / BLOCK if bits == 8 else 8
    return {"gradients": trainable * width, "optimizer": int(trainable * state)}


def linear_weights(model: nn.Module) -> int:
    """Weights of a model's linear layers, packed ones counted as they are dequantised, and LoRA factors included."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def needed_flop_per_token(decoder: DecoderForCausalLM, trained_share: float, document_length: float) -> float:
    """Arithmetic that one token needs, forward and backward; what is computed a second time does not count.

    A product with a weight takes 2 FLOP forward, 2 for the gradient of its input, and 2 for the gradient of the weight
    if it is trained. Attention's backward takes twice its forward.

    Args:
        decoder: with its adapter.
        trained_share: share of the tokens that have a label, 0 to 1; the loss skips the others.
        document_length: mean length of the document that a token stands in, in tokens.
    """
    shape = layer_shape(decoder)
    total = 3 * decoder.config.num_hidden_layers * shape.attention_flop(document_length)
    in_head = {id(module) for module in decoder.get_output_embeddings().modules()}
    for name, module in decoder.named_modules():
        # PEFT keeps the original of a module that it trains in full
        if isinstance(module, nn.Linear) and "original_module" not in name:
            share = trained_share if id(module) in in_head else 1.0
            passes = 3 if module.weight.requires_grad else 2
            total += share * passes * 2 * module.in_features * module.out_features
    return total
