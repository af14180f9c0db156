"""`oribi export RUN --to adapter,merged,gguf:q4_k_m,q8_0`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside
from oribi.errors import ConfigError, ExportError
from oribi.run_record import FORM_FOLDERS
from oribi.text import gibibytes, nearest

# name after --to -> form of the model
FORMS = {
    "adapter": "adapter", "lora": "adapter", "lora_per_expert": "lora_per_expert", "merged": "merged_16bit", "merged_16bit": "merged_16bit",
    "merged_4bit": "merged_4bit", "fp8": "fp8", "fp8_dynamic": "fp8", "w4a16": "w4a16", "gguf": "gguf", "gguf-adapter": "gguf-adapter",
}  # fmt: skip


def export(
    run: Annotated[str, typer.Argument(help="Run, adapter or model folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="Comma-separated forms: adapter, lora_per_expert, merged, merged_4bit, fp8, w4a16, gguf:METHOD, gguf-adapter."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to write to (default: the run's own).")] = None,
    base: Annotated[
        str, typer.Option(help="Weights to merge the adapter into: dequantized, original, auto, or a folder.")
    ] = "dequantized",
    verify: Annotated[bool, typer.Option(help="Compare each file with the trained model.")] = True,
    keep_different: Annotated[
        bool,
        typer.Option(help="Keep files that differ from the trained model; the exit code is still 1."),
    ] = False,
    json: Json = False,
) -> None:
    """Write a trained model as adapter, checkpoint or GGUF files.

    Each file is read back and compared with the trained model; one that differs is set aside, and the command fails.
    """
    with chatter_aside():
        from oribi.models.files import missing_folder
        from oribi.run import held_out_texts, load_run
        from oribi.save.export import AskedOnce

        forms = read_forms(to)
        folder = output or Path(run)
        if output is None and not folder.is_dir():
            raise ConfigError(f"{missing_folder(run)}; exports of a hub model or a file need --output FOLDER")
        loaded = load_run(run)
        rows = (
            held_out_texts(loaded.config, loaded.tokenizer) if loaded.config is not None and verify else None
        )
        held_out = None
        if rows is not None:
            held_out = [
                {"input_ids": row["input_ids"], "labels": row["labels"]}
                for row in rows.select(range(min(32, len(rows))))
            ]
        options = {
            "base": base,
            "held_out": AskedOnce(held_out),
            "verify": "report" if verify and keep_different else verify,
        }
        written, failures = [], []
        for form, methods in forms.items():
            try:
                written.append(_write(loaded, form, methods, folder, options))
            except ExportError as error:  # the other forms do not depend on it
                failures.append(f"{form}: {error}")
    out = Output(json)
    for record in written:
        for path, size in record["files"].items():
            out.text(
                f"{record['form'].removesuffix('_16bit'):<14}{path}  {gibibytes(size)}, {record['verdict']}"
            )
        out.record(**record)
    if failures:
        raise ExportError("\n".join(failures))
    if not all(record["passed"] for record in written):
        raise typer.Exit(1)


def read_forms(text: str) -> dict[str, list[str]]:
    """The forms that --to names, each with its GGUF methods; a method after a comma belongs to the gguf before it.

    Raises:
        ConfigError: a form or method is unknown.
    """
    from oribi.gguf.mixes import METHODS, mix_of

    found: dict[str, list[str]] = {}
    for item in filter(None, (part.strip().lower() for part in text.split(","))):
        name, _, method = item.partition(":")
        if name in FORMS and not method:
            form, method = FORMS[name], "f16" if name == "gguf-adapter" else "q8_0" if name == "gguf" else ""
        elif name in ("gguf", "gguf-adapter"):
            form = name
        elif not method and (found or name in METHODS):
            form, method = "gguf-adapter" if list(found)[-1:] == ["gguf-adapter"] else "gguf", name
        else:
            near = nearest(item, [*FORMS, *METHODS, *(f"gguf:{name}" for name in METHODS)])
            raise ConfigError(
                f"--to {item}: unknown form; did you mean {near}?"
                if near
                else f"--to {item}: unknown form; allowed are {', '.join(FORMS)}, and gguf:METHOD with a METHOD of "
                f"{', '.join(METHODS)}"
            )
        methods = found.setdefault(form, [])
        if form == "gguf":
            method = mix_of(method).name
        if method and method not in methods:
            methods.append(method)
    if not found:
        raise ConfigError(f"--to names nothing; give for instance adapter,merged,gguf:{next(iter(METHODS))}")
    return found


def _write(
    loaded: Any, form: str, methods: list[str], folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    from oribi.save import save_gguf, save_gguf_adapter, save_merged

    target = folder / FORM_FOLDERS.get(form, form)
    if form == "adapter":
        if not loaded.has_adapter:
            raise ConfigError("--to adapter: this model has no adapter; export it as merged or gguf")
        common = {name: options[name] for name in ("held_out", "verify")}
        report = save_merged(loaded.model, target, loaded.tokenizer, "lora", **common)
    elif form == "gguf":
        report = save_gguf(loaded.model, target, loaded.tokenizer, methods, **options)["report"]
    elif form == "gguf-adapter":
        common = {name: options[name] for name in ("held_out", "verify")}
        report = save_gguf_adapter(loaded.model, target, methods, tokenizer=loaded.tokenizer, **common)[
            "report"
        ]
    else:
        report = save_merged(loaded.model, target, loaded.tokenizer, form, **options)
    return {
        "form": form,
        "folder": str(target),
        "files": {str(target / name): size for name, size in report.files.items()},
        "checks": len(report.checks),
        "outcome": str(report.outcome),
        "verdict": report.verdict,
        "passed": report.passed,
        "findings": [check.to_json() for check in report.checks],
    }
