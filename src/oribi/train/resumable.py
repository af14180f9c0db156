"""The part of the trainer that makes a run one run: its folder and record, and continuing from a checkpoint.

Everything here overrides a method of `transformers.Trainer`; what a checkpoint holds and whether it fits is asked elsewhere.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from oribi.data.packing import pack
from oribi.errors import ConfigError
from oribi.models.unwrap import base_model
from oribi.run_record import (
    LOG_FILE,
    RECORD_FILE,
    RunRecord,
    checkpoints,
    new_run,
    read_run_record,
    run_lock,
    set_aside,
)
from oribi.text import say
from oribi.train.checkpoints import PARTIAL, remove_partial, write_checkpoint
from oribi.train.fingerprint import (
    adapter_settings,
    compare_base,
    compare_rows,
    compare_settings,
    data_record,
    identity_of,
    settings_of,
)
from oribi.train.position import PositionedTrainer
from oribi.train.resume import (
    Resumed,
    adapter_config_of,
    named_checkpoint,
    newest_whole,
    require_same,
)
from oribi.train.setup import temporarily

# of an optimizer's groups, what a resumed run may change
GROUP_SETTINGS = ("initial_lr", "weight_decay")


class RunFiles(TrainerCallback):
    """Keeps the record in the run's folder: that it runs, and how it ended."""

    def __init__(self, trainer: "ResumableTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._write(args, state, "running")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._write(args, state, "finished" if self.trainer.has_finished else "stopped")

    def _write(self, args: TrainingArguments, state: TrainerState, how: str) -> None:
        if not state.is_world_process_zero:
            return
        before = read_run_record(args.output_dir)
        record = self.trainer.run_record()
        record.state = how
        if before is not None and before.run == record.run:
            record.saved = before.saved
        try:
            record.write(args.output_dir)
        except OSError as error:
            say(f"oribi: {args.output_dir}/{RECORD_FILE} cannot be written: {error.strerror}")


class ResumableTrainer(PositionedTrainer):
    """transformers' `Trainer` whose runs have an identity: see `train`."""

    run_id = ""
    rows: Any = None  # the training rows before packing
    _found: tuple[Any, Resumed | None] | None = None
    _added_rows = 0
    _staging = PARTIAL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(RunFiles(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        resume_weights_only: bool = False,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train from the start, or continue from a checkpoint of the same run.

        Args:
            resume_from_checkpoint: True takes the newest whole checkpoint of the run in output_dir; a path takes that one.
            trial, ignore_keys_for_eval: as in `transformers.Trainer.train`.
            resume_weights_only: take weights and step from the checkpoint, and begin with an empty optimizer.

        Raises:
            ConfigError: another process trains in the folder; there is no whole checkpoint; or base, rows or settings on
                which the weights depend are not the run's.
        """
        if trial is not None:  # each trial has a folder of its own
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)
        with self._own_folder():
            resumed = self.find_checkpoint(resume_from_checkpoint, resume_weights_only)
            self._start(resumed)
            try:
                path = None if resumed is None else str(resumed.path)
                output = super().train(path, None, ignore_keys_for_eval, **kwargs)
            finally:
                self._resumed = self._found = self._tail = None
        if not self._nothing_left:
            return output
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return TrainOutput(output.global_step, losses[-1] if losses else output.training_loss, output.metrics)

    @property
    def has_finished(self) -> bool:
        """Whether every step of the training is done, or the user's callbacks ended it."""
        stopped = getattr(getattr(self, "stop_on_signal", None), "stopped", False)
        return self.state.global_step >= self.state.max_steps or not stopped

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        if not self.is_world_process_zero():
            yield
            return
        with run_lock(self.args.output_dir):
            remove_partial(self.args.output_dir)  # of trainings that were killed
            yield

    def find_checkpoint(self, resume: str | bool | None, weights_only: bool = False) -> Resumed | None:
        """The checkpoint to continue from, compared with this training; None to start anew.

        Raises:
            ConfigError: as for `train`.
        """
        if resume is None or resume is False:
            return None
        if self._found is not None and self._found[0] == (resume, weights_only):
            return self._found[1]
        folder = self.args.output_dir
        resumed = (
            newest_whole(folder, weights_only) if resume is True else named_checkpoint(resume, weights_only)
        )
        if resumed is None:
            others = ", ".join(one.path.name for one in checkpoints(folder))
            what = f"none of its run; those of an earlier one are {others}" if others else "none"
            raise ConfigError(
                f"resume_from_checkpoint = True: {folder} holds no checkpoint ({what}). Start without it, or give the "
                "path of a checkpoint"
            )
        for one, problem in resumed.damaged:
            self._say(f"{one.path} is not whole ({problem}); continuing from {resumed.path.name}")
        self._compare(resumed)
        self._found = ((resume, weights_only), resumed)
        return resumed

    def _compare(self, resumed: Resumed) -> None:
        """Refuse changes of base and rows and of settings that must stay; report those that take effect from here."""
        record, now = resumed.record, settings_of(self.args, self.model, self.processing_class)
        if record is None:
            stored = adapter_config_of(resumed.path)
            if stored is not None:
                known = RunRecord("", settings=adapter_settings(stored))
                names = [name for name in now if name in adapter_settings(self._adapter_config())]
                require_same(
                    resumed, compare_settings(known, {n: now[n] for n in names}, only_known=True).refused
                )
            self._say(
                f"{resumed.path} has no record of its run, so base, rows and settings were not compared"
            )
            return
        changes = compare_settings(record, now)
        refused = compare_base(record, identity_of(self.model)) + changes.refused
        line, self._added_rows = compare_rows(record, self._all_rows())
        require_same(resumed, refused + ([line] if line else []))
        if self._added_rows:
            changes.applied.append(
                f"rows: {record.data['rows']:,} in the run, {self._added_rows:,} more now, which come last in this pass"
            )
        self._parts = (record.data or {}).get("parts")
        said = f"continuing from {resumed.path.name} (step {resumed.step})"
        if resumed.weights_only:
            said += ", with its weights only: the optimizer begins anew"
        self._say(said + "".join(f"\noribi:   changed: {line}" for line in changes.applied))
        if (record.data or {}).get("hashes") is None:
            self._say(
                "the run's rows have no fingerprint (a stream, or rows without ids), so they were not compared"
            )

    def _adapter_config(self) -> dict[str, Any]:
        config = getattr(self.model, "peft_config", {}).get(getattr(self.model, "active_adapter", None))
        return {} if config is None else config.to_dict()

    def _all_rows(self) -> Any:
        return self.train_dataset if self.rows is None else self.rows

    def _start(self, resumed: Resumed | None) -> None:
        """Take the folder for this run: what is another run's, or lies behind the resumed step, moves aside."""
        folder, before = Path(self.args.output_dir), read_run_record(self.args.output_dir)
        record = None if resumed is None else resumed.record
        self._resumed, self._tail, self._nothing_left = resumed, None, False
        same = before.run if before is not None else ""
        self.run_id = record.run if record else new_run() if resumed is None else same or new_run()
        token = [f"{PARTIAL}-{secrets.token_hex(4)}"]
        if self.args.world_size > 1:
            broadcast_object_list(token)
        self._staging = token[0]
        if resumed is not None:
            self._add_rows(record)
        self.accelerator.wait_for_everyone()  # all have looked at the checkpoints before one moves them
        if self.is_world_process_zero():
            self._set_aside(folder, before, resumed)
        self.accelerator.wait_for_everyone()

    def _set_aside(self, folder: Path, before: RunRecord | None, resumed: Resumed | None) -> None:
        found = checkpoints(folder)
        mine = None if resumed is None else resumed.path.resolve()

        def stays(step: int, path: Path) -> bool:
            if path.resolve() == mine:
                return True
            record = read_run_record(path)
            known = before is None or record is None or record.run == self.run_id
            return resumed is not None and step < resumed.step and known

        moved = [path for step, path in found if not stays(step, path)]
        if not moved:
            return
        names = f"{moved[0].name} to {moved[-1].name}" if len(moved) > 1 else moved[0].name
        if resumed is None:
            moved += [path for path in (folder / LOG_FILE, folder / RECORD_FILE) if path.exists()]
            why = "of an earlier run"
        else:
            why = f"not before {resumed.path.name}"
        place = set_aside(folder, moved, before.run if before else "unknown")
        say(f"oribi: {folder} holds checkpoints {why} ({names}); they are kept in {place}")

    def _add_rows(self, record: RunRecord | None) -> None:
        """Rows that came behind those of the run join it in the pass that is resumed."""
        parts, position = self._parts, (record and record.position) or {"epoch": 0}
        if self._added_rows and parts:
            parts = [*parts, {"rows": self._added_rows, "epoch": position["epoch"]}]
        self._parts = parts
        if self._is_packed() and parts and len(parts) > 1:
            packs, first = [], 0
            for part in parts:
                rows = self.rows.select(range(first, first + part["rows"]))
                packs.append(pack(rows, self.args.max_length, seed=self.args.seed))
                first += part["rows"]
            self._part_items = [len(one) for one in packs]
            self.train_dataset = datasets.concatenate_datasets(packs)
            self.guard.rows = self.train_dataset
        else:
            self._part_items = [part["rows"] for part in parts or []]

    def _is_packed(self) -> bool:
        return self.rows is not None and self.rows is not self.train_dataset

    def run_record(self) -> RunRecord:
        """What this training is, and where it stands."""
        base = identity_of(self.model)
        name = base.name if base else getattr(base_model(self.model).config, "_name_or_path", "")
        if getattr(self, "_data", None) is None or self._data[0] is not self.train_dataset:
            self._data = (self.train_dataset, data_record(self._all_rows(), self._parts))
        return RunRecord(
            self.run_id, name, base and base.to_dict(), self._data[1],
            settings_of(self.args, self.model, self.processing_class),
            self.state.global_step, self.state.max_steps, self.position.to_dict(),
        )  # fmt: skip

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        write = super()._save_checkpoint
        write_checkpoint(
            self, lambda: write(model, trial), self._get_output_dir(trial), self._staging, self.run_record
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        asked = [{k: g[k] for k in GROUP_SETTINGS if k in g} for g in self.optimizer.param_groups]
        resumed = self._resumed
        if resumed is None or not resumed.weights_only:
            device = self.args.device
            # several processes on a CPU compute on "cpu:0", a place that torch.load does not know
            place = torch.device("cpu") if device.type == "cpu" else device
            try:
                with temporarily(self.args, _setup_devices=place):
                    super()._load_optimizer_and_scheduler(checkpoint)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{checkpoint}: its optimizer is another than optim = {self.args.optim!s} makes here "
                    f"({str(error).splitlines()[0]}). Resume with the optimizer and adapter settings of the run"
                ) from error
        for group, settings in zip(self.optimizer.param_groups, asked):
            group.update(settings)
        self._set_schedule([settings.get("initial_lr") for settings in asked])

    def _set_schedule(self, rates: list[float | None]) -> None:
        """The learning rate of the schedule that is asked for now, at the step that is reached."""
        scheduler, resumed = self.lr_scheduler, self._resumed
        if not self._created_lr_scheduler or not isinstance(scheduler, LambdaLR):
            return
        if resumed is not None and resumed.weights_only:
            scheduler.last_epoch, scheduler._step_count = resumed.step, resumed.step + 1
        scheduler.base_lrs = rates
        now = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, now):
            group["lr"] = rate
        scheduler._last_lr = now

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        warmup = self.args.get_warmup_steps(num_training_steps)
        if str(self.args.lr_scheduler_type) == "constant":
            warmup = 0
        if warmup and warmup >= num_training_steps and self.args.learning_rate:
            highest = self.args.learning_rate * (num_training_steps - 1) / warmup
            self._say(
                f"warmup_steps = {warmup:,} and the training has {num_training_steps:,}: the learning rate rises from 0 to "
                f"{highest:.3g} and never reaches {self.args.learning_rate:g}"
                + (", so nothing is learned. Set warmup_steps to 0" if not highest else "")
            )
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is None or not self._resumed.weights_only:
            super()._load_rng_state(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._nothing_left and "train_loss" in logs:  # of no step
            return
        super().log(logs, start_time)
