"""Tensors that wait in pinned host memory between forward and backward, copied beside the computation.

Parcels come in groups, one group a layer, and the order is a stack: backward asks for the group that forward stored
last. Asking for a parcel starts the copies of the whole group below it, so that they have arrived when that layer
needs them. Nothing synchronises with the host, and all of it can be recorded in a CUDA graph.
"""

import mmap
import weakref
from bisect import bisect_left, insort
from contextlib import suppress

import torch

from oribi.kernels.dispatch import next_power_of_2

# bytes of a huge page; smaller buffers gain nothing from one
HUGE_PAGE = 2**21


class Parcel:
    """One tensor that is being copied to the host, waits there, or is being copied back."""

    def __init__(
        self, store: "HostMemory", tensor: torch.Tensor, group: object, below: "Parcel | None"
    ) -> None:
        self.group = group
        self._store = store
        self._below = None if below is None else weakref.ref(below)
        self._device = tensor.device
        self._back: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._buffer = store.borrow(tensor.nbytes)
        self._host: torch.Tensor | None = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._store.send(tensor, self._host, group)

    @property
    def below(self) -> "Parcel | None":
        """The parcel stored before this one, if somebody still holds it."""
        return None if self._below is None else self._below()

    def start_return(self) -> None:
        """Begins the copy back, once."""
        if self._host is not None and self._back is None:
            self._back = torch.empty_like(self._host, device=self._device)
            self._arrived = self._store.copy(self._back, self._host)

    def take(self) -> torch.Tensor:
        """The tensor on its device; it can be taken once."""
        self.start_return()
        self._start_group_below()
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        self._store.give_back(self._buffer)
        back, self._back, self._host = self._back, None, None
        return back

    def start_group(self) -> None:
        """Begins the copies back of this parcel's group, of which it is the last."""
        parcel: Parcel | None = self
        while parcel is not None and parcel.group is self.group:
            parcel.start_return()
            parcel = parcel.below

    def _start_group_below(self) -> None:
        """Begins the copies back of the group that was stored before this parcel's."""
        parcel = self.below
        while parcel is not None and parcel.group is self.group:
            parcel = parcel.below
        if parcel is not None:
            parcel.start_group()


class HostMemory:
    """The stack of parcels of one device and the stream that carries them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._top: weakref.ref[Parcel] | None = None
        # sources of copies under way, with their groups: freed when the computing stream has waited for their copies,
        # so that their memory is never handed out while it is still being read
        self._leaving: list[tuple[object, torch.Tensor, torch.cuda.Event]] = []
        # pinned buffers that wait for the next step, the smallest first; none may be pinned inside a CUDA graph
        self._free: list[torch.Tensor] = []

    def put(self, tensor: torch.Tensor, group: object) -> Parcel:
        """Starts copying a tensor [...] to the host.

        Args:
            tensor: contiguous; its device memory is free again when the second next group is stored.
            group: what it belongs to; parcels of one group come back together.
        """
        parcel = Parcel(self, tensor, group, self._top() if self._top is not None else None)
        self._top = weakref.ref(parcel)
        return parcel

    def send(self, source: torch.Tensor, target: torch.Tensor, group: object) -> None:
        """Copies to the host while the next group computes; the one after that waits for it."""
        known = [other for other, _, _ in self._leaving]
        if known and known[-1] is not group:
            while self._leaving and self._leaving[0][0] is not known[-1]:
                torch.cuda.current_stream(self._device).wait_event(self._leaving.pop(0)[2])
        self._leaving.append((group, source, self.copy(target, source)))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """target.copy_(source) on the side stream, after all that the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def begin_backward(self) -> None:
        """Starts the copies back of the group stored last, and frees the sources of copies to the host."""
        self.flush()
        top = self._top() if self._top is not None else None
        if top is not None:
            top.start_group()

    def flush(self) -> None:
        """Makes the current stream wait for every copy to the host, and frees their sources."""
        while self._leaving:
            torch.cuda.current_stream(self._device).wait_event(self._leaving.pop(0)[2])

    def borrow(self, size: int) -> torch.Tensor:
        """A pinned buffer [at least `size`] of bytes."""
        first = bisect_left(self._free, size, key=len)
        return self._free.pop(first) if first < len(self._free) else pinned(buffer_size(size), self)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Frees a buffer whose last copy is queued; later copies follow it on the same stream."""
        insort(self._free, buffer, key=len)


def buffer_size(size: int) -> int:
    """Bytes of the pinned buffer for `size` bytes: at most an eighth more, so that batches of any length share few sizes."""
    step = max(next_power_of_2(size) // 16, 1)
    return -(-size // step) * step


def pinned(size: int, owner: object) -> torch.Tensor:
    """Page-locked host memory [size] of bytes for as long as `owner` lives.

    CUDA's own allocation locks 1.6 GiB per second, page by page (measured beside an H100); huge pages that are there already
    are registered at 17 GiB per second, small ones at 8.
    """
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # a data loader's workers must not make the pages copies on write
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)):
        with suppress(RuntimeError):  # the next kernel would report the refusal as its own
            torch.zeros(1, device="cuda")
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # pages must not be unmapped while they are registered: until then this holds them
    weakref.finalize(owner, _unregister, buffer).atexit = False
    return buffer


def to_pinned_memory(weight: torch.nn.Parameter) -> None:
    """Moves a weight to page-locked host memory."""
    home = pinned(weight.nbytes, weight).view(weight.dtype).view(weight.shape)
    weight.data = home.copy_(weight.data)


def _unregister(buffer: torch.Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still be under way
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
