"""Checkpoints that are whole or not there: written beside the others under a name that no one reads, then renamed."""

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from oribi.errors import TrainingError
from oribi.run_record import RunRecord, checkpoints, own_checkpoints, read_run_record
from oribi.save.trained import require_finite
from oribi.text import is_first_process, say, say_notes
from oribi.train.setup import temporarily

logger = logging.getLogger(__name__)

PARTIAL = "_partial"  # a leading underscore: uploads of the output folder leave such names out


def remove_partial(run_folder: str | os.PathLike) -> None:
    """Remove what trainings that no longer run left half-written; the caller holds the folder's lock."""
    for path in Path(run_folder).glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(
    trainer: Trainer,
    write: Callable[[], None],
    run_folder: str,
    staging: str = PARTIAL,
    describe: Callable[[], RunRecord] | None = None,
) -> None:
    """Write a checkpoint in a folder that no one reads and give it its name when it is complete.

    A checkpoint that cannot be written leaves the earlier ones as they are and does not end the training, unless it was
    the last chance to save it: then it is written into the system's folder of temporary files, and the error says so.

    Args:
        trainer: its state names the step.
        write: what writes the files, into the folder that `trainer._get_output_dir` names.
        run_folder: where checkpoints belong.
        staging: name of the folder that no one reads; all processes of a run give the same.
        describe: the record that goes into the checkpoint.

    Raises:
        ExportError: the weights are not finite.
        TrainingError: the last checkpoint of a training could not be written where it belongs.
    """
    require_finite(trainer.model)
    folder, state, main = Path(run_folder), trainer.state, trainer.args.should_save
    final = folder / f"checkpoint-{state.global_step}"
    problem = _write_whole(trainer, write, final, folder / staging, describe)
    if problem is None:
        if main:
            rotate_checkpoints(
                output_dir=run_folder, save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )  # fmt: skip
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(final))
        return
    message = (
        f"{final} could not be written: {problem} ({shutil.disk_usage(folder).free / 1e6:.0f} MB are free). Earlier "
        "checkpoints are as they were"
    )
    if not (trainer.control.should_training_stop or state.global_step >= state.max_steps):
        logger.error("%s; training continues and tries again at the next save. Free some space", message)
        return
    elsewhere = [str(Path(tempfile.gettempdir()) / f"oribi-{folder.name}-{secrets.token_hex(4)}")]
    if trainer.args.world_size > 1:
        broadcast_object_list(elsewhere)
    rescue = Path(elsewhere[0])
    problem = _write_whole(trainer, write, rescue / final.name, rescue / PARTIAL, describe)
    if problem is None:
        raise TrainingError(
            f"{message}. It lies in {rescue / final.name} instead: free some space, move it to {folder}, and resume the run"
        )
    if main:
        shutil.rmtree(rescue, ignore_errors=True)
    whole = checkpoints(folder)
    last = f"the newest that is whole is {whole[-1].path}" if whole else "there are none"
    raise TrainingError(
        f"{message}; {last}. Nor could it be written to {rescue.parent}: {problem}. What was trained since is only in "
        "trainer.model, which trainer.save_model(FOLDER) writes elsewhere while this process lives"
    )


def checkpoint_trained(trainer: Trainer) -> Path | None:
    """Write a checkpoint of the trained weights, unless the run has one, before anything else is made of them.

    What ends the process afterwards (a signal, a crash, a full disk) then loses nothing. Every process of a run calls it.

    Returns:
        The checkpoint, which may go once the model is saved in every form that is asked for; None if none was written.
    """
    folder, step = trainer.args.output_dir, trainer.state.global_step
    record = read_run_record(folder)
    saved = record is not None and step in record.saved.values()
    kept = saved or any(one.step == step for one in own_checkpoints(folder))
    if not any_process(trainer, not kept and trainer.args.should_save):
        return None
    # beside the user's own checkpoints; of a whole model the weights alone, since its optimizer may be as large
    settings = {"save_total_limit": None, "push_to_hub": False}
    settings["save_only_model"] = not hasattr(trainer.model, "peft_config")
    try:
        with temporarily(trainer.args, **settings):
            trainer._save_checkpoint(trainer.model, None)
    except TrainingError as error:
        if trainer.args.should_save:
            say(f"oribi: {error}")
        return None
    return Path(folder) / f"checkpoint-{step}"


def where_trained_is(trainer: Trainer) -> str:
    """Where the trained weights are, for the error of a form that could not be saved."""
    folder, step = trainer.args.output_dir, trainer.state.global_step
    advice = f"When that is fixed, `oribi export {folder} --to FORMS` writes them"
    if any(one.step == step for one in own_checkpoints(folder)):
        return f"The trained weights are kept in {folder}/checkpoint-{step}. {advice}"
    saved = read_run_record(folder)
    if saved is not None and step in saved.saved.values():
        return f"The model is saved in {folder} in other forms already. {advice} in this one"
    return "No checkpoint has the trained weights; free some space, and set save_steps"


def _write_whole(
    trainer: Trainer,
    write: Callable[[], None],
    final: Path,
    staging: Path,
    describe: Callable[[], RunRecord] | None,
) -> str | None:
    """Write a checkpoint under a name that no one reads and rename it; what kept it from that, in any process."""
    main, partial = trainer.args.should_save, staging / final.name

    def publish_it() -> None:
        _name_best(trainer.state, final, partial)
        if describe is not None:
            record = describe()
            record.files = _sizes(partial)
            record.write(partial)
        publish(partial, final)

    if main:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with temporarily(
        trainer, _get_output_dir=lambda trial: str(staging), _push_from_checkpoint=lambda folder: None
    ):
        failure = _failed_writing(write, staging)
    # no process may give the folder its name before all have written into it
    failed = any_process(trainer, failure is not None)
    if not failed:
        failure = _failed_writing(publish_it, staging) if main else None
        failed = any_process(trainer, failure is not None)
    if main:
        shutil.rmtree(staging, ignore_errors=True)
    if not failed:
        return None
    return "another process failed" if failure is None else str(failure).splitlines()[0]


def _failed_writing(write: Callable[[], None], staging: Path) -> Exception | None:
    """The file system's error that ended a write; every other error is raised again, with nothing half-written left."""
    try:
        write()
    except Exception as error:
        if failed_write(error):
            return error
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return None


def _sizes(partial: Path) -> dict[str, int]:
    """Bytes of the files that a training continues from."""
    needed = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
    names = ("trainer_state.json", "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME)
    return {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file() and (path.suffix in needed or path.name in names)
    }


def _name_best(state: TrainerState, final: Path, partial: Path) -> None:
    """The best checkpoint under its final name, in the saved state too."""
    if not state.best_global_step:
        return
    best = final.with_name(f"checkpoint-{state.best_global_step}")
    if best == final or best.is_dir():
        state.best_model_checkpoint = str(best)
        state.save_to_json(str(partial / "trainer_state.json"))


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
    stale = partial.parent / f"stale-{final.name}"
    if final.exists():
        if stale.exists():
            shutil.rmtree(stale)
        os.replace(final, stale)
    os.replace(partial, final)
    _sync(final.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders have no file descriptors there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGINT and SIGHUP end training after the step that is running, with a checkpoint; a second one at once.

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
        numbers = [signal.SIGTERM, signal.SIGINT]
        # under nohup the hang-up is ignored, and stays so
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

        def handle(number: int, frame: FrameType | None) -> None:
            self.asked = signal.Signals(number)
            for one, handler in before.items():
                signal.signal(one, handler)
            # a launcher tells every process
            log = logger.warning if is_first_process() else logger.info
            log(
                "%s: training ends after this step, with a checkpoint; a second signal ends it at once",
                self.asked.name,
            )

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs) -> TrainerControl:
        if self.agree(self.asked is not None):
            self.stopped = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def end_program(self, checkpoint: str) -> None:
        """After training: end the program as the signal would have, now that everything is saved."""
        if not self.stopped:
            return
        say_notes(
            [
                f"stopped; the run is saved in {checkpoint}: resume it with --resume (in Python: resume_from_checkpoint=True)"
            ]
        )
        if self.asked is None or self.asked is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.asked)
