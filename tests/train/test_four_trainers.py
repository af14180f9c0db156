"""The same model trains in oribi's, TRL's and transformers' trainer and in a bare loop, with equal losses."""

import json
import os
import subprocess
import sys

import pytest

from oribi.data.prepare import prepare_dataset
from tests.train import four_trainers


@pytest.fixture(scope="module")
def rows(tiny_folder, tmp_path_factory):
    """Prepared rows of different lengths, as many as fill the steps but the last."""
    from tests.train.conftest import chatml_tokenizer, some_conversations

    prepared = prepare_dataset(
        some_conversations(four_trainers.ROWS),
        chatml_tokenizer(),
        max_seq_length=128,
        announce=None,
        progress=False,
    )
    return prepared.dataset


@pytest.fixture(scope="module")
def bare(tiny_folder, rows):
    return four_trainers.bare_losses(*four_trainers.load(str(tiny_folder)), rows, "")


@pytest.mark.parametrize("loop", ["oribi", "transformers"])
def test_losses_equal_those_of_a_bare_loop(loop, bare, tiny_folder, rows, tmp_path):
    losses = four_trainers.LOOPS[loop](*four_trainers.load(str(tiny_folder)), rows, str(tmp_path))
    assert len(losses) == four_trainers.STEPS
    assert losses == pytest.approx(bare, rel=1e-5)


@pytest.mark.long
def test_losses_of_plain_trl_equal_those_of_a_bare_loop(bare, tiny_folder, rows, tmp_path):
    # TRL's loss is a Triton kernel on every device; without a GPU it runs in Triton's interpreter, in its own process
    rows.save_to_disk(tmp_path / "rows")
    command = [
        sys.executable,
        "-m",
        "tests.train.four_trainers",
        "trl",
        str(tiny_folder),
        str(tmp_path / "rows"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses) == four_trainers.STEPS
    assert losses == pytest.approx(bare, rel=1e-5)


def test_losses_change_between_steps(bare):
    assert all(abs(a - b) > 1e-3 for a, b in zip(bare, bare[1:]))
