"""The decoder: every family of the table behind Hugging Face's interface.

B rows, S tokens per row, T = B * S, D hidden size, H query heads, K key/value heads, E head_dim, V vocabulary.
Parameter names equal the checkpoint's, so a checkpoint loads as it is and PEFT, TRL, transformers' Trainer, `generate`
and `save_pretrained` work on the model. What a family changes is read from its row in `families/table.py`.
"""

import copy
import inspect
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oribi.errors import ModelError
from oribi.families import Family, family_of
from oribi.kernels.attention import Visibility
from oribi.kernels.context_attention import ContextGroup
from oribi.kernels.cross_entropy import labelled_rows, linear_cross_entropy, next_tokens
from oribi.models.decoding.generation import GeneratesByItself
from oribi.models.decoding.session import Sessions
from oribi.models.generate import GeneratesInAnyMode
from oribi.models.host_memory import HostMemory
from oribi.models.layers import Batch, DecoderLayer, Embedding, follow_windows
from oribi.models.linear_layers import RMSNorm, any_module_hooked, every_module, hooked, read
from oribi.models.outputs import LogitsWhenRead, require_growing, require_known, require_whole
from oribi.models.per_layer import PerLayerEmbedding, entry
from oribi.models.pretrained import DecoderPreTrainedModel
from oribi.models.rope import RotaryAngles, documents_from_positions

# transformers' word for the cache, in arguments and outputs: another one from 5.24 on
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# share of the tokens up to which the last layer computes the trained ones alone, which have to be gathered for it
MOST_ALONE = 7 / 8


class DecoderModel(DecoderPreTrainedModel, PerLayerEmbedding):
    """Embeddings, layers and the last norm; what `AutoModel` would give."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        family = require_family(config)
        scale = config.hidden_size**0.5 if family.embedding_scale else 1.0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id, scale)
        self.layers = nn.ModuleList(DecoderLayer(config, family, i) for i in range(config.num_hidden_layers))
        self.norm_name = family.attribute("norm")
        self.add_module(self.norm_name, RMSNorm.of(config, family, "norm", config.hidden_size))
        eps = getattr(config, family.norm_eps)
        self.norm_of_embeddings = RMSNorm(None, eps) if family.embedding_norm else None
        self.add_per_layer_inputs(config, family)
        self.rotary = {kind: RotaryAngles(config, kind) for kind in family.rope_kinds(config)}
        self.embedding_multiplier = float(config.embedding_multiplier) if family.multipliers else 1.0
        held = (one for layer in self.layers for one in layer.mixer.holds(1).values())
        self.remembers = any(one.slots is None for one in held)  # a memory in place of each token
        self.host_memory: HostMemory | None = None
        self.sessions = Sessions()  # what a GPU keeps from one generation to the next
        self.shards: object | None = None  # set by `train.shards` where processes share the layers' weights
        self.context: ContextGroup | None = None  # set by `train.context` where processes share rows
        self.post_init()

    @property
    def last_norm(self) -> RMSNorm:
        """The norm after the last layer."""
        return self._modules[self.norm_name]

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
        cache: Cache | None = None,
        context_chunk: int | None = None,
        trained_rows: torch.Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, [B, S, D], or [1, n, D] of trained_rows [n]; arguments are the causal model's."""
        if kwargs or self.config.output_attentions:
            require_known(kwargs, MODEL_ARGUMENTS, self)
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        x = (
            self.embedded(input_ids)
            if inputs_embeds is None
            else inputs_embeds.to(self.last_norm.weight.dtype)
        )
        if self.embedding_multiplier != 1.0:
            x = x * self.embedding_multiplier
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        cache = past_key_values if cache is None else cache
        if cache is not None:
            require_growing(cache)
            require_whole(cache, [layer.mixer.window for layer in self.layers])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given = cache is not None
        if use_cache and not given:
            cache = DynamicCache(config=self.config)
        batch = self._batch(
            x, attention_mask, position_ids, cache, cu_seq_lens_q, max_length_q, context_chunk
        )
        if self.per_layer_size:
            if input_ids is None:
                raise ModelError(
                    "inputs_embeds: each layer of this model has an embedding of its own of each token; give input_ids"
                )
            own = self.per_layer_inputs(input_ids, x)
            batch.shared |= {entry(index): (one,) for index, one in enumerate(own)}
        if self.remembers and batch.visibility.cu_seqlens is not None and isinstance(cache, Cache):
            if given:
                raise ModelError(
                    "a cache holds one memory per row, and this row has several documents: leave the cache out"
                )
            cache = batch.cache = None
        states = [x] if output_hidden_states else None
        count = self.config.num_hidden_layers  # fewer while an early exit drafts tokens
        for index, layer in enumerate(islice(self.layers, count), 1):
            x = layer(x, batch if index < count else replace(batch, trained_rows=trained_rows))
            if states is not None:
                states.append(x)
        x = self.last_norm(x)
        if states is not None:
            states[-1] = x
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if states is None else tuple(states),
            **{CACHE: cache if use_cache else None},
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., D] of ids [...]: what callers may give as `inputs_embeds`."""
        # embeddings that are trained whole are float32
        x = self.embed_tokens(ids).to(self.last_norm.weight.dtype)
        return x if self.norm_of_embeddings is None else self.norm_of_embeddings(x)

    def computes_alone(self, rows: torch.Tensor | None, tokens: int) -> bool:
        """Whether the last layer and norm should compute `rows` [n] of all tokens alone: it saves time, and nobody looks on."""
        saves = rows is not None and self.training and 0 < len(rows) <= MOST_ALONE * tokens
        if not saves or any_module_hooked():
            return False
        modules = every_module(self.layers[self.config.num_hidden_layers - 1])
        del modules[: self.shards is not None]  # a hook fetches the weights that processes share
        return not any(map(hooked, (self, self.last_norm, *modules)))

    def _batch(self, x, attention_mask, position_ids, cache, cu_seqlens, max_length, chunk) -> Batch:
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
            # reading the mask synchronises once; a dense mask would rule out the fast backends
            real = None if bool(attention_mask.all()) else attention_mask
        if chunk is None:
            visibility = Visibility(rows, length, past, real, cu_seqlens, int(max_length or 0))
        else:
            visibility = self.context.part(cu_seqlens, chunk, max_length)
        longest = 0
        if any(angles.needs_length for angles in self.rotary.values()):
            longest = int(max_length) if max_length else int(position_ids.max()) + 1
        positions = position_ids.expand(rows, length).reshape(-1)
        angles = {kind: rotary.angles(positions, longest) for kind, rotary in self.rotary.items()}
        offloads = x.is_cuda and any("host" in layer.keep.values() for layer in self.layers)
        if offloads and self.host_memory is None:
            self.host_memory = HostMemory(x.device)
        return Batch(visibility, angles, cache, self.host_memory)


class DecoderForCausalLM(DecoderPreTrainedModel, GeneratesInAnyMode, GeneratesByItself, GenerationMixin):
    """A causal language model of any family of the table; `build` makes one."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        family = require_family(config)
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.softcap = config.final_logit_softcapping if family.softcaps else None
        self.logit_scale = getattr(config, family.logit_scale) if family.logit_scale else 1.0
        self.logit_scale /= config.logits_scaling if family.multipliers else 1.0
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
        cache: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        context_chunk: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Loss and logits of a batch.

        Args:
            input_ids: [B, S] int64. A pack is one row of documents whose position_ids restart at 0.
            attention_mask: [B, past + S] of 0 and 1, padding on either side; None where nothing is padded.
            position_ids: [B, S] int64; counted from the cached length if None.
            past_key_values, cache: the cache to read and extend, by either of transformers' names.
            inputs_embeds: [B, S, D] in place of input_ids.
            labels: [B, S] int64, not shifted; -100 is not trained on.
            logits_to_keep: logits of only the last N positions (0: all), or of these indices.
            num_items_in_batch: what the summed loss is divided by; None divides by this batch's labelled tokens.
            output_logits: None gives logits, which are formed when they are read while training with labels; False never
                forms them.
            cu_seq_lens_q, max_length_q: bounds [docs + 1] int32 and longest document of a pack.
            context_chunk: tokens of a chunk, where the batch is this process's part of a row that processes share; bounds and
                longest document are then those of the whole row.
            output_hidden_states: whether to give the layers' inputs and the last norm's output.
            return_dict: False gives a tuple.
            kwargs: shift_labels, [B, S] labels that are shifted already, in place of labels (transformers' trainer takes every
                parameter whose name holds "label" for one that each batch has); trained_rows, [n] int64 flat positions whose
                next token is trained, so that no label is read on the host (further positions without one may be among
                them); and arguments that callers pass to any model and that have no effect here.

        Returns:
            loss (float32 scalar or None), logits ([B, S, V] or None), the cache, hidden_states.

        Raises:
            ModelError: an argument is unknown, or asks for what the decoder does not do.
        """
        shift_labels, labelled = kwargs.pop("shift_labels", None), kwargs.pop("trained_rows", None)
        if kwargs:
            require_known(kwargs, ARGUMENTS, self)
        targets, trains = None, labels is not None or shift_labels is not None
        if trains:
            targets = (next_tokens(labels) if shift_labels is None else shift_labels).reshape(-1)
            if labelled is None:
                # reads the labels on the host: done before the layers are launched, nothing has to be waited for
                labelled = labelled_rows(targets, self.config.vocab_size)
        looked_at = output_logits is not False or output_hidden_states or self.config.output_hidden_states
        alone = trains and not looked_at and self.model.computes_alone(labelled, len(targets))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
            context_chunk=context_chunk,
            trained_rows=labelled if alone else None,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        loss = self._loss(hidden, targets, labelled, num_items_in_batch) if trains else None
        output = self._output(outputs, loss, logits_to_keep, output_logits)
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _output(
        self,
        outputs: BaseModelOutputWithPast,
        loss: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        output_logits: bool | None,
    ) -> CausalLMOutputWithPast:
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        waits = output_logits is None and self.training and loss is not None
        formed = output_logits or (output_logits is None and not waits)
        values = {
            "loss": loss,
            "logits": self.head_logits(hidden[:, logits_to_keep]) if formed else None,
            "hidden_states": outputs.hidden_states,
            CACHE: getattr(outputs, CACHE),
        }
        if waits:
            return LogitsWhenRead(**values).wait_for(lambda: self.head_logits(hidden[:, logits_to_keep]))
        return CausalLMOutputWithPast(**values)

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of hidden states [B, S, D] after the last norm."""
        # contiguous: for the last token's view, PyTorch would repeat the head for every row of the batch
        hidden = hidden.to(self.lm_head.weight.dtype).contiguous()  # a head trained whole is float32
        return self.scaled_logits(self.lm_head(hidden))

    def scaled_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the head computes, scaled and capped as the family does."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        labelled: torch.Tensor | None,
        divisor: torch.Tensor | int | None,
    ) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        head = self.lm_head
        if hasattr(head, "modules_to_save"):  # PEFT's wrapper around a fully trained head
            whole = not head.disable_adapters
            head = head.modules_to_save[head.active_adapters[0]] if whole else head.original_module
        projection = read(head)
        if projection is not None and projection.a is None:
            return linear_cross_entropy(
                rows, projection.weight, targets, bias=projection.bias, divisor=divisor,
                softcap=self.softcap, logit_scale=self.logit_scale, labelled=labelled,
            )  # fmt: skip
        labelled = targets != -100 if labelled is None else labelled
        rows, targets = rows if len(rows) < len(targets) else rows[labelled], targets[labelled]
        divisor = max(len(targets), 1) if divisor is None else divisor
        total = rows.sum() * 0.0
        for start in range(0, len(targets), 1024):  # an adapted head keeps the logits of 1024 rows at a time
            part = slice(start, start + 1024)
            total = total + checkpoint(self._summed_loss, rows[part], targets[part], use_reentrant=False)
        return total.float() / divisor

    def _summed_loss(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head_logits(rows).float(), targets, reduction="sum")


# names of the arguments, for messages about misspelt ones
MODEL_ARGUMENTS, ARGUMENTS = (
    set(inspect.signature(of.forward).parameters) - {"self", "kwargs"}
    for of in (DecoderModel, DecoderForCausalLM)
)


def build(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "meta",
    kind: type[DecoderPreTrainedModel] = DecoderForCausalLM,
    name: str | None = None,
) -> DecoderPreTrainedModel:
    """A model for a config, its class named as the checkpoint's architecture.

    Args:
        config: config of a family of the table.
        dtype: dtype of every parameter.
        device: "meta" gives parameters without storage, to be assigned by a loader; elsewhere they are initialised.
        kind: what is put on the decoder.
        name: of the architecture; None is the family's causal language model.

    Raises:
        ModelError: the table has no row for this config.
    """
    family = require_family(config)
    members = {"config_class": type(config), "__module__": __name__}
    # generation that goes back to an earlier token is refused where a mixer's memory cannot
    members["_is_stateful"] = "gated_delta" in family.mixers.values()
    # saved configs name the class, and transformers must find its own class by that name
    architecture = type(name or family.architecture, (kind,), members)
    config.dtype = dtype
    config = follow_windows(config, family)
    if getattr(config, "_experts_implementation", None):  # left there by a transformers model of this config
        config = copy.deepcopy(config)
        config._experts_implementation = None
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
