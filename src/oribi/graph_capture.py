"""Recording a CUDA graph, and what a recording that fails leaves behind."""

from collections.abc import Callable
from typing import Any

import torch


class RecordingFailed(Exception):
    """A function could not be recorded; its first line of text says why."""


def record(function: Callable[[], Any], pool: Any, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Records what a function launches; nothing runs until the graph is replayed.

    Args:
        function: has run before, so that its kernels are compiled.
        pool: of `torch.cuda.graph_pool_handle`, which graphs that never run at the same time share.
        device: whose random numbers the function draws.

    Returns:
        The graph, and what the function returned, which each replay writes again.

    Raises:
        RecordingFailed: it did something that no graph can hold.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError as error:
        # PyTorch leaves the recording's own stream behind as the current one
        torch.cuda.set_stream(stream)
        _fresh_random_state(device)
        raise RecordingFailed(str(error).splitlines()[0]) from error
    return graph, result


def _fresh_random_state(device: torch.device) -> None:
    """Gives a GPU's generator a state of its own again: a recording that fails leaves it tied to the graph."""
    generator = torch.cuda.default_generators[device.index or 0]
    seed = generator.initial_seed()
    generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
    generator.manual_seed(seed)
