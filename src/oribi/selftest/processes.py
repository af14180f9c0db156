"""Several processes of this machine that compute together, as torchrun would start them."""

import os
import socket
import subprocess
import sys

import torch

SECONDS = 600  # processes that wait for each other are stopped then


def run_together(arguments: list[str], processes: int = 2, on_gpus: bool = False, threads: int = 0) -> str:
    """Runs `python ARGUMENTS` in so many processes.

    Args:
        arguments: of the interpreter.
        processes: how many.
        on_gpus: whether each may see the GPUs.
        threads: of each process; 0 shares this process's threads out.

    Returns:
        What the first process wrote to standard output.

    Raises:
        RuntimeError: a process failed; the message ends with what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(threads or max(torch.get_num_threads() // processes, 1))}
    if processes > 1:
        shared |= {
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
    if not on_gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(started, said)):
        if process.returncode:
            raise RuntimeError(f"process {rank} ended with {process.returncode}: {errors.strip()[-1500:]}")
    return said[0][0]
