"""The decoder: every family of the table behind Hugging Face's interface.

B rows, S tokens a row, T = B * S, D hidden size, H query heads, K key/value heads, E head_dim, V vocabulary.
Parameter names equal the checkpoint's, so a checkpoint loads as it is and PEFT, TRL, transformers' Trainer, `generate`
and `save_pretrained` work on the model. What a family changes is read from its row in `families.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oribi.errors import ModelError
from oribi.kernels.attention import Visibility, attention
from oribi.kernels.cross_entropy import linear_cross_entropy
from oribi.kernels.embedding import embedding
from oribi.kernels.gated_mlp import gated_mlp
from oribi.kernels.rms_norm import rms_norm
from oribi.kernels.rope import rope
from oribi.models.families import Family, activation_of, family_of
from oribi.models.fused_layer import POLICIES, Keep, fused_layer, fusible_groups
from oribi.models.generation import GeneratesInAnyMode
from oribi.models.host_memory import HostMemory
from oribi.models.projections import hooked, project, read
from oribi.models.rope import RotaryAngles


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
        self.dequantized: dict[
            str, tuple[tuple, torch.Tensor]
        ] = {}  # group -> what it was made of, and the weights

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


class DecoderPreTrainedModel(PreTrainedModel):
    config_class = PretrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # what Trainer asks before it divides by num_items_in_batch itself
    accepts_loss_kwargs = True

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.is_floating_point():
            module.weight.data.normal_(0.0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0 - module.offset)

    def set_recompute_policy(self, policy: str | list[Keep]) -> None:
        """Chooses what each layer keeps between forward and backward, and switches gradient checkpointing on for it.

        Args:
            policy: "speed" (keep all), "balanced", "memory" (inputs wait in host memory), or one `Keep` a layer.

        Raises:
            ModelError: unknown name, or a list of another length than the layers.
        """
        layers = [module for module in self.modules() if isinstance(module, DecoderLayer)]
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ModelError(f"recompute policy {policy!r}; it can be {', '.join(map(repr, POLICIES))}")
            policy = [POLICIES[policy]] * len(layers)
        if len(policy) != len(layers):
            raise ModelError(f"{len(policy)} recompute policies for {len(layers)} layers; give one for each")
        self.gradient_checkpointing_enable()
        for layer, keep in zip(layers, policy):
            layer.keep = keep
            layer.dequantized.clear()

    def release(self) -> None:
        """Frees what training keeps from step to step: dequantised weights and pinned host memory."""
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.dequantized.clear()
            elif isinstance(module, DecoderModel):
                module.host_memory = None

    @property
    def device(self) -> torch.device:
        """Where the layers compute; an embedding may lie in host memory."""
        return next(p for name, p in self.named_parameters() if name.endswith("layernorm.weight")).device

    def offload_embedding(self) -> int:
        """Moves a frozen embedding that no head shares to pinned host memory.

        Returns:
            Bytes of device memory freed; 0 where the embedding has to stay.
        """
        weight = getattr(self.get_input_embeddings(), "weight", None)
        head = self.get_output_embeddings()
        shared = head is not None and getattr(head, "weight", None) is weight
        if weight is None or shared or weight.requires_grad or not weight.is_cuda:
            return 0
        weight.data = weight.data.cpu().pin_memory()
        return weight.nbytes

    def enable_input_require_grads(self) -> None:
        """Nothing to do: checkpointed layers pass gradients to their factors whether or not the input wants one."""


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, layers and the last norm; what `AutoModel` would give."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        family = require_family(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, family, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, family.norm_offset)
        kinds = sorted(set(config.layer_types)) if family.rope_by_layer_type else [None]
        self.rotary = {kind: RotaryAngles(config, kind) for kind in kinds}
        self.embedding_scale = config.hidden_size**0.5 if family.embedding_scale else 1.0
        self.embedding_multiplier = float(config.embedding_multiplier) if family.multipliers else 1.0
        self.host_memory: HostMemory | None = None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, [B, S, D]. Arguments as in `DecoderForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(self.norm.weight.dtype)  # embeddings that are trained whole are float32
        if inputs_embeds is None and self.embedding_scale != 1.0:
            # rounded to the weight's dtype as the checkpoints were trained
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        if self.embedding_multiplier != 1.0:
            x = x * self.embedding_multiplier
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch = self._batch(x, attention_mask, position_ids, past_key_values, cu_seq_lens_q, max_length_q)
        states = [x] if output_hidden_states else None
        for layer in self.layers:
            x = layer(x, batch)
            if states is not None:
                states.append(x)
        x = self.norm(x)
        if states is not None:
            states[-1] = x
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else tuple(states),
        )

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        weight = getattr(self.embed_tokens, "weight", None)  # PEFT wraps an embedding that it trains
        if weight is None or weight.device == input_ids.device:
            return self.embed_tokens(input_ids)
        return embedding(input_ids, weight)

    def _batch(self, x, attention_mask, position_ids, cache, cu_seqlens, max_length) -> Batch:
        rows, length = x.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        elif attention_mask is None and rows == 1 and cu_seqlens is None and past == 0 and length > 1:
            cu_seqlens, max_length = documents_from_positions(position_ids)
        real = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ModelError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; give [batch, tokens] of 0 and 1"
                )
            # asking costs a synchronisation, a dense mask costs the fast backends: ask
            real = None if bool(attention_mask.all()) else attention_mask
        visibility = Visibility(rows, length, past, real, cu_seqlens, int(max_length or 0))
        longest = 0
        if any(angles.needs_length for angles in self.rotary.values()):
            longest = int(max_length) if max_length else int(position_ids.max()) + 1
        positions = position_ids.expand(rows, length).reshape(-1)
        angles = {kind: rotary.angles(positions, longest) for kind, rotary in self.rotary.items()}
        if self.host_memory is None and x.is_cuda and any(layer.keep.uses_host for layer in self.layers):
            self.host_memory = HostMemory(x.device)
        return Batch(visibility, angles, cache, self.host_memory)


class DecoderForCausalLM(DecoderPreTrainedModel, GeneratesInAnyMode, GenerationMixin):
    """A causal language model of any family of the table; `build` makes one."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        family = require_family(config)
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.softcap = config.final_logit_softcapping if family.softcaps else None
        self.logit_scale = 1.0 / config.logits_scaling if family.multipliers else 1.0
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_logits: bool | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Loss and logits of a batch.

        Args:
            input_ids: [B, S] int64. A pack is one row of documents whose position_ids restart at 0.
            attention_mask: [B, past + S] of 0 and 1, padding on either side; None where nothing is padded.
            position_ids: [B, S] int64; counted from the cached length if None.
            past_key_values: cache to read and extend.
            inputs_embeds: [B, S, D] in place of input_ids.
            labels: [B, S] int64, not shifted; -100 is not trained on.
            logits_to_keep: only the last so many positions' logits (0: all), or their indices.
            num_items_in_batch: what the summed loss is divided by; None divides by this batch's labelled tokens.
            output_logits: None gives logits except while training with labels, where they are never formed.
            kwargs: cu_seq_lens_q [docs + 1] int32 and max_length_q (int) of a pack, output_hidden_states.

        Returns:
            loss (float32 scalar or None), logits ([B, S, V] or None), past_key_values, hidden_states.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch)
        logits = None
        if output_logits or (output_logits is None and not (self.training and labels is not None)):
            if isinstance(logits_to_keep, int):
                logits_to_keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
            logits = self._logits(hidden[:, logits_to_keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden.to(self.lm_head.weight.dtype))  # a head trained whole is float32
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor | int | None
    ) -> torch.Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        head = self.lm_head
        if hasattr(head, "modules_to_save"):  # PEFT's wrapper around a fully trained head
            head = (
                head.modules_to_save[head.active_adapters[0]]
                if not head.disable_adapters
                else head.original_module
            )
        projection = read(head)
        if projection is not None and projection.a is None:
            return linear_cross_entropy(
                rows, projection.weight, targets, bias=projection.bias, divisor=divisor,
                softcap=self.softcap, logit_scale=self.logit_scale,
            )  # fmt: skip
        labelled = targets != -100
        rows, targets = rows[labelled], targets[labelled]
        divisor = max(len(targets), 1) if divisor is None else divisor
        total = rows.sum() * 0.0
        for start in range(0, len(targets), 1024):  # an adapted head keeps the logits of 1024 rows at a time
            part = slice(start, start + 1024)
            total = total + checkpoint(self._summed_loss, rows[part], targets[part], use_reentrant=False)
        return total.float() / divisor

    def _summed_loss(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._logits(rows).float(), targets, reduction="sum")


def build(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta"
) -> DecoderForCausalLM:
    """A model for a config, its class named as the checkpoint's architecture.

    Args:
        config: config of a family of the table.
        dtype: dtype of every parameter.
        device: "meta" gives parameters without storage, to be assigned by a loader; elsewhere they are initialised.

    Raises:
        ModelError: the table has no row for this config.
    """
    family = require_family(config)
    # saved configs name the class, and transformers must find its own class by that name
    architecture = type(
        family.architecture, (DecoderForCausalLM,), {"config_class": type(config), "__module__": __name__}
    )
    config.dtype = dtype
    with torch.device(device):
        return architecture(config).to(dtype)


def require_family(config: PretrainedConfig) -> Family:
    """The config's row of the table.

    Raises:
        ModelError: there is none.
    """
    family = family_of(config)
    if family is None:
        raise ModelError(f"model_type {config.model_type!r} with this config is outside oribi's family table")
    return family


def window_of(config: PretrainedConfig, family: Family, index: int) -> int | None:
    """Sliding window of a layer in tokens, or None where it sees everything before it."""
    if family.windows is None:
        return None
    if family.windows == "layer_types" and config.layer_types[index] != "sliding_attention":
        return None
    return config.sliding_window


def documents_from_positions(position_ids: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Offsets [docs + 1] int32 and longest document of a pack, from positions [1, S] that restart at 0."""
    starts = (position_ids[0] == 0).nonzero().flatten().to(torch.int32)
    if len(starts) <= 1:
        return None, 0
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])
    if starts[0] != 0:
        ends = torch.cat([starts.new_zeros(1), ends])
    return ends, int(ends.diff().max())
