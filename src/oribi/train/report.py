"""The report of a run: report.json with every figure, and report.md and report.html made from it.

The page needs nothing else: charts are inline SVG, there is no script and no request.
"""

import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

import oribi
from oribi.config import as_source
from oribi.config_file import as_yaml
from oribi.save.card import fenced, for_markdown
from oribi.text import clock, write_whole
from oribi.train.charts import as_svg, loss_chart, rewards_charts, save_png, small_chart
from oribi.train.measures import ANSWER_TOKENS, Measured
from oribi.train.over_time import FIGURES, Asked, Span, answers_over_time, turns_in
from oribi.train.samples import Answered

# a general text that became this much less likely is worth a warning
FORGOTTEN = 1.25


def write_report(
    folder: Path,
    *,
    config: dict[str, Any],
    log: Sequence[dict[str, Any]],
    answers: Sequence[Answered] = (),
    data: dict[str, Any],
    machine: dict[str, Any],
    measures: dict[str, Measured],
    exports: dict[str, Path],
) -> dict[str, Any]:
    """Write report.json, report.md, report.html and loss.png into a run's folder.

    Args:
        folder: of the run.
        config: its settings.
        log: lines of log.jsonl. answers: lines of samples.jsonl.
        data: the training data's report.
        machine: name -> text.
        measures: "base" and "tuned".
        exports: form -> folder or file; checks are read from the export_report.json there.

    Returns:
        What report.json holds.
    """
    report = {
        "oribi": oribi.__version__,
        "config": config,
        "written": _date(time.time()),
        "trained": _dates(log),
        "versions": _versions(),
        "machine": machine,
        "data": data,
        "training": training_figures(log),
        "measures": {name: measured.to_json() for name, measured in measures.items()},
        "answers": [asdict(one) for one in answers],
        "exports": [_export(form, Path(path)) for form, path in exports.items()],
    }
    report["warnings"] = warnings_of(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    write_whole(folder / "report.md", as_markdown(report))
    stage = config.get("stage", "sft")
    unit = "nats per token" if stage == "sft" else f"of stage {stage}"
    save_png(loss_chart(log, unit), folder / "loss.png")
    rewards = [] if stage == "sft" else rewards_charts(log)
    if rewards:
        save_png(rewards_charts(log)[0], folder / "rewards.png")
    small = [
        *rewards,
        *(small_chart(log, key, title) for key, title in FIGURES.items()),
    ]
    charts = [as_svg(loss_chart(log, unit)), *(as_svg(figure) for figure in small if figure is not None)]
    write_whole(folder / "report.html", as_page(report, charts))
    return report


def _date(at: float) -> str:
    """Local date and time of seconds since 1970, with the zone."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at)).strip()


def _dates(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """When a training logged first and last."""
    times = [entry["time"] for entry in log if isinstance(entry.get("time"), (int, float))]
    return {"first log": _date(times[0]), "last log": _date(times[-1])} if times else {}


def _versions() -> dict[str, str]:
    """Of Python and the libraries that decide what is trained."""
    found = {"python": platform.python_version(), "oribi": oribi.__version__}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "triton", "trl"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def training_figures(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the training itself, from its log."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry)
    shares = sorted(entry["mfu"] for entry in log if "mfu" in entry)
    rewards = {name: ends for name in TRENDS if (ends := _ends(log, name)) is not None}
    end = next((entry for entry in reversed(log) if "train_runtime" in entry), {})
    return {
        "steps": log[-1]["step"] if log else 0,
        "seconds": end.get("train_runtime"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "mfu": shares[len(shares) // 2] if shares else None,
        **({"rewards": rewards} if rewards else {}),
    }


# figures of TRL's logs that tell how a stage goes
TRENDS = ("rewards/accuracies", "rewards/margins", "accuracy", "margin", "reward")


def _ends(log: Sequence[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The mean of a figure over the first and the last tenth of the logs; None where it is not there."""
    values = [entry[name] for entry in log if isinstance(entry.get(name), (int, float)) and "loss" in entry]
    share = max(len(values) // 10, 1)
    return (sum(values[:share]) / share, sum(values[-share:]) / share) if values else None


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What a reader should know before using the model."""
    found, measures = [], report["measures"]
    base, tuned = measures.get("base"), measures.get("tuned")
    if base and tuned and base["general"] and tuned["general"]:
        ratio = tuned["general"]["perplexity"] / base["general"]["perplexity"]
        if ratio > FORGOTTEN:
            found.append(
                f"a general text became less likely: perplexity {base['general']['perplexity']:.1f} before, "
                f"{tuned['general']['perplexity']:.1f} after. Lower learning_rate or train fewer steps, or mix general "
                "data in, if the model is meant for more than this task"
            )
    if base and tuned and base["held_out"] and tuned["held_out"]["loss"] > base["held_out"]["loss"]:
        found.append("the held-out loss is higher than before training: the run overfits, or learns nothing")
    accuracy = (tuned or {}).get("scores", {}).get("accuracy")
    if accuracy is not None and accuracy <= 0.5:
        found.append(
            f"the better answer is preferred in {accuracy:.0%} of the held-out rows, no more often than by chance: train longer, raise "
            "learning_rate, or look at the pairs with `oribi inspect data`"
        )
    if tuned and tuned["stop_rate"] is not None and tuned["stop_rate"] < 0.5:
        found.append(
            f"only {_stops(tuned)} ended by themselves within {ANSWER_TOKENS} tokens; look at "
            "`oribi inspect data`: is the end of a turn trained?"
        )
    found += [
        f"the export {e['form']} differs from the trained model"
        for e in report["exports"]
        if e["passed"] is False
    ]
    return found


def headline(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of what matters most."""
    measures, training = report["measures"], report["training"]
    base, tuned = measures.get("base"), measures.get("tuned")
    found = []

    def pair(name: str, read: Any, form: str, remark: str) -> None:
        after = None if tuned is None else read(tuned)
        if after is not None:
            before = None if base is None else read(base)
            text = f"{after:{form}}" if before is None else f"{before:{form}} \u2192 {after:{form}}"
            found.append((name, text, remark))

    pair(
        "held-out loss",
        lambda m: m["held_out"] and m["held_out"]["loss"],
        ".3f",
        "before \u2192 after, nats per token",
    )
    stops = [_stops(measured) for measured in (base, tuned) if measured is not None and measured["samples"]]
    if stops:
        counts = " \u2192 ".join(text.removesuffix(" answers") for text in stops)
        found.append(("answers that stop", counts, f"by themselves, within {ANSWER_TOKENS} tokens"))
    for name, form, remark in SCORES:
        pair(name.replace("_", " "), lambda m, name=name: m["scores"].get(name), form, remark)
    for name in (tuned or {}).get("scores", {}):
        if name.startswith("reward "):
            pair(name, lambda m, name=name: m["scores"].get(name), ".3g", "mean over the samples below")
    found += reward_trends(report)
    pair(
        "general text",
        lambda m: m["general"] and m["general"]["perplexity"],
        ".1f",
        "perplexity; much higher is forgetting",
    )
    if training["seconds"]:
        found.append(("training", clock(training["seconds"]), f"{training['steps']} steps"))
    if training["tokens_per_second"]:
        share = f"; MFU {training['mfu']:.0%}" if training.get("mfu") is not None else ""
        found.append(("speed", f"{training['tokens_per_second']:,.0f}", f"tokens per second, median{share}"))
    if report["machine"].get("peak memory"):
        found.append(("peak memory", report["machine"]["peak memory"], report["machine"].get("device", "")))
    return found


def _stops(measured: dict[str, Any]) -> str:
    """How many of a model's answers ended by themselves: "5 of 6 answers"."""
    samples = measured["samples"]
    return f"{sum(sample['stopped'] for sample in samples)} of {len(samples)} answers"


# scores of a stage -> how they are written
SCORES = (
    ("accuracy", ".0%", "held-out rows whose better answer is preferred"),
    ("margin", ".3g", "mean difference of held-out rewards"),
)


def reward_trends(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """How rewards moved in training, from its first to its last logs."""
    found = []
    for name, (first, last) in report["training"].get("rewards", {}).items():
        found.append((name, f"{first:.3g} \u2192 {last:.3g}", "first to last tenth of the training"))
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """The report as text."""
    return _render("report.md.jinja", report)


def as_page(report: dict[str, Any], charts: Sequence[str]) -> str:
    """The report as a page of its own.

    Args:
        report: what report.json holds. charts: SVG elements; the first is the widest.
    """
    return _render("report.html.jinja", report, charts=charts)


def _render(template: str, report: dict[str, Any], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oribi.train"),
        autoescape=lambda name: ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": for_markdown, "fenced": fenced, "verdict": _verdict, "checks": _checks}
    data, samples = _data_facts(report), _side_by_side(report)
    return environment.get_template(template).render(
        report=report,
        title=_title(report),
        subtitle=_subtitle(report),
        facts_of_machine={**report["machine"], **report["versions"], "report written": report["written"]},
        headline=headline(report),
        samples=samples,
        samples_title="Held-out answers"
        if all(m["held_out"] for m in report["measures"].values())
        else "Answers",
        answers=answers_over_time(report["answers"]),
        has_expected=any(expected for _, expected, _ in samples),
        has_rewards=bool(report["training"].get("rewards")),
        going=f"still going after {ANSWER_TOKENS} tokens",
        data=data,
        data_lines="\n".join(f"{name}: {value}" for name, value in data.items()),
        settings=as_yaml(report["config"]).rstrip(),  # the file that would repeat the run
        **values,
    )


def _title(report: dict[str, Any]) -> str:
    config = report["config"]
    model = Path(str(config.get("model", ""))).name or "model"
    names = [Path(as_source(source)["path"]).name for source in config.get("dataset", [])]
    return f"{model} on {', '.join(names)}" if names else model


def _subtitle(report: dict[str, Any]) -> str:
    """When and with what the model was trained."""
    dates = list(dict.fromkeys(report["trained"].values()))
    return (
        f"Trained {' to '.join(dates)} with oribi {report['oribi']}" if dates else f"oribi {report['oribi']}"
    )


def _side_by_side(report: dict[str, Any]) -> list[Asked]:
    """Each measured prompt with every model's answer."""
    measures = report["measures"]
    said = {name: measured["samples"] for name, measured in measures.items()}
    return [
        Asked(
            turns_in(sample),
            sample["expected"],
            [Span(name, _with_rewards(answers[i]), answers[i]["stopped"]) for name, answers in said.items()],
        )
        for i, sample in enumerate(next(iter(said.values()), []))
    ]


def _with_rewards(sample: dict[str, Any]) -> str:
    """An answer, and what each reward function gave it."""
    given = sample.get("rewards") or {}
    rewards = ", ".join(
        f"{name} {'none' if value is None else f'{value:.3g}'}" for name, value in given.items()
    )
    return f"{sample['said']}\n\n[{rewards}]" if rewards else sample["said"]


def _data_facts(report: dict[str, Any]) -> dict[str, Any]:
    data = report["data"]
    facts = {
        name: f"{data[name]:,}" if isinstance(data[name], int) else data[name]
        for name in ("source", "format", "rows_in", "rows_kept", "rows_cut", "rows_dropped", "examples", "tokens",
                     "trained_tokens")
        if name in data
    }  # fmt: skip
    if data.get("end_tokens"):
        facts["ends of turns"] = ", ".join(
            f"{token} trained {count:,} times" for token, count in data["end_tokens"].items()
        )
    if data.get("length_percentiles"):
        facts["lengths"] = ", ".join(
            f"{name} {value:,}" for name, value in data["length_percentiles"].items()
        )
    held_out = next((m["held_out"] for m in report["measures"].values()), None)
    if held_out:
        facts["held out"] = f"{held_out['rows']:,} rows measured, {held_out['tokens']:,} trained tokens"
    facts |= {f"note {i + 1}": note for i, note in enumerate(data.get("notes", []))}
    return {name.replace("_", " "): value for name, value in facts.items()}


def _export(form: str, path: Path) -> dict[str, Any]:
    """A form with the checks that its folder's export_report.json tells."""
    file = (path if path.is_dir() else path.parent) / "export_report.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        "form": form,
        "path": str(path),
        "outcome": found.get("outcome") if found.get("checks") else None,
        "passed": found.get("passed") if found.get("checks") else None,
        "checks": [
            {
                **{name: check.get(name) for name in ("name", "outcome", "says", "passed")},
                **check.get("figures", {}),
            }
            for check in found.get("checks", [])
        ],
    }


def _verdict(export: dict[str, Any]) -> str:
    return export.get("outcome") or {False: "different", None: "not checked"}.get(
        export["passed"], "not tested"
    )


def _checks(export: dict[str, Any]) -> str:
    """What each check found, in the words that the terminal shows."""
    return "\n".join(
        f"{check['outcome'] or _verdict(check)}  {check['name']}: {check['says'] or ''}"
        for check in export["checks"]
    )
