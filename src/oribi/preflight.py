"""What can be found wrong before the model is loaded, which may be a download of gigabytes: settings, data, the folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from oribi.chat.named_templates import get_chat_template
from oribi.config import RunConfig, as_source
from oribi.data.prepare import make_preparation
from oribi.data.sources import Part, evaluation_split, require_held_out
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.gguf.metadata import check_config
from oribi.gguf.mixes import mix_of
from oribi.gguf.writer import note_on_rows, plan_file
from oribi.launch import processes_here, require_groups, require_own_connection
from oribi.memory.fit import refuse_what_cannot_fit
from oribi.models.checkpoint_tensors import expected_shapes
from oribi.models.decoder import build
from oribi.models.files import HubOptions
from oribi.models.identity import fingerprint
from oribi.models.open import OpenedModel, open_model
from oribi.models.packed_linear import planned_types
from oribi.models.quantization import require_codable
from oribi.run_arguments import adapter_ranks, token_ids
from oribi.run_record import (
    FORM_FOLDERS,
    RunRecord,
    checkpoints,
    own_checkpoints,
    read_run_record,
    require_writable,
)
from oribi.save.forms import require_form
from oribi.text import say
from oribi.train.arguments import require_trackers
from oribi.train.context import require_shareable
from oribi.train.fingerprint import compare_settings
from oribi.train.optimizer_settings import require_optimizer
from oribi.train.progress import read_log
from oribi.train.resume import newest_whole, require_same
from oribi.train.rewards import load_reward_functions
from oribi.train.samples import require_prompts
from oribi.train.schedules import require_schedule
from oribi.train.setup import require_fp8_gpu
from oribi.train.stages import require_trl

# where each form of the model goes within the run
FIRST_ROWS = 2  # of each source, read and rendered before the model is loaded


@dataclass
class Start:
    """How a run begins.

    Args:
        resumes: whether it continues from a checkpoint. weights_only: of which it takes the weights alone.
        finished: form -> where it lies, if there is nothing left to do.
    """

    resumes: bool = False
    weights_only: bool = False
    finished: dict[str, Path] = field(default_factory=dict)


def check_settings(config: RunConfig) -> None:
    """Refuse values that are wrong on every machine and for every model.

    Raises:
        ConfigError: a schedule or a GGUF method is unknown.
    """
    require_schedule(config.lr_scheduler_type, config.lr_scheduler_kwargs)
    for method in config.quantization_method:
        mix_of(method)


def check_before_loading(config: RunConfig, environment: Environment, overwrite: bool = False) -> Start:
    """Everything about a run that is known without the model's weights.

    Args:
        config: of the run. environment: of this machine.
        overwrite: whether a run that lies in output_dir may go.

    Returns:
        How the run begins.

    Raises:
        ConfigError: a setting is invalid, the folder is another run's or cannot be written to, or the run to be resumed
            is another than the config's.
        DataError: a source cannot be opened, or its first rows cannot be used.
        ModelError: there is no such model.
        ExportError: llama.cpp cannot hold the model, and GGUF files are asked for.
        ConfigError: no program reads the model's experts in a form that is asked for.
    """
    require_own_connection()
    check_settings(config)
    require_trackers(config.report_to)
    require_optimizer(config)
    require_trl(config.stage, environment)
    load_reward_functions(config.reward_funcs or ())
    if config.fp8:
        require_fp8_gpu(environment)
    if config.context_parallel > 1:
        require_groups(config.context_parallel, processes_here())
        require_shareable(open_run_model(config).config, config.context_parallel)
    if config.fsdp and config.sample_prompts and processes_here() > 1:
        raise ConfigError(
            "sample_prompts asks one process to answer while training, and fsdp leaves none with the whole model: leave out one of "
            "them. `oribi chat` answers after the training"
        )
    start = check_folder(config, environment, overwrite)
    if start.finished:
        return start
    require_writable(config.output_dir)
    refuse_what_cannot_fit(config, environment)
    if config.train_for is not None:
        opened = open_run_model(config)
        require_codable(opened, config.full_finetuning, config.stage == "reward")
        planned_types(build(opened.config), config.train_for)
    if config.quantization_method or config.train_for:
        # what llama.cpp would compute differently is told before the training, not after it
        opened = open_run_model(config)
        check_config(opened.config)
        shapes = expected_shapes(build(opened.config))
        for method in config.quantization_method:
            for note in note_on_rows(plan_file(opened.config, shapes, method), mix_of(method).name):
                say(f"oribi: {note}")
    for form in config.save_method:
        require_form(open_run_model(config).config, form)
    check_data(config)
    return start


def check_folder(config: RunConfig, environment: Environment, overwrite: bool) -> Start:
    """Whether the run may begin in its folder, and from what.

    Raises:
        ConfigError: it may not.
    """
    folder, resume = config.output_dir, str(config.resume).lower()
    weights_only = resume == "weights"
    if overwrite and resume != "false":
        raise ConfigError("--overwrite removes the run that --resume would continue with; give one of them")
    record, results = (
        read_run_record(folder),
        [name for name in FORM_FOLDERS.values() if (Path(folder) / name).is_dir()],
    )
    steps = steps_of(folder, record)
    if overwrite or not (steps or results):
        if resume != "false":
            say(f"oribi: {folder} holds no checkpoint, so the run starts from the beginning")
        return Start()
    whose = f"a run of {record.model} ({steps:,} steps)" if record else f"a run ({steps:,} steps)"
    if resume == "false":
        raise ConfigError(
            f"output_dir = {folder}: it holds {whose}. Go on with it (--resume), give another output_dir, or replace it "
            "(--overwrite)"
        )
    resumed = newest_whole(folder, weights_only)
    if resumed is not None:
        if resumed.record is not None:
            require_same(resumed, known_changes(config, environment, resumed.record))
        return Start(True, weights_only, _finished(config, record, resumed.step))
    if record is not None and record.state == "finished" or results:
        done = _finished(config, record, steps) if record else {}
        if done:
            return Start(finished=done)
        raise ConfigError(
            f"output_dir = {folder}: it holds {whose} without a checkpoint to continue from, since save_steps was not set. "
            f"Train its result further as a new run (--model {folder} --output_dir ANOTHER), or replace it (--overwrite)"
        )
    say(f"oribi: {folder} holds {whose} without a checkpoint, so it starts from the beginning")
    return Start()


def steps_of(folder: str, record: RunRecord | None) -> int:
    """How far a folder's run has got, by its record, its checkpoints and its log."""
    found = [one.step for one in own_checkpoints(folder) or checkpoints(folder)]
    found += [entry["step"] for entry in read_log(folder)]
    return max([record.step if record else 0, *found])


def _finished(config: RunConfig, record: RunRecord | None, step: int) -> dict[str, Path]:
    """The results of a run that has nothing left to do; nothing if it has, or only its data can tell."""
    if record is None or record.state != "finished":
        return {}
    if not _nothing_to_train(config, record, step):
        return {}
    step = record.step if _searched(config) else step
    folder = Path(config.output_dir)
    wanted = result_folders(config)
    if any(record.saved.get(name) != step or not (folder / name).is_dir() for name in wanted.values()):
        return {}
    say(
        f"oribi: nothing left to train: {folder} is finished at step {step:,}. Raise max_steps or num_train_epochs to continue"
    )
    return {form: folder / name for form, name in wanted.items()}


def _searched(config: RunConfig) -> bool:
    """Whether a run keeps its best weights or ends when none are better, so that its newest checkpoint need not be its end."""
    return config.load_best_model_at_end or config.early_stopping_patience is not None


def _nothing_to_train(config: RunConfig, record: RunRecord, step: int) -> bool:
    """Whether a run that is recorded as finished has no step left; `step` is its newest checkpoint's."""
    same = record.settings.get("num_train_epochs") == config.num_train_epochs
    if _searched(config):
        patience = record.settings.get("early_stopping_patience")
        ended_early = record.step < record.max_steps and patience == config.early_stopping_patience
        as_long = record.max_steps == config.max_steps if config.max_steps > 0 else same
        return as_long and (ended_early or record.step >= record.max_steps)
    kept = bool(own_checkpoints(config.output_dir))
    # more rows make a longer epoch, which only the data can tell, and only a checkpoint can be resumed from
    return 0 < config.max_steps <= step or (
        config.max_steps < 0 and same and record.max_steps <= step and not kept
    )


def result_folders(config: RunConfig) -> dict[str, str]:
    """Form of the model that a config asks for -> its folder within the run's."""
    forms = [*config.save_method, *(["gguf"] if config.quantization_method else [])]
    return {form: FORM_FOLDERS[form] for form in forms}


def known_changes(config: RunConfig, environment: Environment, record: RunRecord) -> list[str]:
    """What is known to differ from a run before the model is loaded, a line each."""
    now: dict[str, Any] = {
        "seed": config.seed, "optim": config.optim, "packing": config.packing, "max_seq_length": config.max_seq_length,
        "full_finetuning": config.full_finetuning, "stage": None if config.stage == "sft" else config.stage,
    }  # fmt: skip
    if not config.full_finetuning:
        now |= {
            **adapter_ranks(config), "use_dora": config.use_dora or None,
            "dtype": str(environment.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        }  # fmt: skip
    changes = compare_settings(record, now, only_known=True).refused
    folder = open_run_model(config).location.directory
    for name, entry in ((record.base or {}).get("files") or {}).items():
        path = folder / name
        if path.is_file() and fingerprint(path) != entry:
            changes.append(f"base model: {path} is another file than the run's {name}")
    return changes


def open_run_model(config: RunConfig) -> OpenedModel:
    """The model that a config names, without its weights."""
    hub = HubOptions(revision=config.revision, trust_remote_code=config.trust_remote_code)
    return open_model(config.model, hub)


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run's data is encoded with."""
    tokenizer = open_run_model(config).tokenizer()
    tokenizer.add_tokens([token for token in config.new_tokens if token not in tokenizer.get_vocab()])
    return get_chat_template(tokenizer, config.chat_template) if config.chat_template else tokenizer


def check_data(config: RunConfig) -> None:
    """Open every source, and read and render its first rows.

    Raises:
        ConfigError, DataError: the template, a source or a row cannot be used, or rows to evaluate on are trained on.
    """
    tokenizer = tokenizer_of(config)
    token_ids(config.trainable_tokens, tokenizer)
    settings = {**config.row_settings(), "max_rows": FIRST_ROWS}
    trained: list[Part] = []
    for spec in config.sources():
        trained += _first_rows(spec, tokenizer, settings)
    for spec in evaluation_sources(config):
        require_held_out(spec["path"], _first_rows(spec, tokenizer, settings), trained)
        if config.eval_split is None and spec["split"] != config.split:
            say(f"oribi: {spec['path']}: evaluation reads its split {spec['split']!r}")
    require_prompts(config, tokenizer)


def evaluation_sources(config: RunConfig) -> list[dict[str, Any]]:
    """The sources of eval_dataset, each with its split."""
    trained = [one["path"] for one in config.sources()]
    return [
        {"split": evaluation_split(one["path"], trained, config.split, config.eval_split), **one}
        for one in map(as_source, config.eval_dataset)
    ]


def _first_rows(spec: dict[str, Any], tokenizer: Any, settings: dict[str, Any]) -> list[Part]:
    """Open one source, and read and render its first rows."""
    first = make_preparation([spec], tokenizer, announce=None, **settings)
    next(first.encoded(), None)
    return first.parts
