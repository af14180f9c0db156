"""The page, drawn by gradio: a run's curves, samples and data, runs side by side, and chat."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from oribi.watch import curves
from oribi.watch.chat_tab import chat_tab
from oribi.watch.data_tab import data_tab
from oribi.watch.fragments import cards_html, comparison_html, nothing_html, samples_html, standing_html
from oribi.watch.runs import Watched, WatchedRun
from oribi.watch.talk import Talk

SECONDS = 3.0  # between two looks at the files
COMPARED = 6  # runs that are compared at first


def build_page(watched: Watched, talk: Talk) -> gr.Blocks:
    """The page of some runs.

    Args:
        watched: the runs. talk: the model that answers.
    """
    with gr.Blocks(title="oribi watch", analytics_enabled=False) as page:
        gr.HTML("<h1>oribi watch</h1>")
        chosen = gr.Dropdown([], label="Run", interactive=True)
        standing = gr.HTML()
        timer = gr.Timer(SECONDS)
        seen = gr.State(dict)
        with gr.Tab("Training"):
            outputs = _training_tab(watched, chosen)
        with gr.Tab("Samples"):
            samples = gr.HTML()
        with gr.Tab("Data"):
            data_tab(watched, talk, chosen)
        with gr.Tab("Compare"):
            _compare_tab(watched, timer, page)
        with gr.Tab("Chat"):
            chat_tab(watched, talk, chosen, timer, page)
        look = _looking(watched, talk)
        views = [chosen, seen, standing, *outputs, samples]
        for event in (timer.tick, page.load, chosen.input):
            quietly(event, look, [chosen, seen], views)
    return page


def quietly(
    event: Callable, function: Callable, inputs: list[Any], outputs: list[Any], **settings: Any
) -> Any:
    """Call a function at an event without a sign of progress on the page, and without a name for other programs."""
    return event(function, inputs, outputs, show_progress="hidden", api_visibility="private", **settings)


def _training_tab(watched: Watched, chosen: gr.Dropdown) -> list[Any]:
    cards = gr.HTML()
    loss = gr.LinePlot(
        x="step", y="value", color="curve", title="loss", x_title="step", y_title="nats per token", color_title="curve",
        color_map=curves.COLORS, height=300, elem_id="loss",
    )  # fmt: skip
    small = []
    names = list(curves.SMALL.items())
    for pair in (names[:2], names[2:]):
        with gr.Row():
            small += [
                gr.LinePlot(
                    x="step",
                    y="value",
                    title=title,
                    x_title="step",
                    y_title=title,
                    height=230,
                    elem_id=key,
                    y_lim=[0, None] if key in curves.FROM_ZERO else None,
                )  # fmt: skip
                for key, title in pair
            ]
    other = gr.Dropdown([], label="Another figure of the log", interactive=True)
    another = gr.LinePlot(
        x="step",
        y="value",
        title="another figure",
        x_title="step",
        y_title="value",
        height=230,
        visible=False,
    )

    def show(name: str | None, key: str | None) -> Any:
        run = watched.runs.get(name or "")
        if run is None or not key:
            return gr.LinePlot(visible=False)
        return _plot(curves.figure_frame(run, key), title=key, y_title=key)

    quietly(other.change, show, [chosen, other], [another])
    return [cards, loss, *small, other]


def _looking(watched: Watched, talk: Talk) -> Callable:
    def look(name: str | None, seen: dict[str, Any]) -> list[Any]:
        """What changed of the chosen run since this visitor looked last."""
        runs = watched.refresh([name] if name else [])
        if talk.run and watched.training:
            talk.close()  # the training needs the machine
        if name not in runs:
            name = next(iter(runs), None)
            runs = watched.refresh([name] if name else [])
        choice = _unless_seen(seen, "choice", (name, *runs), lambda: gr.Dropdown(list(runs), value=name))
        if name is None:
            words = nothing_html(
                f"No runs yet in {', '.join(map(str, watched.roots.folders))}. A run appears here when it begins."
            )
            standing = _unless_seen(seen, "standing", words, lambda: words)
            return [choice, seen, standing, *[gr.skip()] * (3 + len(curves.SMALL) + 1)]
        run = runs[name]
        stamp, fresh = (name, run.version), lambda key, show: _unless_seen(seen, key, stamp, show)
        standing, cards = standing_html(run), cards_html(run)
        figures = curves.other_figures(run)
        return [
            choice,
            seen,
            _unless_seen(seen, "standing", standing, lambda: standing),
            _unless_seen(seen, "cards", cards, lambda: cards),
            fresh("loss", lambda: _plot(curves.loss_frame(run))),
            *[fresh(key, lambda key=key: _plot(curves.figure_frame(run, key))) for key in curves.SMALL],
            _unless_seen(
                seen, "other", (name, *figures), lambda: gr.Dropdown(figures, value=_first(figures))
            ),
            _unless_seen(
                seen, "samples", (name, len(run.answers), run.answers[-1:]), lambda: samples_html(run)
            ),
        ]

    return look


def _plot(frame: Any, **settings: Any) -> gr.LinePlot:
    """A plot of a frame; one without points is not there."""
    return gr.LinePlot(frame, visible=len(frame) > 0, **settings)


def _first(figures: list[str]) -> str | None:
    """The figure that a stage is about, where the run has one."""
    return next((name for name in ("rewards/margins", "reward", "margin") if name in figures), None)


def _unless_seen(seen: dict[str, Any], key: str, stamp: Any, show: Callable[[], Any]) -> Any:
    """What is to be shown, or nothing where the page shows it already: a plot that is drawn anew flickers."""
    if seen.get(key) == stamp:
        return gr.skip()
    seen[key] = stamp
    return show()


def _compare_tab(watched: Watched, timer: gr.Timer, page: gr.Blocks) -> None:
    names = gr.Dropdown([], label="Runs", multiselect=True, interactive=True, max_choices=20)
    seen = gr.State(dict)
    tables = gr.HTML()
    plots = []
    for key, title in (("loss", "training loss, smoothed"), ("eval_loss", "held-out loss")):
        plots.append(
            (key, gr.LinePlot(x="step", y="value", color="curve", title=title, x_title="step", y_title="nats per token", color_title="run", height=300))
        )  # fmt: skip

    def look(chosen: list[str] | None, seen: dict[str, Any]) -> list[Any]:
        known = watched.refresh([])
        if "choice" not in seen:
            chosen = list(known)[:COMPARED]
        runs = watched.refresh(chosen or [])
        picked: list[WatchedRun] = [runs[name] for name in chosen or [] if name in runs]
        stamp = tuple((run.name, run.version) for run in picked)
        return [
            _unless_seen(seen, "choice", tuple(runs), lambda: gr.Dropdown(list(runs), value=[run.name for run in picked])),
            seen,
            _unless_seen(seen, "tables", stamp, lambda: comparison_html(picked)),
            *[_unless_seen(seen, key, stamp, lambda key=key: _plot(curves.compared_frame(picked, key), color_map=curves.colors_of(picked))) for key, _ in plots],
        ]  # fmt: skip

    views = [names, seen, tables, *(plot for _, plot in plots)]
    for event in (timer.tick, page.load, names.input):
        quietly(event, look, [names, seen], views)
