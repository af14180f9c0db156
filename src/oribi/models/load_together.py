"""A model loaded by the processes of one training together: each large tensor is read and packed by one of them, which sends it.

Tensors have owners, chosen by bytes, and are exchanged in windows of about one large tensor per process. Codes and scales are a
quarter of what is read, so that they are sent in less time than every process would need to read and pack for itself. Tensors that
stay in 16 bits are read by every process, from the same pages of the file cache, unless each keeps only a part of them.

What one process cannot read ends all of them: each exchange carries, in place of tensors, the message of a process that failed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState
from torch import nn

from oribi.errors import EndedElsewhere
from oribi.models.layer_shards import LayerShards
from oribi.models.layers import DecoderLayer
from oribi.models.peer_memory import machine_group

Packed = tuple[torch.Tensor, QuantState]


class LoadTogether:
    """The processes that load one model, all of them the same; their default group is there already.

    Args:
        device: where this process computes.
        in_parts: each keeps its part of the layers' matrices (`LayerShards`); otherwise each gets the whole model.
    """

    def __init__(self, device: torch.device, in_parts: bool = False) -> None:
        self.device, self.in_parts = device, in_parts
        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        self._over = False
        # tensors are sent within a machine: each of several reads the files once
        try:
            self._group = machine_group()
        except RuntimeError as error:
            raise _gone(error) from error
        here = dist.get_world_size(self._group)
        self._readers = range(self.rank // here * here, self.rank // here * here + here)

    @contextmanager
    def until_loaded(self) -> Iterator[None]:
        """Inside the block the model is loaded; all processes come out of it, or none does.

        Raises:
            EndedElsewhere: another process failed.
        """
        try:
            yield
        except Exception as error:
            if not self._over:
                self._exchange(None, error)
            raise
        self._exchange(None)

    def split(self, model: nn.Module) -> LayerShards | None:
        """What keeps this process's part of the layers of a model on the meta device; None where it gets all of them."""
        if not self.in_parts:
            return None
        layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
        self._exchange(None)  # all have come so far
        return LayerShards(layers, self.device, self._group)

    def share(
        self, sizes: Mapping[str, int], read: Callable[[str], torch.Tensor | Packed]
    ) -> Callable[[str], torch.Tensor | Packed]:
        """Makes of a function that reads a tensor one that gets it from whichever process reads it.

        Args:
            sizes: bytes of each tensor, in the order in which all processes ask for them, each once.
            read: gives a tensor, or codes and scales, on the device.
        """
        windows = _windows(sizes, self._readers)
        found: dict[str, torch.Tensor | Packed] = {}

        def shared(name: str) -> torch.Tensor | Packed:
            while name not in found:
                found.update(self._read_window(next(windows), read))
            return found.pop(name)

        return shared

    def _read_window(
        self, owners: Mapping[str, int], read: Callable[[str], torch.Tensor | Packed]
    ) -> dict[str, torch.Tensor | Packed]:
        own, error = {}, None
        try:
            for name, owner in owners.items():
                if owner == self.rank:
                    own[name] = _taken_apart(read(name))
        except Exception as failure:
            error = failure
        described = {
            name: (state, [(t.shape, t.dtype) for t in tensors]) for name, (state, tensors) in own.items()
        }
        every = self._exchange(described, error)
        found, works = {}, []
        for name, owner in owners.items():
            state, shapes = every[owner][name]
            tensors = own[name][1] if owner == self.rank else [
                torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes
            ]  # fmt: skip
            for tensor in tensors:  # as bytes: nothing else carries every word unharmed
                data = tensor.reshape(-1).view(torch.uint8)
                works.append(dist.broadcast(data, owner, group=self._group, async_op=True))
            found[name] = _put_together(state, tensors)
        for work in works:
            work.wait()
        return found

    def _exchange(self, found: Any, error: Exception | None = None) -> list[Any]:
        """What each process found; the error of one that failed ends all."""
        message = None if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]
        every = self._gather((message, found))
        failed = [(rank, said) for rank, (said, _) in enumerate(every) if said is not None]
        if failed:
            self._over = True
            if error is not None:
                raise error
            rank, said = failed[0]
            raise EndedElsewhere(f"process {rank} could not load the model, which ends all: {said}")
        return [one for _, one in every]

    def _gather(self, found: Any) -> list[Any]:
        every: list[Any] = [None] * self.processes
        try:
            dist.all_gather_object(every, found)
        except RuntimeError as error:
            self._over = True
            raise _gone(error) from error
        return every


def _gone(error: RuntimeError) -> EndedElsewhere:
    return EndedElsewhere(
        "another process is gone while the model was loaded, and left no message; it was killed, or the host ran out of "
        f"memory: {str(error).splitlines()[0]}"
    )


def _windows(sizes: Mapping[str, int], readers: range) -> Iterator[dict[str, int]]:
    """Consecutive tensors, each with the process that reads it: the one with the fewest bytes so far."""
    loads = dict.fromkeys(readers, 0)
    most = max(sizes.values(), default=0) * len(readers)
    window: dict[str, int] = {}
    total = 0
    for name, size in sizes.items():
        if window and total + size > most:
            yield window
            window, total = {}, 0
        owner = min(loads, key=loads.__getitem__)
        loads[owner] += size
        window[name] = owner
        total += size
    if window:
        yield window


def _taken_apart(value: torch.Tensor | Packed) -> tuple[dict[str, Any] | None, list[torch.Tensor]]:
    """What is told and what is sent of a tensor, or of codes and scales."""
    if isinstance(value, torch.Tensor):
        return None, [value.contiguous()]
    codes, state = value
    told = {name: getattr(state, name) for name in ("shape", "dtype", "blocksize", "quant_type")}
    tensors = [codes, state.absmax, state.code]
    if state.nested:
        told["nested"] = {name: getattr(state.state2, name) for name in ("dtype", "blocksize")}
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return told, [tensor.contiguous() for tensor in tensors]


def _put_together(told: dict[str, Any] | None, tensors: list[torch.Tensor]) -> torch.Tensor | Packed:
    if told is None:
        return tensors[0]
    codes, absmax, code, *nested = tensors
    fields = dict(told)
    scales = fields.pop("nested", None)
    state2 = None if scales is None else QuantState(nested[1], code=nested[2], **scales)
    state = QuantState(absmax, code=code, offset=nested[0] if nested else None, state2=state2, **fields)
    return codes, state
