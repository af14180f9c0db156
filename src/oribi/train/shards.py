"""Frozen weights sharded over the processes of a training, trained ones whole on each: `fsdp = True`.

A QLoRA run's memory is its frozen weights; adapters with their gradients and optimizer states are a hundredth of them. So
`LayerShards` splits the layers as bytes, and `Exchange` averages the gradients of what is trained. The head stays whole: it would
have to be whole at the loss, where a step's memory peaks. On GPUs the embedding waits in host memory. Optimizer, clipping, checkpoints and saved adapters
are those of any other run, which continues with another number of processes, sharded or not. The scales of 4-bit weights,
a thirtieth of them, stay whole.

Accelerate's own FSDP shards on GPUs only, and leaves out codes that are stored as bytes. PyTorch's refuses them before
2.13, and copies them wrongly on GPUs as a floating dtype.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from oribi.errors import ConfigError, TrainingError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.layers import DecoderLayer
from oribi.models.linear_layers import read
from oribi.models.unwrap import base_model
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
        packed = hasattr(getattr(getattr(module, "base_layer", None), "weight", None), "quant_state")
        if packed and read(module) is None:
            yield (
                f"{name} has an adapter that PEFT runs, DoRA for one, and PEFT reads no sharded 4-bit weight: train plain "
                "LoRA, load with load_in_4bit=False, or leave out fsdp"
            )
            return


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold only parts of the model's frozen weights: each forward then needs all of them."""
    return getattr(getattr(base_model(model), "model", None), "shards", None) is not None


def shard(model: nn.Module, base: DecoderForCausalLM, device: torch.device) -> None:
    """Splits the frozen weights between the processes, in place; those of a model that is split already stay.

    Args:
        model: what is trained, the same in every process: `base` or PEFT's wrapper around it. Frozen weights may lie in
            host memory, from where one layer at a time moves to the device; trained ones lie on the device.
        base: the decoder.
        device: where this process computes.
    """
    if is_sharded(base):
        return
    layers = [module for module in base.modules() if isinstance(module, DecoderLayer)]
    whole_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    base.model.shards = LayerShards(layers, device, dist.group.WORLD)
    ends = [module for module in base.modules() if not isinstance(module, DecoderLayer)]
    for module in ends:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.device != device and not getattr(tensor, "is_sharded", False):
                _move(getattr(module, name), device)
    base.offload_embedding()
    logger.info(
        "frozen weights are sharded: %.0f of %.0f MiB on each of %d processes, and two layers whole",
        own_bytes(base) / 2**20, whole_bytes / 2**20, dist.get_world_size(),
    )  # fmt: skip


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


# bytes; each matrix starts at a multiple, which every dtype and every vectorised load can be read at
ALIGNMENT = 256
# PyTorch's name from 2.13 on, and the one before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LayerShards:
    """Splits the layers between the processes of a group, in place, and gathers each when it is needed.

    Every process has to run the same layers in the same order.

    Args:
        layers: in the order of the forward pass, equal in every process, on any device.
        device: where this process computes.
        group: the processes.

    Attributes:
        own_bytes: what this process keeps of the layers' matrices.
        whole_bytes: of these matrices, over all processes.
        device: as given.

    Raises:
        TrainingError: a gathered layer differs from the loaded one.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._group, self.device = group, device
        self._processes, self._rank = dist.get_world_size(group), dist.get_rank(group)
        matrices = [list(_frozen_matrices(layer)) for layer in layers]
        sizes = [self._whole_bytes(modules) for modules in matrices]
        self._buffers = [torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._gathered: list[int | None] = [None, None]
        self._pending: list[dist.Work | None] = [None, None]
        self._own: list[torch.Tensor] = []
        damaged = []
        for index, (layer, modules, size) in enumerate(zip(layers, matrices, sizes)):
            packed = {module.weight for module in modules}
            for parameter in layer.parameters():  # norms and biases: a thousandth of the layer stays whole
                if not parameter.requires_grad and parameter not in packed:
                    parameter.data = parameter.data.to(device)
            if not self._take(index, modules, size):
                damaged.append(str(index))
            layer.register_forward_pre_hook(partial(self._before_forward, index))
            layer.register_forward_hook(partial(self._after_forward, index))
        self.own_bytes = sum(own.nbytes for own in self._own)
        self.whole_bytes = self.own_bytes * self._processes
        if damaged:
            raise TrainingError(
                f"sharding: the weights of layers {', '.join(damaged)} gathered from {self._processes} processes differ "
                "from those that were loaded. Either the processes loaded different files, or the link between the GPUs "
                "damages data: compare the files, or train without fsdp"
            )

    def gather(self, index: int, step: int = 1) -> None:
        """Makes a layer's weights whole, and starts on the one that follows.

        Args:
            index: the layer.
            step: 1 on the way forward, -1 on the way backward.
        """
        self._start(index)
        pending = self._pending[index % 2]
        if pending is not None:
            pending.wait()
            self._pending[index % 2] = None
        # its buffer was last read by layer index - step, whose work was handed to the device before this call
        self._start(index + step)

    def _start(self, index: int) -> None:
        place = index % 2
        if not 0 <= index < len(self._own) or self._gathered[place] == index:
            return
        own = self._own[index]
        whole = self._buffers[place][: own.nbytes * self._processes]
        self._pending[place] = _all_gather(whole, own, group=self._group, async_op=True)
        self._gathered[place] = index

    def _before_forward(self, index: int, *_: object) -> None:
        self.gather(index)

    def _after_forward(self, index: int, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """output [B, S, D]: its gradient arrives before the layer's backward needs the weights again."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self.gather(index, -1))

    def _whole_bytes(self, modules: list[nn.Module]) -> int:
        unit = ALIGNMENT * self._processes
        return -(-sum(_aligned(module.weight.nbytes) for module in modules) // unit) * unit

    def _take(self, index: int, modules: list[nn.Module], size: int) -> bool:
        """Keeps this process's part of a layer; whether all processes find the layer they loaded in what is gathered."""
        whole = torch.zeros(size, dtype=torch.uint8, device=self.device)
        start = 0
        for module in modules:
            weight = module.weight
            # Params4bit would quantise what is moved
            plain = weight.detach().as_subclass(torch.Tensor).contiguous()
            whole[start : start + weight.nbytes].copy_(plain.view(-1).view(torch.uint8))
            view = _view(self._buffers[index % 2], start, plain)
            module.weight = nn.Parameter(view, requires_grad=False)
            module.weight.is_sharded = True  # exports ask
            state = getattr(weight, "quant_state", None)
            if state is not None:
                state.to(self.device)
                module.weight.quant_state = state
            start += _aligned(weight.nbytes)
        self._own.append(whole.chunk(self._processes)[self._rank].clone())
        self._gathered[index % 2] = None
        self.gather(index)
        same = torch.tensor(int(torch.equal(self._buffers[index % 2][:size], whole)), device=self.device)
        dist.all_reduce(same, dist.ReduceOp.MIN, group=self._group)
        return bool(same)


def _frozen_matrices(layer: DecoderLayer) -> Iterator[nn.Module]:
    """The linear layers whose weight is frozen, without those of adapters, which may be trained later."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and not module.weight.requires_grad:
            yield module


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor over the buffer's bytes from `start` on, of the shape and dtype of another.

    Autograd counts the writes to a view's base as writes to the view, and refuses backward after one. A buffer is written
    for every layer and holds the same bytes again when backward comes, so that these writes must not count.
    """
    storage = buffer.untyped_storage()
    return torch.empty(0, dtype=like.dtype, device=buffer.device).set_(
        storage, start // like.itemsize, like.shape
    )
