"""The frozen matrices of a decoder's layers, one part in each process, and two layers at a time whole.

A layer's matrices, 4-bit codes or 16-bit values, lie one after the other in a flat buffer of bytes, of which process r
keeps the r-th part. Two buffers take turns: layer i is always gathered into buffer i % 2, so that its weights are views
made once, and the next layer is gathered while this one computes. Everything travels as bytes: a floating dtype would
turn codes that happen to be a NaN into another NaN, which PyTorch's own sharding does on GPUs.

B rows, S tokens per row, D hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from oribi.errors import TrainingError
from oribi.models.layers import DecoderLayer

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

    Raises:
        TrainingError: a gathered layer differs from the loaded one.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._group, self._device = group, device
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
        whole = torch.zeros(size, dtype=torch.uint8, device=self._device)
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
                state.to(self._device)
                module.weight.quant_state = state
            start += _aligned(weight.nbytes)
        self._own.append(whole.chunk(self._processes)[self._rank].clone())
        self._gathered[index % 2] = None
        self.gather(index)
        same = torch.tensor(int(torch.equal(self._buffers[index % 2][:size], whole)), device=self._device)
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
