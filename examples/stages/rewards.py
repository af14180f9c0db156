"""Rewards for grpo.yaml: one number for each answer; columns of the data arrive by their names."""

import re


def right(completions, answer, **kwargs):
    """1 for the number that the row names."""
    said = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
    return [float(numbers[-1:] == [wanted]) for numbers, wanted in zip(said, answer)]


def short(completions, **kwargs):
    """Up to 1, for an answer that is the number alone."""
    return [1 / (1 + len(completion[0]["content"]) / 20) for completion in completions]
