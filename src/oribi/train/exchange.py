"""What the processes of a training tell each other: gradients, requests to stop, how long each computes, and failures.

Nothing wraps the model. Each process runs its step as if it were alone, replayed or not; after the last micro-batch the
gradients meet in one sum over the optimizer's flat buffers. Behind them lie control words, so that a request to stop costs no
call of its own. Whoever waits for the others looks out for a failure of theirs, and for the time limit.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from oribi.errors import EndedElsewhere, OribiError, TrainingError
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.adamw_step import CONTROL_WORDS
from oribi.save.one_writer import group_store

logger = logging.getLogger(__name__)

# control words: whether a process was asked to stop, and the seconds that each computed, as far as there is place
STOP, SECONDS = 0, 1
# gradients of an optimizer that keeps no flat buffer are summed in portions of this many bytes
PORTION_BYTES = 2**28
# seconds between two looks at whether another process failed
LOOK_SECONDS = 1.0
# steps after which a process that computes this many times as long as the usual one is named
MEASURED_STEPS, SLOW = 20, 1.25


class Exchange:
    """One training's connection between its processes.

    Args:
        parameters: what is trained, the same in every process.
        optimizer: unwrapped.
        device: where this process computes.
        timeout: seconds to wait for the other processes.

    Attributes:
        reduced_steps: optimizer steps whose gradients were exchanged.
        is_reduced: whether the gradients are those of all processes.
    """

    _count = 0

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: Any, device: torch.device, timeout: float
    ) -> None:
        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        self.reduced_steps, self.is_reduced = 0, False
        self._parameters, self._device, self._timeout = parameters, device, timeout
        self._optimizer = optimizer if isinstance(optimizer, FlatAdamW) else None
        # trainings of one process keep apart what they announce
        Exchange._count += 1
        self._failure_key = f"oribi/failed/{Exchange._count}"
        self._clock = _Clock(device)
        cuda = device.type == "cuda"
        # on a GPU the words of a step are read when the next one has begun, so that nothing waits for them
        self._words = [torch.zeros(CONTROL_WORDS, pin_memory=cuda) for _ in range(2)]
        self._arrived: list[torch.cuda.Event | None] = [None, None]
        self._sent = torch.zeros(CONTROL_WORDS, pin_memory=cuda)
        self._own_words = torch.zeros(CONTROL_WORDS, device=device)  # where no float32 gradients are
        self._times: list[list[float]] | None = []

    def begin(self, model: nn.Module) -> None:
        """Before the first step: trained values become those of the first process, frozen ones are compared.

        Args:
            model: after a checkpoint was read.

        Raises:
            TrainingError: the processes loaded different weights.
        """
        for parameter in self._parameters:
            dist.broadcast(parameter.data, 0)
        sums = dict(frozen_sums(model))
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, sums)
        for rank, other in enumerate(found):
            differing = [name for name in sums.keys() | other.keys() if found[0].get(name) != other.get(name)]
            if differing:
                raise TrainingError(
                    f"process {rank} loaded other weights than process 0: {len(differing)} tensors differ, {min(differing)} among "
                    "them. Let all processes read the same files"
                )

    def begin_step(self) -> None:
        """A process starts to compute its part of an optimizer step; further calls until `reduce` change nothing."""
        self._clock.start()
        self.is_reduced = False

    def reduce(self, stop: bool) -> None:
        """Replace each gradient by its mean over the processes, after the last micro-batch of an optimizer step.

        Args:
            stop: whether this process was asked to stop.

        Raises:
            TrainingError: another process failed, or did not come here in time.
        """
        seconds = self._clock.stop()
        self._sent.zero_()
        self._sent[STOP] = float(stop)
        if SECONDS + self.rank < CONTROL_WORDS:
            self._sent[SECONDS + self.rank] = seconds
        if self._optimizer is None:
            self._own_words.copy_(self._sent, non_blocking=True)
            self._mean([self._own_words])
            self._reduce_portions()
            words = self._own_words
        else:
            buffers = self._optimizer.shared_buffers()
            words = next((b[-CONTROL_WORDS:] for b in buffers if b.dtype is torch.float32), None)
            if words is None:
                words = self._own_words
                buffers = [*buffers, words]
            words.copy_(self._sent, non_blocking=True)
            self._mean(buffers)
        self._keep(words)
        self.reduced_steps += 1
        self.is_reduced = True

    def asked_to_stop(self, now: bool) -> bool:
        """Whether a process was asked to stop, as all of them learn it in the same step.

        Args:
            now: read the words of the step that was just exchanged, which waits for it; otherwise those of the one before.
        """
        step = self.reduced_steps - (1 if now or self._device.type != "cuda" else 2)
        if step < 0:
            return False
        arrived = self._arrived[step % 2]
        if arrived is not None:
            self._wait(arrived.query)
        words = self._words[step % 2] * self.processes
        self._compare_times(words[SECONDS : SECONDS + self.processes].tolist())
        return bool(words[STOP] > 0.5)

    def least(self, value: int) -> int:
        """The least of what the processes have."""
        found = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def agree(self, found: Any) -> list[Any]:
        """What each process found, in all of them."""
        every: list[Any] = [None] * self.processes
        dist.all_gather_object(every, found)
        return every

    def failure(self, error: BaseException) -> BaseException:
        """The error to end with: this process's own, which the others then learn, or the one that another had before.

        Args:
            error: what ended the training in this process.
        """
        store = group_store()
        said = self._said(store)
        if isinstance(error, EndedElsewhere):
            return error
        if not isinstance(error, OribiError):
            if said is not None:
                return EndedElsewhere(said)
            if isinstance(error, RuntimeError) and _is_link(error):
                return EndedElsewhere(
                    "another process of this training is gone and left no message; it was killed, or the host ran out of "
                    f"memory: {_first_line(error)}"
                )
        if said is None and store is not None:
            text = f"process {self.rank} failed, which ends the training: {_first_line(error)}"
            with suppress(RuntimeError):  # the process that keeps the store is gone
                store.set(self._failure_key, f"{self.rank}:{text}")
        return error

    def _mean(self, buffers: list[torch.Tensor]) -> None:
        # a mean of NCCL's own rounds once; gloo has none
        cuda = self._device.type == "cuda"
        operation = dist.ReduceOp.AVG if cuda else dist.ReduceOp.SUM
        works = [dist.all_reduce(buffer, operation, async_op=True) for buffer in buffers]
        for work, buffer in zip(works, buffers):
            if not cuda:
                self._wait(work.is_completed)
            work.wait()  # on a GPU the stream waits, and the host goes on
            if not cuda:
                buffer.div_(self.processes)

    def _reduce_portions(self) -> None:
        """Gradients of parameters, as they are; one that no process has stays absent."""
        has = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.float32)
        has = has.to(self._device)
        self._mean([has])
        present = [p for p, share in zip(self._parameters, has.tolist()) if share > 0]
        for portion in _portions(present):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in portion]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._mean([flat])
            for parameter, grad, mean in zip(portion, grads, flat.split([g.numel() for g in grads])):
                parameter.grad = grad.copy_(mean.view(grad.shape))

    def _keep(self, words: torch.Tensor) -> None:
        place = self.reduced_steps % 2
        self._words[place].copy_(words, non_blocking=True)
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._arrived[place] = event

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until the others have come, one of them has failed, or time is up."""
        began = looked = time.monotonic()
        pause = 0.0
        while not done():
            time.sleep(pause)
            pause = min(pause + 2e-5, 1e-3)
            now = time.monotonic()
            if now - looked < LOOK_SECONDS:
                continue
            looked = now
            said = self._said(group_store())
            if said is not None:
                raise EndedElsewhere(said)
            if now - began > self._timeout:
                raise TrainingError(
                    f"process {self.rank} waited {self._timeout:.0f} s for the other processes in step {self.reduced_steps}; one of "
                    "them hangs. Look at its output, or raise ddp_timeout where steps take so long"
                )

    def _said(self, store: Any) -> str | None:
        """What another process announced before it ended."""
        try:
            if store is None or not store.check([self._failure_key]):
                return None
            rank, _, text = store.get(self._failure_key).decode().partition(":")
        except RuntimeError:  # the process that kept the store is gone
            return None
        return None if int(rank) == self.rank else text

    def _compare_times(self, seconds: list[float]) -> None:
        """Once, after some steps: name a process that all others wait for."""
        if self._times is None or not all(seconds):
            return
        self._times.append(seconds)
        if len(self._times) < MEASURED_STEPS:
            return
        usual = [median(times) for times in zip(*self._times)]
        self._times = None
        ratio = max(usual) / median(usual)
        if self.rank == 0 and ratio > SLOW:
            logger.warning(
                "process %d computes %.1f times as long per step as the usual one (%.0f ms), and the others wait for it: its GPU is "
                "slower or hotter, shared, or its rows are longer",
                usual.index(max(usual)), ratio, 1e3 * median(usual),
            )  # fmt: skip


class _Clock:
    """Seconds that a process computes between two exchanges; on a GPU those of the last step that is over."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._over: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._seconds = 0.0

    def start(self) -> None:
        if self._began is None:
            self._began = self._mark()

    def stop(self) -> float:
        if self._cuda:
            if self._over is not None and self._over[1].query():
                self._seconds = self._over[0].elapsed_time(self._over[1]) / 1e3
            self._over = (self._began, self._mark()) if self._began is not None else None
        elif self._began is not None:
            self._seconds = time.perf_counter() - self._began
        self._began = None
        return self._seconds

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def frozen_sums(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and checksum of each frozen weight that is whole in every process, and of a 4-bit weight's scales."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or type(parameter).__name__ == "DTensor" or is_part(parameter):
            continue
        packed = getattr(parameter, "packed", None)
        if packed is not None:  # the experts of a layer
            yield name, sum(map(_sum_of_bytes, packed.tensors()))
            continue
        yield name, _sum_of_bytes(parameter)
        scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
        if scales is not None:
            yield f"{name}.absmax", _sum_of_bytes(scales)


def is_part(parameter: torch.Tensor) -> bool:
    """Whether a weight is a view of memory into which its layer is gathered."""
    return getattr(parameter, "is_sharded", False)


def _sum_of_bytes(tensor: torch.Tensor) -> int:
    # a subclass of 4-bit weights would answer for their values
    data = tensor.detach().as_subclass(torch.Tensor).contiguous().view(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    # the storage of a view may begin at any byte
    words = data[:whole] if data.data_ptr() % 8 == 0 else data[:whole].clone()
    total = int(words.view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))
    return total


def _portions(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype together, up to PORTION_BYTES."""
    found: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if found and (parameter.dtype is not found[0].dtype or size + parameter.nbytes > PORTION_BYTES):
            yield found
            found, size = [], 0
        found.append(parameter)
        size += parameter.nbytes
    if found:
        yield found


def _is_link(error: RuntimeError) -> bool:
    """Whether an error says that a connection between processes ended."""
    kind = getattr(dist, "DistError", None)
    words = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo")
    return (kind is not None and isinstance(error, kind)) or any(word in str(error) for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
