"""Starts several processes of this machine that compute together, as torchrun does."""

import os
import subprocess
import sys

import torch

from oribi.launch import free_port, rank_variables

SECONDS = 600  # then processes that wait for each other are stopped


def run_together(
    arguments: list[str], processes: int = 2, on_gpus: bool = False, threads: int = 0
) -> tuple[str, str]:
    """Runs `python ARGUMENTS` in several processes at once.

    Args:
        arguments: of the interpreter.
        processes: how many; a single one runs without torchrun's variables.
        on_gpus: whether they see the GPUs.
        threads: per process; 0 divides this process's threads among them.

    Returns:
        What the first process wrote to standard output, and all of them to standard error.

    Raises:
        RuntimeError: a process failed; the message ends with its standard error.
    """
    port = free_port()
    shared = {**os.environ, "OMP_NUM_THREADS": str(threads or max(torch.get_num_threads() // processes, 1))}
    if not on_gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    started = []
    for rank in range(processes):
        environment = shared | (rank_variables(rank, processes, port) if processes > 1 else {})
        words = [sys.executable, *arguments]
        started.append(
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(started, said)):
        if process.returncode:
            raise RuntimeError(f"process {rank} ended with {process.returncode}: {errors.strip()[-1500:]}")
    return said[0][0], "\n".join(errors for _, errors in said)
