"""Figures and answers to the same prompts while a model is trained, as the report and the page of `oribi watch` show them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# figures of a log that have a curve of their own beside the loss
FIGURES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


class Span(NamedTuple):
    """An answer, and the model that gave it, or the steps at which it was given: "base", "step 20" or "steps 20 to 60"."""

    steps: str
    text: str
    stopped: bool


class Asked(NamedTuple):
    """A prompt as turns of role and text, the answer of the data (empty where there is none), and the model's answers."""

    turns: list[tuple[str, str]]
    expected: str
    spans: list[Span]


def turns_in(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and text of each turn of a sample's prompt; its whole text without a role where the turns are not known."""
    return [(role, text) for role, text in sample.get("turns") or [("", sample["prompt"])]]


def answers_over_time(answers: Sequence[dict[str, Any]]) -> list[Asked]:
    """Each prompt with its answers, the base's first; one that stayed the same over several evaluations stands once.

    Args:
        answers: lines of samples.jsonl; prompts of the last one are shown. Fewer than two tell nothing of a change.
    """
    asked = answers[-1]["samples"] if len(answers) > 1 else []
    found = []
    for i, question in enumerate(asked):
        spans: list[tuple[list[int], dict[str, Any]]] = []
        for one in answers:
            sample = one["samples"][i] if i < len(one["samples"]) else None
            if sample is None or sample["prompt"] != question["prompt"]:
                continue  # of a run that was resumed with other prompts
            if spans and one["step"] and spans[-1][0][0] and spans[-1][1]["said"] == sample["said"]:
                spans[-1][0].append(one["step"])
            else:
                spans.append(([one["step"]], sample))
        shown = [Span(_words(steps), sample["said"], sample["stopped"]) for steps, sample in spans]
        found.append(Asked(turns_in(question), question["expected"], shown))
    return found


def _words(steps: Sequence[int]) -> str:
    if not steps[0]:
        return "base"
    return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
