"""How a family chooses among experts and stores them: the facts of one row of the family table."""

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig


@dataclass(frozen=True)
class ExpertRules:
    """The experts of a family's layers, each a gated MLP, of which every token takes a few.

    Args:
        router: "softmax" takes the largest of all experts' probabilities; "topk_softmax" takes the largest logits, of which it
            makes probabilities.
        normalise: the config's field that says whether the chosen probabilities are divided by their sum; None: they are not.
        count: the config's field for the number of experts.
        size: the config's field for the columns of an expert's gate and up.
        interleaved: whether config.mlp_only_layers and config.decoder_sparse_step are read: some layers have an MLP instead.
        stored: "each": a checkpoint holds gate_proj, up_proj and down_proj of each expert; "stacked": gate_up_proj and
            down_proj of all experts in one tensor, each matrix transposed: [experts, in, out].
        alternating: whether the rows of gate and up alternate in a checkpoint's gate_up_proj, and in what an adapter adds to it.
        biases: whether the router and all matrices of experts have biases.
    """

    router: Literal["softmax", "topk_softmax"] = "softmax"
    normalise: str | None = None
    count: str = "num_experts"
    size: str = "moe_intermediate_size"
    interleaved: bool = False
    stored: Literal["each", "stacked"] = "each"
    alternating: bool = False
    biases: bool = False

    def in_layer(self, config: PretrainedConfig, index: int) -> bool:
        """Whether a layer has experts, and no MLP."""
        if not self.interleaved:
            return True
        return index not in (config.mlp_only_layers or ()) and (index + 1) % config.decoder_sparse_step == 0

    def normalises(self, config: PretrainedConfig) -> bool:
        """Whether the weights of a token's experts sum to 1."""
        return self.normalise is not None and bool(getattr(config, self.normalise))
