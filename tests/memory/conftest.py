"""The tiny model and the rows of the training tests."""

from tests.train.conftest import conversations, load  # noqa: F401 (fixtures)
