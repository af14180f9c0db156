"""Files of a model that several processes trained: the first process writes them, and the others wait until they are there.

A script under `torchrun` or `accelerate launch` calls the same functions in every process, or in the first one alone. So nobody
waits for the others at a meeting: the first process leaves word in the store through which the processes found each other.
"""

import inspect
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import torch.distributed as dist

from oribi import errors
from oribi.errors import EndedElsewhere, OribiError, TrainingError

LOOK_SECONDS = 0.1
BEGIN_SECONDS = 1800  # within which the first process has to come to the same call
BEGUN, DONE, FAILED = b"begun", b"done ", b"failed "

_calls: Counter[str] = Counter()


def group_store() -> Any:
    """Where processes leave words for each other without meeting; None where there is no group of several."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def by_first_process(save: Callable[..., Any]) -> Callable[..., Any]:
    """Of several processes that call `save` with the same folder, lets the first one write and the others wait for its result.

    Args:
        save: its second argument names the folder or repository; what it returns can be pickled.

    Raises:
        OribiError: in all of them, what the first process raised.
    """
    signature = inspect.signature(save)

    @wraps(save)
    def saved(*given: Any, **keywords: Any) -> Any:
        store = group_store()
        if store is None or dist.get_world_size() == 1:
            return save(*given, **keywords)
        place = os.path.abspath(str(list(signature.bind(*given, **keywords).arguments.values())[1]))
        call = f"oribi/{save.__name__}/{place}"
        _calls[call] += 1
        key = f"{call}/{_calls[call]}"
        if dist.get_rank():
            return _wait(store, key, place)
        _leave(store, key, BEGUN)
        try:
            result = save(*given, **keywords)
        except BaseException as error:
            _leave(store, key, FAILED + f"{type(error).__name__} {error}".encode())
            raise
        _leave(store, key, DONE + pickle.dumps(result))
        return result

    return saved


def _leave(store: Any, key: str, word: bytes) -> None:
    with suppress(RuntimeError):  # nobody is left who could read it
        store.set(key, word)


def _wait(store: Any, key: str, place: str) -> Any:
    """What the first process returned."""
    began = time.monotonic()
    while True:
        try:
            word = store.get(key) if store.check([key]) else b""
        except RuntimeError:
            return None  # the first process is over; if it failed, the launcher ends this one
        if word.startswith(DONE):
            return pickle.loads(word.removeprefix(DONE))
        if word.startswith(FAILED):
            kind, _, text = word.removeprefix(FAILED).decode().partition(" ")
            known = getattr(errors, kind, None)
            raise (known if isinstance(known, type) and issubclass(known, OribiError) else EndedElsewhere)(
                f"process 0 could not write {place}: {text}"
            )
        if not word and time.monotonic() - began > BEGIN_SECONDS:
            raise TrainingError(
                f"process {dist.get_rank()} waited {BEGIN_SECONDS} s for process 0 to write {place}: let all processes make the "
                "same calls, or the first one alone"
            )
        time.sleep(LOOK_SECONDS)
