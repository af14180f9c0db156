"""One of two processes of a run is killed at random moments: the run goes on from its newest checkpoint to the same end."""

import json
import os
import subprocess
import sys

import pytest

from oribi.selftest.subject import write_small_model
from tests.train.conftest import some_conversations

SAVE_STEPS = 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("kills", "words"),
    [
        pytest.param(3, (), marks=pytest.mark.long),
        pytest.param(10, (), marks=pytest.mark.long),
        pytest.param(10, ("--fsdp", "true"), marks=pytest.mark.long),
        pytest.param(10, ("--context_parallel", "2"), marks=pytest.mark.long),
    ],
)
def test_a_run_survives_kills_of_one_process_and_ends_as_if_there_were_none(tmp_path, kills, words):
    write_small_model(tmp_path / "model")
    some_conversations(40).to_json(tmp_path / "rows.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tmp_path}/model\nchat_template: chatml\ndataset: {tmp_path}/rows.jsonl\nmax_seq_length: 128\npacking: false\n"
        "max_steps: 12\nper_device_train_batch_size: 1\ngradient_accumulation_steps: 2\nlearning_rate: 1e-3\nlora_r: 4\n"
        f"dtype: float32\nwarmup_steps: 0\nsave_steps: {SAVE_STEPS}\nreport: false\n"
    )
    command = [
        sys.executable,
        "-m",
        "tests.trust.kills_of_ranks",
        str(config),
        str(tmp_path / "runs"),
        str(kills),
    ]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == kills
    assert found["same"]  # every loss of the log and every byte of the adapter
    assert all(0 <= lost <= SAVE_STEPS for lost in found["steps_lost"])
    # the launcher gives the other process fifteen seconds to end; a busy machine takes longer to notice
    assert max(found["seconds_to_restart"]) < 60
