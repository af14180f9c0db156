"""What PEFT, TRL and transformers' Trainer ask of a decoder beside its forward pass, and what training sets in it."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from oribi.errors import ModelError
from oribi.kernels import fp8
from oribi.kernels.packed_weight import PackedWeight
from oribi.models.core import Keep
from oribi.models.expert_tensors import stored_stack
from oribi.models.experts import Experts, ExpertsMLP
from oribi.models.fused_layer import POLICY_NAMES, fusible_halves, policy
from oribi.models.host_memory import to_pinned_memory
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import RMSNorm

# layers that fp8 leaves alone: the first makes the few huge activations that all others read. SmolLM2-135M's gradient has a
# cosine of 0.79 to the exact one where they, too, are rounded, and of 0.96 where they are not
EXACT_LAYERS = 1


class DecoderPreTrainedModel(PreTrainedModel):
    config_class = PretrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    # what Trainer asks before it divides by num_items_in_batch itself
    accepts_loss_kwargs = True

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.is_floating_point():
            module.weight.data.normal_(0.0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.data.fill_(1.0 - module.offset)

    def save_pretrained(
        self, save_directory: str, *args: object, state_dict: dict | None = None, **keywords: object
    ) -> None:
        """transformers' own, with stacks of experts as its class has them.

        Args:
            save_directory, args, state_dict, keywords: transformers'; tensors by other names than the model's are written as they are.

        Raises:
            ModelError: experts are packed, which no reader of such files knows.
        """
        experts = {name: module for name, module in self.named_modules() if isinstance(module, Experts)}
        for name, module in experts.items():
            if isinstance(module.down_proj, PackedWeight):
                raise ModelError(
                    f"save_pretrained: {name} is packed, and files of packed experts have no readers. "
                    "save_pretrained_merged(folder, tokenizer) writes 16-bit weights; the base itself is the checkpoint that was loaded"
                )
        if experts:
            state = dict(self.state_dict() if state_dict is None else state_dict)
            for name, module in experts.items():
                for stack in module.stacks:
                    if (key := f"{name}.{stack}") in state:
                        state[key] = stored_stack(module, stack, state[key]).contiguous()
            state_dict = state
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **keywords)

    def set_recompute_policy(self, wanted: str | list[Keep]) -> None:
        """Chooses what each layer keeps between forward and backward, and switches gradient checkpointing on for it.

        Args:
            wanted: "speed" (keep all), "balanced", "memory" (inputs wait in host memory), or one `Keep` per layer.

        Raises:
            ModelError: unknown name, or a list of another length than the layers.
        """
        layers = self._decoder_layers()
        if isinstance(wanted, str):
            if wanted not in POLICY_NAMES:
                raise ModelError(
                    f"recompute policy {wanted!r}; it can be {', '.join(map(repr, POLICY_NAMES))}"
                )
            wanted = [policy(wanted, layer.results()) for layer in layers]
        if len(wanted) != len(layers):
            raise ModelError(f"{len(wanted)} recompute policies for {len(layers)} layers; give one for each")
        self.gradient_checkpointing_enable()
        for layer, keep in zip(layers, wanted):
            layer.keep = keep
            layer.dequantized.clear()

    def _returns_dict(self, wanted: bool | None) -> bool:
        return self.config.return_dict if wanted is None else wanted

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [module for module in self.modules() if isinstance(module, DecoderLayer)]

    def use_fp8(self, wanted: bool) -> int:
        """Chooses whether training multiplies frozen weights in fp8, approximately.

        Returns:
            In how many layers it does, if their modules are in training mode: those after the first that are
            differentiated by hand and whose sizes the matrix units take.
        """
        layers = self._decoder_layers()
        for index, layer in enumerate(layers):
            halves = fusible_halves(layer) if wanted and index >= EXACT_LAYERS else None
            groups = [group for half in halves or () for group in half.groups.values()]
            layer.fp8 = bool(groups) and all(map(fp8.fits, groups))
            layer.dequantized.clear()
        return sum(layer.fp8 for layer in layers)

    def precision_in_fp8(self) -> str:
        """What `use_fp8` has left in which precision, in one line for the log."""
        layers = self._decoder_layers()
        said = f"fp8 (approximate): base products of {sum(layer.fp8 for layer in layers)} of {len(layers)} layers"
        exact = [index for index, layer in enumerate(layers) if not layer.fp8]
        if len(exact) > EXACT_LAYERS:
            said += f"; exact are layers {', '.join(map(str, exact))}"
        cores = [core for layer in layers for core, _, _ in layer.parts()]
        with_experts = [core for core in cores if isinstance(core, ExpertsMLP)]
        if with_experts:
            beside = "attention" + " and the MLP beside the experts" * any(
                one.shared is not None for one in with_experts
            )
            said += f". In these layers {beside} are rounded; routers and the experts' own stacks are computed in 16 bits"
        return said

    # transformers 5.23 warns of these three names, which PEFT and TRL still use, and calls what a class has for them
    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options: object
    ) -> None:
        """Each layer keeps what its `keep` says; the options of transformers' own checkpointing choose nothing here."""
        self._set_gradient_checkpointing(enable=True)

    def gradient_checkpointing_disable(self) -> None:
        """Each layer keeps everything."""
        self._set_gradient_checkpointing(enable=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer's `keep` counts."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def release(self) -> None:
        """Frees what is kept from step to step and from one generation to the next: dequantised weights, pinned host memory, caches
        and recorded steps.
        """
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.dequantized.clear()
            elif hasattr(module, "host_memory"):
                module.host_memory = None
                module.sessions.clear()

    @property
    def device(self) -> torch.device:
        """Where the layers compute; an embedding may lie in host memory."""
        norms = (module.weight for module in self.modules() if isinstance(module, RMSNorm))
        return next(weight.device for weight in norms if weight is not None)

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
        to_pinned_memory(weight)
        return weight.nbytes

    def enable_input_require_grads(self) -> None:
        """Does nothing: checkpointed layers pass gradients to their factors even if their input needs none."""
