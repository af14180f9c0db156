"""How a run goes, in words and figures: its state, what matters most, and what should worry its owner."""

import math
import time
from statistics import median
from typing import NamedTuple

from oribi.run_record import unfinished_words
from oribi.text import clock, gibibytes
from oribi.watch.runs import WatchedRun

RECENT = 50  # logs that tell the present speed
SILENT = 10  # usual intervals without a log line, after which a training may hang
SILENT_SECONDS = 300.0  # and at least so long: evaluations and checkpoints write none


class Card(NamedTuple):
    """A figure with its name and a remark."""

    name: str
    figure: str
    remark: str = ""


class Standing(NamedTuple):
    """How far a run is: `kind` is training, finished, stopped, ended or unknown; `words` says it."""

    kind: str
    words: str


def standing_of(run: WatchedRun) -> Standing:
    """How far a run is."""
    record = run.record
    if record is None:
        if run.trains:
            return Standing("training", f"trains now, step {run.last_step:,}")
        if run.summary:
            return Standing("finished", f"finished at step {run.last_step:,}")
        return Standing("unknown", f"step {run.last_step:,}; its folder has no record that says more")
    if record.state == "finished" and not run.trains:
        return Standing("finished", f"finished at step {max(record.step, run.last_step):,}")
    kept = run.checkpoints
    words = unfinished_words(record, max(run.last_step, record.step), run.trains, kept[-1] if kept else None)
    kind = "training" if run.trains else "stopped" if record.state == "stopped" else "ended"
    return Standing(kind, words)


def cards_of(run: WatchedRun) -> list[Card]:
    """What matters most about a run, first what changes most."""
    found, series = [], run.series
    if "loss" in series:
        loss = series["loss"]
        found.append(
            Card("training loss", f"{loss.smoothed[-1]:.3f}", f"smoothed; last {loss.values[-1]:.3f}")
        )
    if "eval_loss" in series:
        loss = series["eval_loss"]
        best = min(range(len(loss)), key=loss.values.__getitem__)
        where = (
            "the lowest so far"
            if best == len(loss) - 1
            else f"lowest {loss.values[best]:.3f} at step {loss.steps[best]:,}"
        )
        found.append(Card("held-out loss", f"{loss.values[-1]:.3f}", f"at step {loss.steps[-1]:,}; {where}"))
    for key, name, form in REWARDS:
        if len(series.get(key, ())):
            found.append(Card(name, f"{series[key].values[-1]:{form}}", f"at step {series[key].steps[-1]:,}"))
    left = seconds_left(run)
    if left is not None:
        found.append(
            Card(
                "time left",
                clock(left),
                f"about, at {_step_words(run)}; done at {_time_words(time.time() + left)}",
            )
        )
    elif run.started:
        seconds = run.summary.get("train_runtime") or run.last_time - run.started
        found.append(Card("training time", clock(seconds), f"{run.last_step:,} steps"))
    if "tokens_per_second" in series:
        speeds = series["tokens_per_second"].last(RECENT)
        share = f"; MFU {median(series['mfu'].last(RECENT)):.0%}" if "mfu" in series else ""
        found.append(
            Card(
                "speed",
                f"{median(speeds):,.0f}",
                f"tokens per second, median of the last {len(speeds)} logs{share}",
            )
        )
    if "peak_memory_bytes" in series:
        found.append(
            Card("peak memory", gibibytes(max(series["peak_memory_bytes"].values)), "of the main process")
        )
    answered = _stop_words(run)
    if answered:
        found.append(answered)
    if run.started:
        found.append(Card("started", _time_words(run.started), f"last log {_time_words(run.last_time)}"))
    return found


# figures of a stage's logs -> name and form
REWARDS = (
    ("rewards/margins", "reward margin", ".3f"), ("rewards/accuracies", "reward accuracy", ".0%"), ("margin", "margin", ".3f"),
    ("accuracy", "accuracy", ".0%"), ("reward", "reward", ".3f"),
)  # fmt: skip


def seconds_left(run: WatchedRun) -> float | None:
    """Until a running training has done its steps; None where nothing trains, or it is not known."""
    if not run.trains or run.record is None or run.record.max_steps <= 0:
        return None
    per_step = seconds_per_step(run)
    if per_step is None:
        return None
    passed = time.time() - run.last_time  # of a step that is long
    return max((run.record.max_steps - run.last_step) * per_step - passed, 0.0)


def seconds_per_step(run: WatchedRun) -> float | None:
    """The mean of the last logs, evaluations between them included; None before the second log."""
    loss = run.series.get("loss")
    if loss is None or len(loss) < 2:
        return None
    steps, times = loss.steps[-RECENT:], loss.times[-RECENT:]
    return (times[-1] - times[0]) / max(steps[-1] - steps[0], 1)


def _step_words(run: WatchedRun) -> str:
    seconds = seconds_per_step(run) or 0.0
    return f"{seconds:.1f} s per step" if seconds >= 1 else f"{1e3 * seconds:.0f} ms per step"


def _time_words(at: float) -> str:
    """A time of day, with its date where that is not today's."""
    then, now = time.localtime(at), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%d %b %H:%M", then)


def _stop_words(run: WatchedRun) -> Card | None:
    if not run.answers or not run.answers[-1]["samples"]:
        return None
    last = run.answers[-1]
    ended = sum(sample["stopped"] for sample in last["samples"])
    who = f"step {last['step']:,}" if last["step"] else "the base"
    return Card("answers that stop", f"{ended} of {len(last['samples'])}", f"samples of {who}")


def concerns_of(run: WatchedRun) -> list[str]:
    """What the owner of a run should look at, the most urgent first."""
    found = [*_broken(run), *_silence(run), *_diverging(run), *_overfitting(run), *_slower(run)]
    if run.answers and run.answers[-1]["step"] and not run.report:  # which says it of more answers
        card = _stop_words(run)
        samples = run.answers[-1]["samples"]
        if card and 2 * sum(sample["stopped"] for sample in samples) < len(samples):
            found.append(
                f"only {card.figure} sample answers ended by themselves: is the end of a turn trained? See the data"
            )
    return found + run.report.get("warnings", [])


def _broken(run: WatchedRun) -> list[str]:
    found = []
    if run.config_problem:
        found.append(f"its settings cannot be read: {run.config_problem}")
    damaged = run.log.damaged + run.samples.damaged
    if damaged:
        found.append(f"{damaged:,} damaged lines of its log or samples are left out")
    loss = run.series.get("loss")
    if loss is not None and not math.isfinite(loss.values[-1]):
        found.append(
            f"the loss is {loss.values[-1]} since step {_first_broken(loss):,}: lower learning_rate, or look at the rows there"
        )
    if run.record is not None and run.record.state == "running" and not run.trains and run.log.is_complete:
        found.append(f"the training {standing_of(run).words}: its process is gone")
    return found


def _first_broken(loss) -> int:
    place = len(loss)
    while place and not math.isfinite(loss.values[place - 1]):
        place -= 1
    return loss.steps[place]


def _silence(run: WatchedRun) -> list[str]:
    usual = run.seconds_per_log()
    silent = time.time() - run.last_time
    if run.trains and usual and silent > max(SILENT * usual, SILENT_SECONDS):
        return [
            f"no log line for {clock(silent)}, where one came every {clock(usual)}: it may hang, or measure something long"
        ]
    return []


def _diverging(run: WatchedRun) -> list[str]:
    loss = run.series.get("loss")
    if loss is None or len(loss) < 20 or not math.isfinite(loss.smoothed[-1]):
        return []
    lowest = min(range(10, len(loss)), key=loss.smoothed.__getitem__)
    if loss.smoothed[-1] > 1.5 * loss.smoothed[lowest] + 0.1:
        return [
            f"the smoothed loss rose from {loss.smoothed[lowest]:.3f} (step {loss.steps[lowest]:,}) to {loss.smoothed[-1]:.3f}: "
            "learning_rate may be too high"
        ]
    return []


def _overfitting(run: WatchedRun) -> list[str]:
    loss = run.series.get("eval_loss")
    if loss is None or len(loss) < 3:
        return []
    best = min(range(len(loss)), key=loss.values.__getitem__)
    if len(loss) - 1 - best >= 2 and loss.values[-1] > 1.01 * loss.values[best]:
        return [
            f"the held-out loss rises since step {loss.steps[best]:,}, from {loss.values[best]:.3f} to {loss.values[-1]:.3f}: the "
            "model begins to repeat its training rows; stop, or train fewer steps"
        ]
    return []


def _slower(run: WatchedRun) -> list[str]:
    speed = run.series.get("tokens_per_second")
    if not run.trains or speed is None or len(speed) < 40:
        return []
    usual, now = median(speed.last(2000)), median(speed.last(10))
    if now < 0.5 * usual:
        return [
            f"{now:,.0f} tokens per second, where {usual:,.0f} were usual: does another program use the GPU or the disk?"
        ]
    return []
