"""Names that scripts for reinforcement learning call beside TRL's trainers."""

from dataclasses import dataclass
from typing import Any


@dataclass
class SamplingParams:
    """How answers are drawn, under the names of vLLM's class; other keywords of that class are kept and not read.

    Args:
        temperature: 0 is greedy.
        top_p, min_p: bounds of probability. top_k: candidates; -1 and 0 are all.
        max_tokens: most new tokens of an answer.
        repetition_penalty: 1 is none.
        stop: a text, or several, that ends an answer.
        n: answers to each prompt.
        seed: of the draw; None goes on from torch's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 16
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    n: int = 1
    seed: int | None = None

    def __init__(self, **keywords: Any) -> None:
        for name, value in keywords.items():
            setattr(self, name, value)


vLLMSamplingParams = SamplingParams


def is_vLLM_available() -> bool:
    """False: answers come from the model's own `generate`."""
    return False


def PatchDPOTrainer() -> None:
    """Nothing to do: TRL's DPOTrainer runs on oribi's models as it is."""


def PatchKTOTrainer() -> None:
    """Nothing to do: TRL's KTOTrainer runs on oribi's models as it is."""


def PatchFastRL(*args: Any, **keywords: Any) -> None:
    """Nothing to do: TRL's trainers run on oribi's models as they are."""
