"""Checkpoints that are whole or not there: written beside the others under a name that no one reads, then renamed."""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from oribi.errors import ConfigError, TrainingError
from oribi.save.finite import require_finite
from oribi.train.setup import held

logger = logging.getLogger(__name__)

PARTIAL = "_partial"  # a leading underscore: uploads of the output folder leave such names out


def require_writable(folder: str | os.PathLike) -> None:
    """Make a run's folder and write in it, before hours of training find that they cannot.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    path = Path(folder)
    probe = path / f".oribi-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"oribi")
    except OSError as error:
        raise ConfigError(
            f"output_dir = {folder}: cannot be written to ({error.strerror}); give a folder that this user may write in"
        ) from error
    finally:
        if path.is_dir() and os.access(path, os.W_OK):
            probe.unlink(missing_ok=True)


def write_checkpoint(trainer: Trainer, write: Callable[[], None], run_folder: str) -> None:
    """Write a checkpoint in a folder that no one reads and give it its name when it is complete.

    A checkpoint that cannot be written leaves the earlier ones as they are and does not end the training, unless it was
    the last chance to save it.

    Args:
        trainer: its state names the step.
        write: what writes the files, into the folder that `trainer._get_output_dir` names.
        run_folder: where checkpoints belong.

    Raises:
        ExportError: the weights are not finite.
        TrainingError: the last checkpoint of a training could not be written.
    """
    require_finite(trainer.model)
    state, main = trainer.state, trainer.args.should_save
    final = Path(run_folder) / f"checkpoint-{state.global_step}"
    staging = Path(run_folder) / PARTIAL
    partial = staging / final.name
    if main:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    failure: BaseException | None = None
    try:
        with held(
            trainer, _get_output_dir=lambda trial: str(staging), _push_from_checkpoint=lambda folder: None
        ):
            write()
        if main:
            _name_best(state, final, partial)
    except Exception as error:
        if not failed_write(error):
            raise
        failure = error
    # no process may give the folder its name before all have written into it
    if any_process(trainer, failure is not None):
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        _report(trainer, final, failure)
        return
    if main:
        publish(partial, final)
        rotate_checkpoints(
            output_dir=run_folder, save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
        )  # fmt: skip
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))


def _name_best(state: TrainerState, final: Path, partial: Path) -> None:
    """The best checkpoint under its final name, in the saved state too."""
    if not state.best_global_step:
        return
    best = final.with_name(f"checkpoint-{state.best_global_step}")
    if best == final or best.is_dir():
        state.best_model_checkpoint = str(best)
        state.save_to_json(str(partial / "trainer_state.json"))


def _report(trainer: Trainer, final: Path, failure: BaseException | None) -> None:
    why = "another process failed" if failure is None else str(failure).splitlines()[0]
    message = (
        f"{final} could not be written: {why} ({shutil.disk_usage(final.parent).free / 1e6:.0f} MB are free). Earlier "
        "checkpoints are as they were"
    )
    if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
        raise TrainingError(f"{message}; the trained weights are still in this process's memory") from failure
    logger.error("%s; training goes on and tries again at the next save. Free some space", message)


def any_process(trainer: Trainer, flag: bool) -> bool:
    """Whether the flag is set in any process of the run."""
    if trainer.args.world_size == 1:
        return flag
    total = trainer.accelerator.reduce(torch.tensor(float(flag), device=trainer.args.device), "sum")
    return total.item() > 0


def failed_write(error: BaseException) -> bool:
    """Whether an exception is a file system's: torch and safetensors wrap a full disk in errors of their own."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    # PyTorch's writer of zip files has no exception type of its own
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos")
    )


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name, its bytes on the disk first; an older one of that name goes."""
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    stale = final.parent / PARTIAL / f"stale-{final.name}"
    if final.exists():
        if stale.exists():
            shutil.rmtree(stale)
        os.replace(final, stale)
    os.replace(partial, final)
    _sync(final.parent)
    shutil.rmtree(final.parent / PARTIAL, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders have no file descriptors there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end training after the step that is running, with a checkpoint; a second one ends it at once.

    Args:
        agree: whether any process of the run was asked to stop, given whether this one was.
    """

    def __init__(self, agree: Any) -> None:
        self.agree = agree
        self.asked: signal.Signals | None = None
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block, where Python allows it: in the main thread."""
        self.asked, self.stopped = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, frame: FrameType | None) -> None:
            self.asked = signal.Signals(number)
            for one, handler in before.items():
                signal.signal(one, handler)
            logger.warning("%s: training ends after this step, with a checkpoint", self.asked.name)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agree(self.asked is not None):
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def leave(self, checkpoint: str) -> None:
        """After training: end the program as the signal would have, now that everything is saved."""
        if not self.stopped:
            return
        print(
            f"oribi: stopped; {checkpoint} holds the run, which goes on from there when it is resumed",
            flush=True,
        )
        if self.asked is signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
