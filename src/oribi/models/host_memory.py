"""Tensors that wait in pinned host memory between forward and backward, copied beside the computation.

The order is a stack: backward asks for what forward stored last. Asking for one parcel starts the copy of the one below
it, so that it has arrived when its layer's turn comes. Nothing synchronises with the host.
"""

import weakref

import torch


class Parcel:
    """One tensor on its way out, waiting, or on its way back."""

    def __init__(self, store: "HostMemory", tensor: torch.Tensor, below: "Parcel | None") -> None:
        self._store = store
        self._below = None if below is None else weakref.ref(below)
        self._device = tensor.device
        self._back: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._host: torch.Tensor | None = store.borrow(tensor)
        self._store.copy(self._host, tensor)

    def start_return(self) -> None:
        """Begins the copy back, once."""
        if self._host is not None and self._back is None:
            self._back = torch.empty_like(self._host, device=self._device)
            self._arrived = self._store.copy(self._back, self._host)

    def take(self) -> torch.Tensor:
        """The tensor on its device; it can be taken once."""
        self.start_return()
        below = self._below() if self._below is not None else None
        if below is not None:
            below.start_return()
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        self._store.give_back(self._host)
        back, self._back, self._host = self._back, None, None
        return back


class HostMemory:
    """The stack of parcels of one device and the stream that carries them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._top: weakref.ref[Parcel] | None = None
        # sources of copies under way: freed when the computing stream has waited for their copy, so that their memory
        # is never handed out while it is still being read
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        # pinned buffers that wait for the next step: pinning takes long, and none may be pinned inside a CUDA graph
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def borrow(self, like: torch.Tensor) -> torch.Tensor:
        """A pinned buffer with the shape and dtype of a tensor."""
        free = self._free.get((like.shape, like.dtype))
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Frees a buffer whose last copy has been ordered; later copies come after it on the same stream."""
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def put(self, tensor: torch.Tensor) -> Parcel:
        """Starts copying a tensor [...] to the host; its device memory is free again about two puts later."""
        parcel = Parcel(self, tensor, self._top() if self._top is not None else None)
        self._top = weakref.ref(parcel)
        return parcel

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """target.copy_(source) on the side stream, after all that the current stream has been given so far."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        if source.is_cuda:
            self._leaving.append((source, done))
            while len(self._leaving) > 2:
                main.wait_event(self._leaving.pop(0)[1])
        return done

    def flush(self) -> None:
        """Makes the current stream wait for every copy to the host, and lets go of their sources."""
        while self._leaving:
            torch.cuda.current_stream(self._device).wait_event(self._leaving.pop(0)[1])
