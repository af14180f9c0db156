"""Parts of the page as HTML, with every text of a run escaped."""

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from oribi.train.over_time import Asked, Span, answers_over_time, turns_in
from oribi.watch.compare import results_of, settings_that_differ
from oribi.watch.figures import cards_of, concerns_of, standing_of
from oribi.watch.runs import WatchedRun

STYLE = files("oribi.watch").joinpath("templates/watch.css").read_text(encoding="utf-8")


@cache
def _macros() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oribi.watch"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("watch.html.jinja").module


def nothing_html(words: str) -> str:
    """A line in place of something that is not there."""
    return str(_macros().nothing(words))


def standing_html(run: WatchedRun) -> str:
    """A run's name, how far it is, and what should worry its owner."""
    read = 1.0 if run.log.is_complete else run.log.offset / run.log.size
    return str(_macros().standing(run, standing_of(run), concerns_of(run), read))


def cards_html(run: WatchedRun) -> str:
    """The figures that matter most."""
    cards = cards_of(run)
    return (
        str(_macros().cards(cards))
        if cards
        else nothing_html("No log yet: the first line comes after the first steps.")
    )


def samples_html(run: WatchedRun) -> str:
    """The answers to the run's sample prompts, the base's beside the newest, with the earlier ones folded."""
    asked = answers_over_time(run.answers)
    if not asked and run.answers:  # the base's alone
        asked = [
            Asked(turns_in(one), one["expected"], [Span("base", one["said"], one["stopped"])])
            for one in run.answers[0]["samples"]
        ]
    if asked:
        return str(_macros().samples([one for one in asked if one.spans]))
    return nothing_html(
        "This run answers no prompts. Set sample_prompts to a file with a question on each line, or to held_out, and its answers "
        "are shown here at every evaluation."
    )


def rows_html(rows: list[Any], stage: str, losses: dict[str, str]) -> str:
    """Rows of data (`RowView`) with their tokens coloured."""
    from oribi.data.view import rows_as_html  # reads data sets, which a page without rows does not need

    return f'<div class="oribi-rows">{rows_as_html(rows, stage, losses)}</div>'


def comparison_html(runs: list[WatchedRun]) -> str:
    """Two tables: results, and the settings that differ."""
    if not runs:
        return nothing_html("Choose runs to compare.")
    results = results_of(runs)
    text = str(_macros().table("Results", list(results[0]), [list(row.values()) for row in results]))
    if len(runs) < 2:
        return text
    differ = settings_that_differ(runs)
    if not differ:
        return text + nothing_html("These runs have the same settings.")
    rows = [[name, *values] for name, values in differ.items()]
    return text + str(_macros().table("Settings that differ", ["setting", *(run.name for run in runs)], rows))
