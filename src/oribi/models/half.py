"""One half of a decoder layer, mixer or MLP, differentiated by hand, so that what it keeps for backward is a choice.

    p = pre(x) W_in      h = core(p)      y = x + c post(h W_out)

T tokens (rows flattened), D hidden size. `pre` and `post` are RMSNorms or absent, c is the family's residual multiplier.
W_in and W_out are groups of linear layers with LoRA, N + P columns wide in the words of `kernels/lora.py`. The core is what
distinguishes one mixer or MLP from another: attention and the gated MLP are two, and another one is one more file.

Backward needs x, p, what the core names, and where a norm follows the product h W_out. A `Keep` says of each result
whether it stays on the device, waits in host memory or is computed again; norms and the core's cheap parts are always
computed again. The gradients do not depend on it, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from oribi.kernels import fp8
from oribi.kernels.lora import GroupWeight, Projection, augmented_weight, backward_factors, group_shape
from oribi.models.core import Core, Keep
from oribi.models.host_memory import Parcel
from oribi.models.linear_layers import RMSNorm, read
from oribi.models.trained_rows import norm_backward, put_back, taken

if TYPE_CHECKING:
    from oribi.models.layers import Batch, DecoderLayer

Factors = list[torch.Tensor | None]

# tokens that a row-wise core computes at a time; this many keep the matrix products at full speed
MLP_TOKENS = 16384


class Kept:
    """Results of one pass that wait for its backward.

    Args:
        layer_pass: the pass.
    """

    def __init__(self, layer_pass: "LayerPass") -> None:
        self._layer_pass = layer_pass
        self._results: dict[str, Any] = {}

    def put(self, name: str, result: Any, follows: str | None = None) -> None:
        """Stores a result where `Keep` says, or drops it if it is to be computed again.

        Args:
            name: of the result. result: a tensor; anything if it follows another result.
            follows: the result that decides whether it is kept.
        """
        place = self._layer_pass.keep[follows or name]
        if result is None or place == "recompute":
            return
        if place == "host" and follows is None and result.is_cuda:
            result = self._layer_pass.batch.host_memory.put(result, self._layer_pass)
        self._results[name] = result

    def names(self) -> set[str]:
        """Of the results that wait."""
        return set(self._results)

    def put_back(self, results: dict[str, Any]) -> None:
        """Stores on the device what was taken."""
        self._results |= results

    def take(self, name: str | None) -> Any:
        """A result, once; None where it has to be computed again."""
        found = self._results.pop(name, None)
        return found.take() if isinstance(found, Parcel) else found


@dataclass(eq=False)
class LayerPass:
    """One forward and backward of one layer.

    Args:
        layer, batch, keep: the layer, what all layers of the forward share, and where results wait.
        dtype, device: of the activations.
        identity: of this pass; between its forward and its backward no factor changes.
    """

    layer: "DecoderLayer"
    batch: "Batch"
    keep: Keep
    dtype: torch.dtype
    device: torch.device
    identity: object = field(default_factory=object)

    def weight(self, name: str, projections: Sequence[Projection]) -> GroupWeight:
        """A group's weights, dequantised, with their LoRA pairs."""
        keeps = self.keep["weights"] == "keep"
        if not (keeps or self.layer.fp8):
            self.layer.fetch()
            return augmented_weight(projections, self.dtype, self.device)
        # what the weights were made of: a loaded, merged or moved weight is another one
        source = (self.dtype, *((p.weight.data_ptr(), p.weight._version) for p in projections))
        known = self.layer.dequantized.get(name)
        earlier = known[1] if known is not None and known[0] == source else None
        if earlier is None or self.layer.fp8:  # its copies are made when they are first multiplied with
            self.layer.fetch(again=self.layer.fp8)
        if self.layer.fp8:
            rounded = earlier or fp8.rounded_weights(projections)
            self.layer.dequantized[name] = (source, rounded)
            # of a copy that is not kept, only the scale stays
            return fp8.fp8_weight(
                projections, rounded if keeps else replace(rounded), self.dtype, self.device
            )
        packed = self.layer.packed_in.get(name) is self.identity
        group = augmented_weight(projections, self.dtype, self.device, earlier, packed)
        self.layer.dequantized[name] = (source, group.augmented)
        self.layer.packed_in[name] = self.identity
        return group


@dataclass
class _Restored:
    """What backward reads of one portion: p with its xa, the core's state, h (None: made again), product, xa of W_out."""

    p: torch.Tensor
    xa: torch.Tensor | None
    prepared: Any
    h: torch.Tensor | None
    product: torch.Tensor | None
    xa_out: torch.Tensor | None
    normed: tuple[torch.Tensor, torch.Tensor | None] | None


class Half:
    """A mixer or MLP with its norms, for one forward and backward.

    Args:
        core: the module. pre, post: norms before and after it. scale: c.
        adds: whether y holds x; else it is c post(h W_out) alone, of a half with a norm after it.

    Attributes:
        rows: [n] int64, those of y that are wanted, where the core has to see all of x; None: all. y and dy are then [n, D].
    """

    def __init__(
        self, core: Core, pre: RMSNorm | None, post: RMSNorm | None, scale: float, adds: bool = True
    ) -> None:
        self.core, self.pre, self.post, self.scale, self.adds = core, pre, post, scale, adds
        self.rows: torch.Tensor | None = None
        self.reads, self.gives = getattr(core, "reads", None), getattr(core, "gives", None)
        self.groups = {name: [read(m) for m in modules] for name, modules in core.groups().items()}
        self._weights: dict[str, GroupWeight] = {}
        self._restored: _Restored | None = None
        self._dy_buffer: torch.Tensor | None = None

    def factors(self) -> Factors:
        """A and B of every projection in order, as the autograd function takes them."""
        return [t for group in self.groups.values() for p in group for t in (p.a, p.b)]

    def forward(
        self, x: torch.Tensor, layer_pass: LayerPass, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y [T, D] of x [T, D], to which x is added, or another residual [T, D]."""
        self.layer_pass, residual = layer_pass, x if residual is None else residual
        parts = self._portions(len(x))
        self.kept = [Kept(layer_pass) for _ in parts]
        ys = [self._forward(x[rows], residual[rows], kept) for rows, kept in zip(parts, self.kept)]
        self._weights.clear()
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    def _forward(self, x: torch.Tensor, residual: torch.Tensor, kept: Kept) -> torch.Tensor:
        core = self.core
        weight = self._weight(core.input)
        x_buffer, _ = self._normed(x, weight)
        p = weight.forward(x_buffer)
        if self.layer_pass.keep[core.input] != "recompute":
            kept.put(f"{core.input}_xa", weight.copy_xa(x_buffer), core.input)
        del x_buffer
        prepared = core.prepare(p[:, : weight.out_features], self.layer_pass.batch, True)
        kept.put(core.input, p)
        h = core.run(prepared, kept)
        del prepared, p
        if not core.row_wise:
            del weight, self._weights[core.input]
        y, xa, product = self._project_out(taken(h, self.rows), taken(residual, self.rows))
        kept.put(f"{core.output}_xa", xa, core.output_result or core.input)
        if core.output_result:
            kept.put(core.output_result, y)
        kept.put(core.output, product)
        return y

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """y [T, D] in backward; what is recomputed for it is reused by `backward`, except for a row-wise core."""
        if self.core.row_wise:
            return torch.cat(
                [self._again(kept, x[rows]) for rows, kept in zip(self._portions(len(x)), self.kept)]
            )
        (kept,) = self.kept
        y = kept.take(self.core.output_result)
        self._restored, made = self._restore(kept, x, y is None)
        return made if y is None else y

    def _again(self, kept: Kept, x: torch.Tensor) -> torch.Tensor:
        """y of a portion [t, D], kept or computed; everything else that is kept stays so, and nothing is added."""
        core = self.core
        y, product = kept.take(core.output_result), None
        if y is None and not self.adds:
            product = kept.take(core.output)
        if product is not None:
            kept.put_back({core.output: product})
            y = self._with_residual(product, x)
        elif y is None:
            had = kept.names()
            state, y = self._restore(kept, x, True)
            taken = {
                core.input: state.p,
                f"{core.input}_xa": state.xa,
                core.output: state.product,
                f"{core.output}_xa": state.xa_out,
            }
            if not self.adds:  # its backward, which follows at once, reads it
                had.add(core.output)
            kept.put_back({name: one for name, one in taken.items() if name in had})
        return y

    def _restore(self, kept: Kept, x: torch.Tensor, wants_y: bool) -> tuple[_Restored, torch.Tensor | None]:
        core, normed, y = self.core, None, None
        p, xa = kept.take(core.input), kept.take(f"{core.input}_xa")
        fresh = p is None
        if fresh:
            weight = self._weight(core.input)
            normed = self._normed(x, weight)
            p = weight.forward(normed[0])
            xa = weight.copy_xa(normed[0])
            if not core.row_wise:  # not needed until the end of backward: cheaper to make it again
                normed = None
        columns, _ = group_shape(self.groups[core.input])
        prepared = core.prepare(p[:, :columns], self.layer_pass.batch, fresh)
        h = None if core.row_wise else taken(core.run(prepared, kept), self.rows)
        product, xa_out = kept.take(core.output), kept.take(f"{core.output}_xa")
        if wants_y or (product is None and self.post is not None):
            y, xa_out, product = self._project_out(
                core.run(prepared, kept) if h is None else h, taken(x, self.rows)
            )
        return _Restored(p, xa, prepared, h, product, xa_out, normed), y

    def place_for_dy(self, like: torch.Tensor) -> torch.Tensor:
        """Where to write the gradient of y [T, D]: in W_out's gradient buffer, unless a norm or a scale lies between."""
        if self.post is not None or self.scale != 1.0:
            return torch.empty_like(like)
        self._dy_buffer = self._weight(self.core.output).output_buffer(len(like))
        return self._dy_buffer[:, : like.shape[1]]

    def backward(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        place_for_dx: Callable[[torch.Tensor], torch.Tensor] | None,
        needs_dx: bool = True,
        dresidual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, Factors]:
        """Gradients of x [T, D] and of every factor, in order; empties what was kept.

        Args:
            x, dy: [T, D]; dy may lie at `place_for_dy`, and is [n, D] where only `rows` of y were wanted.
            place_for_dx: allocates dx, called once the widest buffers are free; None reuses a buffer.
            needs_dx: whether dx is wanted.
            dresidual: [T, D], the gradient of x as residual, where it is not dy.
        """
        dresidual = dy if dresidual is None else dresidual
        parts, kept, self.kept = self._portions(len(x)), self.kept, []
        dx, factors = None, []
        if len(parts) > 1 and place_for_dx is None:  # no buffer has all rows
            place_for_dx = torch.empty_like
        for rows, one in zip(parts, kept):
            dn, rstd, grads = self._backward(one, x[rows], dy[rows], needs_dx)
            factors.append(grads)
            if not needs_dx:
                continue
            if dx is None:
                dx = dn if place_for_dx is None else place_for_dx(x)
            out = dx if place_for_dx is None else dx[rows]
            norm_backward(self.pre, dn, x[rows], rstd, put_back(dresidual[rows], self.rows, len(dn)), out)
            del dn
        self._weights.clear()
        return dx, [None if of_one[0] is None else sum(of_one[1:], of_one[0]) for of_one in zip(*factors)]

    def _backward(
        self, kept: Kept, x: torch.Tensor, dy: torch.Tensor, needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Factors]:
        """Of some rows: gradient of pre(x) [t, D], 1/rms of x [t], and gradients of the factors."""
        core = self.core
        state, self._restored = self._restored, None
        if state is None:
            state = self._restore(kept, x, False)[0]
        weight = self._weight(core.output)
        buffer, self._dy_buffer = self._dy_buffer, None
        if buffer is None:
            buffer = self._post_backward(dy, state.product, weight)
        dyb = weight.compute_dyb(buffer)
        dh = weight.backward_input(buffer)
        state.product = None
        if state.h is None:
            core.backward(state.prepared, dh)
            state.h = dh
            xa = weight.compute_xa(dh) if state.xa_out is None else state.xa_out
            factors = self._factor_gradients(core.output, buffer, dyb, dh, xa)
        else:
            xa = weight.compute_xa(state.h) if state.xa_out is None else state.xa_out
            factors = self._factor_gradients(core.output, buffer, dyb, state.h, xa)
            del buffer, weight, self._weights[core.output]
            state.h = None
            dh = put_back(dh, self.rows, len(x))
            core.backward(state.prepared, dh)
        del dh
        state.h = state.prepared = buffer = None
        weight = self._weight(core.input)
        dyb = weight.compute_dyb(state.p)
        x_buffer, rstd = self._normed(x, weight) if state.normed is None else state.normed
        factors_in = self._factor_gradients(
            core.input, state.p, dyb, x_buffer[:, : weight.in_features], state.xa
        )
        state.normed = x_buffer = None
        dn = self._masked(weight.backward_input(state.p), weight) if needs_dx else None
        return dn, rstd, factors_in + factors

    def _portions(self, tokens: int) -> list[slice]:
        return portions(tokens) if self.core.row_wise else [slice(None)]

    def _weight(self, name: str) -> GroupWeight:
        """A group's weights, which stay until their last use in this pass."""
        if name not in self._weights:
            self._weights[name] = self.layer_pass.weight(name, self.groups[name])
        return self._weights[name]

    def _factor_gradients(
        self, name: str, dy: torch.Tensor, dyb: torch.Tensor | None, x: torch.Tensor, xa: torch.Tensor | None
    ) -> Factors:
        """Gradients of a group's LoRA factors; dy [T, N + P]."""
        group = self.groups[name]
        return backward_factors(dy[:, : group_shape(group)[0]], dyb, x, xa, group)

    def _normed(self, x: torch.Tensor, weight: GroupWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W_in's input [T, K + P] with pre(x) in front, and 1/rms of x [T]."""
        x_buffer = weight.input_buffer(len(x))
        place, rstd = x_buffer[:, : weight.in_features], None
        if self.pre is None:
            place.copy_(x)
        else:
            rstd = self.pre.compute(x, out=place)[2]
        return self._masked(x_buffer, weight), rstd

    def _masked(self, rows: torch.Tensor, weight: GroupWeight) -> torch.Tensor:
        """W_in's input [T, K + P], or its gradient, with zeros at padding where the core wants them."""
        real = self.layer_pass.batch.real_tokens() if self.core.masks_padding else None
        if real is not None:
            rows[:, : weight.in_features].masked_fill_(~real[:, None], 0)
        return rows

    def _project_out(
        self, h: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """y [T, D], xa of W_out, and the product where a norm follows it."""
        weight, norm = self._weight(self.core.output), self.post
        if norm is None and self.scale == 1.0:
            return *weight.forward_onto(h, residual), None
        product, xa = weight.forward_onto(h, None)
        return self._with_residual(product, residual), xa, None if norm is None else product

    def _with_residual(self, product: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """y [T, D] of h W_out."""
        y = product if self.post is None else self.post.compute(product)[0]
        y = y * self.scale if self.scale != 1.0 else y
        return residual + y if self.adds else y

    def _post_backward(
        self, dy: torch.Tensor, product: torch.Tensor | None, weight: GroupWeight
    ) -> torch.Tensor:
        """Gradient of W_out's product, in the first columns of [T, N + P]."""
        buffer, norm = weight.output_buffer(len(dy)), self.post
        place = buffer[:, : weight.out_features]
        if self.scale != 1.0:
            dy = dy * self.scale
        if norm is None:
            place.copy_(dy)
        else:
            norm.backward(dy, product, norm.compute(product)[2], out=place)
        return buffer


def portions(tokens: int) -> list[slice]:
    """The rows that a row-wise core computes at a time: equal portions of at most MLP_TOKENS, whatever is kept of them."""
    tokens = max(tokens, 1)  # an empty batch is one empty portion
    count = -(-tokens // MLP_TOKENS)
    size = -(-tokens // (count * 128)) * 128  # a matrix tile's rows
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]
