"""Few cases of a test with many parameters: every two values of different parameters meet in one of them.

A fault that takes one value, or two together, is found as by the whole product; one that takes three may not be.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import pytest

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs(
    values: Mapping[str, Sequence], whole: bool = False, others: pytest.MarkDecorator | None = None
) -> pytest.MarkDecorator:
    """A mark as of `pytest.mark.parametrize`, with cases that cover every pair of values.

    Args:
        values: the values of each parameter; a key may name several ("rows, columns"), whose values are tuples.
        whole: take the product of all values.
        others: take it, too, and mark the cases that the pairs do without.
    """
    names = [name.strip() for key in values for name in key.split(",")]
    everything = list(product(*map(range, map(len, values.values()))))
    needed = everything if whole else covering(values)
    cases = []
    for indices in everything if others else needed:
        case: list = []
        for key, index in zip(values, indices):
            value = values[key][index]
            case += value if "," in key else [value]
        if indices not in needed:
            cases.append(pytest.param(*case, marks=others))
        else:
            cases.append(case if len(names) > 1 else case[0])
    return pytest.mark.parametrize(names, cases)


def covering(values: Mapping[str, Sequence]) -> list[tuple[int, ...]]:
    """Indices of the values of each case, greedily: the next case is the first that has most pairs which no other has."""
    everything = list(product(*map(range, map(len, values.values()))))
    missing = {pair for indices in everything for pair in _pairs_of(values, indices)}
    chosen = []
    while missing:
        best = max(everything, key=lambda indices: len(missing & _pairs_of(values, indices)))
        missing -= _pairs_of(values, best)
        chosen.append(best)
    return chosen


def _pairs_of(values: Mapping[str, Sequence], indices: tuple[int, ...]) -> set[Pair]:
    return set(combinations(zip(values, indices), 2))
