"""A trainer that evaluates on its training rows says so, and continues: scripts do it on purpose."""

from copy import copy

import pytest
from datasets import Dataset

from oribi.train.rows import warn_of_same_rows

ROWS = Dataset.from_dict({"text": ["a", "b", "c"]})


@pytest.mark.parametrize("evaluated", [ROWS, copy(ROWS), {"eval_dataset": ROWS}])
def test_evaluation_on_the_training_rows_is_said(evaluated, capsys):
    warn_of_same_rows(ROWS, evaluated)
    assert "eval_dataset holds the rows of train_dataset" in capsys.readouterr().out


@pytest.mark.parametrize("evaluated", [None, ROWS.select([1]), {"other": ROWS.select([2])}])
def test_other_evaluation_rows_are_not_remarked_on(evaluated, capsys):
    warn_of_same_rows(ROWS, evaluated)
    assert not capsys.readouterr().out
