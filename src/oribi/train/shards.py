"""Frozen weights sharded over the processes of a training, trained ones whole on each: `fsdp = True`.

A QLoRA run's memory is its frozen weights; adapters with their gradients and optimizer states are a hundredth of them. So
`LayerShards` splits the layers as bytes, and `Exchange` averages the gradients of what is trained. The head stays whole: it would
have to be whole at the loss, where a step's memory peaks. On GPUs the embedding waits in host memory. Optimizer, clipping,
checkpoints and saved adapters are those of any other run, which continues with another number of processes, sharded or not.

Accelerate's own FSDP shards on GPUs only, and leaves out codes that are stored as bytes. PyTorch's refuses them before
2.13, and copies them wrongly on GPUs as a floating dtype.
"""

import logging
import os
from collections.abc import Iterator

import torch
from torch import nn

from oribi.errors import ConfigError
from oribi.kernels.packed_weight import is_packed
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.layer_shards import split_layers
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import read
from oribi.models.peer_memory import machine_group
from oribi.models.unwrap import base_model, is_sharded
from oribi.train.arguments import SFTConfig

logger = logging.getLogger(__name__)

# options of fsdp_config that would change what is sharded here; others choose how accelerate does it
REFUSED_OPTIONS = ("activation_checkpointing", "cpu_offload", "xla")


def require_shardable(args: SFTConfig, base: nn.Module) -> None:
    """Decide who shards the model that `args.fsdp` asks to shard; with one process nobody does.

    Args:
        args: its fsdp is None afterwards where there is nothing to share, and accelerate does not see it where oribi
            shards.
        base: the model, taken out of PEFT's wrapper.

    Raises:
        ConfigError: the model cannot be sharded, or not as it was asked for.
    """
    # `accelerate launch --use_fsdp` says it in the environment
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not args.fsdp and not launched:
        return
    if not isinstance(base, DecoderForCausalLM):
        if args.device.type == "cpu":
            raise ConfigError(
                f"fsdp is set, and {type(base).__name__} runs unfused: accelerate would shard it, on GPUs only. Leave "
                "out fsdp"
            )
        return
    if launched:
        raise ConfigError(
            "fsdp was asked of accelerate's launcher, which leaves 4-bit weights whole. Start with `torchrun` or "
            "`accelerate launch --multi_gpu`, and set fsdp = True in the trainer's arguments"
        )
    args.fsdp_plugin_args = None  # what accelerate would be made with
    if args.world_size == 1:
        logger.info("fsdp: there is one process, which keeps the whole model")
        args.fsdp = None
        return
    problems = list(_problems(args, base))
    if problems:
        raise ConfigError("fsdp is set, but " + "; ".join(problems))
    for parameter in base.parameters():
        if parameter.requires_grad:  # the optimizer is made before the rest moves
            parameter.data = parameter.data.to(args.device)


def _problems(args: SFTConfig, base: DecoderForCausalLM) -> Iterator[str]:
    options = args.fsdp_config or {}
    if int(options.get("version", 2)) != 2:
        yield "fsdp_config asks for version 1; leave it out: PyTorch's second FSDP shards single weights"
    refused = [name for name in REFUSED_OPTIONS if str(options.get(name, False)).lower() != "false"]
    if refused:
        yield f"oribi has no {', '.join(refused)} of fsdp_config; use_gradient_checkpointing chooses what layers keep"
    if all(parameter.requires_grad for parameter in base.parameters()):
        yield "every weight is trained, and only frozen ones are sharded: train LoRA, or leave out fsdp"
    if any(type(parameter).__name__ == "Int8Params" for parameter in base.parameters()):
        yield "the model is in 8 bits; load it in 4 or 16, or leave out fsdp"
    for name, module in base.named_modules():
        whole = getattr(module, "original_module", None)
        if isinstance(whole, nn.Linear) and getattr(whole.weight, "is_sharded", False):
            yield f"modules_to_save trains {name} whole, of which each process loaded a part only: leave it out"
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and is_packed(weight) and read(module) is None:
            yield (
                f"{name} has an adapter that PEFT runs, DoRA for one, and PEFT reads no sharded 4-bit weight: train plain "
                "LoRA, load with load_in_4bit=False, or leave out fsdp"
            )
            return


def in_lockstep(model: nn.Module) -> bool:
    """Whether processes hold parts of the weights and gather each layer together, so that none can run the model alone."""
    return is_sharded(model) and base_model(model).model.shards.lockstep


def shard(model: nn.Module, base: DecoderForCausalLM, device: torch.device) -> None:
    """Splits the frozen weights between the processes, in place; those of a model that was loaded in parts are split already.

    Args:
        model: what is trained, the same in every process: `base` or PEFT's wrapper around it. Frozen weights may lie in
            host memory, from where one layer at a time moves to the device; trained ones lie on the device.
        base: the decoder.
        device: where this process computes.
    """
    if not is_sharded(base):
        layers = [module for module in base.modules() if isinstance(module, DecoderLayer)]
        whole_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        base.model.shards = split_layers(layers, device, machine_group())
        for module in (module for module in base.modules() if not isinstance(module, DecoderLayer)):
            beside = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in beside:
                if tensor.device != device and not getattr(tensor, "is_sharded", False):
                    _move(getattr(module, name), device)
        logger.info(
            "frozen weights are sharded: %.0f of %.0f MiB on each of %d processes, and two layers whole; %s",
            own_bytes(base) / 2**20, whole_bytes / 2**20, base.model.shards.processes,
            "gathered together" if base.model.shards.lockstep else "each reads the others' memory",
        )  # fmt: skip
    base.offload_embedding()


def _move(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        state.to(device)


def own_bytes(base: DecoderForCausalLM) -> int:
    """Device memory of this process's frozen weights: its part of the layers, and what is whole beside them."""
    shards = base.model.shards
    whole = [p for p in base.parameters() if not (p.requires_grad or getattr(p, "is_sharded", False))]
    return shards.own_bytes + sum(p.nbytes for p in whole if p.device.type == shards.device.type)
