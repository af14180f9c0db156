"""What ends one of two processes ends or stops both, soon and with a message: whole weights, sharded ones, and shared rows."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oribi.selftest.subject import Subject, write_small_model
from tests.train.several_processes import AtStep
from tests.trust import forks
from tests.trust.runs import trainer_in

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks with gloo"),
]
MODES = {"whole": {}, "sharded": {"fsdp": True}, "shared rows": {"context_parallel": 2}}
SECONDS = 90  # a process that still waits then hangs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small"))


def signalled(module: torch.nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def killed(module: torch.nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def not_finite(module: torch.nn.Module) -> None:
    with torch.no_grad():
        module.lora_A["default"].weight[0, 0] = float("nan")


def failing(module: torch.nn.Module) -> None:
    raise ValueError("these rows are not what they seem")


def short_of_memory(module: torch.nn.Module) -> None:
    """From here on always, in the middle of each forward."""

    def fail(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.register_forward_pre_hook(fail)


# exit codes or error types of both processes, and what is said
EVENTS: dict[Callable[[torch.nn.Module], None], tuple[tuple[str, str], str]] = {
    signalled: (("KeyboardInterrupt", "SystemExit"), ""),
    killed: (("EndedElsewhere", "killed"), "another process of this training is gone and left no message"),
    not_finite: (("TrainingError", "TrainingError"), "The weights of .*lora_A.* are no longer finite"),
    failing: (("EndedElsewhere", "ValueError"), "process 1 failed, which ends the training: these rows are not what they seem"),
    short_of_memory: (("EndedElsewhere", "TrainingError"), "process 1 failed, which ends the training: "),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_what_ends_one_process_ends_both(model, tmp_path, mode, event):
    torch.set_num_threads(1)
    (tmp_path / "1.json").write_text(json.dumps(["killed", ""]))

    def run() -> None:
        rank = os.environ["RANK"]
        settings = {"max_steps": 9, "save_strategy": "no", "neftune_noise_alpha": None, "use_cpu": True}
        trainer = trainer_in(Subject(str(model), "cpu"), tmp_path / "run", **{**settings, **MODES[mode]})
        layer = trainer.model.get_base_model().model.layers[1]
        target = layer if event is short_of_memory else layer.self_attn.q_proj
        if rank == "1":
            trainer.add_callback(AtStep(2, lambda: event(target)))
        try:
            trainer.train()
            found = ["ended", ""]
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            found = [type(error).__name__, str(error)]
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # a link that was left open is not closed in order

    codes = forks.together(run, tmp_path, 2, SECONDS)
    assert codes == [0, -signal.SIGKILL if event is killed else 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    kinds, said = EVENTS[event]
    assert tuple(kind for kind, _ in found) == kinds, found
    assert not said or re.search(said, found[0][1]), found
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert saved == (["checkpoint-3"] if event is signalled else [])
