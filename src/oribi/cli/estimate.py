"""`oribi estimate CONFIG.yaml [--key value ...]`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside
from oribi.cli.settings import read_settings
from oribi.launch import count_of_gpus, require_groups
from oribi.text import clock, gibibytes, short_count

RIGHT = ("peak GiB", "usable GiB", "most rows", "longest row", "s/step", "tokens/s", "total time")
# per weight on a core of a server (Q4_K; Q8_0 takes a twentieth): benchmarks of `gguf.quantize.encode` on 4 million weights
QUANTISING_SECONDS = 64e-9
SHOWN = ("T4", "RTX 4090", "A100-40GB", "A100-80GB", "H100", "H200")


def estimate(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help="YAML file of settings.")] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="GPU to size for, e.g. H100; repeat it for several.")
    ] = None,
    data: Annotated[
        bool, typer.Option(help="Count the tokens of local data files, for the total time.")
    ] = True,
    json: Json = False,
) -> None:
    """Estimate a run's memory, time and disk use.

    Needs neither a GPU nor the model's weights.
    """
    with chatter_aside():
        from psutil import virtual_memory

        from oribi.memory.architecture import OutsideFamilyTable
        from oribi.memory.estimate import training_of
        from oribi.memory.gpus import gpu_named
        from oribi.train.context import require_shareable

        settings = read_settings(config, context.args)
        gpus = [gpu_named(name) for name in gpu or _default_gpus()]
        count = count_of_gpus(settings.gpus, _gpus_here())
        require_groups(settings.context_parallel, count)
        settings = settings.shared_by(count)
        training = outside = tokens = rows = None
        try:
            training = training_of(settings, virtual_memory().total, count)
            if settings.context_parallel > 1:
                require_shareable(training.architecture.config, settings.context_parallel)
        except OutsideFamilyTable as error:
            if error.sizes is None:
                raise
            outside = error
        if training is not None and data and settings.max_steps < 1:
            tokens, rows = _data_size(settings)
    output = Output(json)
    if outside is not None:
        _tell_weights(output, settings, outside, gpus)
        return
    rows_long = training.described_batch
    output.fields(
        {
            "model": settings.model,
            "parameters": f"{training.architecture.parameters:,} ({short_count(training.architecture.parameters)})",
            "trainable": f"{training.trainable:,} ({100 * training.trainable / training.architecture.parameters:.2f} %)",
            "micro-batch": f"{rows_long}, {settings.gradient_accumulation_steps} per optimizer step",
            "GPUs": None
            if count == 1
            else f"{count}, {'which share the frozen weights' if settings.fsdp else 'each with all weights'}",
            "quantising": None
            if settings.train_for is None
            else f"about {clock(training.architecture.packable_weights * QUANTISING_SECONDS)} on one CPU core, less on several or a GPU",
            "data": None if tokens is None else f"{rows:,} examples, {tokens:,} tokens",
        }
    )
    output.text()
    figures = {one.name: _figures(training, one, tokens, rows, count) for one in gpus}
    output.table([_line(one, figures[one.name]) for one in gpus], right=RIGHT)
    output.text(
        "most rows: the largest per_device_train_batch_size; longest row: in tokens, alone in its batch"
    )
    if not all(one["step"].measured for one in figures.values()):
        output.text("* times of this GPU are computed from its data sheet, not measured")
    output.text()
    _tell_parts(output, training, gpus[0])
    output.text()
    disk = _disk(training)
    output.text("disk")
    output.fields({name: gibibytes(size) for name, size in disk.items()}, indent=2)
    for one in gpus:
        output.record(**_record(training, one, figures[one.name]), disk=disk)


def _tell_weights(output: Output, settings: Any, outside: Any, gpus: list[Any]) -> None:
    """What is known of a model outside the family table: its weights, and what of them stays in 16 bits."""
    from oribi.memory.estimate import compute_dtype, usable

    width = compute_dtype(settings).itemsize
    load_in_4bit = settings.load_in_4bit and not settings.full_finetuning
    parts = outside.sizes.parts(width, load_in_4bit)
    needed = sum(parts.values())
    typer.echo(str(outside), err=True)
    if load_in_4bit:
        typer.echo(outside.sizes.note(width), err=True)
    parameters = outside.sizes.parameters
    output.fields({"model": settings.model, "parameters": f"{parameters:,} ({short_count(parameters)})"})
    output.text("weights")
    output.fields({name: gibibytes(size) for name, size in parts.items() if size}, indent=2)
    output.text()
    rows = [
        {
            "GPU": one.name,
            "weights fit": "yes" if needed <= usable(one.memory_bytes) else "no",
            "weights GiB": f"{needed / 2**30:.2f}",
            "usable GiB": f"{usable(one.memory_bytes) / 2**30:.1f}",
        }
        for one in gpus
    ]
    output.table(rows, right=("weights GiB", "usable GiB"))
    for one in gpus:
        fits = needed <= usable(one.memory_bytes)
        output.record(
            gpu=one.name, weights_fit=fits, parameters=parameters, weight_bytes=needed, parts=parts,
            usable_bytes=usable(one.memory_bytes),
        )  # fmt: skip


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _default_gpus() -> list[str]:
    """This machine's GPU, or the usual ones."""
    from oribi.environment import detect
    from oribi.memory.gpus import recognise

    here = detect()
    found = recognise(here.device_name, here.memory_bytes) if here.device.type == "cuda" else None
    if found is not None:
        return [found.name]
    typer.echo(
        "no GPU of the table here, so some common ones are shown; --gpu NAME sizes for yours", err=True
    )
    return list(SHOWN)


def _data_size(settings: Any) -> tuple[int | None, int | None]:
    """Tokens and examples of the training data, where all of it lies on this machine."""
    if not all(Path(source).exists() for source in settings.dataset):
        return None, None
    from oribi.preflight import tokenizer_of
    from oribi.run import read_data

    report = read_data(settings, tokenizer_of(settings))[0].report
    share = 1 - settings.eval_fraction
    return int(share * report.tokens), int(share * report.examples)


def _figures(training: Any, gpu: Any, tokens: int | None, rows: int | None, count: int) -> dict[str, Any]:
    from oribi.memory.estimate import estimate_run, usable
    from oribi.memory.fit import largest_batch, largest_context
    from oribi.memory.speed import optimizer_steps, step_time

    found = estimate_run(training, gpu)
    step = step_time(training, found, gpu)
    steps = optimizer_steps(training, tokens, rows)
    if steps and training.config.max_steps < 1:  # each step takes the rows of all GPUs
        steps = max(-(-steps // (count // training.config.context_parallel)), 1)
    return {
        "peak": found.peak,
        "usable": usable(gpu.memory_bytes),
        "fits": training.fits(found.tokens, found.longest, gpu.memory_bytes),
        "step": step,
        "steps": steps,
        "largest_batch": largest_batch(training, gpu.memory_bytes),
        "largest_context": largest_context(training, gpu.memory_bytes),
        "count": count,
        "estimate": found,
    }


def _line(gpu: Any, f: dict[str, Any]) -> dict[str, Any]:
    return {
        "GPU": gpu.name if f["step"].measured else f"{gpu.name} *",
        "fits": "yes" if f["fits"] else "no",
        "peak GiB": f"{f['peak'] / 2**30:.2f}",
        "usable GiB": f"{f['usable'] / 2**30:.1f}",
        "most rows": f"{f['largest_batch']:,}",
        "longest row": f"{f['largest_context']:,}",
        "s/step": f"{f['step'].seconds:.2f}" if f["fits"] else "-",
        "tokens/s": f"{f['count'] * f['step'].tokens_per_second:,.0f}" if f["fits"] else "-",
        "total time": _total(f["steps"] * f["step"].seconds) if f["fits"] and f["steps"] else "-",
    }


def _total(seconds: float) -> str:
    return "under 1 min" if seconds < 60 else clock(seconds)


def _tell_parts(output: Output, training: Any, gpu: Any) -> None:
    from oribi.memory.estimate import estimate_run
    from oribi.memory.plan import describe

    found = estimate_run(training, gpu)
    output.text(f"peak on {gpu.name}, {gibibytes(found.peak)} at {found.at}")
    output.fields({name: gibibytes(size) for name, size in found.parts.items() if size}, indent=2)
    if found.measured:
        output.text(f"  {describe(list(found.keeps))}")
    else:
        output.text("  PyTorch's autograd keeps what these settings need; such runs were not measured")


def _record(training: Any, gpu: Any, f: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "gpus": f["count"],
        "fits": f["fits"],
        "parameters": training.architecture.parameters,
        "trainable": training.trainable,
        "peak_bytes": f["peak"],
        "usable_bytes": f["usable"],
        "parts": f["estimate"].parts,
        "at": f["estimate"].at,
        "step_seconds": f["step"].seconds,
        "time_measured": f["step"].measured,
        "steps": f["steps"],
        "largest_batch": f["largest_batch"],
        "largest_context": f["largest_context"],
    }


def _disk(training: Any) -> dict[str, int]:
    """Bytes that a run reads and writes, by form."""
    from oribi.gguf.mixes import mix_of
    from oribi.gguf.writer import plan_file
    from oribi.models.checkpoint_tensors import expected_shapes

    a, config = training.architecture, training.config
    adapter = training.trainable * (a.decoder.dtype.itemsize if config.full_finetuning else 4)
    found = {"model's files": a.file_bytes}
    if not config.full_finetuning:
        found["adapter"] = adapter
    if config.save_steps:
        found["each checkpoint"] = int(adapter + training.fixed()["optimizer"])
    merged = {"merged_16bit": a.parameters * 2, "merged_4bit": a.weight_bytes(load_in_4bit=True)}
    dense = (a.parameters - a.packable_weights) * 2
    merged |= {
        "fp8": dense + a.packable_weights,
        "w4a16": dense + a.packable_weights * 33 // 64,
    }  # with scales of groups
    forms = ["merged_16bit"] if config.full_finetuning else config.save_method
    found |= {form: merged[form] for form in forms if form in merged}
    shapes = expected_shapes(a.decoder)
    files = {f"gguf {mix_of(method).name}": method for method in config.quantization_method}
    if config.train_for is not None and "gguf-adapter" in config.save_method:
        files["base as gguf"] = config.train_for
    for name, method in files.items():
        found[name] = sum(e.nbytes for e in plan_file(a.config, shapes, method))
    return found
