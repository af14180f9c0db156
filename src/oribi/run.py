"""The seven steps for one config: environment, model, adapter, data, trainer, training, saving."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from oribi.config import RunConfig
from oribi.data import PreparedData, get_chat_template, prepare_dataset
from oribi.data.report import DataReport
from oribi.environment import detect
from oribi.language_model import FastLanguageModel
from oribi.save import save_gguf, save_merged
from oribi.save.gguf.mixes import mix_of
from oribi.train.arguments import SFTConfig
from oribi.train.determinism import settle_cublas
from oribi.train.fp8 import require_fp8_gpu
from oribi.train.memory import refuse_what_cannot_fit
from oribi.train.progress import peak_memory_bytes
from oribi.train.report import Measured, measure, write_report
from oribi.train.trackers import require_trackers
from oribi.train.trainer import SFTTrainer

# where each form of the model goes within the run
FOLDERS = {"lora": "adapter", "merged_16bit": "merged", "merged_4bit": "merged_4bit"}


def run(config: RunConfig) -> dict[str, Path]:
    """Train what a config says; the resolved config is saved in the run's folder.

    Args:
        config: as `read_config` returns it.

    Returns:
        Form of the model -> where it was saved; nothing in processes that are not the main one.
    """
    folder = Path(config.output_dir)
    if config.deterministic:
        settle_cublas()
    require_trackers(config.report_to)
    for method in config.quantization_method:
        mix_of(method)  # an unknown one is told before training, not after
    environment = detect()  # 1
    if config.fp8:
        require_fp8_gpu(environment)
    refuse_what_cannot_fit(config, environment)
    model, tokenizer = FastLanguageModel.from_pretrained(  # 2
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
    model = FastLanguageModel.get_peft_model(  # 3
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
    rows, held_out = read_data(config, tokenizer)  # 4
    arguments = training_arguments(config, evaluates=held_out is not None)  # 5
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer
    )
    folder.mkdir(parents=True, exist_ok=True)
    is_main = trainer.is_world_process_zero()
    if is_main:
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    reports = config.report and is_main
    measured_rows = None if held_out is None else held_out.dataset
    measures = {"base": measure(model, tokenizer, measured_rows)} if reports else {}
    checkpoint = get_last_checkpoint(config.output_dir) if config.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)  # 6
    saved = save(config, model, tokenizer) if is_main else {}  # 7
    if reports:
        measures["tuned"] = measure(model, tokenizer, measured_rows)
        saved["report"] = report(config, rows.report, measures, saved)
    return saved


def read_data(config: RunConfig, tokenizer: Any) -> tuple[PreparedData, PreparedData | None]:
    """Prepared training rows, and evaluation rows from their own files or split off."""

    def prepared(sources: list[str]) -> PreparedData:
        return prepare_dataset(
            [{"path": source} for source in sources],
            tokenizer,
            max_seq_length=config.max_seq_length,
            split=config.split,
            train_on="responses" if config.train_on_responses_only else "everything",
            overlong=config.overlong,
            turns=config.turns,
            text_field=config.dataset_text_field,
            num_proc=config.dataset_num_proc,
        )

    rows = prepared(config.dataset)
    if config.eval_dataset:
        return rows, prepared(config.eval_dataset)
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
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    write_report(
        folder, config=asdict(config), log=log, data=data.to_dict(), machine=machine, measures=measures, exports=saved
    )  # fmt: skip
    return folder / "report.html"


def save(config: RunConfig, model: Any, tokenizer: Any) -> dict[str, Path]:
    """Save the model in every form that the config names."""
    folder, saved = Path(config.output_dir), {}
    methods = (
        ["merged_16bit"] if config.full_finetuning and config.save_method == ["lora"] else config.save_method
    )
    for method in methods:
        saved[method] = folder / FOLDERS[method]
        save_merged(model, saved[method], tokenizer, method)
    if config.quantization_method:
        written = save_gguf(model, folder / "gguf", tokenizer, config.quantization_method)
        saved |= {f"gguf {m}": Path(f) for m, f in zip(config.quantization_method, written["gguf_files"])}
    return saved
