"""The seven steps for one config: environment, model, adapter, data, trainer, training, saving."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oribi.compat.language_model import FastLanguageModel
from oribi.config import RunConfig, read_config
from oribi.data import PreparedData, get_chat_template, prepare_dataset
from oribi.data.report import DataReport
from oribi.environment import Environment, detect
from oribi.errors import ConfigError, ExportError
from oribi.gguf.mixes import mix_of
from oribi.run_record import read_record, record_saved, remove_run
from oribi.save import save_gguf, save_merged
from oribi.text import write_whole
from oribi.train.arguments import SFTConfig
from oribi.train.checkpoints import checkpoint_trained, where_trained_is
from oribi.train.determinism import settle_cublas
from oribi.train.preflight import check_before_loading, evaluation_sources, result_folders
from oribi.train.progress import peak_memory_bytes, read_log
from oribi.train.report import Measured, measure, write_report
from oribi.train.run_lock import run_lock
from oribi.train.trainer import SFTTrainer


def run(config: RunConfig, overwrite: bool = False) -> dict[str, Path]:
    """Train what a config says; the config in force is saved in the run's folder.

    Args:
        config: as `read_config` returns it.
        overwrite: replace a run that lies in the folder already.

    Returns:
        Form of the model -> where it was saved; nothing in processes that are not the main one.
    """
    if config.deterministic:
        settle_cublas()
    alone = run_lock(config.output_dir) if os.environ.get("RANK", "0") == "0" else nullcontext()
    with alone:
        environment = detect()  # 1
        start = check_before_loading(config, environment, overwrite)
        if start.finished:
            return start.finished
        model, tokenizer = load(config, environment)  # 2, 3
        rows, held_out = read_data(config, tokenizer)  # 4
        arguments = training_arguments(config, evaluates=held_out is not None)  # 5
        trainer = SFTTrainer(
            model, arguments, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer
        )
        trainer.find_checkpoint(start.resumes, start.weights_only)
        is_main = trainer.is_world_process_zero()
        reports = config.report and is_main
        measured_rows = None if held_out is None else held_out.dataset
        measures = {"base": measure(model, tokenizer, measured_rows)} if reports else {}
        if is_main:
            begin(config, overwrite)
        trainer.train(resume_from_checkpoint=start.resumes, resume_weights_only=start.weights_only)  # 6
        kept = checkpoint_trained(trainer)
        saved, failures = save(config, trainer, tokenizer) if is_main else ({}, {})  # 7
        if is_main and kept is not None and not failures:
            shutil.rmtree(kept)
        if reports:
            measures["tuned"] = measure(model, tokenizer, measured_rows)
            refused = {form: Path(f"{path}.rejected") for form, (path, _) in failures.items()}
            saved["report"] = report(config, rows.report, measures, saved | refused)
        if failures:
            found = [str(error) for _, error in failures.values()]
            raise ExportError("\n".join([*found, where_trained_is(trainer)]))
        return saved


def load(config: RunConfig, environment: Environment) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer with its template."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        config.model,
        max_seq_length=config.max_seq_length,
        dtype=environment.dtype if config.dtype == "auto" else config.dtype,
        load_in_4bit=config.load_in_4bit and not config.full_finetuning,
        full_finetuning=config.full_finetuning,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    checkpointing = {"true": True, "false": False}.get(
        config.gradient_checkpointing, config.gradient_checkpointing
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.target_modules == ["all-linear"] else config.target_modules,
        modules_to_save=config.modules_to_save or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
    )
    if config.chat_template is not None:
        tokenizer = get_chat_template(tokenizer, config.chat_template)
    return model, tokenizer


def begin(config: RunConfig, overwrite: bool) -> None:
    """Take the folder: the run that is replaced goes, and the config in force is written down."""
    folder = Path(config.output_dir)
    path = folder / "config.yaml"
    written = path.read_text(encoding="utf-8") if path.is_file() else None
    if overwrite:
        remove_run(folder)
    try:
        kept = (
            written is not None and read_config(path)[0] == config
        )  # the user's own file, with its comments
    except (ConfigError, OSError):
        kept = False
    if not kept:
        write_whole(path, config.to_yaml())


def read_data(config: RunConfig, tokenizer: Any) -> tuple[PreparedData, PreparedData | None]:
    """Prepared training rows, and evaluation rows from their own files or split off."""

    def prepared(sources: list[dict[str, str]]) -> PreparedData:
        return prepare_dataset(
            sources,
            tokenizer,
            num_proc=config.dataset_num_proc,
            **config.row_settings(),
        )

    rows = prepared([{"path": source} for source in config.dataset])
    if config.eval_dataset:
        return rows, prepared(evaluation_sources(config))
    if not config.eval_fraction:
        return rows, None
    parts = rows.dataset.train_test_split(config.eval_fraction, seed=config.seed)
    return PreparedData(parts["train"], rows.report), PreparedData(parts["test"], rows.report)


def training_arguments(config: RunConfig, evaluates: bool) -> SFTConfig:
    """The trainer's part of a config, under the trainer's names."""
    same = (
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "learning_rate", "embedding_learning_rate", "lr_scheduler_type", "warmup_steps",
        "optim", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "seed", "fp8", "deterministic",
        "logging_steps", "save_total_limit", "report_to", "packing", "eval_steps",
    )  # fmt: skip
    evaluation = "no" if not evaluates else "steps" if config.eval_steps else "epoch"
    return SFTConfig(
        **{name: getattr(config, name) for name in same},
        max_length=config.max_seq_length,
        eval_packing=False,
        eval_strategy=evaluation,
        run_name=Path(config.output_dir).name,  # in trackers
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
    )


def report(
    config: RunConfig, data: DataReport, measures: dict[str, Measured], saved: dict[str, Path]
) -> Path:
    """Write the run's report; returns the page."""
    folder, here = Path(config.output_dir), detect()
    machine = {
        "device": here.device_name,
        "dtype": str(here.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        "attention": here.attention,
        "peak memory": f"{peak_memory_bytes() / 2**30:.2f} GiB",
    }
    write_report(
        folder, config=asdict(config), log=read_log(folder), data=data.to_dict(), machine=machine, measures=measures, exports=saved
    )  # fmt: skip
    return folder / "report.html"


def save(
    config: RunConfig, trainer: SFTTrainer, tokenizer: Any
) -> tuple[dict[str, Path], dict[str, tuple[Path, Exception]]]:
    """Save the model in every form that the config names; what lies there already from the same step stays.

    Returns:
        Form -> where it was saved; and of each form that could not be written or is not right, its folder and the error.
    """
    folder, saved, failures = Path(config.output_dir), {}, {}
    step, record = trainer.state.global_step, read_record(folder)
    there = record.saved if record else {}
    for form, name in result_folders(config).items():
        if there.get(name) == step and (folder / name).is_dir():
            saved[form] = folder / name
            continue
        try:
            if form == "gguf":
                written = save_gguf(trainer.model, folder / name, tokenizer, config.quantization_method)
                asked = dict.fromkeys(mix_of(method).name for method in config.quantization_method)
                saved |= {f"gguf {m}": Path(f) for m, f in zip(asked, written["gguf_files"])}
            else:
                save_merged(trainer.model, folder / name, tokenizer, form)
                saved[form] = folder / name
        except (ExportError, OSError) as error:  # the other forms do not depend on it
            failures[form] = (folder / name, error)
            continue
        record_saved(folder, name, step)
    return saved, failures
