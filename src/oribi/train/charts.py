"""Curves of a run as SVG for a page and PNG for a folder, drawn by matplotlib without its global state."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from oribi.text import whole_file
from oribi.train.smoothed import Smoothed

INK, PALE, ACCENT, POINT, GRID = "#1f2937", "#9db8d9", "#1d4ed8", "#c2410c", "#e5e7eb"


def loss_chart(log: Sequence[dict[str, Any]], unit: str = "nats per token") -> Figure:
    """Training loss per step, smoothed, and the loss of each evaluation."""
    figure, axes = _axes((7.2, 3.2), f"loss, {unit}")
    steps, losses = _series(log, "loss")
    axes.plot(steps, losses, color=PALE, linewidth=1, label="each log")
    axes.plot(steps, list(map(Smoothed().add, losses)), color=ACCENT, linewidth=1.8, label="smoothed")
    at, evaluated = _series(log, "eval_loss")
    if at:
        axes.plot(at, evaluated, "o-", color=POINT, linewidth=1.2, markersize=4.5, label="held out")
    axes.legend(frameon=False, fontsize=9)
    return figure


# what a stage's logs tell of rewards: chart -> figures of the log with their names in its legend
REWARDS = {
    "rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "margin": {"rewards/margins": "training", "eval_rewards/margins": "held out"},
    "accuracy": {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
    "reward model: margin": {"margin": "training", "eval_margin": "held out"},
    "reward model: accuracy": {"accuracy": "training", "eval_accuracy": "held out"},
    "reward": {"reward": "weighted sum", "eval_reward": "held out"},
    "completion length": {"completions/mean_length": "mean"},
    "KL to the reference": {"kl": "KL"},
}
_FUNCTION_MEAN = re.compile(r"rewards/(.+)/mean")


def rewards_charts(log: Sequence[dict[str, Any]]) -> list[Figure]:
    """One figure for each kind of reward that the logs of a stage tell."""
    names = {name for entry in log for name in entry}
    functions = {name: found[1] for name in sorted(names) if (found := _FUNCTION_MEAN.fullmatch(name))}
    charts = {**REWARDS, **({"reward by function": functions} if functions else {})}
    found = []
    for title, figures in charts.items():
        series = {label: _series(log, name) for name, label in figures.items()}
        series = {label: one for label, one in series.items() if one[0]}
        if not any(len(steps) > 1 for steps, _ in series.values()):
            continue
        figure, axes = _axes((3.5, 2.1), title)
        for (label, (steps, values)), color in zip(series.items(), (ACCENT, POINT, INK, PALE) * 5):
            axes.plot(steps, values, "o-" if len(steps) == 1 or label == "held out" else "-", color=color, linewidth=1.3,
                      markersize=3.5, label=label)  # fmt: skip
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        found.append(figure)
    return found


def small_chart(log: Sequence[dict[str, Any]], key: str, title: str) -> Figure | None:
    """One figure of the log against the step; None where the log has fewer than two of it."""
    steps, values = _series(log, key)
    if len(steps) < 2:
        return None
    figure, axes = _axes((3.5, 2.1), title)
    axes.plot(steps, values, color=ACCENT, linewidth=1.4)
    axes.set_ylim(bottom=0)
    return figure


# colour of a chart -> that of the page around it, which knows light and dark
_ON_PAGES = {
    INK: "currentColor", "#000000": "currentColor", GRID: "var(--line)", PALE: "var(--faint)", ACCENT: "var(--accent)",
    POINT: "var(--point)",
}  # fmt: skip


def as_svg(figure: Figure) -> str:
    """The figure as an element for a page; letters are drawn as shapes, so no font is needed.

    The page gives its colours: --line, --faint, --accent, --point, and that of its text.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, on_page in _ON_PAGES.items():
        text = text.replace(color, on_page)
    title = html.escape(figure.axes[0].get_title(loc="left"), quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="curve: {title}"', 1)


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a file."""
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=144)


def _axes(size: tuple[float, float], title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[key]) for entry in log if isinstance(entry.get(key), (int, float))]
    return [step for step, _ in found], [float(value) for _, value in found]
