"""The seven steps for one config: environment, model, adapter, data, trainer, training, saving; and a run's folder reopened."""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from oribi.chat.named_templates import get_chat_template
from oribi.config import RunConfig
from oribi.config_file import as_yaml, read_run_config
from oribi.data.preferences import prepare_preferences
from oribi.data.prepare import PreparedData, prepare_dataset
from oribi.data.report import DataReport
from oribi.environment import Environment, detect
from oribi.errors import ConfigError, ExportError
from oribi.gguf.mixes import mix_of
from oribi.launch import processes_here
from oribi.lora.attach import attach_lora, set_checkpointing
from oribi.lora.tokens import add_new_tokens
from oribi.memory.fit import loads_in_parts
from oribi.models.adapter_files import read_record
from oribi.models.files import missing_folder
from oribi.models.load import load_model
from oribi.models.unwrap import is_sharded
from oribi.preflight import (
    check_before_loading,
    evaluation_sources,
    open_run_model,
    result_folders,
    steps_of,
)
from oribi.run_arguments import adapter_arguments, training_arguments
from oribi.run_record import (
    CONFIG_FILE,
    FORM_FOLDERS,
    is_locked,
    own_checkpoints,
    read_run_record,
    record_saved,
    remove_run,
    run_lock,
    unfinished_words,
)
from oribi.save import save_gguf, save_merged
from oribi.save.export import AskedOnce
from oribi.save.four_bits import kept_by_auto
from oribi.save.gguf_adapter import save_gguf_adapter
from oribi.save.requantised import Requantiser
from oribi.save.whole import whole_model
from oribi.text import gibibytes, is_first_process, say_notes, write_whole
from oribi.train.checkpoints import checkpoint_trained, where_trained_is
from oribi.train.determinism import fix_order_of_cublas
from oribi.train.measures import Measured, measure, measure_stage
from oribi.train.progress import peak_memory_bytes, read_log
from oribi.train.report import write_report
from oribi.train.rewards import load_reward_functions
from oribi.train.run_trainer import RunTrainer
from oribi.train.samples import SampleAnswers, read_samples, sample_prompts
from oribi.train.several import load_together
from oribi.train.stage_measures import texts_of
from oribi.train.stages import RunData, make_stage_trainer
from oribi.train.trainer import SFTTrainer


def run(config: RunConfig, overwrite: bool = False) -> dict[str, Path]:
    """Train what a config says; the config in force is saved in the run's folder.

    Args:
        config: as `read_run_config` returns it.
        overwrite: replace a run that lies in the folder already.

    Returns:
        Form of the model -> where it was saved; nothing in processes that are not the main one.
    """
    asked, config = config, config.shared_by(processes_here())
    if config.total_batch_size is not None:
        say_notes(
            [
                f"total_batch_size = {config.total_batch_size}: gradient_accumulation_steps is {config.gradient_accumulation_steps}"
            ]
        )
    if config.deterministic:
        fix_order_of_cublas()
    alone = run_lock(config.output_dir) if is_first_process() else nullcontext()
    with alone:
        environment = detect()  # 1
        start = check_before_loading(config, environment, overwrite)
        if start.finished:
            return start.finished
        say_notes([f"loading {config.model}"])
        model, tokenizer = _load(config, environment, start.resumes)  # 2, 3
        data = RunData(*read_data(config, tokenizer), load_reward_functions(config.reward_funcs or ()))  # 4
        trainer = _trainer(config, model, tokenizer, data)  # 5
        trainer.find_checkpoint(start.resumes, start.weights_only)
        is_main = trainer.is_world_process_zero()
        in_parts = is_sharded(model)
        if config.report and in_parts:
            say_notes(["no report: it would measure the untrained model, which no process holds whole"])
        reports = config.report and is_main and not in_parts
        prompts = sample_prompts(config, tokenizer, data.held_out and data.held_out.dataset)
        if prompts:
            trainer.add_callback(
                SampleAnswers(trainer, tokenizer, prompts, config.sample_tokens, config.eval_steps)
            )
        look = partial(_measure, config, model, tokenizer, data)
        measures = {"base": look(trained=False)} if reports else {}
        if is_main:
            _begin(asked, overwrite)
        trainer.train(resume_from_checkpoint=start.resumes, resume_weights_only=start.weights_only)  # 6
        kept = checkpoint_trained(trainer)
        if is_main and is_sharded(trainer.model):
            trainer.model = model = whole_model(trainer.model)
            look = partial(_measure, config, model, tokenizer, data)
        saved, failures = _save(config, trainer, tokenizer) if is_main else ({}, {})  # 7
        if is_main and kept is not None and not failures:
            shutil.rmtree(kept)
        if reports:
            measures["tuned"] = look(trained=True)
            refused = {form: Path(f"{path}.rejected") for form, (path, _) in failures.items()}
            saved["report"] = _report(config, data.rows.report, measures, saved | refused)
        if failures:
            found = [str(error) for _, error in failures.values()]
            raise ExportError("\n".join([*found, where_trained_is(trainer)]))
        return saved


def _load(config: RunConfig, environment: Environment, resumes: bool) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer with its template."""
    dtype = environment.dtype if config.dtype == "auto" else config.dtype
    model, tokenizer = load_model(
        config.model,
        max_seq_length=config.max_seq_length,
        dtype=dtype,
        load_in_4bit=config.load_in_4bit and not config.full_finetuning,
        keep_in_16bit=_kept_in_16bit(config, environment, resumes),
        train_for=config.train_for,
        full_finetuning=config.full_finetuning,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        **({"num_labels": 1} if config.stage == "reward" else {}),
        together=load_together(environment.device, loads_in_parts(config, environment), config.ddp_timeout),
    )
    _announce(model)
    if config.new_tokens:
        add_new_tokens(model, tokenizer, config.new_tokens)
    if config.full_finetuning:
        set_checkpointing(model, config.gradient_checkpointing)
    else:
        told = len(model.oribi.notes)
        model = attach_lora(model, **adapter_arguments(config, model, tokenizer))
        say_notes(model.oribi.notes[told:])
    if config.chat_template is not None:
        tokenizer = get_chat_template(tokenizer, config.chat_template)
    return model, tokenizer


def _kept_in_16bit(config: RunConfig, environment: Environment, resumes: bool) -> Sequence[str]:
    """Names of linear layers that are not packed: those of the config, or measured; a run that is resumed keeps its own."""
    if config.keep_in_16bit != ["auto"]:
        return config.keep_in_16bit
    if processes_here() > 1:  # each would measure by itself, and near ties might differ
        raise ConfigError(
            "keep_in_16bit = auto is for one process; run `oribi inspect model NAME --four-bits`, and give the names that it keeps"
        )
    checkpoints = own_checkpoints(config.output_dir) if resumes else []
    record = read_record(checkpoints[-1].path) if checkpoints else None
    if record is not None:
        return record.kept_in_16bit
    names, notes = kept_by_auto(open_run_model(config), environment.device, environment.dtype)
    say_notes(notes)
    return names


def _announce(model: Any) -> None:
    """Say what a model runs on, and what its loader decided."""
    say_notes([detect().summary(model.dtype), *model.oribi.notes])


def _begin(config: RunConfig, overwrite: bool) -> None:
    """Take the folder: a run that is replaced is removed, and the config in force is written down."""
    path = Path(config.output_dir) / CONFIG_FILE
    written = path.read_text(encoding="utf-8") if path.is_file() else None
    if overwrite:
        remove_run(config.output_dir)
    try:  # the user's own file, with its comments, stays
        kept = written is not None and read_run_config(path)[0] == config
    except (ConfigError, OSError):
        kept = False
    if not kept:
        write_whole(path, as_yaml(config))


def read_data(config: RunConfig, tokenizer: Any) -> tuple[PreparedData, PreparedData | None]:
    """Prepared training rows, and evaluation rows from their own files or split off."""
    prepare = prepare_dataset if config.stage == "sft" else prepare_preferences

    def prepared(sources: list[dict[str, Any]]) -> PreparedData:
        # of several processes one prepares, and the first speaks
        first = is_first_process()
        return prepare(
            sources, tokenizer, num_proc=config.dataset_num_proc, progress=first, announce=print if first else None,
            **config.row_settings(),
        )  # fmt: skip

    rows = prepared(config.sources())
    if config.eval_dataset:
        return rows, prepared(evaluation_sources(config))
    if not config.eval_fraction:
        return rows, None
    parts = rows.dataset.train_test_split(config.eval_fraction, seed=config.seed)
    return PreparedData(parts["train"], rows.report), PreparedData(parts["test"], rows.report)


def _trainer(config: RunConfig, model: Any, tokenizer: Any, data: RunData) -> RunTrainer:
    """oribi's own trainer for supervised fine-tuning, one of TRL's for another stage."""
    if config.stage != "sft":
        return make_stage_trainer(config, model, tokenizer, data)
    arguments = training_arguments(config, evaluates=data.held_out is not None)
    return SFTTrainer(
        model, arguments, train_dataset=data.rows, eval_dataset=data.held_out, processing_class=tokenizer
    )


def _measure(config: RunConfig, model: Any, tokenizer: Any, data: RunData, trained: bool) -> Measured:
    """What the report says of the model, before or after training."""
    say_notes([f"measuring the {'trained' if trained else 'base'} model for the report"])
    rows, held_out = data.rows.dataset, None if data.held_out is None else data.held_out.dataset
    if config.stage == "sft":
        return measure(model, tokenizer, held_out)
    is_held_out = held_out is not None
    return measure_stage(
        config, model, tokenizer, held_out if is_held_out else rows, is_held_out, data.rewards, trained
    )


def _report(
    config: RunConfig, data: DataReport, measures: dict[str, Measured], saved: dict[str, Path]
) -> Path:
    """Write the run's report; returns the page."""
    folder, here = Path(config.output_dir), detect()
    machine = {
        "device": here.device_name,
        "dtype": str(here.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        "attention": here.attention,
        "peak memory": gibibytes(peak_memory_bytes()),
    }
    write_report(
        folder, config=asdict(config), log=read_log(folder), answers=read_samples(folder), data=data.to_dict(), machine=machine,
        measures=measures, exports=saved,
    )  # fmt: skip
    return folder / "report.html"


def _save(
    config: RunConfig, trainer: RunTrainer, tokenizer: Any
) -> tuple[dict[str, Path], dict[str, tuple[Path, Exception]]]:
    """Save the model in every form that the config names; forms already saved at the same step are kept.

    Returns:
        Form -> where it was saved; and of each form that could not be written or is not right, its folder and the error.
    """
    folder, saved, failures = Path(config.output_dir), {}, {}
    step, record = trainer.state.global_step, read_run_record(folder)
    there = record.saved if record else {}
    # asked once for all forms, except where each loads a whole model, which would stay in memory
    held_out = None if is_sharded(trainer.model) else AskedOnce(None)
    for form, name in result_folders(config).items():
        if there.get(name) == step and (folder / name).is_dir():
            saved[form] = folder / name
            continue
        try:
            if form == "gguf":
                methods = config.quantization_method
                written = save_gguf(trainer.model, folder / name, tokenizer, methods, held_out=held_out)
                asked = dict.fromkeys(mix_of(method).name for method in methods)
                saved |= {f"gguf {m}": Path(f) for m, f in zip(asked, written["gguf_files"])}
            elif form == "gguf-adapter":
                save_gguf_adapter(trainer.model, folder / name, tokenizer=tokenizer, held_out=held_out)
                saved[form] = folder / name
            else:
                save_merged(trainer.model, folder / name, tokenizer, form, held_out=held_out)
                saved[form] = folder / name
        except (ExportError, OSError) as error:  # the other forms do not depend on it
            failures[form] = (folder / name, error)
            continue
        record_saved(folder, name, step)
    return saved, failures


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
        what = f"it has no {CONFIG_FILE}" if Path(folder).is_dir() else missing_folder(str(folder))
        raise ConfigError(f"{folder} is no run: {what}; give the output_dir of a finished `oribi train`")
    config, _ = read_run_config(Path(folder) / CONFIG_FILE)
    return replace(config, output_dir=str(folder))


def load_run(name: str | Path, *, dtype: str | None = None) -> LoadedRun:
    """The model of a run, loaded as it was trained; or any model by its name.

    Args:
        name: a run's folder, or what `FastLanguageModel.from_pretrained` takes.
        dtype: compute dtype; None takes the run's, or the machine's.

    Raises:
        ModelError: there is nothing to load.
    """
    if not is_run(name):
        model, tokenizer = load_model(str(name), max_seq_length=None, dtype=dtype)
        _announce(model)
        return LoadedRun(model, tokenizer, None)
    config = read_run(name)
    model, tokenizer = load_model(
        str(name),
        max_seq_length=config.max_seq_length,
        dtype=dtype or (None if config.dtype == "auto" else config.dtype),
        load_in_4bit=config.load_in_4bit and not config.full_finetuning,
        # an adapter's own record says it too; a run of merged weights has none
        keep_in_16bit=None if config.keep_in_16bit in ([], ["auto"]) else config.keep_in_16bit,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision if config.full_finetuning else None,
    )
    if model.oribi.merges_codes:
        Requantiser(model).quantise()
    _announce(model)
    return LoadedRun(model, tokenizer, config)


def held_out_rows(config: RunConfig, tokenizer: Any) -> Any:
    """The evaluation rows of a run, prepared again (from the cache where nothing changed); None if it has none."""
    if not (config.eval_dataset or config.eval_fraction):
        return None
    held_out = read_data(config, tokenizer)[1]
    return None if held_out is None else held_out.dataset


def held_out_texts(config: RunConfig, tokenizer: Any) -> Any:
    """The evaluation rows of a run as input_ids and labels; None if it has none, or none with answers."""
    rows = held_out_rows(config, tokenizer)
    return rows if rows is None or config.stage == "sft" else texts_of(config.stage, rows)


@dataclass(frozen=True)
class RunState:
    """How far a run has got. `words` says it, `steps` are done, `finished` whether none is left."""

    words: str
    steps: int
    finished: bool


def state_of(folder: str | Path) -> RunState:
    """Whether a run is finished, was stopped, was killed, or trains now."""
    record, kept = read_run_record(folder), own_checkpoints(folder)
    steps = steps_of(str(folder), record)
    if record is None:  # of an earlier version: the summary of a training that ended, whole or stopped
        ended = any("train_loss" in entry for entry in read_log(folder))
        whole = ended and any((Path(folder) / name).is_dir() for name in FORM_FOLDERS.values())
        return RunState("yes" if whole else "no", steps, whole)
    if record.state == "finished":
        return RunState("yes", steps, True)
    newest = kept[-1].path.name if kept else None
    return RunState(f"no: it {unfinished_words(record, steps, is_locked(folder), newest)}", steps, False)
