"""Layers whose frozen matrices are split between processes as bytes, and gathered one layer at a time.

Each process keeps one part of every layer. Two buffers of the largest layer's size hold the layer that computes and the one after it;
a weight is a view of its layer's buffer, made once. The scales of 4-bit weights, a thirtieth of them, and norms and biases stay whole.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import bitsandbytes as bnb
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
    """Splits layers between the processes of a group, in place, and gathers each when it is needed.

    Every process has to keep its part of all layers in their order, and then to run the same layers in the same order.

    Args:
        layers: in the order of the forward pass, equal in every process, on any device; those on the meta device get their
            values before `keep_part`.
        device: where this process computes.
        group: the processes.

    Attributes:
        own_bytes: what this process keeps of the layers' matrices.
        whole_bytes: of these matrices, over all processes.
        device: as given.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._group, self.device = group, device
        self._processes, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._layers = list(layers)
        self._matrices = [list(_frozen_matrices(layer)) for layer in layers]
        self._sizes = [self._whole_bytes(modules) for modules in self._matrices]
        self._buffers = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._gathered: list[int | None] = [None, None]
        self._pending: list[dist.Work | None] = [None, None]
        self._own: list[torch.Tensor] = []
        self._damaged: list[str] = []
        self._calls = 0  # of `gather` in the forward and backward that runs

    @property
    def own_bytes(self) -> int:
        return sum(own.nbytes for own in self._own)

    @property
    def whole_bytes(self) -> int:
        return sum(self._sizes)

    def keep_part(self) -> None:
        """Keeps this process's part of the next layer, which has its values; its weights are views of a buffer from now on."""
        index = len(self._own)
        layer, modules = self._layers[index], self._matrices[index]
        packed = {module.weight for module in modules}
        for parameter in layer.parameters():  # norms and biases: a thousandth of the layer stays whole
            if not parameter.requires_grad and parameter not in packed:
                parameter.data = parameter.data.to(self.device)
        whole = torch.zeros(self._sizes[index], dtype=torch.uint8, device=self.device)
        start = 0
        for module in modules:
            module.weight = self._moved(module.weight, whole, index, start)
            start += _aligned(module.weight.nbytes)
        self._own.append(whole.chunk(self._processes)[self._rank].clone())
        if not self._is_gathered_as(index, whole):
            self._damaged.append(str(index))
        layer.register_forward_pre_hook(partial(self._before_forward, index))
        layer.register_forward_hook(partial(self._after_forward, index))

    def require_undamaged(self) -> None:
        """After the last layer.

        Raises:
            TrainingError: a gathered layer differs from the one that a process had before.
        """
        if self._damaged:
            raise TrainingError(
                f"sharding: the weights of layers {', '.join(self._damaged)} gathered from {self._processes} processes differ "
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
        self._calls += 1

    def begin_pass(self) -> None:
        """Before a forward and its backward, whose layers are counted."""
        self._calls = 0

    def finish_pass(self, first_trained: int) -> None:
        """Gathers what the rest of a forward and its backward would, without computing: the other processes wait for it.

        Args:
            first_trained: the layer at which a backward ends.
        """
        count = len(self._own)
        forward = [(index, 1) for index in range(count)]
        backward = [(index, -1) for index in reversed(range(first_trained, count))]
        for index, step in (forward + backward)[self._calls :]:
            self.gather(index, step)

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
        return -(-sum(_aligned(_bytes(module)) for module in modules) // unit) * unit

    def _moved(self, weight: nn.Parameter, whole: torch.Tensor, index: int, start: int) -> nn.Parameter:
        """A weight whose bytes go to `whole` [bytes] of a layer from `start` on, as a view of the layer's buffer."""
        # Params4bit would quantise what is moved
        plain = weight.detach().as_subclass(torch.Tensor).contiguous()
        whole[start : start + weight.nbytes].copy_(plain.view(-1).view(torch.uint8))
        view = nn.Parameter(_view(self._buffers[index % 2], start, plain), requires_grad=False)
        view.is_sharded = True  # exports ask
        state = getattr(weight, "quant_state", None)
        if state is not None:
            state.to(self.device)
            view.quant_state = state
            # PEFT asks before it puts an adapter there
            view.compress_statistics, view.quant_type = state.nested, state.quant_type
        return view

    def _is_gathered_as(self, index: int, whole: torch.Tensor) -> bool:
        """Whether all processes find the layer they had in what is gathered."""
        self._gathered[index % 2] = None
        self.gather(index)
        same = torch.tensor(
            int(torch.equal(self._buffers[index % 2][: len(whole)], whole)), device=self.device
        )
        dist.all_reduce(same, dist.ReduceOp.MIN, group=self._group)
        return bool(same)


def split_layers(
    layers: Sequence[DecoderLayer], device: torch.device, group: dist.ProcessGroup
) -> LayerShards:
    """Splits layers that have their values; arguments as of `LayerShards`.

    Raises:
        TrainingError: a gathered layer differs from the loaded one.
    """
    shards = LayerShards(layers, device, group)
    for _ in layers:
        shards.keep_part()
    shards.require_undamaged()
    return shards


def _frozen_matrices(layer: DecoderLayer) -> Iterator[nn.Module]:
    """The linear layers whose weight is frozen, without those of adapters, which may be trained later."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and not module.weight.requires_grad:
            yield module


def _bytes(module: nn.Linear) -> int:
    """Of a linear layer's weight, also before it has values: a 4-bit one on the meta device has the shape of a dense one."""
    weight = module.weight
    return weight.numel() // 2 if weight.is_meta and isinstance(module, bnb.nn.Linear4bit) else weight.nbytes


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
