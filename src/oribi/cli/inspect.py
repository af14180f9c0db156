"""`oribi inspect data|model|adapter|run`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside
from oribi.cli.settings import read_settings
from oribi.text import gibibytes, short_count

app = typer.Typer(
    no_args_is_help=True, help="Inspect data as the model sees it, a model, an adapter or a run."
)


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="Config of a run (.yaml), or a data file or hub data set.")],
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer is used (default: the config's).")
    ] = None,
    max_seq_length: Annotated[
        int, typer.Option(min=2, help="Longest example in tokens, if no config is given.")
    ] = 2048,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 3,
    split: Annotated[str, typer.Option(help="Split of a hub data set, if no config is given.")] = "train",
    stage: Annotated[
        str | None,
        typer.Option(
            help="sft, dpo, orpo, kto, reward or grpo (default: the config's, or as the rows are made)."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Column by oribi's name, such as question=task; repeatable.")
    ] = None,
    role_aliases: Annotated[
        list[str] | None,
        typer.Option("--role-aliases", "--role_aliases", help="Role, such as coach=assistant; repeatable."),
    ] = None,
    malformed: Annotated[
        str | None, typer.Option(help="Rows that cannot be read: stop (error) or leave out (drop).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the rows as an HTML page.")] = None,
    json: Json = False,
) -> None:
    """Show token by token what is trained, context or cut off.

    Rows of preferences show the prompt and each answer. Counts, lengths and warnings of all rows follow.
    """
    with chatter_aside():
        from rich.console import Console

        from oribi.config import as_source
        from oribi.config_file import setting_of
        from oribi.data.view import inspect_data
        from oribi.errors import ConfigError
        from oribi.models.open import open_model
        from oribi.preflight import tokenizer_of

        settings: dict[str, Any] = {"max_seq_length": max_seq_length, "split": split}
        sources, config = [source], None
        if Path(source).suffix in (".yaml", ".yml"):
            config = read_settings(source, [])
            if model is not None:
                config = replace(config, model=model, revision=None, trust_remote_code=False)
            sources, settings = config.sources(), config.row_settings()
        given = {"columns": columns, "role_aliases": role_aliases, "malformed": malformed}
        settings |= {key: setting_of(key, value) for key, value in given.items() if value}
        if model is None and config is None:
            raise ConfigError(
                f"inspect data {source}: name the tokenizer with --model, or give a run's config.yaml"
            )
        tokenizer = open_model(model).tokenizer() if config is None else tokenizer_of(config)
        parts = [as_source(path) for path in sources]
        if stage is not None:
            settings["stage"] = stage
        elif config is None:
            settings["stage"] = recognised(parts, settings)
    report = inspect_data(
        parts, tokenizer, rows=rows, html_file=html,
        console=Console(stderr=json), **settings,
    )  # fmt: skip
    Output(json).record(**report.to_dict())


def recognised(parts: list[dict[str, str]], settings: dict[str, Any]) -> str:
    """The stage that the rows are made for, which is said where it is not sft."""
    from oribi.data.preferences import stage_of_source

    names = {key: settings[key] for key in ("split", "columns", "role_aliases") if key in settings}
    stage = stage_of_source(parts, **names)
    if stage != "sft":
        others = {"dpo": "; --stage orpo, kto or reward shows them for those"}.get(stage, "")
        typer.echo(f"the rows are made for stage {stage}{others}", err=True)
    return stage


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="Model folder, GGUF file, adapter, run or hub name.")],
    four_bits: Annotated[
        bool,
        typer.Option(
            "--four-bits",
            "--four_bits",
            help="Measure what NF4 costs: run the 16-bit weights, one layer in memory at a time, and compare.",
        ),
    ] = False,
    texts: Annotated[
        str | None,
        typer.Option(help="Data file to measure on with --four-bits (default: oribi's own texts)."),
    ] = None,
    json: Json = False,
) -> None:
    """Show a model's sizes, family and tokens; or what 4 bits cost it.

    The weights are not loaded, except for --four-bits.
    """
    if texts is not None and not four_bits:
        raise typer.BadParameter("it goes with --four-bits", param_hint="--texts")
    if four_bits:
        _show_four_bits(name, texts, json)
        return
    with chatter_aside():
        from oribi.families import row_of
        from oribi.families.sizes import mlp_size
        from oribi.memory.architecture import architecture_of
        from oribi.models.mixers.attention import Attention
        from oribi.models.open import open_model

        found = architecture_of(name)
        tokenizer = open_model(name).tokenizer()
    config, mixers = found.config, [layer.mixer for layer in found.decoder.model.layers]
    facts = {
        "model": name,
        "stored as": found.location.kind + f", {found.stored_in_words}" * bool(found.stored),
        "family": f"{config.model_type} ({row_of(config).architecture})",
        "parameters": f"{found.parameters:,} ({short_count(found.parameters)})",
        "layers": config.num_hidden_layers,
        "hidden size": f"{config.hidden_size}, MLP {mlp_size(config)}",
        "heads": f"{config.num_attention_heads}, for keys and values "
        + ", or ".join(
            dict.fromkeys(
                f"{mixer.sizes[1] // mixer.head_dim}; {mixer.head_dim} wide"
                for mixer in mixers
                if isinstance(mixer, Attention)
            )
        ),
        "vocabulary": f"{config.vocab_size:,}" + (", head tied to the embedding" if found.tied else ""),
        "longest context": f"{config.max_position_embeddings:,} tokens",
        "in NF4": gibibytes(found.weight_bytes(load_in_4bit=True)),
        "in 16 bit": gibibytes(found.weight_bytes(load_in_4bit=False)),
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        "end token": f"{tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}",
        "chat template": "yes"
        if tokenizer.chat_template
        else "none: give chat_template to train on conversations",
    }
    output = Output(json)
    output.fields(facts)
    output.record(
        model=name, parameters=found.parameters, bytes_nf4=found.weight_bytes(True),
        bytes_16bit=found.weight_bytes(False), has_chat_template=bool(tokenizer.chat_template),
        config=config.to_dict(),
    )  # fmt: skip


def _show_four_bits(name: str, texts: str | None, json: bool) -> None:
    with chatter_aside():
        from oribi.data.prepare import prepare_dataset
        from oribi.environment import detect
        from oribi.models.open import open_model
        from oribi.save.four_bits import four_bit_loss

        opened, here = open_model(name), detect()
        tokenizer, rows = opened.tokenizer(), None
        if texts is not None:
            rows = list(
                prepare_dataset([{"path": texts}], tokenizer, max_seq_length=512, max_rows=32).dataset
            )
        found = four_bit_loss(
            opened, tokenizer, rows, device=here.device, dtype=here.dtype,
            say=lambda line: typer.echo(f"measuring: {line}", err=True),
        )  # fmt: skip
    output = Output(json)
    output.text(found.note())
    output.text()
    output.table(
        [
            {
                "kept in 16 bits": kind.name,
                "KL": f"{kind.kl:.4f}",
                "less": "-" if not found.kl else f"{max(1 - kind.kl / found.kl, 0):.0%}",
                "more memory": gibibytes(kind.extra_bytes),
            }
            for kind in found.kinds
        ],
        right=("KL", "less", "more memory"),
    )
    output.text()
    worst = sorted(range(len(found.layers)), key=found.layers.__getitem__, reverse=True)[:4]
    moved = ", ".join(f"layers.{index} {found.layers[index]:.1%}" for index in worst)
    output.text(f"layers whose output NF4 moves most, on the same input: {moved}")
    output.text(found.note_on_kept())
    output.record(**asdict(found))


@app.command()
def adapter(
    name: Annotated[str, typer.Argument(help="Adapter folder, run or hub name.")], json: Json = False
) -> None:
    """Show an adapter's settings and how much it changes each layer."""
    with chatter_aside():
        from oribi.lora.contents import read_adapter

        found = read_adapter(name)
    output = Output(json)
    output.fields(found.facts())
    output.text()
    output.table(
        [
            {"layers": kind, "count": row.count, "parameters": f"{row.parameters:,}", "mean |scale B A|": f"{row.norm:.4f}"}
            for kind, row in found.kinds.items()
        ],
        right=("count", "parameters", "mean |scale B A|"),
    )  # fmt: skip
    for problem in found.problems:
        output.text(f"note: {problem}")
    output.record(
        **found.facts(), problems=found.problems, kinds={kind: vars(row) for kind, row in found.kinds.items()}
    )


@app.command("run")
def inspect_run(folder: Annotated[Path, typer.Argument(help="Folder of a run.")], json: Json = False) -> None:
    """Show how a run went and what it left."""
    from oribi.run import read_run, state_of
    from oribi.run_record import EARLIER
    from oribi.train.progress import read_log

    config, log, state = read_run(folder), read_log(folder), state_of(folder)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry)
    exports = sorted(
        path.relative_to(folder).as_posix()
        for pattern in ("adapter_model.safetensors", "model*.safetensors", "*.gguf")
        for path in folder.rglob(pattern)
        if EARLIER not in path.parts
    )
    facts = {
        "run": str(folder),
        "model": config.model,
        "dataset": ", ".join(one["path"] for one in config.sources()),
        "steps": state.steps,
        "loss": f"{losses[0]:.4f} first, {losses[-1]:.4f} last, {min(losses):.4f} lowest" if losses else None,
        "eval loss": ", ".join(f"{loss:.4f}" for loss in evaluations),
        "tokens/s": f"{speeds[len(speeds) // 2]:,.0f} median" if speeds else None,
        "finished": state.words,
        "files": "\n".join(exports) or "none",
    }
    output = Output(json)
    output.fields(facts)
    output.record(
        run=str(folder), model=config.model, dataset=config.dataset, steps=facts["steps"], losses=losses,
        eval_losses=evaluations, finished=state.finished, files=exports,
    )  # fmt: skip
