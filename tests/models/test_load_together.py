"""Two processes load a model as one does, each tensor read by one of them, and a process that fails ends both."""

import json
import sys

import pytest

from oribi.models.load_together import _windows
from oribi.selftest.processes import run_together
from oribi.selftest.subject import write_small_model

posix = pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX")
MATRICES = 14  # seven in each of two layers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    model = str(write_small_model(tmp_path_factory.mktemp("small")))
    said, _ = run_together(["-m", "tests.models.load_together", model], threads=1)
    return json.loads(said.splitlines()[-1])


@posix
@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("bits", ["nf4", "16bit"])
def test_each_process_has_the_bytes_of_one_that_loads_alone(loaded, in_parts, bits):
    for process in loaded:
        found = process[f"{in_parts}-{bits}"]
        # the record of the base, too: a run that is resumed compares it
        assert [found[part] for part in ("layers", "whole", "scales", "states", "identity")] == [True] * 5
        assert found["in_parts"] == in_parts
        assert len(found["notes"]) == in_parts


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "shared"),
    [("False-nf4", True), ("True-nf4", True), ("True-16bit", True), ("False-16bit", False)],
)
def test_each_large_tensor_is_read_by_one_process_unless_all_keep_it_in_16_bits(loaded, mode, shared):
    first, second = (set(process[mode]["read"]) for process in loaded)
    assert len(first | second) == MATRICES
    if shared:
        assert not first & second
        assert 5 <= len(first) <= 9
    else:
        assert first == second


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("a tensor", "OSError", ".weight: the disk"),
        ("open_model", "ValueError", "no such thing"),
        ("identify", "ValueError", "no such thing"),
    ],
)
def test_a_process_that_cannot_load_ends_both_with_its_message(loaded, where, kind, message):
    first, second = (process[where] for process in loaded)
    assert second[0] == kind
    assert first[0] == "EndedElsewhere"
    assert first[1].startswith("process 1 could not load the model, which ends all: ")
    assert first[1].endswith(message)  # the first line of it


def test_windows_hold_about_a_large_tensor_per_process_and_share_the_bytes():
    sizes = {
        f"{layer}.{name}": size
        for layer in range(20)
        for name, size in zip("qkvogud", (4, 1, 1, 4, 14, 14, 14))
    }
    windows = list(_windows(sizes, range(4, 8)))
    assert [name for window in windows for name in window] == list(sizes)
    assert all(sum(sizes[name] for name in window) <= 4 * 14 for window in windows)
    assert len(windows) < sum(sizes.values()) / (4 * 14) * 1.5
    loads = {
        owner: sum(sizes[n] for w in windows for n, o in w.items() if o == owner) for owner in range(4, 8)
    }
    assert max(loads.values()) < 1.1 * min(loads.values())
    assert list(_windows({}, range(2))) == []
