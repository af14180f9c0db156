"""Starts one process per GPU of this machine, watches over them, and ends as they do.

The processes are those of `torchrun`: they read the same variables. What is added are exit codes that schedulers know, signals
that give every process the time to save, and restarts from the newest checkpoint. Over several machines `torchrun`'s own agent does
it, whose exit codes are translated.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import FrameType

from oribi.errors import ConfigError
from oribi.text import say

# of processes that are left when one has failed: to end by themselves, to end at a second signal, and until they are killed
SIGNAL_SECONDS = (0.0, 2.0, 15.0)
POLL_SECONDS = 0.05
# that processes have to save when a signal ends them, over several machines
SAVING_SECONDS = 300
# exit codes after which another attempt would end alike: wrong arguments, and a run that was stopped
FINAL_CODES = (2, 130, 143, 129)
LAUNCHED = "ORIBI_LAUNCHED"
# how accelerate's launcher asks its processes to be connected, by the variable that says it
OTHER_CONNECTIONS = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}  # fmt: skip
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP")


def is_launched() -> bool:
    """Whether this is one of several processes that a launcher started."""
    return "WORLD_SIZE" in os.environ


def launcher_spoke() -> bool:
    """Whether `start_together` started this process, and said what there is to say about the settings."""
    return LAUNCHED in os.environ


def require_own_connection() -> None:
    """Before anything is loaded: that no launcher asks for another connection between the processes of a run.

    Raises:
        ConfigError: accelerate's launcher, or the config file that it read, does.
    """
    asked = [
        what for name, what in OTHER_CONNECTIONS.items() if os.environ.get(name, "").lower() in ("true", "1")
    ]
    if asked:
        raise ConfigError(
            f"accelerate's launcher, or its config file, asks for {' and '.join(asked)}, and a run connects its processes itself: "
            "start it with `oribi train FILE --gpus all`, torchrun or `accelerate launch --multi_gpu`; fsdp: true in the run file "
            "splits the weights"
        )


def processes_here() -> int:
    """Processes of the training that this one belongs to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_on_machine() -> int:
    """Those of them that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes_here()))


def count_of_gpus(asked: str | None, found: int) -> int:
    """How many GPUs a run's `gpus` means, also for another machine: `found` where it says all."""
    if asked is None:
        return 1
    if asked.strip().lower() == "all":
        return max(found, 1)
    return int(asked) if asked.strip().isdecimal() else len(chosen_gpus(asked, 10**6))


def require_groups(context_parallel: int, processes: int) -> None:
    """Before anything is loaded: whether processes can share rows in groups of `context_parallel`.

    Raises:
        ConfigError: they do not come out even.
    """
    if processes % context_parallel:
        wanted = -(-processes // context_parallel) * context_parallel
        there = "there is one process" if processes == 1 else f"there are {processes} processes"
        raise ConfigError(
            f"context_parallel = {context_parallel}: {there}, and each row is shared by {context_parallel}. Set gpus: {wanted}, "
            f"or start {wanted} processes with torchrun; context_parallel = 1 gives each row to one process"
        )


def is_restarted() -> bool:
    """Whether a launcher started this process in place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def chosen_gpus(asked: str, found: int) -> list[int]:
    """The GPUs that a run's `gpus` names.

    Args:
        asked: "all", how many, or indices with commas between them, as in "0,2".
        found: GPUs that this process may use.

    Raises:
        ConfigError: it is none of these, or names GPUs that are not there.
    """
    here = f"this machine has {found} that this process may use" if found else "this machine has no CUDA GPU"
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if asked.strip().lower() == "all":
        if not found:
            raise ConfigError(f"gpus = all: {here}")
        return list(range(found))
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"gpus = {asked!r}; must be all, a number of GPUs, or indices such as 0,2")
    if "," not in asked:
        count = int(asked)
        if not 1 <= count <= found:
            raise ConfigError(f"gpus = {count}: {here}")
        return list(range(count))
    indices = [int(word) for word in words]
    wrong = [index for index in indices if index >= found]
    if wrong:
        raise ConfigError(f"gpus = {asked}: there is no GPU {wrong[0]}; {here}, counted from 0")
    if len(set(indices)) < len(indices):
        raise ConfigError(f"gpus = {asked}: a GPU is named twice")
    return indices


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What `torchrun` tells a process of one machine about itself and the others."""
    return {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_together(arguments: Sequence[str], gpus: Sequence[int], restarts: int = 0) -> int:
    """Run `python ARGUMENTS` in one process per GPU, and again after a failure.

    SIGTERM, SIGINT and SIGHUP go to every process, once each, and nothing is started anew after them.

    Args:
        arguments: of the interpreter.
        gpus: indices among those that this process may use.
        restarts: how often all processes are started again when one fails; each then has TORCHELASTIC_RESTART_COUNT.

    Returns:
        Exit code: 0; that of the process which failed first, 128 and the signal where it was killed by one; after a signal to
        this process what the others returned.
    """
    group = _Group()
    with group.forwarding():
        for attempt in range(restarts + 1):
            code = group.run(arguments, gpus, attempt)
            if code == 0 or group.signalled is not None or code in FINAL_CODES or attempt == restarts:
                return code
            say(f"oribi: all processes start again, from the newest checkpoint ({attempt + 1} of {restarts})")
    return code


def start_on_machines(
    arguments: Sequence[str], gpus: Sequence[int], machines: int, rendezvous: str, restarts: int = 0
) -> int:
    """Run `python ARGUMENTS` in one process per GPU of this machine, as the same call does on the others at the same time.

    Args:
        arguments, gpus, restarts: as of `start_together`; equally many GPUs on each machine.
        machines: how many.
        rendezvous: HOST:PORT of one of them, the same for all, where they meet.

    Returns:
        Exit code, as of `start_together`.

    Raises:
        ConfigError: `rendezvous` is no HOST:PORT, or the machines did not meet there in time.
    """
    host, colon, port = rendezvous.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(
            f"rendezvous = {rendezvous!r}; must be HOST:PORT of one of the machines, as in node1:29400"
        )
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    known = {one.name for one in fields(LaunchConfig)}
    # of torch 2.13 and later; before, processes that were told to end have 30 seconds to save
    patient = {"shutdown_timeout": SAVING_SECONDS} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=machines, max_nodes=machines, nproc_per_node=len(gpus), run_id="oribi", rdzv_backend="c10d",
        rdzv_endpoint=rendezvous, max_restarts=restarts, **patient,
    )  # fmt: skip
    # the agent passes on its own variables alone; `env` adds ours and becomes the process
    variables = [f"{name}={value}" for name, value in _shared_variables(gpus).items()]
    try:
        elastic_launch(config, "env")(*variables, sys.executable, *arguments)
    except SignalException as ended:
        return 128 + ended.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _say_killed(rank, failure.exitcode)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except RendezvousError as error:
        raise ConfigError(
            f"rendezvous = {rendezvous}: {machines} machines did not meet there: {error}"
        ) from error
    return 0


def _shared_variables(gpus: Sequence[int]) -> dict[str, str]:
    """What each process of this machine is told."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    threads = str(max((os.cpu_count() or 1) // len(gpus), 1))
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), LAUNCHED: "1"}
    if "CUDA_VISIBLE_DEVICES" not in os.environ or visible:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in gpus)
    return shared


def _say_killed(rank: int, code: int) -> None:
    """Say of a process that a signal ended by which one."""
    if code < 0:
        hint = "; the host may have run out of memory" if -code == signal.SIGKILL else ""
        say(f"oribi: process {rank} was ended by {signal.Signals(-code).name}{hint}")


class _Group:
    """The processes of one attempt."""

    def __init__(self) -> None:
        self.signalled: int | None = None
        self._processes: list[subprocess.Popen] = []

    def forwarding(self) -> "_Forwarding":
        return _Forwarding(self.send)

    def send(self, number: int) -> None:
        """Pass a signal on to every process."""
        self.signalled = number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def run(self, arguments: Sequence[str], gpus: Sequence[int], attempt: int) -> int:
        port = free_port()
        shared = {**os.environ, **_shared_variables(gpus), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        self._processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=shared | rank_variables(rank, len(gpus), port),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is passed on once
            )
            for rank in range(len(gpus))
        ]
        try:
            return self._watch()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                process.wait()

    def _watch(self) -> int:
        """Wait for all processes; when one fails, end the others. Returns the exit code of the first that ended badly."""
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            if failed:
                rank = failed[0]
                code = codes[rank]
                if self.signalled is None:
                    _say_killed(rank, code)
                    self._end_others()
                else:  # each saves what it has to, and ends
                    for process in self._processes:
                        process.wait()
                    if code in FINAL_CODES:  # a process may have learned of the stop from the others
                        return 128 + self.signalled
                return code if code > 0 else 128 - code
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_SECONDS)

    def _end_others(self) -> None:
        began = time.monotonic()
        for number, seconds in zip((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL), SIGNAL_SECONDS):
            while time.monotonic() - began < seconds and self._alive():
                time.sleep(POLL_SECONDS)
            for process in self._alive():
                process.send_signal(number)

    def _alive(self) -> list[subprocess.Popen]:
        return [process for process in self._processes if process.poll() is None]


class _Forwarding:
    """Inside the block, signals that end a program go to `send` instead."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self._send(number)

        for name in FORWARDED:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
