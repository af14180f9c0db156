"""A decoder's embedding and its layer of mixer and MLP.

B rows, S tokens per row, D hidden size. Parameter names equal the checkpoint's. While only LoRA factors are trained, a layer
runs as `fused_layer` describes; otherwise by PyTorch's autograd.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PretrainedConfig

from oribi.families import Family
from oribi.kernels.attention import Visibility
from oribi.kernels.embedding import embedding
from oribi.kernels.fp8 import RoundedWeights
from oribi.kernels.gated_delta_chunks import Chunks
from oribi.kernels.rope import Angles
from oribi.models.core import Keep, Mixer, Result
from oribi.models.experts import ExpertsMLP
from oribi.models.fused_layer import fused_layer, fusible_halves, policy
from oribi.models.host_memory import HostMemory
from oribi.models.linear_layers import NamedParts, RMSNorm
from oribi.models.mixers import mixer_of
from oribi.models.mixers.attention import window_of
from oribi.models.mlp import MLP
from oribi.models.per_layer import PerLayerInput, has_per_layer_inputs
from oribi.models.trained_rows import taken


@dataclass
class Batch:
    """What all layers of one forward share: who sees whom, the angles of each kind of layer, the cache, the host.

    Args:
        shared: what layers read beside their input, by name: keys and values that an earlier layer left, inputs of their own.
        gradients: of entries of `shared`, between the parts of one layer's hand-written backward.
        trained_rows: [n] int64, the tokens of B * S of which the layer's output is wanted, [1, n, D]; None: all. Its mixer
            sees all of them.
    """

    visibility: Visibility
    angles: dict[str | None, Angles]
    cache: Cache | None = None
    host_memory: HostMemory | None = None
    shared: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    gradients: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    trained_rows: torch.Tensor | None = None
    _chunks: Chunks | None = None
    _real: torch.Tensor | None = None

    def part(self, names: Sequence[str]) -> "Batch":
        """A batch that shares these entries alone, outside any graph: what holds it keeps no other layer's graph alive."""
        found = {name: tuple(t.detach() for t in self.shared[name]) for name in names}
        return replace(self, shared=found, gradients={})

    def real_tokens(self) -> torch.Tensor | None:
        """[T] bool, False at padding; None where nothing is padded."""
        visibility = self.visibility
        if visibility.real is not None and self._real is None:
            self._real = visibility.real[:, visibility.past :].bool().reshape(-1)
        return self._real

    def delta_chunks(self, device: torch.device) -> Chunks:
        """The documents in chunks, as the gated delta rule takes them."""
        if self._chunks is None:
            visibility = self.visibility
            dense = visibility.cu_seqlens is None or visibility.uniform
            length = visibility.max_length if visibility.uniform else visibility.length
            tokens = visibility.batch * visibility.length
            offsets, _ = visibility.documents(device)
            self._chunks = Chunks(
                offsets, tokens, range(0, tokens + 1, length) if dense else visibility.bounds
            )
        return self._chunks


class Embedding(nn.Embedding):
    """Token embeddings times the family's scale; a frozen table may lie in host memory.

    Args:
        vocab_size, hidden_size: rows and columns. padding_idx: the row that is never trained.
        scale: factor of every looked-up row, rounded to the table's dtype as the checkpoints were trained.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, padding_idx: int | None, scale: float = 1.0
    ) -> None:
        super().__init__(vocab_size, hidden_size, padding_idx)
        self.scale = scale
        if scale != 1.0:
            self.embed_scale = scale  # PEFT asks for it by this name, as transformers' modules have it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids) if self.weight.device == ids.device else embedding(ids, self.weight)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)


def _all_here(again: bool = True) -> None:
    """A layer whose frozen matrices this process holds."""


class DecoderLayer(NamedParts):
    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__(family)
        mixer = mixer_of(config, family, index)
        self.mixer_name = mixer.attribute  # as the checkpoint has it
        self.add_module(self.mixer_name, mixer)
        has_experts = family.experts is not None and family.experts.in_layer(config, index)
        # not a module of the layer's where the layer itself has its parts
        self.experts_mlp = ()
        if has_experts and family.experts.in_layer_itself:
            self.experts_mlp = (ExpertsMLP(config, family, index, self),)
        else:
            self.add_part("mlp", (ExpertsMLP if has_experts else MLP)(config, family, index))
        for role in family.layer_norms():
            self.add_part(role, RMSNorm.of(config, family, role, config.hidden_size))
        # not a module of the layer's, whose attributes its parts are
        own = has_per_layer_inputs(config, family)
        self.per_layer_input = (PerLayerInput(self, config, family, index),) if own else ()
        if family.layer_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))
        self.parallel = family.norms == "parallel"  # the MLP reads what the mixer reads
        self.residual_scale = float(config.residual_multiplier) if family.multipliers else 1.0
        self.gradient_checkpointing = False  # set by transformers' gradient_checkpointing_enable
        self.keep = policy(
            "balanced", self.results()
        )  # what stays between forward and backward where it is set
        self.keep_nothing = policy("nothing", self.results())
        self.fp8 = False  # set by `use_fp8`
        # group -> what it was made of, and the weights
        self.dequantized: dict[str, tuple[tuple, torch.Tensor | RoundedWeights]] = {}
        # called before frozen matrices are read, which processes may share: `LayerShards`
        self.fetch: Callable[..., None] = _all_here
        # group -> identity of the pass that wrote the LoRA pairs beside them
        self.packed_in: dict[str, object] = {}

    @property
    def mixer(self) -> Mixer:
        """What mixes the tokens."""
        return self._modules[self.mixer_name]

    def parts(self) -> tuple[tuple[nn.Module, RMSNorm | None, RMSNorm | None], ...]:
        """The mixer, the MLP and what adds the layer's own input, each with the norms before and after it."""
        norms = self.family.layer_norms()
        norms = {role: getattr(self, attribute) for role, attribute in norms.items()}
        first = norms.get("mixer_input_norm")
        mlp = self.experts_mlp[0] if self.experts_mlp else self.part("mlp")
        before = first if self.parallel else norms.get("mlp_input_norm")
        if isinstance(mlp, ExpertsMLP) and mlp.own_norms:
            before = None  # one of several that read the same
        return (
            (self.mixer, first, norms.get("mixer_output_norm")),
            (mlp, before, norms.get("mlp_output_norm")),
            *((one, None, self.part("post_per_layer_input_norm")) for one in self.per_layer_input),
        )

    def results(self) -> tuple[Result, ...]:
        """What the layer can keep between forward and backward, beside its input."""
        return tuple(result for module, _, _ in self.parts() for result in module.results)

    @property
    def gives(self) -> str | None:
        """The entry of `Batch.shared` that the layer leaves for later ones."""
        return getattr(self.mixer, "gives", None)

    @property
    def scalar(self) -> torch.Tensor | None:
        """[1] factor of the layer's output; None without one."""
        return self._buffers.get("layer_scalar")

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not self.training:
            return self._composed(x, batch)
        if batch.cache is None:
            halves = fusible_halves(self)
            if halves is not None:
                # without gradients, as for a reference's log-probabilities: the same bits, nothing kept
                keep = self.keep if self.gradient_checkpointing else Keep()
                return fused_layer(
                    self, halves, x, batch, keep if torch.is_grad_enabled() else self.keep_nothing
                )
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self._composed(x, batch)
        has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        # what the graph holds of the batch must not hold the graph of what this layer leaves there
        own = replace(batch, shared=dict(batch.shared))
        x, *given = checkpoint(
            self._composed_with_given, x, own, use_reentrant=False, preserve_rng_state=has_dropout
        )
        if given:
            batch.shared[self.gives] = tuple(given)
        return x

    def _composed_with_given(self, x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The layer's output, and what later layers read."""
        own = replace(batch, shared=dict(batch.shared))
        x = self._composed(x, own)
        return (x, *own.shared[self.gives]) if self.gives else (x,)

    def _composed(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The layer by PyTorch's autograd, for inference and for whatever `fused_layer` does not train."""
        self.fetch()
        read = x
        for index, (module, pre, post) in enumerate(self.parts()):
            read = read if self.parallel else x
            h = module(read if pre is None else pre(read), batch)
            if index == 0 and batch.trained_rows is not None:
                x, h, read = (taken(t.flatten(0, 1), batch.trained_rows)[None] for t in (x, h, read))
            h = h if post is None else post(h)
            x = x + (h if self.residual_scale == 1.0 else h * self.residual_scale)
        return x if self.scalar is None else x * self.scalar


def follow_windows(config: PretrainedConfig, family: Family) -> PretrainedConfig:
    """A config whose caches keep what the decoder's layers see; the config itself where they do.

    transformers' caches slide wherever a config has `sliding_window` or `layer_types`, in families without windows too.
    """
    if family.reads_layer_types:
        return config
    fields = ("sliding_window", "attention_chunk_size", "layer_types")
    wanted = None
    if window_of(config, family, 0) is None and any(getattr(config, name, None) for name in fields):
        wanted = ["full_attention"] * config.num_hidden_layers
    if getattr(config, "layer_types", None) == wanted:
        return config
    config = copy.deepcopy(config)
    config.layer_types = wanted
    return config
