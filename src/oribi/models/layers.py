"""The parts of a decoder: norm, attention, gated MLP, and the layer of them.

B rows, S tokens a row, D hidden size, H query heads, K key/value heads, E head_dim. Parameter names equal the
checkpoint's. While only LoRA factors are trained, a layer runs as `fused_layer` describes; otherwise by PyTorch's
autograd.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PretrainedConfig

from oribi.families import Family, activation_of
from oribi.kernels.attention import Visibility, attention
from oribi.kernels.embedding import embedding
from oribi.kernels.fp8 import RoundedWeights
from oribi.kernels.gated_mlp import gated_mlp
from oribi.kernels.rms_norm import rms_norm
from oribi.kernels.rope import rope
from oribi.models.fused_layer import POLICIES, Keep, fused_layer, fusible_groups
from oribi.models.host_memory import HostMemory
from oribi.models.projections import hooked, project


@dataclass
class Batch:
    """What all layers of one forward share: who sees whom, the angles of each kind of layer, the cache, the host."""

    visibility: Visibility
    angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]]
    cache: Cache | None = None
    host_memory: HostMemory | None = None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    @property
    def observed(self) -> bool:
        """Whether hooks want to see this norm run by itself."""
        return hooked(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


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


class Attention(nn.Module):
    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.index = index
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        configured = family.attention_bias == "config" and bool(getattr(config, "attention_bias", False))
        qkv_bias = configured or family.attention_bias == "qkv"
        if family.fused_projections:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=qkv_bias)
        else:
            for name, size in zip(("q_proj", "k_proj", "v_proj"), self.sizes):
                self.add_module(name, nn.Linear(config.hidden_size, size, bias=qkv_bias))
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=configured)
        self.qk_norm = family.qk_norm
        if self.qk_norm:
            q_size, k_size = (self.head_dim, self.head_dim) if self.qk_norm == "head" else self.sizes[:2]
            self.q_norm = RMSNorm(q_size, config.rms_norm_eps, family.norm_offset)
            self.k_norm = RMSNorm(k_size, config.rms_norm_eps, family.norm_offset)
        self.scale = self.head_dim**-0.5
        if family.attention_scale:
            self.scale = float(getattr(config, family.attention_scale)) ** family.attention_scale_power
        self.softcap = config.attn_logit_softcapping if family.softcaps else None
        self.window = window_of(config, family, index)
        self.rope_kind = config.layer_types[index] if family.rope_by_layer_type else None
        self.rotates = bool(config.no_rope_layers[index]) if family.no_rope_layers else True

    def qkv_modules(self) -> list[nn.Module]:
        """q, k, v, or the one layer that holds them all."""
        return [self.qkv_proj] if hasattr(self, "qkv_proj") else [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows, length = x.shape[:2]
        outputs = project(self.qkv_modules(), x)
        q, k, v = outputs[0].split(self.sizes, dim=-1) if len(outputs) == 1 else outputs
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(rows * length, -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rope(q, k, *batch.angles[self.rope_kind])
        q, k, v = (t.view(rows, length, -1, self.head_dim) for t in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.index)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, batch.visibility, self.scale, self.window, self.softcap)
        return project([self.o_proj], out.reshape(rows, length, -1))[0]


class MLP(nn.Module):
    def __init__(self, config: PretrainedConfig, family: Family) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        bias = family.mlp_bias and bool(getattr(config, "mlp_bias", False))
        if family.fused_projections:
            self.gate_up_proj = nn.Linear(size, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(size, inner, bias=bias)
            self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.activation = activation_of(config)

    def gate_up_modules(self) -> list[nn.Module]:
        """gate and up, or the one layer that holds both."""
        return [self.gate_up_proj] if hasattr(self, "gate_up_proj") else [self.gate_proj, self.up_proj]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = project(self.gate_up_modules(), x)
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        flat = gated_mlp(gate.flatten(0, -2), up.flatten(0, -2), self.activation)
        return project([self.down_proj], flat.view(*x.shape[:-1], -1))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, family, index)
        self.mlp = MLP(config, family)

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, family.norm_offset)

        # checkpoints call the MLP's input norm post_attention_layernorm, except where attention's output has one
        if family.norms != "post":
            self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if family.norms == "sandwich":
            self.pre_feedforward_layernorm = norm()
        if family.norms != "pre":
            self.post_feedforward_layernorm = norm()
        self.norms = family.norms
        self.residual_scale = float(config.residual_multiplier) if family.multipliers else 1.0
        self.gradient_checkpointing = False  # set by transformers' gradient_checkpointing_enable
        self.keep = POLICIES["balanced"]  # what stays between forward and backward where it is set
        self.fp8 = False  # set by `use_fp8`
        # group -> what it was made of, and the weights
        self.dequantized: dict[str, tuple[tuple, torch.Tensor | RoundedWeights]] = {}

    def norm_modules(self) -> list[RMSNorm]:
        """Every norm of the layer."""
        return [module for module in self.modules() if isinstance(module, RMSNorm)]

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._composed(x, batch)
        if batch.cache is None:
            groups = fusible_groups(self)
            if groups is not None:
                return fused_layer(
                    self, groups, x, batch, self.keep if self.gradient_checkpointing else Keep()
                )
        if not self.gradient_checkpointing:
            return self._composed(x, batch)
        has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        return checkpoint(
            self._composed, x, batch, use_reentrant=False, preserve_rng_state=has_dropout
        )  # fmt: skip

    def _composed(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The layer by PyTorch's autograd, for inference and for whatever `fused_layer` does not train."""
        h = self.self_attn(self.input_layernorm(x) if self.norms != "post" else x, batch)
        if self.norms != "pre":
            h = self.post_attention_layernorm(h)
        x = x + h * self.residual_scale if self.residual_scale != 1.0 else x + h
        if self.norms == "pre":
            h = self.mlp(self.post_attention_layernorm(x))
        else:
            h = self.mlp(self.pre_feedforward_layernorm(x) if self.norms == "sandwich" else x)
            h = self.post_feedforward_layernorm(h)
        return x + h * self.residual_scale if self.residual_scale != 1.0 else x + h


def window_of(config: PretrainedConfig, family: Family, index: int) -> int | None:
    """Sliding window of a layer in tokens, or None where it sees everything before it."""
    if family.windows is None:
        return None
    if family.windows == "layer_types" and config.layer_types[index] != "sliding_attention":
        return None
    return config.sliding_window


def follow_windows(config: PretrainedConfig, family: Family) -> PretrainedConfig:
    """A config whose caches keep what the decoder's layers see; the config itself where they do.

    transformers' caches slide wherever a config has `sliding_window` or `layer_types`, in families without windows too.
    """
    if family.windows == "layer_types" or family.rope_by_layer_type:
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
