"""`oribi init MODEL DATASET`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside

# settings that people change first, written although they have their defaults
SHOWN = (
    "model", "max_seq_length", "load_in_4bit", "lora_r", "lora_alpha", "target_modules", "dataset",
    "train_on_responses_only", "eval_fraction", "output_dir", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "save_method",
    "quantization_method",
)  # fmt: skip
EFFECTIVE_BATCH = 8
READ_SUFFIXES = (".gz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


def init(
    model: Annotated[str, typer.Argument(help="Hub name, local folder or GGUF file.")],
    dataset: Annotated[list[str], typer.Argument(help="Data files or hub data sets.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The config file.")] = Path("config.yaml"),
    gpu: Annotated[
        str | None, typer.Option(help='GPU to size for, e.g. "RTX 4090" (default: this machine\'s).')
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of that kind to train on.")] = 1,
    max_seq_length: Annotated[int, typer.Option(min=16, help="Longest example in tokens.")] = 2048,
    schema: Annotated[
        Path | None,
        typer.Option(help="Also write the JSON schema to this file, and name it in the config for editors."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: Json = False,
) -> None:
    """Write a commented config for a model, a data set and a GPU."""
    with chatter_aside():
        from json import dumps

        from oribi.config import json_schema
        from oribi.config_file import commented_yaml, require_free, write_config
        from oribi.data.readers import READERS
        from oribi.data.text_files import suffix_of
        from oribi.errors import ConfigError
        from oribi.memory.architecture import architecture_of
        from oribi.models.open import open_model

        for source in dataset:
            if suffix_of(Path(source)) in READERS and not Path(source).exists():
                raise ConfigError(f"{source}: no such file.")
        require_free(output, force)
        architecture = architecture_of(model)
        tokenizer = open_model(model).tokenizer()
        notes: list[str] = []
        stage = _stage_of(dataset, notes)
        max_seq_length = min(max_seq_length, architecture.config.max_position_embeddings)
        values: dict[str, Any] = {
            "model": model,
            "dataset": list(dataset),
            "max_seq_length": max_seq_length,
            "eval_fraction": 0.05,
            "output_dir": f"runs/{_short_name(model)}-{_data_name(dataset)}",
        }
        if stage != "sft":
            values["stage"] = stage
        if stage == "grpo":
            del values["eval_fraction"]  # an evaluation would write several answers to each held-out prompt
            values["reward_funcs"] = ["rewards.py:score"]
            notes.append(
                "write score(completions, **columns) in rewards.py beside this file: one number per answer"
            )
        if not tokenizer.chat_template:
            values["chat_template"] = "chatml"
            notes.append("the model has no chat template of its own, so it is trained with chatml")
        values |= _sizes(architecture, values, gpu, gpus, notes)
    # either of them says what a step takes
    shown = [key for key in SHOWN if key != "gradient_accumulation_steps" or "total_batch_size" not in values]
    text = commented_yaml(values, f"oribi train {output}", notes=notes, shown=shown)
    if schema is not None:
        write_config(schema, dumps(json_schema(), indent=1) + "\n", force=True)
        text = f"# yaml-language-server: $schema={schema}\n{text}"
    write_config(output, text, force)
    out = Output(json)
    for note in notes:
        typer.echo(note, err=True)
    out.text(f"written: {output}")
    out.text(f"next: oribi inspect data {output}; oribi estimate {output}; oribi train {output}")
    out.record(output=output, values=values, notes=notes)


def _stage_of(sources: list[str], notes: list[str]) -> str:
    """The stage that the rows are made for, where they lie on this machine; sft where that cannot be told."""
    from oribi.data.preferences import stage_of_source
    from oribi.data.text_files import UnreadableText
    from oribi.errors import DataError

    local = [source for source in sources if Path(source).exists()]
    if not local:
        return "sft"
    try:
        stage = stage_of_source([{"path": source} for source in local])
    except UnreadableText:
        raise
    except DataError as error:
        notes.append(f"the rows are not recognised yet: {error}")
        return "sft"
    if stage != "sft":
        others = {"dpo": "; orpo, kto and reward take them too"}.get(stage, "")
        notes.append(f"the rows are made for stage {stage}{others}")
    return stage


def _short_name(model: str) -> str:
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    return name.lower() or "run"


# names that say nothing about a data set; its folder's name is used instead
_NAMELESS = {"train", "training", "data", "dataset", "default"}


def _data_name(sources: list[str]) -> str:
    """The first source's name as a folder: data/FAQ 2.csv -> faq-2, so that runs on other data get other folders."""
    source = Path(sources[0].rstrip("/"))
    name = source.name
    while Path(name).suffix in READ_SUFFIXES:
        name = Path(name).stem
    if name.lower() in _NAMELESS and source.parent.name:
        name = source.parent.name
    name = re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "data"
    return name if len(sources) == 1 else f"{name}-and-{len(sources) - 1}-more"


def _sizes(
    architecture: Any, values: dict[str, Any], gpu: str | None, gpus: int, notes: list[str]
) -> dict[str, Any]:
    """The batch size that fits the GPU, and how many micro-batches make the usual effective batch; whether GPUs share weights."""
    from oribi.config import SETTINGS, RunConfig
    from oribi.environment import detect
    from oribi.errors import ConfigError
    from oribi.memory.estimate import Training
    from oribi.memory.fit import FEWER_PAIRS, largest_batch, largest_context, ways_to_share
    from oribi.memory.gpus import gpu_named, recognise

    here = detect()
    known = gpu_named(gpu) if gpu else None
    if known is None and here.device.type == "cuda":
        known = recognise(here.device_name, here.memory_bytes)
    stage = values.get("stage", "sft")
    memory = known.memory_bytes if known else here.memory_bytes if here.device.type == "cuda" else None
    if memory is None:
        notes.append("no GPU here, so the batch size is a usual one; --gpu NAME fits it to a GPU")
        rows = SETTINGS["per_device_train_batch_size"].default_of(stage)
        return _batch(rows, gpus, gpus)
    defaults = {name: setting.default_of(stage) for name, setting in SETTINGS.items()}
    config = RunConfig(
        **{**defaults, "model": values["model"], "max_seq_length": values["max_seq_length"], "stage": stage}
    )
    training = Training(architecture, config, processes=gpus)
    name = known.name if known else here.device_name
    name = name if gpus == 1 else f"{gpus} x {name}"
    shared = ways_to_share(training, gpus, memory)
    if shared:
        training = replace(training, config=replace(config, **shared), shards=gpus if "fsdp" in shared else 1)
        notes += [_SHARED[key] for key in shared]
    adapter: dict[str, Any] = {}
    for setting, value in FEWER_PAIRS.items() if training.adapted_stacks else ():
        if not largest_batch(training, memory):
            adapter[setting] = value
            training = replace(training, config=replace(training.config, **adapter))
            notes.append(f"{setting} leaves the experts fewer pairs, so that the run fits {name}")
    groups = gpus // training.config.context_parallel
    rows = largest_batch(training, memory)
    if rows == 0:
        context = largest_context(training, memory)
        if not context:
            raise ConfigError(
                f"{values['model']} does not fit on {name} at any length; take a smaller model"
                + (" or more GPUs (--gpus)" if stage == "sft" else "")
            )
        notes.append(f"{values['max_seq_length']} tokens do not fit on {name}; max_seq_length is {context}")
        return {"max_seq_length": context, **_batch(1, gpus, groups), **shared, **adapter}
    # two rows of 2,048 tokens keep a GPU busy, and a larger effective batch would change what is learned
    least = 2 if stage == "kto" else 1  # kto compares the rows of a batch
    most = max(min(rows, 4096 // values["max_seq_length"], EFFECTIVE_BATCH // groups), least)
    rows = max(n for n in range(1, most + 1) if EFFECTIVE_BATCH % n == 0)
    notes.append(f"sizes fit {name}")
    return {**_batch(rows, gpus, groups), **shared, **adapter}


_SHARED = {
    "fsdp": "the frozen weights are shared by the GPUs, since one cannot hold them (fsdp)",
    "context_parallel": "GPUs share each row, which is too long for one of them (context_parallel)",
}


def _batch(rows: int, gpus: int, groups: int) -> dict[str, Any]:
    """Rows of a micro-batch, and how many of these make the usual effective batch on GPUs that read so many batches at a time."""
    found: dict[str, Any] = {"per_device_train_batch_size": rows}
    steps = max(EFFECTIVE_BATCH // (rows * groups), 1)
    if gpus == 1:
        return {**found, "gradient_accumulation_steps": steps}
    return {**found, "total_batch_size": steps * rows * groups, "gpus": str(gpus)}
