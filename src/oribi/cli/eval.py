"""`oribi eval RUN`."""

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from oribi.cli.output import Json, Output, chatter_aside


def eval(  # noqa: A001 (the verb's name)
    run: Annotated[str, typer.Argument(help="Run, or any model with --dataset.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Files or hub data sets to use instead of the run's held-out rows."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    rows: Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Answers to generate and print.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    json: Json = False,
) -> None:
    """Compare the base and the trained model on held-out rows."""
    with chatter_aside():
        from oribi.errors import ConfigError
        from oribi.run import load_run
        from oribi.train.evaluate import answer_rows, held_out_loss, stop_rate, without_adapter

        loaded = load_run(run)
        held_out = _rows(loaded, dataset, split)
        if held_out is None:
            raise ConfigError(
                f"{run} has no held-out rows (it was trained without eval_dataset and eval_fraction); name some with "
                "--dataset FILE"
            )
        stage = loaded.config.stage if loaded.config else "sft"
        if stage != "sft":
            found = _measure_stage(loaded, held_out, rows, samples, max_new_tokens)
        measured: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        for name in () if stage != "sft" else ("base", "tuned") if loaded.has_adapter else ("tuned",):
            with without_adapter(loaded.model) if name == "base" else nullcontext():
                measured[name] = held_out_loss(loaded.model, held_out, rows)
                answers[name] = answer_rows(loaded.model, loaded.tokenizer, held_out, samples, max_new_tokens)
    output = Output(json)
    if stage != "sft":
        _show_stage(output, stage, samples, *found)
        return
    output.table(
        [
            {
                "model": name,
                "loss": f"{figures.loss:.4f}",
                "perplexity": f"{figures.perplexity:.3f}",
                "stops": "-" if (rate := stop_rate(answers[name])) is None else f"{rate:.0%}",
                "rows": figures.rows,
                "trained tokens": figures.tokens,
            }
            for name, figures in measured.items()
        ],
        right=("loss", "perplexity", "stops", "rows", "trained tokens"),
    )
    for name, figures in measured.items():
        output.record(model=name, **figures.to_json(), stop_rate=stop_rate(answers[name]))
    for i, sample in enumerate(answers["tuned"]):
        said = {
            "prompt": sample.prompt,
            "expected": sample.expected,
            "base": answers["base"][i].said if "base" in answers else None,
            "tuned": sample.said,
        }
        output.text()
        output.fields(said)
        output.record(sample=i, **said)


def _measure_stage(
    loaded: Any, held_out: Any, rows: int | None, samples: int, max_new_tokens: int
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """What a run of another stage is about: which answers it prefers, its own answers, and what these earn."""
    from oribi.train.evaluate import without_adapter
    from oribi.train.rewards import load_reward_functions
    from oribi.train.stage_measures import preferences_of, stage_samples

    config, model, figures = loaded.config, loaded.model, {}
    if config.stage != "grpo":
        figures = preferences_of(config.stage, model, held_out, beta=config.beta, limit=rows)
    if config.stage == "reward":  # it writes no answers
        return figures, {}, {}
    rewards = load_reward_functions(config.reward_funcs or ())
    count = min(rows or len(held_out), len(held_out)) if rewards else samples
    said: dict[str, Any] = {}
    for name in ("base", "tuned") if loaded.has_adapter else ("tuned",):
        with without_adapter(model) if name == "base" else nullcontext():
            said[name] = stage_samples(
                config.stage, model, loaded.tokenizer, held_out, rewards, count, max_new_tokens
            )
    means: dict[str, Any] = {}
    for name, found in said.items() if rewards else ():
        given = {one.__name__: [s.rewards[one.__name__] for s in found] for one in rewards}
        known = {one: [value for value in values if value is not None] for one, values in given.items()}
        means[name] = {one: sum(values) / len(values) if values else None for one, values in known.items()}
    return figures, said, means


def _show_stage(
    output: Output,
    stage: str,
    samples: int,
    figures: dict[str, float],
    said: dict[str, Any],
    means: dict[str, Any],
) -> None:
    """Print what `_measure_stage` found."""
    if figures:
        output.fields({name.replace("_", " "): f"{value:.4f}" for name, value in figures.items()})
        output.record(model="tuned", stage=stage, **figures)
    for name, rewards in means.items():
        output.fields(
            {f"{name} {one}": "-" if value is None else f"{value:.4f}" for one, value in rewards.items()}
        )
        output.record(model=name, stage=stage, rewards=rewards)
    for i, one in enumerate(said.get("tuned", [])[:samples]):
        shown = {
            "prompt": one.prompt,
            "expected": one.expected or None,
            "base": said["base"][i].said if "base" in said else None,
            "tuned": one.said,
        }
        output.text()
        output.fields(shown)
        output.record(sample=i, **shown, rewards=one.rewards)


def _rows(loaded: Any, dataset: list[str] | None, split: str) -> Any:
    from oribi.data.preferences import prepare_preferences
    from oribi.data.prepare import prepare_dataset
    from oribi.run import held_out_rows

    if dataset:
        settings = {"max_seq_length": loaded.model.max_seq_length}
        if loaded.config:
            settings = loaded.config.row_settings()
        sources = [{"path": source} for source in dataset]
        prepare = prepare_preferences if "stage" in settings else prepare_dataset
        return prepare(sources, loaded.tokenizer, **{**settings, "split": split}).dataset
    return held_out_rows(loaded.config, loaded.tokenizer) if loaded.config else None
