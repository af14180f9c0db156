"""The tab that shows rows of a run's data: which tokens are trained, and what they cost the model."""

from typing import Any

import gradio as gr

from oribi.errors import OribiError
from oribi.watch.fragments import nothing_html, rows_html
from oribi.watch.runs import Watched, WatchedRun
from oribi.watch.talk import Talk

ROWS = 5  # of a page


def data_tab(watched: Watched, talk: Talk, chosen: gr.Dropdown) -> None:
    """Draw the tab.

    Args:
        watched: the runs. talk: its model measures losses where it is loaded. chosen: the run that is shown.
    """
    opened = OpenedRows()
    start = gr.State(0)
    with gr.Row():
        show = gr.Button("Show rows", variant="primary")
        earlier, later = gr.Button("Earlier rows"), gr.Button("Later rows")
        measure = gr.Button("Measure their loss")
    rows = gr.HTML(
        nothing_html(
            "The rows of the chosen run, in the order of its files. Trained tokens are highlighted. Their loss is measured by the model "
            "that is loaded under Chat."
        )
    )

    def page(name: str | None, first: int, measures: bool = False) -> tuple[int, str]:
        run = watched.runs.get(name or "")
        if run is None or run.config is None:
            return 0, nothing_html("The run has no settings that can be read, which say where its rows are.")
        try:
            found = opened.rows_of(run)
            first = max(first, 0)
            views = found.page(first, ROWS)
            if not views and first:
                first = max(first - ROWS, 0)
                views = found.page(first, ROWS)
            losses = _losses(talk, run, found.tokens(first, ROWS)) if measures else {}
        except (OribiError, OSError) as error:
            return first, nothing_html(str(error))
        return first, rows_html(views, found.stage, losses)

    moves = ((show, lambda name, first: page(name, 0)), (earlier, lambda name, first: page(name, first - ROWS)),
             (later, lambda name, first: page(name, first + ROWS)), (measure, lambda name, first: page(name, first, True)))  # fmt: skip
    for button, move in moves:
        button.click(move, [chosen, start], [start, rows], show_progress="minimal", api_visibility="private")


def _losses(talk: Talk, run: WatchedRun, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Origin of each row -> its losses in words.

    Raises:
        TalkError: the model cannot say.
    """
    if talk.run != run.name:
        raise OribiError(
            f"load the model of {run.name} under Chat first; it measures the loss of each row, base beside tuned"
        )
    if not rows:
        raise OribiError("losses of single rows are measured for supervised runs (stage sft) only")
    measured = talk.losses([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    words = [", ".join(f"{name} {value:.3f}" for name, value in one.items()) for one in measured]
    return {
        row["origin"]: f"loss {found}" if found else "no trained token" for row, found in zip(rows, words)
    }


class OpenedRows:
    """The rows of the run that was looked at last; opened again when its settings changed."""

    def __init__(self) -> None:
        self._of: Any = None
        self._rows: Any = None

    def rows_of(self, run: WatchedRun) -> Any:
        """Rows of a run.

        Raises:
            OribiError: they cannot be opened.
        """
        from oribi.watch.data_rows import RunRows  # brings transformers, which only this tab needs

        if self._of != (run.folder, run.config):
            self._rows, self._of = RunRows(run.config), (run.folder, run.config)
        return self._rows
