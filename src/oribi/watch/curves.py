"""Curves as data frames for gradio's plots."""

import math
from collections.abc import Sequence

import pandas

from oribi.train.over_time import FIGURES
from oribi.watch.runs import WatchedRun

POINTS = 400  # of one curve
EACH, SMOOTHED, HELD_OUT = "each log", "smoothed", "held out"
# readable on light and on dark grounds, and for eyes that confuse red and green
COLORS = {EACH: "#94a3b8", SMOOTHED: "#2f7ed8", HELD_OUT: "#e8710a"}
PALETTE = ("#2f7ed8", "#e8710a", "#0f9d8a", "#c2459b", "#8a6fd8", "#b08800", "#d64545", "#6b8e23")
SMALL = {**FIGURES, "peak_memory_gib": "peak memory, GiB"}
FROM_ZERO = ("tokens_per_second", "peak_memory_gib")  # a change in the third digit is no rise
_COLUMNS = ("step", "value", "curve")


def loss_frame(run: WatchedRun) -> pandas.DataFrame:
    """Training loss, smoothed loss and held-out loss."""
    rows = [
        *_points(run, "loss", EACH),
        *_points(run, "loss", SMOOTHED, smoothed=True),
        *_points(run, "eval_loss", HELD_OUT),
    ]
    return pandas.DataFrame(rows, columns=_COLUMNS)


def figure_frame(run: WatchedRun, key: str) -> pandas.DataFrame:
    """One figure of a run's log."""
    if key == "peak_memory_gib":
        rows = [(step, value / 2**30, name) for step, value, name in _points(run, "peak_memory_bytes", key)]
    else:
        rows = _points(run, key, key)
    return pandas.DataFrame(rows, columns=_COLUMNS)


def compared_frame(runs: Sequence[WatchedRun], key: str) -> pandas.DataFrame:
    """One figure of several runs; losses of training are smoothed."""
    rows = [point for run in runs for point in _points(run, key, run.name, smoothed=key == "loss")]
    return pandas.DataFrame(rows, columns=_COLUMNS)


def colors_of(runs: Sequence[WatchedRun]) -> dict[str, str]:
    """Run's name -> colour of its curve."""
    return {run.name: PALETTE[place % len(PALETTE)] for place, run in enumerate(runs)}


def other_figures(run: WatchedRun) -> list[str]:
    """Figures of a log that have no plot of their own."""
    shown = {"loss", "eval_loss", "peak_memory_bytes", *SMALL}
    return sorted(name for name in run.series if name not in shown)


def _points(run: WatchedRun, key: str, curve: str, smoothed: bool = False) -> list[tuple[int, float, str]]:
    if key not in run.series:
        return []
    found = zip(*run.series[key].thinned(POINTS, smoothed))
    return [(step, value, curve) for step, value in found if math.isfinite(value)]
