"""Layers whose frozen matrices are split between processes as bytes, and gathered one layer at a time.

Each process keeps one part of every layer. Two buffers of the largest layer's size hold the layer that computes and the one after it;
a weight is a view of its layer's buffer, made once. The scales of 4-bit weights, a thirtieth of them, and norms and biases stay whole.

Parts never change. Where processes can read each other's memory, each copies what it needs whenever it needs it, and no process
waits for another; elsewhere all of them gather each layer together, in one order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import nn

from oribi.errors import TrainingError
from oribi.kernels.packed_weight import PackedWeight
from oribi.models.experts import STACKS, Experts
from oribi.models.fused_layer import fusible_halves
from oribi.models.layers import DecoderLayer
from oribi.models.peer_memory import peer_memory

# bytes; each matrix starts at a multiple, which every dtype and every vectorised load can be read at
ALIGNMENT = 256
# PyTorch's name from 2.13 on, and the one before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LayerShards:
    """Splits layers between the processes of a group, in place, and gathers each when it is needed.

    Every process has to keep its part of all layers in their order and, where they gather in lockstep, to run the same layers in
    the same order afterwards.

    Args:
        layers: in the order of the forward pass, equal in every process, on any device; those on the meta device get their
            values before `keep_part`.
        device: where this process computes.
        group: the processes.
        lockstep: gather together also where they can read each other's memory.

    Attributes:
        own_bytes: what this process keeps of the layers' matrices.
        whole_bytes: of these matrices, over all processes.
        device: as given.
        processes: that share the layers.
        lockstep: whether the processes gather each layer together, so that none may leave one out.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        device: torch.device,
        group: dist.ProcessGroup,
        lockstep: bool = False,
    ) -> None:
        self._group, self.device = group, device
        self.processes, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._layers = list(layers)
        self._matrices = [list(_frozen_matrices(layer)) for layer in layers]
        self._sizes = [self._whole_bytes(matrices) for matrices in self._matrices]
        self._buffers = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._gathered: list[int | None] = [None, None]
        self._pending: list[Callable[[], object] | None] = [None, None]  # makes what is computed next wait
        shares = [size // self.processes for size in self._sizes]
        self._starts = [0, *accumulate(shares)]  # of each layer in this process's part
        self._peers = None if lockstep else peer_memory(self._starts[-1], device, group)
        self.lockstep = self._peers is None
        self._part = (
            torch.zeros(self._starts[-1], dtype=torch.uint8, device=device)
            if self._peers is None
            else self._peers.own
        )
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        # of each layer on the way forward and backward, whether its codes were read there when it last came by
        self._is_read = [[True, True] for _ in layers]
        self._ways = [0] * len(layers)
        self._covered: dict[int, bool] = {}
        self._kept = 0  # layers of which this process has its part
        self._damaged: list[str] = []
        self._calls = 0  # of `gather` in the forward and backward that runs

    @property
    def own_bytes(self) -> int:
        return self._starts[self._kept]

    @property
    def whole_bytes(self) -> int:
        return sum(self._sizes)

    def keep_part(self) -> None:
        """Keeps this process's part of the next layer, which has its values; its weights are views of a buffer from now on."""
        index = self._kept
        layer, matrices = self._layers[index], self._matrices[index]
        split = {id(matrix.weight) for matrix in matrices}
        for parameter in layer.parameters():  # norms and biases: a thousandth of the layer stays whole
            if not parameter.requires_grad and id(parameter) not in split:
                parameter.data = parameter.data.to(self.device)
        whole = torch.zeros(self._sizes[index], dtype=torch.uint8, device=self.device)
        start = 0
        for matrix in matrices:
            size = matrix.nbytes
            setattr(matrix.module, matrix.name, self._moved(matrix.weight, whole, index, start))
            start += _aligned(size)
        self._own(index).copy_(whole.chunk(self.processes)[self._rank])
        self._kept += 1
        # the others read this part: their copies come after this sum, and the sum after all have written
        dist.all_reduce(torch.zeros(1, device=self.device), group=self._group)
        if not self._is_gathered_as(index, whole):
            self._damaged.append(str(index))
        layer.fetch = partial(self._fetch, index)
        layer.register_forward_pre_hook(partial(self._before_forward, index))
        layer.register_forward_hook(partial(self._after_forward, index))

    def require_undamaged(self) -> None:
        """After the last layer.

        Raises:
            TrainingError: a gathered layer differs from the one that a process had before.
        """
        if self._damaged:
            raise TrainingError(
                f"sharding: the weights of layers {', '.join(self._damaged)} gathered from {self.processes} processes differ "
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
        self._wait(index % 2)
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
        count = self._kept
        forward = [(index, 1) for index in range(count)]
        backward = [(index, -1) for index in reversed(range(first_trained, count))]
        for index, step in (forward + backward)[self._calls :]:
            self.gather(index, step)

    def flush(self) -> None:
        """After a backward: nothing is under way, and the next pass gathers its layers itself, as a recorded one has to."""
        for place in range(2):
            self._wait(place)
        self._gathered = [None, None]

    def _own(self, index: int) -> torch.Tensor:
        return self._part[self._starts[index] : self._starts[index + 1]]

    def _wait(self, place: int) -> None:
        wait, self._pending[place] = self._pending[place], None
        if wait is not None:
            wait()

    def _start(self, index: int) -> None:
        place = index % 2
        if not 0 <= index < self._kept or self._gathered[place] == index:
            return
        self._wait(place)  # two copies into one buffer must not overlap
        own = self._own(index)
        whole = self._buffers[place][: own.nbytes * self.processes]
        if self._peers is None:
            self._pending[place] = _all_gather(whole, own, group=self._group, async_op=True).wait
        else:
            self._pending[place] = self._read(index, whole)
        self._gathered[place] = index

    def _read(self, index: int, whole: torch.Tensor) -> Callable[[], object] | None:
        """Copies a layer's parts from all processes; on a GPU beside what is computed, after all that it was given so far."""
        first, last = self._starts[index : index + 2]
        parts = whole.chunk(self.processes)
        # from the next process on: not all of them read one at a time
        ranks = [(self._rank + 1 + step) % self.processes for step in range(self.processes)]
        if self._side is None:
            for rank in ranks:
                parts[rank].copy_(self._peers.parts[rank][first:last])
            return None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            for rank in ranks:
                parts[rank].copy_(self._peers.parts[rank][first:last], non_blocking=True)
            arrived = self._side.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(arrived)

    def _before_forward(self, index: int, *_: object) -> None:
        self._prepare(index, 1)

    def _after_forward(self, index: int, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """output [B, S, D]: its gradient arrives before the layer's backward needs the weights again."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._prepare(index, -1))

    def _prepare(self, index: int, step: int) -> None:
        """Before a layer computes: gathers it and starts on the next, each unless it has 16-bit copies of all of its weights."""
        if self.lockstep:
            self.gather(index, step)
            return
        self._ways[index] = way = int(step < 0)
        if self._is_needed(index, way):
            self._start(index)
            self._wait(index % 2)
        self._is_read[index][way] = False
        if self._is_needed(index + step, way):
            self._start(index + step)

    def _is_needed(self, index: int, way: int) -> bool:
        return 0 <= index < self._kept and (self._is_read[index][way] or not self._is_covered(index))

    def _is_covered(self, index: int) -> bool:
        """Whether all of a layer's matrices are read by what calls `fetch` before; others may be read at any time."""
        if index not in self._covered:
            halves = fusible_halves(self._layers[index]) or ()
            groups = [group for half in halves for group in half.groups.values()]
            fetched = {id(projection.weight) for group in groups for projection in group}
            self._covered[index] = all(id(matrix.weight) in fetched for matrix in self._matrices[index])
        return self._covered[index]

    def _fetch(self, index: int, again: bool = True) -> None:
        """Makes a layer's weights whole where they are read. again: whether they will be read at this place of the next pass."""
        self._start(index)
        self._wait(index % 2)
        self._is_read[index][self._ways[index]] |= again

    def _whole_bytes(self, matrices: list["_Matrix"]) -> int:
        unit = ALIGNMENT * self.processes
        return -(-sum(_aligned(matrix.nbytes) for matrix in matrices) // unit) * unit

    def _moved(self, weight: nn.Parameter, whole: torch.Tensor, index: int, start: int) -> nn.Parameter:
        """A weight whose bytes go to `whole` [bytes] of a layer from `start` on, as a view of the layer's buffer."""
        packed = weight.packed if isinstance(weight, PackedWeight) else None
        # Params4bit would quantise what is moved
        plain = weight.detach().as_subclass(torch.Tensor).contiguous() if packed is None else packed.codes
        whole[start : start + plain.nbytes].copy_(plain.view(-1).view(torch.uint8))
        place = _view(self._buffers[index % 2], start, plain)
        if packed is not None:
            view = PackedWeight(packed.moved(self.device, place), weight.dtype)
            view.is_sharded = True
            return view
        view = nn.Parameter(place, requires_grad=False)
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
        self._fetch(index)
        same = torch.tensor(
            int(torch.equal(self._buffers[index % 2][: len(whole)], whole)), device=self.device
        )
        dist.all_reduce(same, dist.ReduceOp.MIN, group=self._group)
        return bool(same)


def split_layers(
    layers: Sequence[DecoderLayer], device: torch.device, group: dist.ProcessGroup, lockstep: bool = False
) -> LayerShards:
    """Splits layers that have their values; arguments as of `LayerShards`.

    Raises:
        TrainingError: a gathered layer differs from the loaded one.
    """
    shards = LayerShards(layers, device, group, lockstep)
    for _ in layers:
        shards.keep_part()
    shards.require_undamaged()
    return shards


class _Matrix(NamedTuple):
    """A frozen weight: a parameter of a linear layer or of experts."""

    module: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def nbytes(self) -> int:
        """Of what is split, also before it has values: a 4-bit weight on the meta device has the shape of a dense one."""
        weight = self.weight
        if isinstance(weight, PackedWeight):
            return weight.packed.codes.nbytes
        in_four_bits = weight.is_meta and isinstance(self.module, bnb.nn.Linear4bit)
        return weight.numel() // 2 if in_four_bits else weight.nbytes


def _frozen_matrices(layer: DecoderLayer) -> Iterator[_Matrix]:
    """Frozen weights of linear layers and of experts, without those of adapters, which may be trained later."""
    for name, module in layer.named_modules():
        names = (
            STACKS if isinstance(module, Experts) else ("weight",) if isinstance(module, nn.Linear) else ()
        )
        if "lora_" not in name:
            yield from (_Matrix(module, one) for one in names if not getattr(module, one).requires_grad)


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
