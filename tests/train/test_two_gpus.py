"""One process, DDP, sharded processes and such that share rows train the same on two GPUs, and sharded codes arrive as they were loaded.

python -m pytest -m gpu -s tests/train/test_two_gpus.py     prints the table
"""

import json
import sys
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from oribi.errors import TrainingError
from oribi.models import layer_shards
from oribi.models.layer_shards import split_layers
from oribi.selftest.gathered_codes import compare_gathered_codes, decoder_of_all_words
from oribi.selftest.processes import run_together
from oribi.selftest.subject import write_small_model

TWO_GPUS = torch.cuda.device_count() > 1
gpu = [pytest.mark.gpu, pytest.mark.skipif(not TWO_GPUS, reason="needs two CUDA devices")]
ABOUT_1B = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "deviation": 0.02,  # of the weights: larger ones give losses whose rounding alone is above the tolerance
}  # fmt: skip
HEAD = f"{'model':6} {'weights':7} {'mode':15} {'first loss':>10} {'last loss':>10} {'first norm':>10} {'tokens/s':>9} {'own MiB':>8} {'peak MiB':>9} changed layers"

posix = pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX")


@pytest.mark.gpu
@pytest.mark.skipif(not TWO_GPUS, reason="needs two CUDA devices; `oribi selftest` checks two gloo processes")
def test_codes_that_hold_every_word_are_gathered_byte_for_byte():
    checks = list(compare_gathered_codes())
    assert len(checks) == 2
    for check in checks:
        assert check.passed, check.note


@posix
def test_a_gathered_layer_that_differs_from_the_loaded_one_stops_the_run(tmp_path, monkeypatch):
    """A NaN among 16-bit floats becomes another NaN, as PyTorch's own copy makes of it on GPUs."""
    real = layer_shards._all_gather

    def as_floats(whole, own, **options):
        work = real(whole, own, **options)
        work.wait()
        values = whole.view(torch.bfloat16)
        values[values.isnan()] = float("nan")
        return work

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        layers = list(decoder_of_all_words().model.layers)
        split_layers(layers, torch.device("cpu"), dist.group.WORLD, lockstep=True)
        monkeypatch.setattr(layer_shards, "_all_gather", as_floats)
        layers = list(decoder_of_all_words().model.layers)
        with pytest.raises(TrainingError, match="layers 0, 1, 2 gathered from 1 processes differ"):
            split_layers(layers, torch.device("cpu"), dist.group.WORLD, lockstep=True)
    finally:
        dist.destroy_process_group()


def compare(
    tmp_path, name: str, device: str, modes: Sequence[str], weights: Sequence[str], **sizes: float
) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    path = write_small_model(tmp_path / "model", dtype, **sizes)
    # all trainings on as many processes in one start: importing takes longer than they do
    alone = [f"{mode}:{bits}" for mode in modes for bits in weights if mode == "one"]
    together = [f"{mode}:{bits}" for mode in modes for bits in weights if mode != "one"]
    found: dict[tuple[str, str], dict] = {}
    print(f"\n{HEAD}")
    for processes, trainings in ((1, alone), (2, together)):
        command = [
            "-m",
            "tests.train.two_gpus",
            str(path),
            str(tmp_path / str(processes)),
            device,
            *trainings,
        ]
        said, _ = run_together(command, processes, on_gpus=device == "cuda")
        for run in (json.loads(line) for line in said.splitlines() if line.startswith("{")):
            found[run["mode"], run["bits"]] = run
            print(
                f"{name:6} {run['bits']:7} {run['mode']:15} {run['losses'][0]:10.5f} {run['losses'][-1]:10.5f} "
                f"{run['norms'][0]:10.5f} {run['tokens_per_second']:9.0f} {run['own_mib']:8.1f} {run['peak_mib']:9.0f} "
                f"{run['changed_layers']} of {run['layers']}"
            )
    assert len(found) == len(alone) + len(together)
    for (mode, bits), run in found.items():
        one = found["one", bits]
        assert run["sharded"] == ("sharded" in mode)
        assert run["changed_layers"] == 0, (mode, bits)
        assert run["losses"][0] == pytest.approx(one["losses"][0], abs=1e-3), (mode, bits)
        assert run["norms"][0] == pytest.approx(one["norms"][0], rel=2e-3), (mode, bits)
        assert run["losses"][-1] == pytest.approx(one["losses"][-1], rel=2e-3), (mode, bits)
        if run["sharded"]:
            assert run["own_mib"] < 0.6 * one["own_mib"]


@pytest.mark.parametrize(("name", "sizes"), [("tiny", {"max_position_embeddings": 512}), ("1B", ABOUT_1B)])
class TestTwoGpus:
    pytestmark = gpu

    def test_one_process_ddp_shards_and_shared_rows_train_the_same(self, tmp_path, name, sizes):
        modes = ("one", "ddp", "sharded", "sharded-lockstep", "context", "context-sharded")
        compare(tmp_path, name, "cuda", modes, ("nf4", "16bit"), **sizes)
