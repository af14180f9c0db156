"""Cases that cover pairs: all of them, in far fewer cases than the product."""

from itertools import combinations

import pytest

from tests.pairs import covering, pairs

VALUES = {"size": [1, 2, 3, 4], "kind": "abc", "whole": [False, True], "left, right": [(1, 2), (3, 4)]}


def test_every_two_values_meet():
    cases = covering(VALUES)
    for (a, left), (b, right) in combinations(enumerate(VALUES.values()), 2):
        assert {(case[a], case[b]) for case in cases} == {
            (i, j) for i in range(len(left)) for j in range(len(right))
        }
    assert len(cases) <= 14  # of 48; 4 x 3 are needed


def test_one_parameter_has_each_of_its_values_and_several_names_share_a_tuple():
    assert pairs({"size": [1, 2]}, whole=True).args == (["size"], [1, 2])
    names, cases = pairs({"size": [5], "left, right": [(1, 2), (3, 4)]}).args
    assert names == ["size", "left", "right"]
    assert cases == [[5, 1, 2], [5, 3, 4]]


def test_the_other_cases_of_the_product_are_marked():
    _, cases = pairs({"size": [1, 2], "kind": "ab", "whole": [False, True]}, others=pytest.mark.long).args
    marked = [case for case in cases if getattr(case, "marks", ())]
    assert len(cases) == 8
    assert len(marked) == 4
    assert {case.marks[0].name for case in marked} == {"long"}
