"""Runs side by side: the settings in which they differ, and their results."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from oribi.text import clock, shown
from oribi.watch.figures import seconds_left, standing_of
from oribi.watch.runs import WatchedRun

# where a run lies and what it writes beside its result decide nothing about it
UNCOMPARED = {
    "output_dir",
    "resume",
    "report",
    "report_to",
    "logging_steps",
    "gpus",
    "dataset_num_proc",
    "ddp_timeout",
}


def settings_of_run(run: WatchedRun) -> dict[str, Any]:
    """A run's settings by name; of a training without a config, what its record says."""
    if run.config is not None:
        return asdict(run.config)
    return {"model": run.record.model, **run.record.settings} if run.record is not None else {}


def settings_that_differ(runs: Sequence[WatchedRun]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for those that are not the same in all; empty where a run has none."""
    found = [settings_of_run(run) for run in runs]
    known = [settings for settings in found if settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in UNCOMPARED)
    return {
        name: [_written(settings[name]) if name in settings else "" for settings in found]
        for name in names
        if any(settings.get(name) != known[0].get(name) for settings in known)
    }


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else shown(value)


def results_of(runs: Sequence[WatchedRun]) -> list[dict[str, str]]:
    """A row per run: how far it is, and what came of it."""
    rows = []
    for run in runs:
        loss, held_out = run.series.get("loss"), run.series.get("eval_loss")
        measures = run.report.get("measures", {})
        base, tuned = measures.get("base"), measures.get("tuned")
        best = min(range(len(held_out)), key=held_out.values.__getitem__) if held_out else None
        left = seconds_left(run)
        rows.append(
            {
                "run": run.name,
                "state": standing_of(run).kind,
                "step": f"{run.last_step:,}",
                "training loss": f"{loss.smoothed[-1]:.3f}" if loss else "",
                "held-out loss": f"{held_out.values[-1]:.3f}" if held_out else "",
                "lowest": f"{held_out.values[best]:.3f} at {held_out.steps[best]:,}" if held_out else "",
                "report: held out": _change(base, tuned, lambda m: m["held_out"]["loss"], ".3f"),
                "report: stops": _stops(tuned),
                "report: accuracy": _change(base, tuned, lambda m: m["scores"]["accuracy"], ".0%"),
                "time": f"{clock(left)} left"
                if left is not None
                else clock(max(run.last_time - run.started, 0)),
            }
        )
    used = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def _change(base: Any, tuned: Any, read: Callable[[Any], float], form: str) -> str:
    """Base and tuned model by one measure of a report: "1.234 -> 0.567"."""
    found = []
    for measured in (base, tuned):
        try:
            found.append(f"{read(measured):{form}}")
        except (KeyError, TypeError, ValueError):  # not measured
            continue
    return " \u2192 ".join(found)


def _stops(tuned: Any) -> str:
    try:
        stopped = [one["stopped"] for one in tuned["samples"]]
    except (KeyError, TypeError):  # not measured
        return ""
    return f"{sum(map(bool, stopped))} of {len(stopped)}" if stopped else ""
