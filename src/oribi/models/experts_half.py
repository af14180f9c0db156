"""The experts' half of a decoder layer, differentiated by hand.

    n = pre(x)      l = n W_r^T      w, e = route(l)      gu_r = n_t(r) W1_e^T + b1_e      h = act(gate) up
    o_r = h_r W2_e^T + b2_e
    y_t = x_t + c (sum over the rows r of t: w_r o_r + m(n_t))

where only some families have biases, and only some an MLP m beside the experts: a half of its own with which both passes begin.
Where both have norms of their own,

    o_t = sum over the rows r of t: w_r o_r      z = post_e(o) + post_m(m(pre_m(x)))      y = x + c post(z)

with n = pre_e(x), and l may be made of a norm of x alone. Backward then ends with m's half.
T tokens, k experts of a token, R = T k rows sorted by expert, D hidden size, I columns of gate and of up, P columns of LoRA
(`kernels/expert_linear.py`). From dy, with the rows' weights applied to the gradient of h:

    dh_r = c dy_t(r) W2_e      dw_r = dh_r . h_r + c dy_t(r) . b2_e      dgu = act'(w dh)      dn_t = sum of (dgu_r W1_e) + dl W_r

What was chosen is kept, never computed again: rounding could choose other experts. gu is kept, waits in host memory or is
computed again as `Keep` says; the gradients do not depend on it, to the bit.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

from oribi.kernels.expert_linear import StackProjection, StackWeight
from oribi.kernels.expert_rows import combine, products_and_weighted
from oribi.kernels.gated_mlp import gated_mlp_backward, gated_mlp_forward
from oribi.kernels.lora import Projection
from oribi.kernels.routing import Routing, sort_by_expert
from oribi.models.experts import ExpertsMLP, Router
from oribi.models.half import Factors, Half, Kept, LayerPass
from oribi.models.linear_layers import RMSNorm
from oribi.models.trained_rows import norm_backward

# gives a tensor like another
Allocate = Callable[[torch.Tensor], torch.Tensor]
# rows that are computed at a time: at Qwen3-30B-A3B's sizes gate|up, h and the output take 0.8 GB of so many
MOST_ROWS = 65536


def experts_half(
    core: ExpertsMLP, pre: RMSNorm | None, post: RMSNorm | None, scale: float
) -> "ExpertsHalf | None":
    """The half of a layer's experts; None where PyTorch's autograd has to differentiate them."""
    stacks, router = core.stacks(), core.part("router")
    if (post is not None) != core.own_norms or stacks is None or not isinstance(router, Router):
        return None
    frozen = [*router.parameters(), *(t for one in stacks.values() for t in (one.weight, one.bias))]
    if any(parameter is not None and parameter.requires_grad for parameter in frozen):
        return None
    if core.own_norms:
        inside = core.norm("mlp_input_norm"), core.norm("shared_output_norm")
        shared = Half(core.shared, *inside, 1.0, adds=False)
        return NormedExpertsHalf(core, core.norm("experts_input_norm"), post, stacks, scale, shared)
    shared = None if core.shared is None else Half(core.shared, pre, None, scale)
    if shared is not None and (rows := core.shared.rows_beside(router.matrix.device)):
        size, dtype = router.matrix.shape[1], router.matrix.dtype
        shared.groups[core.shared.input].append(Projection(_zeros(rows, size, dtype, router.matrix.device)))
    return ExpertsHalf(core, pre, post, stacks, scale, shared)


@lru_cache
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One for all layers."""
    with torch.inference_mode(False):
        return torch.zeros(rows, columns, dtype=dtype, device=device)


class ExpertsHalf:
    """The experts with the norm before them, for one forward and backward; its methods are those of `models.half.Half`.

    Args:
        core: the module. pre: the norm. post: None. stacks: its weights and pairs. scale: c.
        shared: the half of the MLP beside the experts.
    """

    reads = gives = None

    def __init__(
        self,
        core: ExpertsMLP,
        pre: RMSNorm | None,
        post: RMSNorm | None,
        stacks: dict[str, StackProjection],
        scale: float,
        shared: Half | None,
    ) -> None:
        self.core, self.pre, self.post, self.scale = core, pre, post, scale
        self.router = core.part("router")
        self.stacks = stacks
        self.shared = shared
        # linear layers, which only the MLP beside the experts has
        self.groups: dict[str, list] = {} if self.shared is None else self.shared.groups
        self._weights: dict[str, StackWeight] = {}

    def factors(self) -> Factors:
        """A and B of both stacks, and of the MLP beside the experts, in order, as the autograd function takes them."""
        own = [factor for stack in self.stacks.values() for factor in (stack.a, stack.b)]
        return own + ([] if self.shared is None else self.shared.factors())

    def forward(self, x: torch.Tensor, layer_pass: LayerPass) -> torch.Tensor:
        """y [T, D] of x [T, D]."""
        parts = self._begin(x, layer_pass)
        alone = len(parts) == 1
        onto = x if self.shared is None else self.shared.forward(x, layer_pass)
        ys = [
            self._output(x[rows], onto[rows], *one, alone)
            for rows, *one in zip(parts, self.routed, self.kept)
        ]
        self._weights.clear()
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    def _begin(self, x: torch.Tensor, layer_pass: LayerPass) -> list[slice]:
        """Chooses the experts of x [T, D]; gives the portions of its rows."""
        self.layer_pass = layer_pass
        parts = self._portions(len(x))
        self.kept = [Kept(layer_pass) for _ in parts]
        self.routed = [self._route(x[rows]) for rows in parts]
        return parts

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """y [T, D] in backward, computed again from what was chosen."""
        parts = self._portions(len(x))
        onto = x if self.shared is None else self.shared.restore(x)
        return torch.cat(
            [self._output(x[rows], onto[rows], one, None, False) for rows, one in zip(parts, self.routed)]
        )

    place_for_dy = staticmethod(torch.empty_like)

    def backward(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        place_for_dx: Allocate | None,
        needs_dx: bool = True,
    ) -> tuple[torch.Tensor | None, Factors]:
        """Gradients of x [T, D] and of every factor; arguments as of `Half.backward`."""
        kept, self.kept, routed, self.routed = self.kept, [], self.routed, []
        dx, found, others = None, [], []
        dresidual = dy
        if self.shared is not None:
            dresidual, others = self.shared.backward(x, dy, None, needs_dx)
        for rows, one, routing in zip(self._portions(len(x)), kept, routed):
            part, dy_part = x[rows], dy[rows]
            n, rstd = self._normed(part)
            dy_part = dy_part if self.scale == 1.0 else dy_part * self.scale
            dn, dlogits, grads = self._backward(part, n, dy_part, routing, one, needs_dx)
            found.append(grads)
            if not needs_dx:
                continue
            if dx is None:
                dx = torch.empty_like(x) if place_for_dx is None else place_for_dx(x)
            self._add_gradients(dn, dlogits, part, rstd, dresidual[rows], dx[rows])
        self._weights.clear()
        return dx, summed(found) + others

    def _add_gradients(
        self,
        dn: torch.Tensor,
        dlogits: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor | None,
        dresidual: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Writes the gradient of some rows x [t, D], of which n, the logits and the residual stream were made."""
        router = self.router
        if router.norm is None:
            dn = dn.addmm_(dlogits.to(dn.dtype), router.matrix.to(dn.dtype))
        norm_backward(self.pre, dn, x, rstd, dresidual, out)
        if router.norm is not None:
            router.logits_backward(dlogits, x, out, out)

    def _route(self, x: torch.Tensor) -> Routing:
        router = self.router
        n = self._normed(x)[0] if router.norm is None else None
        return sort_by_expert(router.choose(self._logits(x, n)), len(router.matrix))

    def _logits(self, x: torch.Tensor, n: torch.Tensor | None) -> torch.Tensor:
        """[t, E] of some rows x [t, D], or of what the experts read of them."""
        return self.router.logits(n if self.router.norm is None else x, self.router.matrix)

    def _output(
        self, x: torch.Tensor, onto: torch.Tensor, routing: Routing, kept: Kept | None, alone: bool
    ) -> torch.Tensor:
        """y [t, D] of some rows x, added to `onto`; arguments as of `_sums`."""
        y = self._sums(x, routing, kept, alone)
        return onto + (y if self.scale == 1.0 else y * self.scale)

    def _sums(
        self,
        x: torch.Tensor,
        routing: Routing,
        kept: Kept | None,
        alone: bool,
        gate_up: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sums [t, D] of the experts' outputs for some rows x.

        Args:
            kept: takes what is kept. alone: whether no rows follow, and the weights of gate|up are freed.
            gate_up: [R, 2I + P] where it is there already.
        """
        n, _ = self._normed(x)
        weights = self.router.weigh(self._logits(x, n), routing.experts)
        if gate_up is None:
            gate_up = self._gate_up(n, routing)
        if kept is not None:
            kept.put("gate_up", gate_up)
        h_buffer = self._h(gate_up)
        del gate_up
        if alone:
            del self._weights["gate_up_proj"]
        out = self._weight("down_proj").forward(h_buffer, routing.offs, with_columns=False)
        return combine(out, routing, weights)

    def _backward(
        self, x: torch.Tensor, n: torch.Tensor, do: torch.Tensor, routing: Routing, kept: Kept, needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Factors]:
        """Gradients of n [t, D], through the experts alone, of the logits and of the factors, of some rows x.

        Args:
            do: [t, D], the gradient of the weighted sums.
        """
        offs, router = routing.offs, self.router
        logits = self._logits(x, n)
        row_weights = routing.of_rows(router.weigh(logits, routing.experts))
        gate_up = kept.take("gate_up")
        if gate_up is None:
            gate_up = self._gate_up(n, routing)
        h_buffer, down = self._h(gate_up), self._weight("down_proj")
        down.fill_xa(h_buffer, offs)
        dy_buffer = down.with_columns(do, routing.tokens)
        dh = down.backward_input(dy_buffer, offs)
        of_rows = products_and_weighted(dh, h_buffer[:, : down.in_features], row_weights)
        if down.has_bias:  # a row's output has it, too
            of_rows += dy_buffer[:, down.out_features + down.rank]
        dweights = routing.of_tokens(of_rows)
        factors = down.factor_gradients(h_buffer, dy_buffer, offs, self._pair("down_proj"), row_weights)
        del h_buffer, dy_buffer, down, self._weights["down_proj"]
        up = self._weight("gate_up_proj")
        gate_part, up_part = gate_up[:, : up.out_features].chunk(2, dim=1)
        gated_mlp_backward(dh, gate_part, up_part, self.core.activation, dgate=gate_part, dup=up_part)
        del dh, gate_part, up_part
        dn_rows = up.backward_input(gate_up, offs) if needs_dx or up.rank else None
        if up.rank:
            x_buffer = self._rows(n, routing)
            up.fill_xa(x_buffer, offs)
            factors = up.factor_gradients(x_buffer, gate_up, offs, self._pair("gate_up_proj")) + factors
        else:
            factors = [None, None, *factors]
        if not needs_dx:
            return None, None, factors
        dlogits = router.weigh_backward(dweights, logits, routing.experts)
        return combine(dn_rows, routing, None), dlogits, factors

    def _portions(self, tokens: int) -> list[slice]:
        step = max(MOST_ROWS // self.router.rule.count, 1)
        return [slice(first, first + step) for first in range(0, max(tokens, 1), step)]

    def _weight(self, name: str) -> StackWeight:
        """A stack's weights, which stay until their last use in this pass."""
        if name not in self._weights:
            self._weights[name] = StackWeight(self.stacks[name], self.layer_pass.dtype)
        return self._weights[name]

    def _pair(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.stacks[name].a, self.stacks[name].b

    def _rows(self, n: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[R, D + P]: each row's token in the first D columns."""
        return self._weight("gate_up_proj").with_columns(n, routing.tokens)

    def _gate_up(self, n: torch.Tensor, routing: Routing) -> torch.Tensor:
        """gate|up in the first columns of [R, 2I + P]."""
        return self._weight("gate_up_proj").forward(self._rows(n, routing), routing.offs)

    def _h(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[R, I + P]: h in the first I columns."""
        down = self.stacks["down_proj"]
        size = down.weight.shape[2]
        buffer = gate_up.new_empty(len(gate_up), size + down.columns)
        gate_part, up_part = gate_up[:, : 2 * size].chunk(2, dim=1)
        gated_mlp_forward(gate_part, up_part, self.core.activation, out=buffer[:, :size])
        return buffer

    def _normed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """pre(x) [t, D], and 1/rms of x [t]."""
        if self.pre is None:
            return x, None
        n, _, rstd = self.pre.compute(x)
        return n, rstd


class NormedExpertsHalf(ExpertsHalf):
    """The same where the experts, the MLP beside them and their sum have norms of their own; post is that of the sum."""

    def forward(self, x: torch.Tensor, layer_pass: LayerPass) -> torch.Tensor:
        """y [T, D] of x [T, D]."""
        parts = self._begin(x, layer_pass)
        beside = self.shared.forward(x, layer_pass)
        ys = []
        for rows, routing, kept in zip(parts, self.routed, self.kept):
            sums = self._sums(x[rows], routing, kept, len(parts) == 1)
            kept.put("experts", sums)
            ys.append(self._after(x[rows], beside[rows], sums))
        self._weights.clear()
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """y [T, D] in backward, computed again from what was chosen and kept."""
        beside, ys = self.shared.restore(x), []
        for rows, routing, kept in zip(self._portions(len(x)), self.routed, self.kept):
            sums = self._again(x[rows], routing, kept)
            kept.put_back({"experts": sums})
            ys.append(self._after(x[rows], beside[rows], sums))
        return torch.cat(ys)

    def backward(
        self, x: torch.Tensor, dy: torch.Tensor, place_for_dx: Allocate | None, needs_dx: bool = True
    ) -> tuple[torch.Tensor | None, Factors]:
        """Gradients of x [T, D] and of every factor; arguments as of `Half.backward`."""
        kept, self.kept, routed, self.routed = self.kept, [], self.routed, []
        after, found = self.core.norm("experts_output_norm"), []
        beside = self.shared.restore(x)  # of which the gradient takes the place
        through_experts = torch.empty_like(x) if needs_dx else None
        for rows, one, routing in zip(self._portions(len(x)), kept, routed):
            part, dy_part = x[rows], dy[rows] if self.scale == 1.0 else dy[rows] * self.scale
            sums = self._again(part, routing, one, True)
            own, _, rstd = after.compute(sums)
            total = own.add_(beside[rows])
            dz = self.post.backward(dy_part, total, self.post.compute(total)[2], out=beside[rows])
            dsums = after.backward(dz, sums, rstd)
            del own, total, sums
            n, rstd = self._normed(part)
            dn, dlogits, grads = self._backward(part, n, dsums, routing, one, needs_dx)
            found.append(grads)
            if needs_dx:
                self._add_gradients(dn, dlogits, part, rstd, dy[rows], through_experts[rows])
        self._weights.clear()
        dx, others = self.shared.backward(x, beside, place_for_dx, needs_dx, through_experts)
        return dx, summed(found) + others

    def _again(
        self, x: torch.Tensor, routing: Routing, kept: Kept, keeps_gate_up: bool = False
    ) -> torch.Tensor:
        """The weighted sums [t, D] for some rows x, kept or computed; gate|up stays where it was kept, or if `keeps_gate_up`."""
        sums = kept.take("experts")
        if sums is None:
            gate_up = kept.take("gate_up")
            keeps_gate_up = keeps_gate_up or gate_up is not None
            if gate_up is None:
                gate_up = self._gate_up(self._normed(x)[0], routing)
            sums = self._sums(x, routing, None, False, gate_up)
            kept.put_back({"gate_up": gate_up} if keeps_gate_up else {})
        return sums

    def _after(self, x: torch.Tensor, beside: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """y [t, D] of some rows x, of what the MLP beside the experts gives, and of the sums of the experts' outputs."""
        total = self.core.norm("experts_output_norm").compute(sums)[0].add_(beside)
        y = self.post.compute(total)[0]
        return x + (y if self.scale == 1.0 else y * self.scale)


def summed(of_portions: list[Factors]) -> Factors:
    """The factors' gradients, added over portions of the tokens."""
    return [None if of_one[0] is None else sum(of_one[1:], of_one[0]) for of_one in zip(*of_portions)]
