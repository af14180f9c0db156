"""The tiny model and the rows of the training tests."""

from tests.train.conftest import conversations, load, tiny_folder  # noqa: F401 (fixtures)
