"""A run's folder after training: its settings, its model, its log and its held-out rows, each from the folder alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oribi.config import RunConfig, read_config
from oribi.errors import ConfigError
from oribi.models.files import missing_folder
from oribi.run_record import RESULTS, own_checkpoints, read_record
from oribi.train.preflight import steps_of
from oribi.train.progress import read_log
from oribi.train.run_lock import is_locked

CONFIG_FILE = "config.yaml"


@dataclass
class LoadedRun:
    """A model to use: `config` is None where the name was a model's and no run's."""

    model: Any
    tokenizer: Any
    config: RunConfig | None

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")


def is_run(name: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(name) / CONFIG_FILE).is_file()


def read_run(folder: str | Path) -> RunConfig:
    """The settings that a run was trained with.

    Raises:
        ConfigError: the folder is no run's.
    """
    if not is_run(folder):
        what = "it has no config.yaml" if Path(folder).is_dir() else missing_folder(str(folder))
        raise ConfigError(f"{folder} is no run: {what}; give the output_dir of a finished `oribi train`")
    config, _ = read_config(Path(folder) / CONFIG_FILE)
    return replace(config, output_dir=str(folder))


def load_run(name: str | Path, *, dtype: str | None = None) -> LoadedRun:
    """The model of a run, loaded as it was trained; or any model by its name.

    Args:
        name: a run's folder, or what `FastLanguageModel.from_pretrained` takes.
        dtype: compute dtype; None takes the run's, or the machine's.

    Raises:
        ModelError: there is nothing to load.
    """
    from oribi.compat.language_model import FastLanguageModel

    if not is_run(name):
        model, tokenizer = FastLanguageModel.from_pretrained(str(name), max_seq_length=None, dtype=dtype)
        return LoadedRun(model, tokenizer, None)
    config = read_run(name)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(name),
        max_seq_length=config.max_seq_length,
        dtype=dtype or (None if config.dtype == "auto" else config.dtype),
        load_in_4bit=config.load_in_4bit and not config.full_finetuning,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision if config.full_finetuning else None,
    )
    return LoadedRun(model, tokenizer, config)


def held_out_rows(config: RunConfig, tokenizer: Any) -> Any:
    """The evaluation rows of a run, prepared again (from the cache where nothing changed); None if it has none."""
    if not (config.eval_dataset or config.eval_fraction):
        return None
    from oribi.run import read_data

    held_out = read_data(config, tokenizer)[1]
    return None if held_out is None else held_out.dataset


@dataclass(frozen=True)
class RunState:
    """How far a run came. `words` says it, `steps` are done, `finished` whether none is left."""

    words: str
    steps: int
    finished: bool


def state_of(folder: str | Path) -> RunState:
    """Whether a run is finished, was stopped, was killed, or trains now."""
    record, kept = read_record(folder), own_checkpoints(folder)
    steps = steps_of(str(folder), record)
    if record is None:  # of an earlier version: the summary of a training that ended, whole or stopped
        ended = any("train_loss" in entry for entry in read_log(folder))
        whole = ended and any((Path(folder) / name).is_dir() for name in RESULTS)
        return RunState("yes" if whole else "no", steps, whole)
    total = f"step {steps:,} of {record.max_steps:,}"
    if record.state == "finished":
        return RunState("yes", steps, True)
    if is_locked(folder):
        return RunState(f"no: it trains now, {total}", steps, False)
    ended = "was stopped" if record.state == "stopped" else "ended before its time"
    where = f"; --resume goes on from {kept[-1].path.name}" if kept else ", without a checkpoint"
    return RunState(f"no: it {ended} at {total}{where}", steps, False)
