"""How a family chooses among experts and stores them: the facts of one row of the family table."""

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig


@dataclass(frozen=True)
class ExpertRules:
    """The experts of a family's layers, each a gated MLP, of which every token takes a few.

    Args:
        router: what scores are made of logits, in the words of `kernels.routing.RouterRule`.
        normalise: the config's field that says whether the chosen weights are divided by their sum; True: they are; None: they
            are not.
        added: to that sum. least: the config's field for the smallest number that the sum is taken for.
        scale: the config's field for a factor of the weights.
        groups: whether config.n_group and config.topk_group are read: experts are chosen from some of several groups.
        correction: where a number per expert lies that is added to the scores before the choice alone: in the router, or in
            its part "moe_statics".
        in_float32: whether the router's matrix is kept, and its logits are computed, in float32.
        count: the config's field for the number of experts.
        size: the config's field for the columns of an expert's gate and up.
        used: the config's field for how many experts a token takes.
        layers: which layers have experts: "all"; by config.mlp_only_layers and config.decoder_sparse_step; all after
            the first config.first_k_dense_replace; by config.moe_layer_start_index, moe_layer_end_index and
            moe_layer_interval.
        shared: the config's field for how many experts' width an MLP has that every token takes beside the experts; None: there
            is none, unless it has a field of its own.
        shared_columns: the config's field for the columns of that MLP's gate and up.
        shared_gate: whether that MLP's output is multiplied by the sigmoid of one number per token, which a linear layer
            "shared_expert_gate" gives.
        in_layer_itself: whether the router and the experts are parts of the layer, beside an MLP under its usual name; else they are
            parts of what is in the MLP's place.
        own_norms: whether the experts and the MLP beside them have norms of their own: one before each, which read the same, and
            one after each, before they are added.
        router_part: the part of the router that holds its matrix; None: the router itself does.
        router_norm: whether the router reads the residual stream, divided by its root mean square and by the root of its size and
            multiplied by a vector "scale"; else it reads what the experts read.
        expert_scale: whether the weights are multiplied by a number per expert, "per_expert_scale" of the router.
        stored: "each": a checkpoint holds gate_proj, up_proj and down_proj of each expert; "stacked": gate_up_proj and
            down_proj of all experts in one tensor; "transposed": likewise, with matrices [in, out]; "either": each or stacked,
            and a merge as its base.
        alternating: whether the rows of gate and up alternate in a checkpoint's gate_up_proj, and in what an adapter adds to it.
        biases: whether the router and all matrices of experts have biases.
        renamed: parts of the names of some tensors, each with what checkpoints have there instead.
    """

    router: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    normalise: str | Literal[True] | None = None
    added: float = 0.0
    least: str | None = None
    scale: str | None = None
    groups: bool = False
    correction: Literal["router", "moe_statics"] | None = None
    in_float32: bool = False
    count: str = "num_experts"
    size: str = "moe_intermediate_size"
    used: str = "num_experts_per_tok"
    layers: Literal["all", "sparse_step", "after_first", "interval"] = "all"
    shared: str | None = None
    shared_columns: str | None = None
    shared_gate: bool = False
    in_layer_itself: bool = False
    own_norms: bool = False
    router_part: str | None = None
    router_norm: bool = False
    expert_scale: bool = False
    stored: Literal["each", "stacked", "transposed", "either"] = "each"
    alternating: bool = False
    biases: bool = False
    renamed: tuple[tuple[str, str], ...] = ()

    def in_layer(self, config: PretrainedConfig, index: int) -> bool:
        """Whether a layer has experts."""
        if self.layers == "sparse_step":
            return (
                index not in (config.mlp_only_layers or ()) and (index + 1) % config.decoder_sparse_step == 0
            )
        if self.layers == "after_first":
            return index >= config.first_k_dense_replace
        if self.layers == "interval":
            inside = config.moe_layer_start_index <= index <= config.moe_layer_end_index
            return inside and (index + 1) % config.moe_layer_interval == 0
        return True

    def normalises(self, config: PretrainedConfig) -> bool:
        """Whether the weights of a token's experts sum to 1, or to their scale."""
        return bool(getattr(config, self.normalise) if isinstance(self.normalise, str) else self.normalise)

    def shared_size(self, config: PretrainedConfig) -> int:
        """Columns of the gate of the MLP beside the experts; 0 where there is none."""
        if self.shared_columns:
            return getattr(config, self.shared_columns)
        return getattr(config, self.size) * (getattr(config, self.shared) or 0) if self.shared else 0

    @property
    def has_shared(self) -> bool:
        """Whether models of the family can have an MLP beside the experts."""
        return bool(self.shared or self.shared_columns)

    @property
    def shared_by_name(self) -> bool:
        """Whether target_modules reach the MLP beside the experts: where checkpoints hold each expert, PEFT takes the names of an
        MLP's projections for the experts alone."""
        return self.stored != "each"

    def problems(self, config: PretrainedConfig) -> list[str]:
        """What no experts can have, one line each; every size is a whole number."""
        used, count = getattr(config, self.used), getattr(config, self.count)
        return [f"{self.used} = {used}: the model has {count} experts"] * (used > count)
