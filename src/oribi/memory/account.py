"""The one account of bytes and arithmetic in training; plan, estimate, speed and utilisation ask it.

T tokens of a micro-batch, D hidden size, I MLP size, H width of all query heads together, V vocabulary. A group of
linear layers that share their input has weights [N, K] and P columns beside them, which hold LoRA factors and biases
(`kernels/lora.py`). What a layer keeps between forward and backward is decided by `Keep`, of results that
the layer's halves list (`models/half.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from oribi.kernels.adamw import FLAT_OPTIMIZERS
from oribi.kernels.adamw_step import BLOCK
from oribi.kernels.cross_entropy import logits_shape
from oribi.memory.experts_shape import multiplied
from oribi.memory.layer_shape import LayerShape
from oribi.models.core import Keep
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.decoding.session import bucket_for
from oribi.models.decoding.state import SLOT_STEP, row_bytes
from oribi.models.experts import ExpertsMLP
from oribi.models.fused_layer import LAYER_INPUT, policy
from oribi.models.half import MLP_TOKENS

# cuBLAS workspaces of two streams, rotary tables and batches. Fitted: what three runs of Llama-3.2-1B and Qwen2.5-0.5B
# on an H100 took beyond the sums below, within 4 MiB of each other
LIBRARY_BYTES = 131 * 2**20
# a layer's backward takes more than the tensors named below. Fitted: Llama-3.1-8B on an H100, keeping all and nothing
BACKWARD_FACTOR = 1.25


@dataclass(frozen=True)
class KeptResult:
    """A result of a layer's forward that its backward needs, with those that follow it.

    Args:
        name: its entry of `Keep`.
        bytes: of the tensor that is kept on the device or waits in host memory.
        beside: bytes that stay on the device with it, wherever it is; 0 when it is computed again.
        flop: arithmetic of computing it again, a mixer's own in units of matrix products.
        row_wise: whether it is computed again in portions of the tokens.
    """

    name: str
    bytes: int
    beside: int
    flop: float
    row_wise: bool


@dataclass(frozen=True, eq=False)
class LayerAccount:
    """Bytes and arithmetic of one layer on one micro-batch.

    Args:
        shape: of the layer.
        tokens: T. longest: tokens of the longest document.
        context: processes that share the row, of which the tokens are one's.
    """

    shape: LayerShape
    tokens: int
    longest: int
    context: int = 1

    @cached_property
    def results(self) -> dict[str, KeptResult]:
        """What the layer may keep, by the names of `Keep`."""
        s, found = self.shape, {}
        listed = [(LAYER_INPUT, False, False)]
        for core, _, post in s.layer.parts():
            # made again for the next part in portions, of which x A^T is not kept for the own backward
            listed += [
                (one, core.row_wise, core.row_wise and one.name == core.output_result)
                for one in core.results
                if post is not None or not one.before_norm
            ]
        for one, row_wise, forgets in listed:
            if one.follows is not None:
                continue
            beside, again = 0, 0.0
            if one.made_by == "core":
                again = s.mixer.core_by_products * s.core_flop(self.longest)
            elif one.made_by is not None:
                again = s.product_flop(one.made_by)
            for other, *_ in listed:
                if other.follows == one.name:
                    beside += s.columns(other.columns) * (other.itemsize or s.width)
                    group = other.name.removesuffix("_xa")
                    if group in s.groups and (
                        forgets or group != one.made_by
                    ):  # x A^T that no product brings
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
        """Arithmetic of the forward of linear layers and experts."""
        experts = 0 if self.shape.experts is None else self.shape.experts.flop()
        return self.tokens * (sum(map(self.shape.product_flop, self.shape.groups)) + experts)

    @property
    def core_flop(self) -> float:
        """Arithmetic of the mixer's own forward, in units of matrix products."""
        return self.tokens * self.shape.mixer.core_by_products * self.shape.core_flop(self.longest)

    @property
    def lent(self) -> int:
        """Device bytes from forward to backward of what later layers read."""
        return self.tokens * self.shape.lent * self.shape.width

    @property
    def always(self) -> int:
        """Device bytes from forward to backward, whatever is kept."""
        experts = self.shape.experts
        return self.lent + (0 if experts is None else experts.routing_bytes(self.tokens))

    def kept(self, keep: Keep) -> int:
        """Device bytes from forward to backward, without dequantised weights."""
        return self.always + sum(
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
            if isinstance(core, ExpertsMLP):
                size += s.experts.backward_bytes(tokens, keep["gate_up"] != "keep")
                continue
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
            if one.name == "gate_up" and s.experts is not None:
                continue  # among the experts' own
            if place != "keep":  # made there, or back from the host
                in_portions = one.row_wise and place == "recompute"
                size += one.bytes * portion // tokens if in_portions else one.bytes
        return int(max(BACKWARD_FACTOR * size, self._core_backward(keep)))

    def _core_backward(self, keep: Keep) -> int:
        """Device bytes of the mixer's own backward, attention's for one: on long rows more than the MLP's portions take."""
        s, mixer = self.shape, self.shape.mixer
        # dy, and the gradient of x_mid
        size = 2 * self.tokens * s.width * s.hidden + mixer.core_backward_bytes(self.tokens, s.width)
        # what only the MLP needs is gone
        if self.context > 1:
            size += mixer.exchange_bytes(self.tokens * self.context, s.width)
        needed = {"x", *(one.name for one in mixer.results if one.made_by in (mixer.input, "core"))}
        return size + sum(
            one.bytes for one in self.results.values() if one.name in needed and keep[one.name] != "keep"
        )

    def by_autograd(self, dropout: bool = False, dora: bool = False, mask_bytes: int = 1) -> int:
        """Bytes that PyTorch's autograd keeps of a layer that is not differentiated by hand.

        Args:
            dropout: whether the inputs of LoRA are dropped, each linear layer's on its own. dora: whether LoRA is DoRA.
            mask_bytes: of an element of a dropout's mask, 1 on a GPU.
        """
        s = self.shape
        inner = sum(s.groups[group][1] for group in ("down", "shared_down") if group in s.groups)
        adapted = [(s.groups[group], len(ranks)) for group, ranks in s.ranks.items() if group in s.groups]
        # inputs of the norms, what the mixer needs, gate and up
        numbers = 2 * s.hidden + s.mixer.autograd_columns() + 2 * inner + sum(map(sum, s.ranks.values()))
        numbers += 0 if s.experts is None else s.experts.autograd_columns() + s.gated_columns
        numbers += s.hidden * sum(post is not None for _, _, post in s.layer.parts())
        if dropout:
            dropped = sum(k * count for (_, k, _), count in adapted)
            return self.tokens * (s.width * (numbers + dropped) + mask_bytes * dropped)
        numbers += 2 * s.hidden + inner  # inputs of the linear layers; o's is the output of attention
        if dora:  # the output of LoRA, and what its magnitude multiplies
            numbers += 2 * sum(n for (n, _, _), count in adapted if count)
        return self.tokens * s.width * numbers


def layer_accounts(
    shapes: Sequence[LayerShape], tokens: int, longest: int, context: int = 1
) -> list[LayerAccount]:
    """The account of each layer of a model; layers of one kind share one.

    Args:
        shapes: of the layers, as `layer_shapes` gives them.
        tokens, longest: of a micro-batch, and of its longest document.
        context: processes that share a row.
    """
    kinds = {shape: LayerAccount(shape, tokens, longest, context) for shape in shapes}
    return [kinds[shape] for shape in shapes]


def step_account(
    decoder: DecoderForCausalLM,
    shapes: Sequence[LayerShape],
    tokens: int,
    longest: int,
    context: int = 1,
    trains_head: bool = False,
) -> "StepAccount":
    """The account of a micro-batch's forward and backward.

    Args:
        decoder: the model. shapes: of its layers, as `layer_shapes` gives them.
        tokens, longest: of a micro-batch, and of its longest document. context: processes that share a row.
        trains_head: whether the head is trained whole.
    """
    inputs = len(shapes) * getattr(decoder.model, "per_layer_size", 0)
    beside = tokens * inputs * decoder.dtype.itemsize
    layers = layer_accounts(shapes, tokens, longest, context)
    return StepAccount(layers, decoder.config.vocab_size, trains_head, beside)


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
        layers: the account of each layer; layers of one kind share one.
        vocab_size: V.
        trains_head: whether the head is trained whole.
        beside: bytes of what is made before the first layer and read by all.
    """

    layers: Sequence[LayerAccount]
    vocab_size: int
    trains_head: bool = False
    beside: int = 0

    @cached_property
    def kinds(self) -> dict[LayerAccount, list[int]]:
        """Each kind of layer -> its layers."""
        found: dict[LayerAccount, list[int]] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault(layer, []).append(index)
        return found

    @property
    def input_bytes(self) -> int:
        """Bytes of a layer's input, which is equally wide in all."""
        return self.layers[0].results["x"].bytes

    @property
    def always(self) -> int:
        """Bytes that stay from forward to backward whatever layers keep."""
        return self.beside + sum(layer.always for layer in self.layers)

    @cached_property
    def loss(self) -> int:
        """Bytes of the loss: a chunk of logits, and the hidden states with their gradients."""
        shape, tokens = self.layers[0].shape, self.layers[0].tokens
        rows, columns = logits_shape(tokens, self.vocab_size, shape.width)
        size = shape.width * (min(rows, tokens) * columns + 4 * tokens * shape.hidden)
        if self.trains_head:  # its gradient in float32, and the head in 16 bit
            size += self.vocab_size * shape.hidden * (4 + shape.width)
        return size

    def moments(self, keeps: Sequence[Keep]) -> list[Moment]:
        """Every moment that may be the peak, for what each layer keeps; weights that are kept are no part of it."""
        away = [sum(layer.in_host(keep)) for layer, keep in zip(self.layers, keeps)]
        # `HostMemory` holds the sources of the last two layers that it copies until backward begins
        leaving = sum([one for one in away if one][-2:])
        found, kept = [], self.beside
        for layer, keep, arriving in zip(self.layers, keeps, [0, *away]):  # for the layer below
            kept += layer.kept(keep)
            found.append(Moment("a layer's backward", kept, arriving + layer.backward(keep)))
        return [Moment("the loss", kept, self.loss + leaving), *found]

    def moments_by_autograd(self, checkpointed: bool, dropout: bool, dora: bool) -> list[Moment]:
        """The same where PyTorch's autograd differentiates the layers."""
        ones = {layer: layer.by_autograd(dropout, dora) for layer in self.kinds}
        kept = self.beside + sum(
            self.input_bytes + layer.lent if checkpointed else ones[layer] for layer in self.layers
        )
        work = max(one * (2 if checkpointed else 1) + layer.shape.mlp_buffer for layer, one in ones.items())
        moments = {"the loss": self.loss, "a layer's backward": work}
        return [Moment(name, kept, working) for name, working in moments.items()]

    @cached_property
    def workspace(self) -> int:
        """Device bytes of the loss, and of the backward of a layer that keeps nothing there, whichever is most."""
        return max(self.loss, *(layer.backward(_nothing_kept(layer)) for layer in self.kinds))

    @property
    def last_gate_up_is_free(self) -> bool:
        """Whether the last layer's gate|up, which its backward makes first, can stay through the loss at no cost."""
        last = self.layers[-1]
        gate_up = last.results["gate_up"]
        beside = self.loss + gate_up.bytes + gate_up.beside <= last.backward(_nothing_kept(last))
        return last.tokens <= MLP_TOKENS and beside  # more are made in portions


def _nothing_kept(layer: LayerAccount) -> Keep:
    """Of a layer that keeps nothing on the device."""
    return policy("memory", layer.shape.layer.results())


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


def generation_bytes(decoder: DecoderForCausalLM, rows: int, length: int) -> int:
    """Bytes that a GPU keeps of a generation until `release`: places of a batch, in whole steps of slots.

    Args:
        decoder: with or without weights. rows: that are generated together. length: tokens of the longest, at its end.
    """
    slots = -(-length // SLOT_STEP) * SLOT_STEP
    of_row = row_bytes(decoder.model.layers, slots, decoder.config.vocab_size, decoder.dtype.itemsize)
    return bucket_for(rows) * of_row


def linear_weights(model: nn.Module) -> int:
    """Weights that a token is multiplied with: of linear layers, packed ones counted as they are dequantised, LoRA factors
    included, and of the experts that it takes."""
    return int(sum(weights for _, _, weights, _ in multiplied(model)))


def needed_flop_per_token(decoder: DecoderForCausalLM, trained_share: float, document_length: float) -> float:
    """Arithmetic that one token needs, forward and backward; what is computed a second time does not count.

    A product with a weight takes 2 FLOP forward, 2 for the gradient of its input, and 2 for the gradient of the weight
    if it is trained. A mixer's own backward takes twice its forward.

    Args:
        decoder: with its adapter.
        trained_share: share of the tokens that have a label, 0 to 1; the loss skips the others.
        document_length: mean length of the document that a token stands in, in tokens.
    """
    total = 3 * sum(layer.mixer.core_flop(document_length) for layer in decoder.model.layers)
    in_head = {id(module) for module in decoder.get_output_embeddings().modules()}
    for name, module, weights, trained in multiplied(decoder):
        # PEFT keeps the original of a module that it trains in full
        if "original_module" not in name:
            share = trained_share if id(module) in in_head else 1.0
            total += share * (3 if trained else 2) * 2 * weights
    return total
