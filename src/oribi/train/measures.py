"""What a report says of one model, before or after training: losses, answers, and what a stage is about."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

from torch import nn

from oribi.config import RunConfig
from oribi.train.evaluate import HeldOut, Sample, answer_rows, held_out_loss, stop_rate, text_loss
from oribi.train.rewards import RewardFunction
from oribi.train.stage_measures import preferences_of, stage_samples

# a short text written for oribi, unlike any training data: has the model forgotten other things?
GENERAL_TEXT = files("oribi.train").joinpath("templates/general_text.txt").read_text(encoding="utf-8")
ROWS = 200  # held-out rows that are measured
SAMPLES = 6
ANSWER_TOKENS = 64
GRPO_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class Measured:
    """One model, before or after training.

    Args:
        held_out: on held-out rows; None without them.
        general: on the general text; None for a model that writes none.
        samples: greedy answers to held-out prompts.
        scores: of a stage, on held-out rows; see `stage_measures`.
    """

    held_out: HeldOut | None
    general: HeldOut | None
    samples: list[Sample]
    scores: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "general": None if self.general is None else self.general.to_json(),
            "stop_rate": stop_rate(self.samples),
            "samples": [asdict(sample) for sample in self.samples],
            "scores": self.scores,
        }


def measure(model: nn.Module, tokenizer: Any, rows: Any) -> Measured:
    """What a report says of a model.

    Args:
        model, tokenizer: as trained.
        rows: held-out rows (input_ids, labels), or None.
    """
    return Measured(
        None if rows is None else held_out_loss(model, rows, ROWS),
        text_loss(model, tokenizer, GENERAL_TEXT),
        [] if rows is None else answer_rows(model, tokenizer, rows, SAMPLES, ANSWER_TOKENS),
    )


def measure_stage(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    held_out: bool,
    rewards: Sequence[RewardFunction] = (),
    trained: bool = True,
) -> Measured:
    """What a report says of a model whose stage is not supervised.

    Args:
        config: of the run. model, tokenizer: as trained.
        rows: prepared; prompts to answer come from them. held_out: whether they were not trained on, so that they are scored.
        rewards: functions that score answers.
        trained: whether the model is; before, it prefers nothing to its own reference.
    """
    stage = config.stage
    general = samples = None
    if stage != "reward":
        general = text_loss(model, tokenizer, GENERAL_TEXT)
        tokens = (
            min(config.max_completion_length or ANSWER_TOKENS, GRPO_ANSWER_TOKENS)
            if rewards
            else ANSWER_TOKENS
        )
        samples = stage_samples(stage, model, tokenizer, rows, rewards, SAMPLES, tokens)
    scores: dict[str, float] = {}
    compares = stage in ("orpo", "reward") or (trained and hasattr(model, "disable_adapter"))
    if held_out and stage != "grpo" and compares:
        scores = preferences_of(stage, model, rows, beta=config.beta, limit=ROWS)
    if rewards:
        for name in (one.__name__ for one in rewards):
            given = [s.rewards[name] for s in samples if s.rewards[name] is not None]
            scores |= {f"reward {name}": sum(given) / len(given)} if given else {}
    return Measured(None, general, samples or [], scores)
